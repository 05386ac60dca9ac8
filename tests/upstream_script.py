"""Scripted upstreams, and wires without sockets, for the tests of the client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from nbgate.upstream import Connection, Endpoint, Pool, PoolLimits, Timeouts, UpstreamError
from nbgate.upstream_wire import Wire

T = TypeVar("T")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

REQUEST = [b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n", b"{}"]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LIMITS = PoolLimits(tick_s=0.02, wait_s=0.1, idle_s=30)
TIMEOUTS = Timeouts(connect_s=2, first_byte_s=5, answer_s=5, idle_s=5, total_s=10)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop; what takes 15 s hangs."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main, 15))


async def until(true: Callable[[], object]) -> None:
    """Wait until something is so; what takes 5 s is not."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 (what is looked at has no event)
            await asyncio.sleep(0.002)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read one request of the tests' shape; b"" at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    return head + await reader.readexactly(length)


def answering(*answers: bytes, close: bool = False) -> Handler:
    """Make a handler that gives these answers in turn, on every connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            if not await read_request(reader):
                return
            writer.write(answer)
        if not close:
            await reader.read()

    return handle


class Upstream:
    """Listen, count connections, and run the handler on each."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.gone = 0  # connections whose handler has ended
        self.tasks: set[asyncio.Task[Any]] = set()
        self.endpoint = Endpoint("http", "127.0.0.1", 1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connections += 1
        try:
            await self.handler(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone += 1
            self.tasks.discard(task)
            writer.close()

    @contextlib.asynccontextmanager
    async def listening(self, **more: Any) -> AsyncIterator[Upstream]:
        if "path" in more:
            server: Any = await asyncio.start_unix_server(self._serve, **more)
            self.endpoint = Endpoint("http", "x", 80, unix_path=more["path"])
        else:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, **more)
            self.endpoint = Endpoint("http", "127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            yield self
        finally:
            server.close()
            tasks = list(self.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def pooled(limits: PoolLimits = LIMITS, **more: Any) -> AsyncIterator[Pool]:
    """Run a pool."""
    pool = Pool(limits, **more)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
        assert pool.total == 0, "a connection was left on the books"
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def rig(handler: Handler, limits: PoolLimits = LIMITS) -> AsyncIterator[tuple[Pool, Upstream]]:
    """Run a pool and one upstream."""
    async with Upstream(handler).listening() as upstream, pooled(limits) as pool:
        yield pool, upstream


async def ask(pool: Pool, endpoint: Endpoint, timeouts: Timeouts = TIMEOUTS) -> Connection:
    """Do one whole exchange."""
    conn = await pool.acquire(endpoint, timeouts.connect_s)
    conn.send(REQUEST, timeouts)
    await conn.answer()
    return conn


async def refusal(pool: Pool, endpoint: Endpoint, timeouts: Timeouts = TIMEOUTS) -> UpstreamError:
    """Do one exchange that must fail."""
    try:
        await ask(pool, endpoint, timeouts)
    except UpstreamError as exc:
        return exc
    raise AssertionError("the exchange did not fail")


class Taken:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.ends: list[object] = []

    def feed(self, data: bytes) -> None:
        assert data and not self.ends
        self.data.append(data)

    def finish(self) -> None:
        self.ends.append("finish")

    def fail(self, exc: Exception) -> None:
        self.ends.append(exc)


class NoSocket:
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.aborted = False
        self.reading = True
        self.unsent = 0

    def writelines(self, parts: list[bytes]) -> None:
        self.written += parts

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


class Offline:
    """One exchange on a wire without a socket."""

    def __init__(self, limits: PoolLimits = LIMITS, ready: Any = None) -> None:
        self.pool = Pool(limits)
        self.endpoint = Endpoint("http", "x", 80, extra=frozenset((b"x-special",)))
        self.transport = NoSocket()
        lane = self.pool.lane(self.endpoint)
        self.wire = Wire(self.pool, lane)
        self.wire.connection_made(self.transport)  # type: ignore[arg-type]
        self.pool._wires.add(self.wire)  # as if it had been dialled
        self.pool.total = lane.total = 1
        self.conn = Connection(self.wire, False)
        self.conn.send(REQUEST, TIMEOUTS, ready)

    def read(self, data: bytes, step: int = 0) -> Connection:
        """Let bytes arrive, `step` at a time, while anyone listens."""
        for at in range(0, len(data), step or len(data) or 1):
            if self.transport.aborted:
                break
            self.wire.data_received(data[at : at + (step or len(data))])
        return self.conn

    def eof(self) -> Connection:
        self.wire.eof_received()
        self.wire.connection_lost(None)
        return self.conn

    @property
    def kind(self) -> str:
        return self.conn.error.kind if self.conn.error is not None else ""

    @property
    def reusable(self) -> bool:
        """Tell whether the wire lies in the pool again."""
        return self.pool.idle(self.endpoint) is not None


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
