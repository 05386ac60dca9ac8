"""One exchange with an upstream: its request, its answer, its deadlines.

What lives here: `Connection`, one request and its answer on a lent wire; who
waits for it, who takes its body, what is held until then. What must not:
parsing (`upstream_wire.py`), dialling, pooling. Heat: R and C.

Law: a `Connection` serves one exchange and is worth nothing after it, so that
no one can touch a wire that serves another by now. What is held is bounded,
and an exchange ends once: by `finish` or by `fail`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from nbgate.dial import Endpoint, Kind, UpstreamError
from nbgate.inflate import Inflater
from nbgate.server.waiter import Waiter

if TYPE_CHECKING:
    from nbgate.upstream_wire import Wire

HOLD_BYTES = 256 * 1024  # body held before someone attaches
OFTEN_BYTES = 16 * 1024  # up to here `ready` is asked at every read


class Timeouts(msgspec.Struct, frozen=True):
    """Bound one call, in seconds; 0 is no bound.

    first_byte_s: until the head. idle_s: between reads after it, not while we
    paused. answer_s and total_s: the whole, of which the shorter counts.
    """

    connect_s: float = 5.0
    first_byte_s: float = 120.0
    answer_s: float = 600.0
    idle_s: float = 120.0
    total_s: float = 3600.0

    def for_stream(self) -> Timeouts:
        """Return the bounds of a streamed answer."""
        return msgspec.structs.replace(self, answer_s=0.0)

    def for_whole(self) -> Timeouts:
        """Return the bounds of an answer whose head comes with its end."""
        return msgspec.structs.replace(self, first_byte_s=0.0)


class Sink(Protocol):
    """Take an answer's body; what `Connection.attach` wants."""

    def feed(self, data: bytes) -> None:
        """Take body bytes, never b""."""

    def finish(self) -> None:
        """Take note of the clean end."""

    def fail(self, exc: Exception) -> None:
        """Take note that the upstream broke."""


Ready = Callable[["Connection"], bool]


