"""Reaching upstreams: names, TLS, proxies, unix sockets."""

from __future__ import annotations

import asyncio
import pathlib
import socket
import ssl
import subprocess
from typing import Any

import msgspec
import pytest
from upstream_script import (
    LIMITS,
    OK,
    TIMEOUTS,
    Upstream,
    answering,
    ask,
    free_port,
    pooled,
    read_request,
    refusal,
    run,
    until,
)

from nbgate.dial import UpstreamError
from nbgate.upstream import Endpoint

replace = msgspec.structs.replace
Made = dict[str, pathlib.Path]


async def serve_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await read_request(reader):
        writer.write(OK)


# names


def local(port: int, *hosts: str) -> list[tuple[int, Any]]:
    return [(socket.AF_INET, (host, port)) for host in hosts]


def test_dial_tries_every_address_in_turn_and_prefers_the_good_one() -> None:
    async def main() -> None:
        asked: list[str] = []

        async def resolve(host: str, port: int) -> list[tuple[int, Any]]:
            asked.append(host)
            return [*local(dead, "127.0.0.1", "127.0.0.2"), *local(port, "127.0.0.1")]

        dead = free_port()
        async with Upstream(serve_ok).listening() as upstream, pooled(resolve=resolve) as pool:
            endpoint = replace(upstream.endpoint, host="many.test")
            await ask(pool, endpoint)
            pool.retire(endpoint)
            await ask(pool, endpoint)
            assert asked == ["many.test"], "the second dial uses the cache"
            names = pool._dialer._names
            assert (await names.addresses("many.test", endpoint.port))[0] == local(endpoint.port, "127.0.0.1")[0]

    run(main())


def test_dial_asks_again_when_the_cache_is_old_or_its_addresses_dead() -> None:
    async def main() -> None:
        asked = 0
        now = 100.0

        async def resolve(host: str, port: int) -> list[tuple[int, Any]]:
            nonlocal asked
            asked += 1
            return local(port, "127.0.0.1")

        async with Upstream(serve_ok).listening() as upstream, pooled(resolve=resolve, clock=lambda: now) as pool:
            endpoint = replace(upstream.endpoint, host="a.test")
            await ask(pool, endpoint)
            now += LIMITS.dns_cache_s + 1
            pool.retire(endpoint)
            await ask(pool, endpoint)
            assert asked == 2
            dead = Endpoint("http", "a.test", free_port())
            for _ in range(2):
                assert (await refusal(pool, dead)).kind == "dial"
            assert asked == 4

    run(main())


def test_dial_asks_once_for_many_callers() -> None:
    async def main() -> None:
        asked = 0

        async def resolve(host: str, port: int) -> list[tuple[int, Any]]:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.01)
            return local(port, "127.0.0.1")

        async with Upstream(serve_ok).listening() as upstream, pooled(resolve=resolve) as pool:
            endpoint = replace(upstream.endpoint, host="a.test")
            await asyncio.gather(*(ask(pool, endpoint) for _ in range(20)))
            assert asked == 1

    run(main())


@pytest.mark.parametrize("found", [OSError("not known"), UnicodeError("label too long"), []])
def test_dial_says_dns_when_there_is_no_address(found: Any) -> None:
    async def main() -> None:
        async def resolve(host: str, port: int) -> list[tuple[int, Any]]:
            if isinstance(found, Exception):
                raise found
            return list(found)

        async with pooled(resolve=resolve) as pool:
            assert (await refusal(pool, Endpoint("http", "no.test", 80))).kind == "dns"

    run(main())


def test_dial_times_out_while_the_name_is_looked_up() -> None:
    async def main() -> None:
        async def resolve(host: str, port: int) -> list[tuple[int, Any]]:
            await asyncio.sleep(30)
            return []

        async with pooled(resolve=resolve) as pool:
            with pytest.raises(UpstreamError) as caught:
                await pool.acquire(Endpoint("http", "slow.test", 80), 0.05)
            assert caught.value.kind == "timeout_connect" and pool.total == 0

    run(main())


