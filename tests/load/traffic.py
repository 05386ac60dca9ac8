"""Steady traffic for a station whose workers come and go: so many streams at any time, calls at a rate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, cast

import httptools
import uvloop
from loadkit import connect, over, quantile, request

T = TypeVar("T")
STREAM = "paced-60-50"  # 3 s each
CALL = "json-800"
CONNECT_S = 5.0
ANSWER_S = 30.0


def run(coro: Coroutine[Any, Any, T], within_s: float) -> T:
    """Run on uvloop; fail at the bound."""

    async def bounded() -> T:
        async with asyncio.timeout(within_s):
            return await coro

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


def raise_fd_limit(wanted: int) -> None:
    """Allow so many descriptors to us and our children."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < wanted:  # only root may do that
        hard = wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Failure(NamedTuple):
    """A call that did not end well."""

    kind: str
    why: str
    port: int  # of the client; 0 = it never had one
    at: float


class Link(asyncio.Protocol):
    """One connection; one request under way at most."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.port = 0
        self.open = False
        self.used = 0
        self._keep = True
        self._parser: httptools.HttpResponseParser
        self._waiter: asyncio.Future[str] | None = None
        self._parts: list[bytes] = []
        self._began = self._whole = False

    async def ask(self, data: bytes, right: Callable[[bytes], bool]) -> str:
        """Make one call; "" when the answer is right and whole, else what was wrong."""
        self._parser = httptools.HttpResponseParser(self)
        self._parts, self._began, self._whole, self.used = [], False, False, self.used + 1
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        try:
            async with asyncio.timeout(ANSWER_S):
                why = await self._waiter
        except TimeoutError:
            why = "no end"
        self._waiter = None
        if not why and self._parser.get_status_code() != 200:
            why = f"status {self._parser.get_status_code()}: {b''.join(self._parts)[:200]!r}"
        if not why and not right(b"".join(self._parts)):
            why = f"wrong bytes: {b''.join(self._parts)[-200:]!r}"
        if why or not self._keep:
            self.close()
        return why

    def close(self) -> None:
        """Leave."""
        self.open = False
        self.transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.port = transport.get_extra_info("sockname")[1]
        self.open = True

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:  # a 408 or such on an idle connection: it ends
            self.close()
            return
        self._began = True
        self._parser.feed_data(data)
        if self._whole and not self._waiter.done():
            self._waiter.set_result("")

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._waiter is not None and not self._waiter.done():
            moment = "in its answer" if self._began else "before its answer"
            fresh = "a reused" if self.used > 1 else "a fresh"
            self._waiter.set_result(f"{fresh} connection was lost {moment} ({exc or 'closed'})")

    # httptools

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._whole = True
        self._keep = self._parser.should_keep_alive()


@dataclass
class Volume:
    """How much."""

    streams: int = 500
    calls_per_s: float = 150.0


class Traffic:
    """Streams that are begun anew as they end, and calls at a fixed rate; half of both on connections of their own."""

    def __init__(self, port: int, volume: Volume | None = None) -> None:
        self.port = port
        self.volume = volume or Volume()
        self.done: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.streaming = self.most = 0
        self.connections = 0
        self.call_s: list[float] = []
        self._expected = b""
        self._stopping = asyncio.Event()
        self._idle: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        client = await connect(self.port, request("chat", STREAM, True))
        await over([client], 30)
        assert client.whole, client.status
        assert client.body.endswith(b"data: [DONE]\n\n")
        self._expected = client.body
        for number in range(self.volume.streams):
            self._spawn(self._streams(number))
        self._spawn(self._calls())
        async with asyncio.timeout(30):
            while self.streaming < self.volume.streams:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Begin nothing more; wait for the end of what is under way."""
        self._stopping.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for link in self._idle:
            link.close()
        await asyncio.sleep(0.05)

    def _spawn(self, coro: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail("ours", repr(task.exception()), 0)

    def _fail(self, kind: str, why: str, port: int) -> None:
        self.failures.append(Failure(kind, why, port, time.monotonic()))

    async def _link(self, kind: str) -> Link | None:
        loop = asyncio.get_running_loop()
        self.connections += 1
        try:
            async with asyncio.timeout(CONNECT_S):
                _, link = await loop.create_connection(Link, "127.0.0.1", self.port)
        except (OSError, TimeoutError) as exc:
            self._fail(f"{kind}: connect", repr(exc), 0)
            return None
        return link

    async def _streams(self, number: int) -> None:
        """Stream after stream, the first ones spread over the time of one."""
        await asyncio.sleep(3.0 * number / self.volume.streams)
        data = request("chat", STREAM, True)
        expected, link = self._expected, None
        while not self._stopping.is_set():
            if link is None or not link.open:
                link = await self._link("stream")
            if link is None:
                await asyncio.sleep(0.1)
                continue
            self.streaming += 1
            self.most = max(self.most, self.streaming)
            why = await link.ask(data, lambda body: body == expected)
            self.streaming -= 1
            if why:
                self._fail("stream", why, link.port)
            else:
                self.done["streams"] += 1
            if number % 2:
                link.close()
        if link is not None:
            link.close()

    async def _calls(self) -> None:
        began, number = time.monotonic(), 0
        while not self._stopping.is_set():
            while number < (time.monotonic() - began) * self.volume.calls_per_s:
                self._spawn(self._call(number % 2 == 0))
                number += 1
            await asyncio.sleep(0.002)

    async def _call(self, fresh: bool) -> None:
        began = time.monotonic()
        link = None
        while not fresh and self._idle and (link is None or not link.open):
            link = self._idle.pop()
        if link is None or not link.open:
            link = await self._link("call")
        if link is None:
            return
        why = await link.ask(request("chat", CALL, False), lambda body: b'"usage"' in body)
        self.call_s.append(time.monotonic() - began)
        if why:
            self._fail("call", why, link.port)
            return
        self.done["calls"] += 1
        if fresh:
            link.close()
        elif link.open:
            self._idle.append(link)

    def says(self) -> str:
        """Give the figures in a line."""
        slow = f"p50 {quantile(self.call_s, 0.5) * 1e3:.1f} ms, p99 {quantile(self.call_s, 0.99) * 1e3:.0f} ms"
        return (
            f"{self.done['streams']} streams whole (at most {self.most} at once), {self.done['calls']} calls "
            f"({slow}, max {max(self.call_s) * 1e3:.0f} ms), {self.connections} connections, "
            f"{len(self.failures)} failures"
        )


def client_ports(pid: int, port: int) -> set[int]:
    """List the ports of the clients whose connections to `port` a process holds."""
    held = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                held.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_, inode = line.split()[:10]
        if state != "0A" and int(local.rpartition(":")[2], 16) == port and f"socket:[{inode}]" in held:
            found.add(int(remote.rpartition(":")[2], 16))
    return found
