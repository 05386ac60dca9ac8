"""The end of a server on real sockets: who waits in the accept queue, who is idle, who comes last."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest
from serverkit import GET, Wire, answer, dial, eager, live, read_all, under_uvloop

from nbgate.server.listener import Server, Settings
from nbgate.server.waiter import Waiter


@eager
async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await answer(send)


def queued(family: int, address: Any, count: int) -> list[socket.socket]:
    """Connect without a turn of the loop: nobody can have accepted these yet."""
    out = []
    for number in range(count):
        sock = socket.socket(family)
        sock.connect(address)
        if number % 2 == 0:
            sock.sendall(GET)
        sock.settimeout(5)
        out.append(sock)
    return out


def read_to_end(sock: socket.socket) -> bytes:
    """Read until the end of file; a reset fails."""
    data = b""
    with contextlib.closing(sock):
        while chunk := sock.recv(65536):
            data += chunk
    return data


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_drain_answers_or_closes_whoever_waits_in_the_accept_queue(kind: str, tmp_path: Any) -> None:
    async def main() -> None:
        family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
        listening = socket.socket(family)
        listening.bind(("127.0.0.1", 0) if kind == "tcp" else str(tmp_path / "s"))
        server = Server(app, Settings(tick_s=0.02, drain_idle_s=0.1))
        await server.start([listening])
        clients = queued(family, listening.getsockname(), 40)
        assert server.stats.accepted == 0
        await server.drain(5.0, 5.0)
        assert server.stats.accepted == 40
        for number, sock in enumerate(clients):
            found = read_all(read_to_end(sock), (), True)
            assert [r.status for r in found] == ([200] if number % 2 == 0 else [])
            assert all(r.headers[b"connection"] == b"close" for r in found)
        await server.stop()

    under_uvloop(main())


def test_drain_leaves_the_queue_to_another_process_that_holds_the_socket() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as held:
            server = Server(app, Settings(tick_s=0.02))
            await server.start([held.dup()])
            clients = queued(socket.AF_INET, held.getsockname(), 4)
            await server.drain(5.0, 5.0, queued=False)
            assert server.stats.accepted == 0
            for sock in clients:
                taken, _ = held.accept()
                taken.close()
                sock.close()
            await server.stop()

    under_uvloop(main())


async def end_of(client: Wire) -> list[int]:
    reader, writer = client
    data = await reader.read()
    writer.close()
    return [r.status for r in read_all(data, (), True)]


@pytest.mark.parametrize("raw", [b"", GET], ids=["fresh", "kept"])
def test_drain_answers_a_request_that_was_on_its_way_on_an_idle_connection(raw: bytes) -> None:
    async def main() -> None:
        async with live(app, drain_idle_s=0.2) as (server, port):
            clients = [await dial(port, raw) for _ in range(2)]
            for reader, _ in clients if raw else []:
                await reader.readuntil(b"ok")
            while server.stats.accepted < 2:  # noqa: ASYNC110  the condition is the server's
                await asyncio.sleep(0.005)
            draining = asyncio.ensure_future(server.drain(5.0, 5.0))
            await asyncio.sleep(0)
            clients[0][1].write(GET)
            assert await end_of(clients[0]) == [200]
            assert await end_of(clients[1]) == []
            await asyncio.wait_for(draining, 2.0)
            assert server.stats.timeouts == 0

    under_uvloop(main())


def test_drain_may_be_cancelled_and_begun_again_with_less_time() -> None:
    @eager
    async def sleeper(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        async with live(sleeper) as (server, port):
            _reader, writer = await dial(port, GET)
            while not server.stats.active_requests:  # noqa: ASYNC110  the condition is the server's
                await asyncio.sleep(0.005)
            patient = asyncio.ensure_future(server.drain(3600.0, 3600.0, queued=False))
            await asyncio.sleep(0.05)
            patient.cancel()
            await asyncio.wait({patient})
            assert server.stats.active_requests == 1
            await asyncio.wait_for(server.drain(0.05, 0.05), 2.0)
            assert server.stats.connections == 0
            writer.close()

    under_uvloop(main())


def test_drain_keeps_the_connection_of_an_answer_whose_head_promised_that() -> None:
    go = Waiter()

    @eager
    async def slow(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await go
            await send({"type": "http.response.body", "body": b"b"})

    async def main() -> None:
        async with live(slow, drain_idle_s=0.2) as (server, port):
            reader, writer = await dial(port, GET)
            assert b"connection:" not in await reader.readuntil(b"\r\n\r\n")
            draining = asyncio.ensure_future(server.drain(5.0, 5.0))
            await asyncio.sleep(0)
            go.wake()
            await reader.readuntil(b"0\r\n\r\n")
            writer.write(GET)
            assert b"connection: close" in await reader.readuntil(b"\r\n\r\n")
            assert (await reader.read()).endswith(b"0\r\n\r\n")
            writer.close()
            await asyncio.wait_for(draining, 2.0)

    under_uvloop(main())