def test_dial_leaves_time_for_the_address_after_a_silent_one() -> None:
    async def main() -> None:
        with socket.socket() as full:  # a full backlog: connects to it hang
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))

            async def resolve(host: str, asked: int) -> list[tuple[int, Any]]:
                return [*local(port, "127.0.0.1"), *(local(asked, "127.0.0.1") if host == "half.test" else [])]

            try:
                async with Upstream(serve_ok).listening() as upstream, pooled(resolve=resolve) as pool:
                    conn = await pool.acquire(replace(upstream.endpoint, host="half.test"), 0.4)
                    conn.release()
                    with pytest.raises(UpstreamError) as caught:
                        await pool.acquire(Endpoint("http", "none.test", 1), 0.1)
                    assert caught.value.kind == "timeout_connect"
            finally:
                for filler in fillers:
                    filler.close()

    run(main())


def test_dial_sets_nodelay() -> None:
    async def main() -> None:
        async with Upstream(serve_ok).listening() as upstream, pooled() as pool:
            conn = await pool.acquire(upstream.endpoint, 1)
            assert conn._wire is not None
            sock = conn._wire.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            conn.release()

    run(main())


def test_dial_reaches_unix_sockets(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "up.sock")
        async with Upstream(serve_ok).listening(path=path) as upstream, pooled() as pool:
            assert (await ask(pool, upstream.endpoint)).buffered == b"ok"
            assert (await ask(pool, upstream.endpoint)).reused
            assert (await refusal(pool, replace(upstream.endpoint, unix_path=path + "x"))).kind == "dial"

    run(main())


# TLS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make an authority and a certificate for up.test, for this run."""
    room = tmp_path_factory.mktemp("ca")
    files = {name: room / name for name in ("ca.key", "ca.crt", "up.key", "up.csr", "up.crt", "ext")}
    files["ext"].write_text("subjectAltName=DNS:up.test\n")

    def openssl(line: str) -> None:
        words = [str(files.get(word, word)) for word in line.split()]
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=30)

    new = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    openssl(f"{new} -x509 -keyout ca.key -out ca.crt -days 2 -subj /CN=nbgate-tests")
    openssl(f"{new} -keyout up.key -out up.csr -subj /CN=up.test")
    openssl("x509 -req -in up.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out up.crt -days 2 -extfile ext")
    return files


def tls_server(made: Made, names: list[str | None]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made["up.crt"], made["up.key"])
    context.sni_callback = lambda _sock, name, _context: names.append(name)
    return context


def test_dial_verifies_the_certificate(made: Made) -> None:
    async def main() -> None:
        names: list[str | None] = []
        async with Upstream(serve_ok).listening(ssl=tls_server(made, names)) as upstream, pooled() as pool:
            base = replace(upstream.endpoint, scheme="https")
            good = replace(base, ca_file=str(made["ca.crt"]), server_name="up.test")
            assert (await ask(pool, good)).buffered == b"ok"
            assert (await ask(pool, good)).reused
            assert names == ["up.test"]
            assert (await ask(pool, replace(base, verify=False))).buffered == b"ok"
            for bad in (
                replace(base, server_name="up.test"),  # an unknown authority
                replace(good, server_name="other.test"),
                replace(good, server_name=""),  # the host is an address
                replace(good, ca_file=str(made["ca.key"])),
                replace(good, ca_file="/nowhere"),
            ):
                error = await refusal(pool, bad)
                assert error.kind == "tls", (bad, error)

    run(main())


def test_dial_sends_the_host_as_sni(made: Made) -> None:
    async def main() -> None:
        names: list[str | None] = []

        async def resolve(host: str, port: int) -> list[tuple[int, Any]]:
            return local(port, "127.0.0.1")

        async with (
            Upstream(serve_ok).listening(ssl=tls_server(made, names)) as upstream,
            pooled(resolve=resolve) as pool,
        ):
            endpoint = Endpoint("https", "up.test", upstream.endpoint.port, ca_file=str(made["ca.crt"]))
            assert (await ask(pool, endpoint)).buffered == b"ok" and names == ["up.test"]

    run(main())


def test_dial_says_tls_when_the_upstream_speaks_none_and_times_out_when_it_is_mute() -> None:
    async def main() -> None:
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            await asyncio.Event().wait()

        async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OK)
            await reader.read()

        async with Upstream(speak).listening() as plain, Upstream(mute).listening() as silent, pooled() as pool:
            assert (await refusal(pool, replace(plain.endpoint, scheme="https"))).kind == "tls"
            with pytest.raises(UpstreamError) as caught:
                await pool.acquire(replace(silent.endpoint, scheme="https"), 0.1)
            assert caught.value.kind == "timeout_connect"
            await until(lambda: pool.total == 0)

    run(main())


