"""A server without sockets, and one with them, for the tests of this folder.

What lives here: `Bench` (a fake transport, a clock that moves by hand, a loop
that is stepped), `live` (a real server under uvloop), and a strict reader of
responses. What must not: expectations of one test.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvloop

from nbgate.server.listener import Server, Settings
from nbgate.server.protocol import HttpProtocol

FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9a-z]+): ([\t\x20-\x7e\x80-\xff]*)")
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*")
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


def post(body: bytes, path: bytes = b"/", extra: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: a\r\n%bcontent-length: %d\r\n\r\n%b" % (path, extra, len(body), body)


def chunked(*parts: bytes, extra: bytes = b"", trailer: bytes = b"") -> bytes:
    head = b"POST / HTTP/1.1\r\nhost: a\r\n" + extra + b"transfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n" + trailer + b"\r\n"


@dataclass
class Response:
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    whole: bool = True  # False: cut before its framing was complete


def _chunks(data: bytes, pos: int) -> tuple[bytes, int, bool]:
    body = b""
    while True:
        end = data.find(b"\r\n", pos)
        if end < 0:
            return body, len(data), False
        size = int(data[pos:end], 16)
        if size == 0:
            if data[end + 2 : end + 4] != b"\r\n":
                return body, len(data), False
            return body, end + 4, True
        if len(data) < end + 4 + size:
            return body + data[end + 2 : end + 2 + size], len(data), False
        assert data[end + 2 + size : end + 4 + size] == b"\r\n"
        body += data[end + 2 : end + 2 + size]
        pos = end + 4 + size


def read_one(data: bytes, head_only: bool, closed: bool) -> tuple[Response, int]:
    """Read one response strictly; raise AssertionError on any slip."""
    end = data.find(b"\r\n\r\n")
    assert end >= 0, f"no head in {data[:200]!r}"
    first, *lines = data[:end].split(b"\r\n")
    match = STATUS.fullmatch(first)
    assert match, first
    status = int(match[1])
    headers: dict[bytes, bytes] = {}
    for line in lines:
        found = FIELD.fullmatch(line)
        assert found, line
        assert found[1] not in headers or found[1] not in (b"content-length", b"transfer-encoding"), line
        headers[found[1]] = found[2]
    pos = end + 4
    if status < 200 or status in (204, 304) or head_only:
        return Response(status, headers, b""), pos
    if b"transfer-encoding" in headers:
        assert headers[b"transfer-encoding"] == b"chunked"
        assert b"content-length" not in headers
        body, pos, whole = _chunks(data, pos)
    elif b"content-length" in headers:
        size = int(headers[b"content-length"])
        body, whole = data[pos : pos + size], len(data) >= pos + size
        pos = min(len(data), pos + size)
    else:
        body, pos, whole = data[pos:], len(data), closed
    return Response(status, headers, body, whole), pos


def read_all(data: bytes, heads: tuple[int, ...] = (), closed: bool = False) -> list[Response]:
    """Read every response; `heads` are the places of answers to HEAD."""
    out: list[Response] = []
    finals = 0
    while data:
        response, pos = read_one(data, finals in heads, closed)
        finals += response.status >= 200
        out.append(response)
        data = data[pos:]
    return out


class FakeTransport(asyncio.Transport):
    """Keep what is written; `stuck` makes a client that does not read."""

    def __init__(self, bench: Bench, peer: tuple[str, int] | None) -> None:
        super().__init__({"peername": peer, "sockname": ("127.0.0.1", 8080)})
        self.bench = bench
        self.out = bytearray()
        self.protocol: HttpProtocol
        self.high = 64 * 1024
        self.stuck = False
        self.held = 0  # bytes that the client has not taken
        self.blocked = False
        self.closed = self.aborted = self.eof_sent = self.lost = False
        self.reading = True
        self.late_writes = 0

    def write(self, data: Any) -> None:
        if self.closed or self.eof_sent:
            self.late_writes += 1
            return
        self.out += data
        if self.stuck:
            self.held += len(data)
            if self.held > self.high and not self.blocked:
                self.blocked = True
                self.protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def take(self, size: int | None = None) -> None:
        """Let the client read `size` bytes, or all."""
        self.held -= self.held if size is None else min(size, self.held)
        if self.blocked and self.held <= self.high // 4:
            self.blocked = False
            self.protocol.resume_writing()
        if self.closed and not self.held:
            self._lose()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 64 * 1024

    def get_write_buffer_size(self) -> int:
        return self.held

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof_sent = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        if self.closed:
            raise RuntimeError("pause_reading on a closing transport")
        self.reading = False

    def resume_reading(self) -> None:
        if self.closed:
            raise RuntimeError("resume_reading on a closing transport")
        self.reading = True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if not self.held:
                self.bench.loop.call_soon(self._lose)

    def abort(self) -> None:
        self.aborted = self.closed = True
        self.held = 0
        self.bench.loop.call_soon(self._lose)

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(None)


class Client:
    """One connection of a `Bench`."""

    def __init__(self, bench: Bench, peer: tuple[str, int] | None) -> None:
        self.bench = bench
        self.transport = FakeTransport(bench, peer)
        self.protocol = self.transport.protocol = HttpProtocol(bench.server)
        bench.call(self.protocol.connection_made, self.transport)

    def send(self, *pieces: bytes) -> Client:
        for piece in pieces:
            if piece and not self.transport.closed:
                self.bench.call(self.protocol.data_received, piece)
        return self

    def eof(self) -> None:
        """Send FIN; like uvloop, close when the protocol returns None."""
        self.bench.call(self.protocol.eof_received)
        self.transport.close()
        self.bench.spin()

    def lose(self) -> None:
        """Break the connection."""
        self.transport.closed = True
        self.bench.call(self.transport._lose)

    def take(self, size: int | None = None) -> None:
        self.bench.call(self.transport.take, size)

    @property
    def out(self) -> bytes:
        return bytes(self.transport.out)

    @property
    def done(self) -> bool:
        """Tell whether the server will say no more here."""
        return self.transport.closed or self.transport.eof_sent

    def read(self, *heads: int) -> list[Response]:
        return read_all(self.out, heads, self.done)

    def statuses(self, *heads: int) -> list[int]:
        return [r.status for r in self.read(*heads)]


@dataclass
class Bench:
    """A server that runs on a stepped loop and a hand-moved clock."""

    app: Any
    settings: Settings = field(default_factory=lambda: Settings(tick_s=3600.0))
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = Server(self.app, self.settings, clock=lambda: self.now)
        self.server.loop = self.loop
        self.clients: list[Client] = []
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _loop, context: self.complaints.append(context))

    def spin(self, turns: int = 4) -> None:
        for _ in range(turns):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call `fn` inside the loop but in no Task; what it raises is raised here."""
        result: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                result.append(fn(*args))
            except BaseException as exc:
                errors.append(exc)

        self.loop.call_soon(run)
        self.spin()
        if errors:
            raise errors[0]
        return result[0]

    def run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coro)

    def connect(self, peer: tuple[str, int] | None = ("192.0.2.1", 5000)) -> Client:
        client = Client(self, peer)
        self.clients.append(client)
        return client

    def advance(self, seconds: float, step: float = 0.5) -> None:
        """Move the clock, ticking every `step`."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.tick()

    def tick(self) -> None:
        if self.server._ticker is not None:
            self.server._ticker.cancel()
        self.call(self.server._tick)

    def gauges(self) -> tuple[int, ...]:
        server, stats = self.server, self.server.stats
        return (
            len(server.connections), stats.connections, len(server.splices), stats.active_requests,
            stats.body_bytes, stats.streams, len(server._addresses), len(server.tasks),
        )  # fmt: skip

    def close(self) -> None:
        """Break every connection; nothing may be left."""
        for client in self.clients:
            if not client.transport.lost:
                client.lose()
        self.spin()
        if self.server._ticker is not None:
            self.server._ticker.cancel()
        left = [t for t in asyncio.all_tasks(self.loop) if not t.done()]
        for task in left:
            task.cancel()
        self.spin()
        gauges, complaints = self.gauges(), self.complaints
        self.loop.close()
        assert not left, f"apps that nobody woke: {left}"
        assert not any(gauges), gauges
        assert not complaints, complaints


def eager(app: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    app.nbgate_eager = True  # type: ignore[attr-defined]
    return app


async def answer(send: Callable[[dict[str, Any]], Awaitable[None]], body: bytes = b"ok", status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Callable[[], Awaitable[dict[str, Any]]]) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left")
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


@contextlib.asynccontextmanager
async def live(app: Any, **settings: Any) -> AsyncIterator[tuple[Server, int]]:
    """Serve `app` on a free port of the running loop; check for leaks after."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = Server(app, Settings(**({"tick_s": 0.02} | settings)))
    await server.start([sock])
    try:
        yield server, sock.getsockname()[1]
    finally:
        await server.stop()
        stats = server.stats
        gauges = (len(server.connections), len(server.splices), stats.active_requests, stats.body_bytes, stats.streams)
        assert gauges == (0, 0, 0, 0, 0), gauges


Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_writers: list[asyncio.StreamWriter] = []


async def dial(port: int, raw: bytes = b"", receive_buffer: int = 0) -> Wire:
    """Connect to a live server and send `raw`; `under_uvloop` closes what is left open."""
    if not receive_buffer:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    else:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer)
    _writers.append(writer)
    writer.write(raw)
    return reader, writer


def under_uvloop(main: Coroutine[Any, Any, None], timeout_s: float = 20.0) -> None:
    """Run one test on uvloop; what the loop complains of fails it."""
    complaints: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        try:
            await asyncio.wait_for(main, timeout_s)
        finally:
            for writer in _writers:
                writer.transport.abort()
            _writers.clear()
            await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(guarded())
    assert not complaints, complaints
