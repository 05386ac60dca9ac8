"""Many clients in one loop: raw sockets that note each byte, each time, each end."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar, cast

import httptools
import httpx
import uvloop

T = TypeVar("T")
KEY = "sk-load-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHI"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {  # dialect -> path and the least body
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    "completions": ("/v1/completions", {"prompt": "hi"}),
    "responses": ("/v1/responses", {"input": "hi"}),
    "messages": ("/v1/messages", {"max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]}),
    "embeddings": ("/v1/embeddings", {"input": "hi"}),
    "images": ("/v1/images/generations", {"prompt": "hi"}),
    "moderations": ("/v1/moderations", {"input": "hi"}),
}
STREAMS = ("chat", "completions", "responses", "messages")


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, with all the descriptors that the machine allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def bounded() -> T:
        try:
            async with asyncio.timeout(150):
                return await coro
        finally:
            for client in list(Client.alive):
                client.transport.abort()
            await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


def request(dialect: str, model: str, stream: bool) -> bytes:
    """Write one request. Streams of OpenAI's dialects ask for usage, so that no frame is ours to hide."""
    path, fields = BODIES[dialect]
    body: dict[str, Any] = {"model": model, **fields}
    if stream:
        body["stream"] = True
        if dialect in ("chat", "completions"):
            body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: load\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


class Client(asyncio.Protocol):
    """One connection with one request on it."""

    alive: ClassVar[set[Client]] = set()

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.parts: list[bytes] = []  # the payload, one item per HTTP chunk
        self.open_part: list[bytes] = []
        self.reads: list[float] = []
        self.whole = False
        self.sent_at = self.first_at = self.ended_at = self.closed_at = 0.0
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def took_s(self) -> float:
        return self.ended_at - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Give the times between payload reads."""
        return [later - sooner for sooner, later in zip(self.reads, self.reads[1:], strict=False)]

    def leave(self, reset: bool) -> None:
        """Go away, with RST or with FIN."""
        self.closed_at = time.time()
        if reset:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.transport.abort()
        else:
            self.transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.alive.add(self)

    def ask(self) -> None:
        """Send the request."""
        self.sent_at = time.monotonic()
        self.transport.write(self.data)

    def data_received(self, data: bytes) -> None:
        self.reads.append(time.monotonic())
        self.parser.feed_data(data)
        if self.open_part:
            self.on_chunk_complete()
        if not self.first.done():
            self.first_at = self.reads[0]
            self.first.set_result(None)
        if self.whole:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive.discard(self)
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended_at = time.monotonic()
            self.ended.set_result(None)
        if not self.first.done():
            self.first.set_result(None)
        self.transport.close()

    # httptools

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.open_part.append(data)

    def on_chunk_complete(self) -> None:
        if self.open_part:
            self.parts.append(b"".join(self.open_part))
            self.open_part.clear()

    def on_message_complete(self) -> None:
        self.on_chunk_complete()
        self.whole = True


async def connect(port: int, data: bytes) -> Client:
    """Open one connection and send the request."""
    client = (await many(port, data, 1))[0]
    client.ask()
    return client


async def many(port: int, data: bytes, count: int, batch: int = 100) -> list[Client]:
    """Open connections in batches, as fast as they are taken; they do not ask yet."""
    loop = asyncio.get_running_loop()
    made: list[Any] = []
    for start in range(0, count, batch):
        opens = (
            loop.create_connection(lambda: Client(data), "127.0.0.1", port) for _ in range(min(batch, count - start))
        )
        made += await asyncio.gather(*opens)
    return [client for _, client in made]


async def over(clients: list[Client], within_s: float) -> None:
    """Wait until each answer is over."""
    async with asyncio.timeout(within_s):
        await asyncio.gather(*(client.ended for client in clients))


class SlowReader:
    """A client that reads a kilobyte a second from a stream that is always ready."""

    def __init__(self, port: int, data: bytes) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.connect(("127.0.0.1", port))
        self.sock.sendall(data)
        self.sock.setblocking(False)
        self.received = 0
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self.sock, 1024):
            self.received += len(data)
            await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """Leave."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.sock.close()


def upstream_log(url: str) -> list[dict[str, Any]]:
    """Read the log of the fake upstream."""
    lines = httpx.get(url + "/_log", trust_env=False, timeout=60).text.splitlines()
    return [json.loads(line) for line in lines]


def upstream_stats(url: str) -> dict[str, int]:
    """Read the counts of the fake upstream."""
    found: dict[str, int] = httpx.get(url + "/_stats", trust_env=False, timeout=60).json()
    return found


def quantile(values: list[float], share: float) -> float:
    """Pick a quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
