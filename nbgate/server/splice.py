"""An upstream's answer joined to a client's connection.

Rule 1: payload goes from the source to the client inside the source's own
callback: no task, no await, no dictionary and no copy per chunk.
Rule 2: only framing is made here; what the bytes mean is the pipe's business.
Rule 3: the app sleeps from `begin` to the end and is woken once.

What lives here: the ends (complete, client_gone, upstream_failed, drained),
re-framing, backpressure, keep-alive comments. What must not: retries, HTTP
parsing, anything of the app. Heat: C.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from .waiter import Waiter

if TYPE_CHECKING:
    from .cycle import Cycle

logger = logging.getLogger("nbgate.server")

COMPLETE, CLIENT_GONE, UPSTREAM_FAILED, DRAINED = "complete", "client_gone", "upstream_failed", "drained"

# Small pieces go out as one buffer, long ones uncopied as three.
_JOIN_BYTES = 16 * 1024


class _Shut:
    """The pipe of an ended splice: a source that goes on says nothing."""

    def feed(self, data: bytes) -> bytes:
        return b""

    def finish(self) -> bytes:
        return b""

    def fail(self, exc: Exception) -> bytes:
        return b""


_SHUT = _Shut()


class Drained(Exception):
    """The server ends a stream because it shuts down."""

    kind = "drained"


class Source(Protocol):
    """An answer under way."""

    def attach(self, sink: Sink) -> None:
        """Hand over what was received at once, then each later chunk."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


