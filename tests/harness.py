"""The gateway and scripted upstreams on real sockets, inside one loop thread."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from nbgate.app import App
from nbgate.config import parse
from nbgate.server.listener import Server
from nbgate.worker import settings

T = TypeVar("T")
KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"


class LoopThread:
    """A running uvloop that synchronous tests can call into."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, coro: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result(timeout_s)

    def run(self, function: Callable[[], T]) -> T:
        """Run a function there."""

        async def call() -> T:
            return function()

        return self.call(call())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Asked:
    """One request as a scripted upstream got it."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head = head
        self.body = body
        lines = head.split(b"\r\n")
        self.method, self.path, _ = lines[0].decode().split(" ")
        self.headers = {
            n.lower().decode(): v.strip().decode() for n, _, v in (x.partition(b":") for x in lines[1:] if x)
        }


class Peer:
    """What a handler may do with its connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def json(self, status: int, body: bytes, more: bytes = b"") -> None:
        """Write a whole JSON answer."""
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
        self.writer.write(head % (status, more, len(body)) + body)

    def sse_head(self) -> None:
        """Begin a chunked event stream."""
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")

    def reset(self) -> None:
        """Close with RST."""
        self.writer.transport.abort()

    async def closed(self) -> None:
        """Wait until the gateway closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


class ScriptedUpstream:
    """Answer each request as a handler says; `asked` keeps what came."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler = handler
        self.asked: list[Asked] = []
        self.open = 0
        self.connections = 0
        self.closed_at: list[float] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, handler: Callable[..., Any]) -> ScriptedUpstream:
        self = cls(handler)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                asked = Asked(head[:-4], b"")
                length = int(asked.headers.get("content-length", "0"))
                asked.body = await reader.readexactly(length) if length else b""
                self.asked.append(asked)
                done = self.handler(asked, Peer(reader, writer))
                if inspect.isawaitable(done):
                    await done
                await writer.drain()
                if writer.transport.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self.open -= 1
            self.closed_at.append(time.monotonic())
            writer.close()


class Gateway:
    """The app on nbgate's own server, in this process."""

    loop_thread: LoopThread

    def __init__(self, app: App, server: Server, port: int) -> None:
        self.app = app
        self.server = server
        self.port = port
        self.folder = Path()

    @classmethod
    async def start(cls, text: str, folder: Path, bounds: dict[str, Any]) -> Gateway:
        config = parse(text, {}, written_at=time.time())
        app = App(config, run_dir=str(folder), **bounds)
        server = Server(app, settings(config))
        app.attach(server)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        await server.start([sock])
        self = cls(app, server, sock.getsockname()[1])
        self.folder = folder
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Stop, and see that nothing was left behind."""
        await self.server.stop()
        stats = self.server.stats
        left = (len(self.server.connections), len(self.server.splices), stats.active_requests, stats.streams)
        assert left == (0, 0, 0, 0), f"left behind: connections, splices, requests, streams = {left}"
        assert stats.body_bytes == 0


def config(*channels: str, more: str = "", key: str = KEY, rates: str = "") -> str:
    """Write a TOML file with one key and the channels given."""
    return "\n".join(
        [
            '[logging]\naccess = ""',
            more,
            *channels,
            f'[[keys]]\nkey = "{key}"\naccount = "test"\n{rates}',
        ]
    )


def channel(name: str, url: str, type: str = "openai", more: str = "", models: str = '"*"') -> str:
    """Write one channel."""
    base = f"{url}/v1" if type == "openai" else url
    head = f'[channels.{name}]\ntype = "{type}"\nbase_url = "{base}"\n'
    return head + f'keys = ["up-secret-{name}"]\nmodels = [{models}]\n{more}\n'
