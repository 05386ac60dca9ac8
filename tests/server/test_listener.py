"""The server on real sockets under uvloop: accept, bounds, deadlines, drain."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from serverkit import GET, Response, Wire, answer, chunked, dial, eager, live, post, read_all, read_body, under_uvloop

from nbgate.server.listener import Server, Settings
from nbgate.server.waiter import Waiter


async def work(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Serve what the path names."""
    if scope["type"] != "http":
        return
    path = scope["path"]
    if path == "/deaf":
        await answer(send, b"early", 401)
    elif path == "/big":
        await answer(send, b"z" * (10 << 20))
    elif path == "/parts":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(160):
            await send({"type": "http.response.body", "body": b"p" * 65536, "more_body": True})
        await send({"type": "http.response.body"})
    elif path == "/sleep":
        await asyncio.get_running_loop().create_future()
    else:
        await answer(send, await read_body(receive))


@eager
async def eager_work(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await work(scope, receive, send)


BOTH = pytest.mark.parametrize("app", [eager_work, work], ids=["eager", "task"])


async def rest(client: Wire, heads: tuple[int, ...] = ()) -> list[Response]:
    """Read to the end of the connection."""
    reader, writer = client
    data = await reader.read()
    writer.close()
    return read_all(data, heads, True)


async def ask(port: int, raw: bytes, heads: tuple[int, ...] = ()) -> list[Response]:
    last = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    return (await rest(await dial(port, raw + last), heads))[:-1]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  the condition is the server's
        await asyncio.sleep(0.005)


@BOTH
def test_server_answers_every_framing_over_one_connection(app: Any) -> None:
    async def main() -> None:
        async with live(app) as (server, port):
            raw = (
                GET
                + post(b"abc")
                + chunked(b"d" * 9, b"ef")
                + b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n"
                + post(b"x" * 9000)
            )
            responses = await ask(port, raw, heads=(3,))
            assert [r.body for r in responses] == [b"", b"abc", b"d" * 9 + b"ef", b"", b"x" * 9000]
            assert server.stats.requests == 6 and server.stats.accepted == 1

    under_uvloop(main())


@BOTH
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_server_takes_and_gives_ten_mebibytes(app: Any, framing: str) -> None:
    body = bytes(range(256)) * (40 << 10)
    parts = [body[i : i + 100_000] for i in range(0, len(body), 100_000)]

    async def main() -> None:
        async with live(app) as (_server, port):
            (response,) = await ask(port, post(body) if framing == "length" else chunked(*parts))
            assert response.body == body

    under_uvloop(main())


@BOTH
@pytest.mark.parametrize("path", [b"/big", b"/parts"])
def test_server_gives_ten_mebibytes_to_a_slow_reader_whole(app: Any, path: bytes) -> None:
    async def main() -> None:
        async with live(app, write_timeout_s=2.0) as (server, port):
            raw = b"GET %b HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n" % path
            client = await dial(port, raw, receive_buffer=8192)
            await until(lambda: any(p.paused for p in server.connections))
            (response,) = await rest(client)
            assert len(response.body) == 10 << 20 and response.whole

    under_uvloop(main())


@BOTH
@pytest.mark.parametrize("path", [b"/big", b"/parts"])
@pytest.mark.parametrize("close", [b"", b"connection: close\r\n"])
def test_server_cuts_a_client_that_reads_nothing(app: Any, path: bytes, close: bytes) -> None:
    async def main() -> None:
        async with live(app, write_timeout_s=0.2) as (server, port):
            client = await dial(port, b"GET %b HTTP/1.1\r\nhost: a\r\n%b\r\n" % (path, close), receive_buffer=8192)
            await until(lambda: server.stats.connections == 1)
            await until(lambda: server.stats.connections == 0)
            await until(lambda: server.stats.active_requests == 0)  # a Task takes a turn more
            assert server.stats.stalled == 1
            client[1].close()

    under_uvloop(main())


def test_server_holds_a_big_body_back_while_the_app_waits() -> None:
    go = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await go
            await answer(send, b"%d" % len(await read_body(receive)))

    async def main() -> None:
        async with live(app) as (server, port):
            client = await dial(port, post(b"x" * (10 << 20)))
            await until(lambda: any(p.reading_paused for p in server.connections))
            assert server.stats.body_bytes < 1 << 20
            go.wake()
            assert (await client[0].readuntil(b"10485760")).startswith(b"HTTP/1.1 200")
            client[1].close()

    under_uvloop(main())


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 408), (b"GET / HT", 408), (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc", 408),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n", 408),
    ],
)  # fmt: skip
def test_server_answers_408_to_what_does_not_come(raw: bytes, status: int) -> None:
    async def main() -> None:
        async with live(eager_work, head_timeout_s=0.1, body_timeout_s=0.1) as (server, port):
            (response,) = await rest(await dial(port, raw))
            assert response.status == status and response.headers[b"connection"] == b"close"
            assert server.stats.timeouts == 1

    under_uvloop(main())