class Sink(Protocol):
    """Where a source delivers."""

    def feed(self, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def fail(self, exc: Exception) -> None: ...


class Pipe(Protocol):
    """Pure: what becomes of the payload on its way."""

    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...
    def fail(self, exc: Exception) -> bytes: ...


class Splice:
    """Join `source` to the client of `cycle` until one of four ends."""

    __slots__ = (
        "_left",
        "_parts",
        "_told",
        "_waiter",
        "active",
        "chunked",
        "cycle",
        "keepalive",
        "outcome",
        "pipe",
        "silent_s",
        "source",
    )

    def __init__(self, cycle: Cycle, message: dict[str, Any]) -> None:
        self.cycle = cycle
        self.source: Source = message["source"]
        self.pipe: Pipe = message["pipe"]
        self.keepalive: bytes = message.get("keepalive", b"")
        self.outcome = ""
        self.chunked = False
        self.active = True  # something was written since the last tick
        self.silent_s = 0.0
        length = message.get("length")
        self._left: int = -1 if length is None else length
        self._parts: list[bytes] | None = []
        self._told = False  # the pipe had an error event for the failure
        self._waiter: Waiter | None = None

    async def run(self, status: int, head: bytes) -> None:
        """Deliver until the end. Cancellation: the source is aborted, the answer cut."""
        if not self._begin(status, head):
            self._waiter = waiter = Waiter()
            try:
                await waiter
            except BaseException:
                if not self.outcome:
                    self.cycle.protocol.cut()
                    self.client_gone()
                raise

    def _begin(self, status: int, head: bytes) -> bool:
        """Write the head and what is there; True when that was all."""
        cycle = self.cycle
        self.source.attach(self)
        parts, self._parts = self._parts or [], None
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if self.outcome == COMPLETE and not cycle.head_only:
            if self._left > 0 and status not in (204, 304):  # the source ended early and told nobody
                cycle.truncate(status, head, self._left + len(body), body)
                self.outcome = UPSTREAM_FAILED
            else:
                cycle.respond(status, head, body)
            return True
        length = None if self._left < 0 else self._left + len(body)
        if self.outcome == UPSTREAM_FAILED:
            cycle.keep_alive = False
        lines = cycle.head(status, head, length)
        self.chunked = cycle.chunked
        if cycle.head_only:  # HEAD, 204 or 304: whatever the source has, the client gets no body
            cycle.write(lines)
            if not self.outcome:
                self._shut(COMPLETE)
                self.source.abort()
        elif self.outcome:  # failed before it could begin: the error frame is the body
            ended = b"0\r\n\r\n" if self._told and self.chunked else b""
            cycle.write(lines + (self._framed(body) if body else b"") + ended)
        else:
            cycle.write(lines + self._framed(body) if body else lines)
            cycle.spliced(self)
            return False
        cycle.ended = True
        return True

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data

    # Sink

    def feed(self, data: bytes) -> None:
        """Send one piece of payload on."""
        try:
            out = self.pipe.feed(data)
        except Exception as exc:
            self._broken_pipe(exc)
            return
        if not out:
            return
        if self._left >= 0:
            left = self._left - len(out)
            if left < 0:
                self.source.abort()
                self.fail(ValueError("the answer is longer than its content-length"))
                return
            self._left = left
        if self._parts is not None:
            self._parts.append(out)
            return
        self.active = True
        transport = self.cycle.transport
        if not self.chunked:
            transport.write(out)
        elif len(out) <= _JOIN_BYTES:
            transport.write(b"%x\r\n%b\r\n" % (len(out), out))
        else:
            transport.writelines((b"%x\r\n" % len(out), out, b"\r\n"))

    def finish(self) -> None:
        """End the answer cleanly."""
        if self.outcome:
            return
        try:
            tail = self.pipe.finish()
        except Exception as exc:
            self._broken_pipe(exc)
            return
        if self._parts is not None:
            if tail:
                self._parts.append(tail)
                if self._left > 0:
                    self._left -= len(tail)
            self._shut(COMPLETE)
            return
        cycle = self.cycle
        if self._left >= 0 and self._left != len(tail):
            cycle.keep_alive = False
            self._end(UPSTREAM_FAILED)
            return
        if self.chunked:
            cycle.write((b"%x\r\n%b\r\n0\r\n\r\n" % (len(tail), tail)) if tail else b"0\r\n\r\n")
        elif tail:
            cycle.write(tail)
        self._end(COMPLETE)

    def fail(self, exc: Exception) -> None:
        """End a broken answer: the dialect's error event, then close."""
        if not self.outcome:
            self._fail(exc, UPSTREAM_FAILED)

    def _fail(self, exc: Exception, outcome: str) -> None:
        try:
            last = self.pipe.fail(exc)
        except Exception:
            logger.exception("pipe failed while it told of a failure")
            last = b""
        if self._parts is not None:
            if last and self._left < 0:
                self._told = True
                self._parts.append(last)
            self._shut(outcome)
            return
        cycle = self.cycle
        # NOTE: without an error event the body must look cut, so no last chunk is written.
        cycle.keep_alive = False
        if last and self.chunked:
            cycle.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))
        elif last and self._left < 0:
            cycle.write(last)
        elif self._left < 0 and not self.chunked:
            cycle.protocol.cut()  # the close is the only framing: it must not look clean
        self._end(outcome)

    def _broken_pipe(self, exc: Exception) -> None:
        logger.error("pipe failed", exc_info=exc)
        self.source.abort()
        self.fail(exc)

    def _shut(self, outcome: str) -> None:
        self.outcome = outcome
        self.pipe = _SHUT

    def _end(self, outcome: str) -> None:
        self._shut(outcome)
        self.cycle.unspliced(self)
        waiter = self._waiter
        if waiter is not None:
            waiter.wake()

    # Protocol and server

    def client_gone(self) -> None:
        """Close the upstream; nothing can be written any more."""
        if not self.outcome:
            self._shut(CLIENT_GONE)  # first: an abort may come back as `fail`
            self.source.abort()
            self._end(CLIENT_GONE)

    def drain(self) -> None:
        """End on shutdown, with the dialect's error event."""
        if not self.outcome:
            self.outcome = DRAINED  # first: an abort may come back as `fail`
            self.source.abort()
            self._fail(Drained("the server is shutting down"), DRAINED)

    def tick(self, tick_s: float, keepalive_s: float) -> None:
        """Send the keep-alive bytes after `keepalive_s` of silence."""
        if self.active:
            self.active = False
            self.silent_s = 0.0
            return
        self.silent_s += tick_s
        if self.silent_s < keepalive_s or not self.keepalive or self._left >= 0:
            return
        # NOTE: not to a client that does not read: it would never be found stalled.
        if not getattr(self.pipe, "mid_frame", False) and not self.cycle.protocol.paused:
            self.silent_s = 0.0
            self.cycle.write(self._framed(self.keepalive))
