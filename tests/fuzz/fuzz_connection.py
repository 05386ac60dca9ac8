"""A whole client connection: any bytes, any cuts, an app that does all an app may do.

Modes (first digit): 1 eager, 2 an unruly world (ticks, splices that break, a client
that reads late), 4 the client leaves with a reset. Without 2 every request is echoed,
and cuts must not change what the app sees.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from typing import Any

from fuzzkit import StepLoop, Target, chance, pieces, read_chunks, running_loop, split_mode

from nbgate.server.listener import Server, Settings
from nbgate.server.protocol import HttpProtocol
from nbgate.server.waiter import Waiter

SETTINGS = Settings(
    max_line_bytes=256, max_head_bytes=1024, max_headers=20, max_body_bytes=4096, eager_body_bytes=64,
    body_memory_bytes=8192, pipelined_bytes=512, linger_bytes=256, write_high_bytes=256, max_requests_per_connection=64,
)  # fmt: skip
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9a-z]+): ([\t\x20-\x7e\x80-\xff]*)")
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*")
LOG = logging.getLogger("nbgate.server")


class Planned(Exception):
    """The app fails on purpose."""


class Transport(asyncio.Transport):
    """As strict as uvloop's; `slow` makes a client that reads only when `take` is called."""

    def __init__(self, loop: StepLoop, slow: bool) -> None:
        super().__init__({"peername": ("192.0.2.1", 5000), "sockname": ("127.0.0.1", 8080)})
        self.loop = loop
        self.slow = slow
        self.protocol: HttpProtocol
        self.out = bytearray()
        self.held = 0
        self.blocked = self.closed = self.eof_sent = self.lost = False
        self.reading = True

    def write(self, data: Any) -> None:
        if self.eof_sent:
            raise RuntimeError("write after write_eof")
        if self.closed:
            return
        self.out += data
        if self.slow:
            self.held += len(data)
            if self.held > SETTINGS.write_high_bytes and not self.blocked:
                self.blocked = True
                self.protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def take(self, size: int) -> None:
        self.held -= min(size, self.held)
        if self.blocked and self.held <= SETTINGS.write_high_bytes // 4:
            self.blocked = False
            if not self.lost:
                self.protocol.resume_writing()
        if self.closed and not self.held:
            self.loop.call_soon(self.lose)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.held

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof_sent = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = self.closed

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if not self.held:
                self.loop.call_soon(self.lose)

    def abort(self) -> None:
        self.closed = True
        self.held = 0
        self.loop.call_soon(self.lose)

    def lose(self) -> None:
        if not self.lost:
            self.closed = self.lost = True
            self.protocol.connection_lost(None)


class Source:
    """An upstream's answer, fed by the world; each end comes once."""

    def __init__(self, rng: random.Random, sources: list[Source]) -> None:
        self.rng = rng
        self.sources = sources
        self.sink: Any = None
        self.paused = False

    def attach(self, sink: Any) -> None:
        self.sink = sink
        self.sources.append(self)
        for _ in range(self.rng.randint(0, 2)):
            self.move()

    def move(self) -> None:
        """Deliver something, or end."""
        sink = self.sink
        if sink is None or self.paused:
            return
        what = self.rng.randint(0, 9)
        if what < 7:
            sink.feed(b"p" * self.rng.randint(1, 100))
            return
        self.sink = None
        self.sources.remove(self)
        if what < 9:
            sink.finish()
        else:
            sink.fail(Planned())

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self) -> None:
        if self.sink is not None:
            self.sink = None
            self.sources.remove(self)