def test_server_answers_408_to_a_dripping_body() -> None:
    async def main() -> None:
        settings = {"body_grace_s": 0.15, "body_min_bytes_per_s": 1000, "body_timeout_s": 5.0}
        async with live(eager_work, **settings) as (server, port):
            reader, writer = await dial(port, b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 999\r\n\r\n")
            while not server.stats.timeouts:
                writer.write(b"x")
                await asyncio.sleep(0.02)
            assert [r.status for r in await rest((reader, writer))] == [408]

    under_uvloop(main())


def test_server_closes_idle_connections_and_crowded_ones_sooner() -> None:
    async def main() -> None:
        async with live(eager_work, keepalive_s=0.1) as (server, port):
            assert [r.status for r in await rest(await dial(port, GET))] == [200]
        async with live(eager_work, keepalive_s=60.0, crowded_keepalive_s=0.05, max_connections=4) as (server, port):
            clients = [await dial(port, GET) for _ in range(4)]
            assert [[r.status for r in await rest(c)] for c in clients] == [[200]] * 4
            await until(lambda: server.stats.connections == 0)

    under_uvloop(main())


@pytest.mark.parametrize("bound", ["max_connections", "max_connections_per_address"])
def test_server_answers_503_past_its_bounds_and_serves_again_after(bound: str) -> None:
    async def main() -> None:
        async with live(eager_work, linger_s=0.1, **{bound: 2}) as (server, port):
            held = [await dial(port, GET) for _ in range(2)]
            for reader, _ in held:
                await reader.readuntil(b"\r\n\r\n")
            (response,) = await rest(await dial(port))
            assert response.status == 503 and server.stats.refused == 1
            for _, writer in held:
                writer.close()
            await until(lambda: server.stats.connections == 0)
            assert [r.status for r in await ask(port, GET)] == [200]
            assert server._addresses == {}

    under_uvloop(main())


@BOTH
def test_early_answer_reaches_a_client_that_is_still_sending(app: Any) -> None:
    async def main() -> None:
        async with live(app) as (_server, port):
            for size in (100, 200_000):
                head = b"POST /deaf HTTP/1.1\r\nhost: a\r\ncontent-length: 5000000\r\n\r\n"
                reader, writer = await dial(port, head)
                sending = asyncio.ensure_future(_send_on(writer, size))
                assert (await reader.readuntil(b"early")).startswith(b"HTTP/1.1 401")
                await sending
                writer.close()

    async def _send_on(writer: asyncio.StreamWriter, size: int) -> None:
        try:
            for _ in range(20):
                writer.write(b"x" * (size // 20))
                await writer.drain()
        except ConnectionError:
            pass

    under_uvloop(main())


def test_expecting_client_gets_100_then_its_answer() -> None:
    async def main() -> None:
        async with live(eager_work) as (_server, port):
            reader, writer = await dial(
                port, b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await reader.readuntil(b"abc")).startswith(b"HTTP/1.1 200")
            writer.close()

    under_uvloop(main())


def test_last_allowed_request_of_a_connection_closes_it() -> None:
    async def main() -> None:
        async with live(eager_work, max_requests_per_connection=3) as (_server, port):
            responses = await rest(await dial(port, GET * 5))
            assert [r.headers.get(b"connection") for r in responses] == [None, None, b"close"]

    under_uvloop(main())


@BOTH
def test_client_that_leaves_frees_everything(app: Any) -> None:
    async def main() -> None:
        async with live(app) as (server, port):
            for raw in (b"", b"GET", GET, b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n", post(b"x" * 99)[:-9]):
                _reader, writer = await dial(port, raw)
                await until(lambda: server.stats.connections == 1)
                writer.transport.abort()
                await until(lambda: server.stats.connections == 0)

    under_uvloop(main())


class Stream:
    """A source without end, and its pipe."""

    def __init__(self) -> None:
        self.aborted = False

    def attach(self, sink: Any) -> None:
        sink.feed(b"data: 1\n\n")

    def pause(self) -> None: ...
    def resume(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True

    def feed(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""

    def fail(self, exc: Exception) -> bytes:
        return b"data: %b\n\n" % type(exc).__name__.encode()


@eager
async def streaming(scope: dict[str, Any], receive: Any, send: Any) -> None:
    stream = Stream()
    if scope["type"] == "http" and scope["path"] == "/stream":
        await send(
            {"type": "nbgate.splice", "status": 200, "head": b"", "source": stream, "pipe": stream, "length": None}
        )
    else:
        await work(scope, receive, send)


STREAM, SLEEP = (b"GET /%b HTTP/1.1\r\nhost: a\r\n\r\n" % p for p in (b"stream", b"sleep"))


def test_drain_ends_idle_ones_at_once_plain_ones_then_streams() -> None:
    async def main() -> None:
        async with live(streaming, drain_idle_s=0.05) as (server, port):
            idle, plain, stream, partial = [await dial(port, r) for r in (GET, SLEEP, STREAM, b"GET /")]
            await until(lambda: server.stats.requests == 3 and len(server.connections) == 4)
            loop = asyncio.get_running_loop()
            began = loop.time()
            draining = asyncio.ensure_future(server.drain(0.2, 0.5))
            ends: dict[str, float] = {}

            async def end(name: str, client: Wire) -> None:
                try:
                    data = await client[0].read()
                except ConnectionResetError:
                    data = b""
                ends[name] = loop.time() - began
                if name == "stream":
                    assert read_all(data, (), True)[0].body == b"data: 1\n\ndata: Drained\n\n"
                client[1].close()

            named = {"idle": idle, "plain": plain, "stream": stream, "partial": partial}
            await asyncio.gather(draining, *(end(n, c) for n, c in named.items()))
            assert ends["idle"] < ends["plain"] < ends["stream"]
            assert min(ends["plain"], ends["partial"]) >= 0.19
            assert ends["stream"] >= 0.49
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port)

    under_uvloop(main())


def test_drain_of_idle_connections_takes_no_time_and_finishes_answers() -> None:
    go = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await go
            await answer(send)

    async def main() -> None:
        async with live(app) as (server, port):
            client = await dial(port, GET)
            await until(lambda: server.stats.requests == 1)
            draining = asyncio.ensure_future(server.drain(10.0, 20.0))
            await asyncio.sleep(0)
            go.wake()
            (response,) = await rest(client)
            assert response.status == 200 and response.headers[b"connection"] == b"close"
            await asyncio.wait_for(draining, 1.0)

    under_uvloop(main())


def test_stop_ends_apps_that_still_run() -> None:
    ended: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("end")

    async def main() -> None:
        async with live(app) as (server, port):
            _reader, writer = await dial(port, GET)
            await until(lambda: server.stats.requests == 1)
            writer.close()
        assert ended == ["end"] and not server.tasks

    under_uvloop(main())


def test_server_serves_unix_sockets(tmp_path: Any) -> None:
    async def main() -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "s"))
        server = Server(eager_work, Settings(tick_s=0.02, max_connections_per_address=1))
        await server.start([sock])
        clients = [await asyncio.open_unix_connection(str(tmp_path / "s")) for _ in range(2)]
        for reader, writer in clients:
            writer.write(GET)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()
        await server.stop()

    under_uvloop(main())