def test_abort_closes_a_tls_socket_at_once(made: Made) -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            await reader.read()

        async with Upstream(handle).listening(ssl=tls_server(made, [])) as upstream, pooled() as pool:
            conn = await pool.acquire(replace(upstream.endpoint, scheme="https", verify=False), 1)
            conn.send([b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"], TIMEOUTS)
            await until(lambda: upstream.connections == 1)
            conn.abort()
            await until(lambda: upstream.gone == 1)

    run(main())


# proxies


class Proxy:
    """A scripted CONNECT and SOCKS5 proxy that leads to one port."""

    def __init__(self, port: int, reply: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> None:
        self.port = port
        self.reply = reply
        self.asked: list[bytes] = []

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.reply)
        if b" 200 " in self.reply:
            await self.join(reader, writer)

    async def socks5(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _version, count = await reader.readexactly(2)
        await reader.readexactly(count)
        writer.write(b"\x05\x00")
        _, _, _, kind, size = await reader.readexactly(5)
        assert kind == 3, "the name goes to the proxy unresolved"
        self.asked.append(await reader.readexactly(size + 2))
        writer.write(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x01")
        await self.join(reader, writer)

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.close()

        try:
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        finally:
            far_writer.close()


def test_dial_goes_through_a_connect_proxy(made: Made) -> None:
    async def main() -> None:
        async with Upstream(serve_ok).listening(ssl=tls_server(made, [])) as upstream:
            proxy = Proxy(upstream.endpoint.port)
            async with Upstream(proxy.connect).listening() as hop, pooled() as pool:
                url = f"http://me:secret@127.0.0.1:{hop.endpoint.port}"
                endpoint = Endpoint("https", "up.test", 443, ca_file=str(made["ca.crt"]), proxy=url)
                assert (await ask(pool, endpoint)).buffered == b"ok"
                assert (await ask(pool, endpoint)).reused
                assert proxy.asked[0].startswith(b"CONNECT up.test:443 HTTP/1.1\r\n")
                assert b"Basic bWU6c2VjcmV0" in proxy.asked[0] and len(proxy.asked) == 1

    run(main())


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_dial_goes_through_a_socks5_proxy(scheme: str) -> None:
    async def main() -> None:
        async with Upstream(serve_ok).listening() as upstream:
            proxy = Proxy(upstream.endpoint.port)
            async with Upstream(proxy.socks5).listening() as hop, pooled() as pool:
                endpoint = Endpoint("http", "up.test", 80, proxy=f"{scheme}://127.0.0.1:{hop.endpoint.port}")
                assert (await ask(pool, endpoint)).buffered == b"ok"
                assert proxy.asked == [b"up.test\x00\x50"]

    run(main())


@pytest.mark.parametrize("reply", [b"HTTP/1.1 407 No\r\n\r\n", b"garbage\r\n\r\n", b""])
def test_dial_says_dial_when_the_proxy_refuses_and_never_names_its_password(reply: bytes) -> None:
    async def main() -> None:
        proxy = Proxy(1, reply)
        async with Upstream(proxy.connect).listening() as hop, pooled() as pool:
            url = f"http://me:secret@127.0.0.1:{hop.endpoint.port}"
            for bad in (url, f"http://me:secret@127.0.0.1:{free_port()}", "ftp://me:secret@x:1"):
                error = await refusal(pool, Endpoint("http", "up.test", 80, proxy=bad))
                assert error.kind == "dial" and "secret" not in str(error)

    run(main())


def test_dial_times_out_on_a_mute_proxy() -> None:
    async def main() -> None:
        async with Upstream(answering()).listening() as hop, pooled() as pool:
            endpoint = Endpoint("http", "up.test", 80, proxy=f"http://127.0.0.1:{hop.endpoint.port}")
            with pytest.raises(UpstreamError) as caught:
                await pool.acquire(endpoint, 0.1)
            assert caught.value.kind == "timeout_connect"

    run(main())