class Pipe:
    def feed(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""

    def fail(self, exc: Exception) -> bytes:
        return b"error"


class World:
    """One connection, its app, and all that happens beside the bytes."""

    def __init__(self, loop: StepLoop, mode: int, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.eager = bool(mode & 1)
        self.unruly = bool(mode & 2)
        self.reset = bool(mode & 4)
        self.entered = self.left = 0
        self.seen: list[tuple[object, ...]] = []
        self.faults: list[BaseException] = []
        self.sleepers: list[Waiter] = []
        self.sources: list[Source] = []
        self.statuses: list[int] = []
        self.server = Server(self._make_app(), SETTINGS, clock=lambda: 1000.0)
        self.server.loop = loop  # type: ignore[assignment]
        self.transport = Transport(loop, self.unruly and rng.random() < 0.5)
        self.protocol = self.transport.protocol = HttpProtocol(self.server)
        self.protocol.connection_made(self.transport)

    def _make_app(self) -> Any:
        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            self.entered += 1
            try:
                await self._answer(scope, receive, send)
            except (Planned, asyncio.CancelledError):
                raise
            except BaseException as exc:
                self.faults.append(exc)
                raise
            finally:
                self.left += 1

        app.nbgate_eager = self.eager  # type: ignore[attr-defined]
        app.nbgate_reject = lambda status, code, message, target: (b"x-reject: 1\r\n", b"rejected")  # type: ignore[attr-defined]
        return app

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        mark = b"%d" % self.entered + (b" head" if scope["method"] == "HEAD" else b"")
        action = scope["raw_path"][1:2] if self.unruly else b""
        if action == b"x":
            raise Planned
        if action == b"w":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        if action == b"d":
            self.sleepers.append(sleeper := Waiter())
            await sleeper
        if action == b"p":
            length = 50 if scope["query_string"] == b"l" else None
            source = Source(self.rng, self.sources)
            message = {"type": "nbgate.splice", "status": 200, "head": b"x-n: %b\r\n" % mark, "source": source}
            await send(message | {"pipe": Pipe(), "length": length, "keepalive": b": ping"})
            return
        body = b"" if action == b"n" else await self._body(receive)
        if body is None:
            return
        self.seen.append((scope["method"], scope["raw_path"], scope["query_string"], tuple(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-n", mark)]})
        if action == b"s":
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"s" * 150, "more_body": True})
        if action == b"y":
            raise Planned
        await send({"type": "http.response.body", "body": body})

    async def _body(self, receive: Any) -> bytes | None:
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message["body"])
            if not message["more_body"]:
                return b"".join(parts)

    def happen(self) -> None:
        """Let something happen between two reads."""
        rng = self.rng
        what = rng.randint(0, 9)
        if what == 0 and self.sleepers:
            self.sleepers.pop(0).wake()
        elif what <= 3 and self.sources:
            self.sources[0].move()
        elif what <= 5:
            self.transport.take(rng.randint(1, 1000))
        elif what == 6:
            self.server.now += rng.choice((0.5, 0.5, 0.5, 5.0, 31.0))
            if not self.transport.lost:
                self.protocol.tick(self.server.now, False)
            for splice in tuple(self.server.splices):
                splice.tick(10.0, 15.0)
        elif what == 7 and rng.random() < 0.1:
            self.protocol.drain()
        self.loop.run()

    def live(self, parts: list[bytes]) -> None:
        """Send the bytes, let the world settle, and leave."""
        for part in parts:
            for _ in range(20):
                if self.transport.reading or self.transport.closed or not self.unruly:
                    break
                self.happen()
            if self.transport.closed:
                break
            if self.transport.reading:
                self.protocol.data_received(part)
                self.loop.run()
            if self.unruly:
                self.happen()
        if self.unruly:
            for _ in range(self.rng.randint(0, 20)):
                self.happen()
        if not self.transport.lost and not self.reset:
            self.protocol.eof_received()
            self.transport.close()
            self.transport.take(1 << 20)
            self.loop.run()
        self.transport.closed = True
        self.loop.call_soon(self.transport.lose)
        self.loop.run()
        for sleeper in self.sleepers:
            sleeper.wake()
        self.loop.run()

    def check(self) -> list[int]:
        """Nothing may be left, and what was written must be whole answers in order."""
        server, stats = self.server, self.server.stats
        gauges = (
            len(server.connections), stats.connections, len(server.splices), stats.active_requests, stats.body_bytes,
            stats.streams, len(server.tasks), len(self.sources),
        )  # fmt: skip
        assert not any(gauges), f"left behind: {gauges}"
        assert self.entered == self.left, "an app was never woken"
        assert not self.faults, repr(self.faults[0])
        statuses, marks = answers(bytes(self.transport.out))
        finals = [status for status in statuses if status >= 200]
        assert len(finals) <= stats.requests + stats.rejected, (finals, stats.requests, stats.rejected)
        assert len(statuses) - len(finals) <= self.entered, "100 Continue without a request"
        assert marks == sorted(set(marks)) and (not marks or marks[-1] <= self.entered), marks
        if not self.unruly:
            assert len(marks) == len(self.seen), "a request without its answer"
        return statuses


def answers(out: bytes) -> tuple[list[int], list[int]]:
    """Read what the server wrote, strictly: (all statuses, the app's numbers)."""
    statuses: list[int] = []
    marks: list[int] = []
    last = False
    while out:
        assert not last, f"bytes after the last answer: {out[:80]!r}"
        end = out.find(b"\r\n\r\n")
        assert end >= 0, f"no head in {out[:80]!r}"
        first, *lines = out[:end].split(b"\r\n")
        found = STATUS.fullmatch(first)
        assert found, first
        fields = [FIELD.fullmatch(line) for line in lines]
        assert all(fields), lines
        headers = {field[1]: field[2] for field in fields if field}
        assert len(headers) == len(fields), lines
        out = out[end + 4 :]
        status = int(found[1])
        statuses.append(status)
        if status < 200:
            continue
        last = headers.get(b"connection") == b"close"
        number, _, is_head = headers.get(b"x-n", b"").partition(b" ")
        if number:
            marks.append(int(number))
        if is_head or (b"x-reject" in headers and not out):
            continue
        if b"transfer-encoding" in headers:
            chunks = read_chunks(out)
            if chunks is None:  # cut: then it is the last
                break
            out = out[chunks[1] :]
        else:
            size = int(headers.get(b"content-length", b"1000000000"))
            out = out[size:]
    return statuses, marks


def _run(data: bytes, parts: list[bytes], mode: int) -> World:
    LOG.disabled = True  # it tells of apps that fail, as they should
    try:
        with running_loop() as loop:
            world = World(loop, mode, chance(data, 7))
            world.live(parts)
            world.statuses = world.check()
    finally:
        LOG.disabled = False
    return world


def connection(data: bytes) -> None:
    """No exception, no answer too many, nothing left; and echoes do not depend on cuts."""
    mode, data = split_mode(data, 8)
    first = _run(data, pieces(data, 1) if mode & 2 else [data], mode)
    # NOTE: an app that is a Task answers later, so what is pipelined may pass its bound.
    if mode & 2 or (not mode & 1 and len(data) > SETTINGS.pipelined_bytes):
        return
    for salt in (0, 2):
        cut = _run(data, pieces(data, salt), mode)
        assert cut.seen == first.seen, (first.seen, cut.seen)
        assert bool(cut.server.stats.rejected) == bool(first.server.stats.rejected), (first.statuses, cut.statuses)


TARGETS: dict[str, Target] = {"connection": connection}