class Connection:
    """Hold one exchange: from the pool's hands to its end.

    Send on it or `release` it or `abort` it; nothing else returns its place in
    the pool. At a clean end the wire goes back by itself. `received` counts
    decoded body bytes; the stamps are the pool's clock, 0.0 before the fact.
    """

    __slots__ = (
        "_body", "_held", "_poked", "_ready", "_ready_at", "_ready_s", "_timeouts", "_waiter", "_wire",
        "complete", "endpoint", "error", "first_byte_at", "head_at", "head_bytes", "headers", "inflater", "paused",
        "received", "reused", "sent_at", "sink", "status", "touched", "touched_at",
    )  # fmt: skip

    def __init__(self, wire: Wire, reused: bool) -> None:
        self._wire: Wire | None = wire
        self.endpoint: Endpoint = wire.lane.endpoint
        self.reused = reused
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete = False
        self.error: UpstreamError | None = None
        self.received = 0
        self.head_bytes = 0
        self.sent_at = 0.0
        self.first_byte_at = 0.0
        self.head_at = 0.0
        self.touched = True
        self.touched_at = 0.0
        self.paused = False
        self.sink: Sink | None = None
        self._body = b""
        self._held: list[bytes] | None = None
        self.inflater: Inflater | None = None
        self._waiter: Waiter | None = None
        self._poked = False

    # what the relay calls

    def send(self, parts: list[bytes], timeouts: Timeouts, ready: Ready | None = None, ready_s: float = 0.0) -> None:
        """Write head and body and start the exchange; never raises.

        `ready` is asked after reads once the head is there, and ends `answer`
        when it says True; None waits for the end. `ready_s` after the head
        `answer` returns all the same (0 = never). The request must be one that
        may have a body in its answer: not HEAD, not CONNECT.
        """
        self._timeouts = timeouts
        self._ready = ready
        self._ready_s = ready_s
        self._ready_at = 0
        wire = self._wire
        if wire is None:
            self.fail("lost", "sent on a connection given back")
            return
        self.sent_at = wire.pool.clock()
        if wire.gone:
            self.fail("lost", "closed before the request")
            return
        wire.exchange = self
        wire.transport.writelines(parts)

    async def answer(self) -> None:
        """Wait until ready, complete, full (256 KiB held) or `ready_s` late.

        Raises:
            UpstreamError: the exchange broke; the wire is closed.
        Cancellation: leaves the exchange running; the caller aborts it.
        """
        if not (self._poked or self.complete or self.error is not None or self.paused):
            waiter = self._waiter = Waiter()
            try:
                await waiter
            except asyncio.CancelledError:
                self._waiter = None
                raise
        self._poked = False
        if self.error is not None:
            raise self.error

    @property
    def buffered(self) -> bytes:
        """Return the body bytes received and not handed to a sink."""
        held = self._held
        if held is not None:
            self._body = b"".join((self._body, *held))
            self._held = None
        return self._body

    def attach(self, sink: Sink) -> None:
        """Give what is held, then everything later, to the sink."""
        held = self.buffered
        self._body = b""
        self.sink = sink
        self._ready = None
        if held:
            clogged, self.paused = self.paused, False
            sink.feed(held)
            if clogged and not self.paused:
                self.paused = True
                self.resume()
            if self.sink is not sink:  # ended by `resume`, or aborted by the sink
                return
        if self.complete:
            self.sink = None
            sink.finish()
        elif self.error is not None:
            self.sink = None
            sink.fail(self.error)

    def pause(self) -> None:
        """Stop reading until `resume`; the idle timeout stands still."""
        if not self.paused:
            self.paused = True
            wire = self._wire
            if wire is not None and not wire.transport.is_closing():
                wire.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self.paused:
            return
        self.paused = False
        self.touched = True
        if self.inflater is not None:
            self._inflate(self.inflater)
            if self.paused or self.error is not None:
                return
            if self._wire is None:
                if not self.complete:
                    self.finish()
                return
        wire = self._wire
        if wire is not None and not wire.transport.is_closing():
            wire.transport.resume_reading()

    def abort(self) -> None:
        """End the exchange and close its socket; harmless after the end."""
        self.sink = None
        if not self.complete:
            self.fail("lost", "aborted")

    def release(self) -> None:
        """Give back a connection that was never sent on."""
        wire, self._wire = self._wire, None
        if wire is not None and wire.exchange is not self:
            wire.pool.put(wire)

    # what the wire and the pool call

    def take(self, data: bytes) -> None:
        """Pass body bytes on: decoded, to the sink or into the hold."""
        if self.inflater is not None:
            self.inflater.push(data)
            self._inflate(self.inflater)
        else:
            self._accept(data)

    def decode(self, coding: bytes) -> None:
        """Undo a content-encoding from here on."""
        self.inflater = Inflater(coding)
        self.headers.pop(b"content-length", None)

    def _accept(self, data: bytes) -> None:
        self.received += len(data)
        sink = self.sink
        if sink is not None:
            sink.feed(data)
            return
        if not self._body:
            self._body = data
        elif self._held is None:
            self._held = [data]
        else:
            self._held.append(data)
        if self.received >= HOLD_BYTES:
            self.pause()

    def _inflate(self, inflater: Inflater) -> None:
        try:
            while not self.paused and self.error is None:
                data = inflater.step()
                if not data:
                    return
                self._accept(data)
        except ValueError as exc:
            self.fail("framing", f"content-encoding: {exc}")
        except OverflowError as exc:
            self.fail("too_large", f"content-encoding: {exc}")

    def ask_ready(self) -> None:
        """Wake the relay if there is now what it waits for."""
        ready = self._ready
        if self.paused:
            self.poke()
        elif ready is not None:
            received = self.received
            # PERF: `ready` looks at all that is held: each byte a read, each read a join, would be quadratic.
            # The pool's tick asks again for what is left out here.
            if received > OFTEN_BYTES and received - self._ready_at < received >> 4:
                return
            self._ready_at = received
            if ready(self):
                self.poke()

    def poke(self) -> None:
        """Let `answer` return."""
        waiter = self._waiter
        if waiter is None:
            self._poked = True
        else:
            self._waiter = None
            waiter.wake()

    def finish(self) -> None:
        """Note the clean end of the wire's message; the wire is let go."""
        inflater = self.inflater
        if inflater is not None:
            if inflater.pending:
                return  # paused in the middle of it: `resume` comes back here
            if not inflater.finished:
                self.fail("framing", "content-encoding: cut short")
                return
        self.complete = True
        sink = self.sink
        if sink is not None:
            self.sink = None
            sink.finish()
        else:
            self.poke()

    def fail(self, kind: Kind, why: str) -> None:
        """End the exchange badly, once, and close its wire."""
        if self.complete or self.error is not None:
            return
        wire = self._wire
        since_s = wire.pool.clock() - self.sent_at if wire is not None and self.sent_at else 0.0
        self.error = error = UpstreamError(
            kind, why, bytes_read=self.head_bytes + self.received, reused=self.reused, since_write_s=since_s
        )
        if wire is not None:
            self._wire = None
            wire.exchange = None
            wire.close()
        sink = self.sink
        if sink is not None:
            self.sink = None
            sink.fail(error)
        else:
            self.poke()

    def detach(self) -> None:
        """Let go of the wire, which has all of this answer."""
        self._wire = None

    def check(self, now: float) -> None:
        """Look at the deadlines; the pool's tick calls this."""
        bounds = self._timeouts
        age_s = now - self.sent_at
        if self.head_at == 0.0:
            if bounds.first_byte_s and age_s >= bounds.first_byte_s:
                self.fail("timeout_first_byte", f"no head in {bounds.first_byte_s:g} s")
                return
        elif self.touched or self.paused:
            self.touched = False
            self.touched_at = now
        elif bounds.idle_s and now - self.touched_at >= bounds.idle_s:
            self.fail("timeout_idle", f"nothing for {bounds.idle_s:g} s")
            return
        for bound_s in (bounds.answer_s, bounds.total_s):
            if bound_s and age_s >= bound_s:
                self.fail("timeout_total", f"not complete in {bound_s:g} s")
                return
        self._check_ready(now)

    def _check_ready(self, now: float) -> None:
        if self.sink is not None or self.head_at == 0.0:
            return
        if self._ready_s and now - self.head_at >= self._ready_s:
            self._ready_s = 0.0
            self.poke()
        elif self._ready is not None and self._ready_at != self.received:
            self._ready_at = self.received
            if self._ready(self):
                self.poke()
