"""One client connection: bytes in, cycles in order.

Rule 1: one request is read at a time; what follows it stays unparsed, up to a
bound, until its answer is out.
Rule 2: reading goes on while an answer is under way, since a paused uvloop
transport reports neither FIN nor RST.
Rule 3: a message that breaks the grammar ends the connection.

What lives here: the state of a connection, grouped by lifetime. What must not:
grammar (`wire`, `head`), ASGI (`cycle`). Heat: K, R.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from .cycle import Cycle
from .head import RequestHead
from .waiter import Waiter
from .wire import ChunkedBody, LengthBody, WireError, bad, status_line

if TYPE_CHECKING:
    from .listener import Server

_NEVER = float("inf")


class HttpProtocol:
    """Serve one connection; an asyncio protocol by its methods."""

    __slots__ = (
        "_advancing", "_body_at", "_body_bytes", "_drain_waiter", "_head", "_held", "_lingered", "_pending",
        "_requests", "_stall_at", "_stall_size", "body", "closing", "cycle", "deadline", "paused", "peer",
        "reading_paused", "server", "settings", "sockname", "transport",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        # process
        self.server = server
        self.settings = server.settings
        # connection
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.peer: tuple[str, int] | None = None
        self.sockname: tuple[str, int | None] | None = None
        self.deadline = _NEVER
        self.paused = False
        self.reading_paused = False
        self.closing = False
        self._lingered = 0
        self._requests = 0
        self._stall_at = 0.0
        self._stall_size = 0
        self._drain_waiter: Waiter | None = None
        self._advancing = False
        self._pending = b""
        # request
        self._head: RequestHead | None = None
        self._held: bytearray | None = None
        self.body: LengthBody | ChunkedBody | None = None
        self._body_at = 0.0
        self._body_bytes = 0
        self.cycle: Cycle | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)
        server = self.server
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = (peer[0], peer[1])
        sockname = transport.get_extra_info("sockname")
        self.sockname = (sockname[0], sockname[1]) if isinstance(sockname, tuple) else (str(sockname or ""), None)
        self.deadline = server.now + self.settings.head_timeout_s
        if not server.admit(self):
            self.reject(503, "service_unavailable", "Too many connections. Please retry shortly.")
            return
        transport.set_write_buffer_limits(high=self.settings.write_high_bytes)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            self._linger(data)
        elif self.cycle is None:
            self._advance(data)
        elif self.body is not None:
            self._read_body(data)
        else:
            self._pipelined(data)

    def eof_received(self) -> None:
        self._gone()  # and uvloop closes, since this returns None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.server.forget(self)
        self._gone()

    def pause_writing(self) -> None:
        self.paused = True
        self._stall_at = self.server.now
        self._stall_size = self.transport.get_write_buffer_size()
        cycle = self.cycle
        if cycle is not None and cycle.splice is not None:
            cycle.splice.source.pause()

    def resume_writing(self) -> None:
        self.paused = False
        self._wake_writer()
        cycle = self.cycle
        if cycle is None:
            self.body_taken()
            self._go_on()
        elif cycle.splice is not None and not self.paused:
            cycle.splice.source.resume()

    def _wake_writer(self) -> None:
        waiter, self._drain_waiter = self._drain_waiter, None
        if waiter is not None:
            waiter.wake()

    # requests

    def _advance(self, data: bytes) -> None:
        """Read requests one after the other, as long as answers and the client keep up."""
        self._advancing = True
        try:
            while data and self.cycle is None and not self.closing and not self.paused:
                data = self._read_head(data)
        except WireError as exc:
            self._broken(exc)
            data = b""
        finally:
            self._advancing = False
        if data:
            self._pipelined(data)

    def _pipelined(self, data: bytes) -> None:
        if self.closing:
            return
        self._pending = self._pending + data if self._pending else data
        if len(self._pending) > self.settings.pipelined_bytes:
            if self.cycle is None:  # the client does not read its answers: nor do we read on
                if not self.reading_paused:
                    self.reading_paused = True
                    self.transport.pause_reading()
            else:
                # NOTE: one byte stays, so that the close lingers: a reset would overtake the answer.
                self.cycle.keep_alive = False
                self._pending = self._pending[:1]

    def _go_on(self) -> None:
        """Read what came while an answer was under way."""
        if self._pending and not self._advancing:
            data, self._pending = self._pending, b""
            self._advance(data)

    def _read_head(self, data: bytes) -> bytes:
        """Read a head, and start its cycle when it is whole; return the rest."""
        if self._head is None:
            if data[0] in b"\r\n":
                data = self._skip_empty_lines(data)
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                if data:
                    self._head = RequestHead()
                    self._held = bytearray()
                    if data != b"\r":  # half an empty line is no head yet
                        self.deadline = self.server.now + self.settings.head_timeout_s
                    return self._read_partial(data)
                return b""
            return self._begin(self._whole_head(data, end), data[end:])
        return self._read_partial(data)

    def _whole_head(self, data: bytes, end: int) -> RequestHead:
        """Read a head that came in one piece. Raises: WireError."""
        max_headers = self.settings.max_headers
        head = RequestHead()
        lines = data[: end - 4]
        if end > self.settings.max_line_bytes:
            self._check_sizes(data[:end])
        elif head.recall(lines, max_headers):
            return head
        else:
            head = RequestHead()
        head.feed(data[:end])
        head.finish(max_headers, data)
        head.remember(lines)
        return head

    def _skip_empty_lines(self, data: bytes) -> bytes:
        # RFC 9112 2.2: empty lines before the request line are ignored; they move no deadline.
        rest = data.lstrip(b"\r\n")
        skipped = data[: len(data) - len(rest)]
        if not rest and skipped[-1:] == b"\r":  # an empty line that was cut; the head reader holds it
            rest, skipped = b"\r", skipped[:-1]
        if skipped.replace(b"\r\n", b""):
            raise bad("malformed request line")
        return rest

    def _read_partial(self, data: bytes) -> bytes:
        """Go on with a head that came in pieces."""
        head, held = self._head, self._held
        assert head is not None and held is not None
        known = len(held)
        if known == 1 and held[0] == 13:  # an empty line before the head, cut in two
            self._head = self._held = None
            if data[0] != 10:
                raise bad("malformed request line")
            return data[1:]
        held += data
        end = held.find(b"\r\n\r\n", max(0, known - 3)) + 4
        if end > 4:
            self._check_sizes(held[:end])
            head.feed(bytes(held[known:end]))
            self._head = self._held = None
            head.finish(self.settings.max_headers, held)
            return self._begin(head, bytes(held[end:]))
        self._check_sizes(held)
        head.feed(data)
        if head.complete:
            raise bad("malformed request head")
        return b""

    def _check_sizes(self, head: bytes | bytearray) -> None:
        bound = self.settings.max_line_bytes
        if len(head) <= bound:
            return
        lines = head.split(b"\r\n")
        if len(lines[0]) > bound:
            raise WireError(414, "uri_too_long", f"request line exceeds {bound} bytes")
        if len(head) > self.settings.max_head_bytes or max(map(len, lines)) > bound:
            raise WireError(431, "headers_too_large", "request header fields too large")

    def _begin(self, head: RequestHead, rest: bytes) -> bytes:
        """Make the cycle of a whole head; return what belongs to the next one."""
        settings = self.settings
        self._requests += 1
        server = self.server
        server.stats.requests += 1
        length = head.length
        cycle = Cycle(self, head)
        self.cycle = cycle
        server.stats.active_requests += 1
        self.deadline = _NEVER
        if length > settings.max_body_bytes:
            raise WireError(413, "request_too_large", f"request body exceeds {settings.max_body_bytes} bytes")
        if length == 0:
            cycle.body_done = True
            cycle.start()
            return rest
        if 0 < length <= len(rest):
            cycle.push(rest[:length], True)
            rest = rest[length:]
            cycle.start()
            return rest
        self.body = LengthBody(length) if length > 0 else ChunkedBody(settings.max_body_bytes)
        self._body_at = server.now
        self._body_bytes = 0
        self.deadline = server.now + settings.body_timeout_s
        if head.expects_continue or length > settings.eager_body_bytes:
            cycle.start()
            if not self._serves(cycle):  # answered already, without the body
                self._linger(rest)
                return b""
        return self._read_body(rest) if rest else b""

    def _serves(self, cycle: Cycle) -> bool:
        # NOTE: a look of its own, for mypyc trusts that what was assigned to an attribute is still there after a call.
        return self.cycle is cycle

    def _read_body(self, data: bytes) -> bytes:
        """Feed the body under way; keeps what follows it."""
        body, cycle = self.body, self.cycle
        assert body is not None and cycle is not None
        try:
            payload = body.feed(data)
        except WireError as exc:
            self._broken(exc)
            return b""
        self.deadline = self.server.now + self.settings.body_timeout_s
        self._body_bytes += len(payload)
        if payload and not self._hold(cycle, len(payload)):
            self._broken(WireError(503, "service_unavailable", "The server is out of memory for request bodies."))
            return b""
        rest = body.rest
        if body.done:
            self.body = None
            self.deadline = _NEVER
        cycle.push(payload, body.done)
        if not cycle.started and self.cycle is cycle:
            if body.done or cycle.buffered > self.settings.eager_body_bytes:
                cycle.start()
        elif not body.done and cycle.buffered > self.settings.eager_body_bytes and self.cycle is cycle:
            self.reading_paused = True
            self.transport.pause_reading()
        if not rest:
            return b""
        if self._advancing:
            return rest
        if self.cycle is None and not self.closing:
            self._advance(rest)
        else:
            self._pipelined(rest)
        return b""

    def _hold(self, cycle: Cycle, size: int) -> bool:
        stats = self.server.stats
        if stats.body_bytes + size > self.settings.body_memory_bytes:
            return False
        stats.body_bytes += size
        cycle.counted += size
        return True

    def body_taken(self) -> None:
        """What was buffered is taken: read on."""
        if self.reading_paused:
            self.reading_paused = False
            self.restart_body_clock()
            self.transport.resume_reading()

    def restart_body_clock(self) -> None:
        """The client may send on: what was before was not its delay."""
        if self.body is not None:
            self._body_at = self.server.now
            self._body_bytes = 0
            self.deadline = self.server.now + self.settings.body_timeout_s

    @property
    def _body_waits(self) -> bool:
        """Tell whether the body does not come because the app has not asked for it."""
        return self.reading_paused or (self.cycle is not None and self.cycle.expects_continue)

    # ends

    def cycle_done(self, cycle: Cycle) -> None:
        """The answer is out and the app has returned."""
        if self.cycle is not cycle:
            return
        self.cycle = None
        stats = self.server.stats
        stats.active_requests -= 1
        stats.body_bytes -= cycle.counted
        if self.closing:
            return
        if self.body is not None or not cycle.keep_alive:
            self._close()
            return
        idle_s = self.settings.drain_idle_s if self.server.draining else self.settings.keepalive_s
        self.deadline = self.server.now + idle_s
        self._go_on()

    def _broken(self, exc: WireError) -> None:
        """Answer a message that broke the grammar or a bound, and close."""
        self.server.stats.rejected += 1
        cycle = self.cycle
        if cycle is None or not cycle.head_sent:
            self.reject(exc.status, exc.code, exc.message)
        elif cycle.ended:
            self._close(linger=True)
            self._gone()
        else:
            self.cut()

    def reject(self, status: int, code: str, message: str) -> None:
        """Answer without an app and close, reading on for a moment."""
        cycle = self.cycle
        target = cycle.raw_path if cycle is not None else b""
        lines, body = self.server.reject(status, code, message, target)
        head = b"%b%b%bcontent-length: %d\r\nconnection: close\r\n\r\n" % (
            status_line(status), lines, self.server.date_line, len(body),
        )  # fmt: skip
        self.transport.write(head if cycle is not None and cycle.head_only else head + body)
        self._close(linger=True)
        self._gone()

    def cut(self) -> None:
        """End an answer that cannot be completed: the client must see it cut."""
        self.closing = True
        self.transport.abort()

    def _close(self, linger: bool = False) -> None:
        """Close after what is written; linger when more may be on its way."""
        self.closing = True
        self._stall_size = 0
        if linger or self.body is not None or self._pending:
            self._pending = b""
            self.body = None
            self._head = self._held = None
            self.deadline = self.server.now + self.settings.linger_s
            if self.transport.is_closing():
                return
            if self.reading_paused:
                self.reading_paused = False
                self.transport.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
        else:
            self.deadline = self.server.now + self.settings.write_timeout_s
            self.transport.close()

    def _linger(self, data: bytes) -> None:
        self._lingered += len(data)
        if self._lingered > self.settings.linger_bytes:
            self.transport.close()

    def _gone(self) -> None:
        if self.cycle is not None:
            self.cycle.client_gone()
        self._wake_writer()

    def exhausted(self) -> bool:
        """Tell whether this connection has had its share of requests."""
        return 0 < self.settings.max_requests_per_connection <= self._requests

    async def writable(self) -> None:
        """Sleep until the client has read enough, or left."""
        if self.paused and not self.closing:
            self._drain_waiter = waiter = self._drain_waiter or Waiter()
            await waiter

    # ticker

    def tick(self, now: float, crowded_s: float) -> None:
        """Look at the deadlines, each `tick_s`; `crowded_s` bounds idleness, 0 = does not."""
        if self.paused:
            self._check_stall(now)
        elif now >= self.deadline:
            self._expired(now)
        elif self.body is not None:
            self._check_body(now)
        elif crowded_s and self.idle and self.deadline > now + crowded_s:
            self.deadline = now + crowded_s

    def _check_body(self, now: float) -> None:
        elapsed, settings, cycle = now - self._body_at, self.settings, self.cycle
        if cycle is not None and not cycle.started:
            if elapsed > settings.body_patience_s:  # APPSEC: a slow stranger is told so before all of the body
                cycle.start()
        elif elapsed > settings.body_grace_s and not self._body_waits and self._body_bytes < (
            settings.body_min_bytes_per_s * elapsed
        ):
            self._timeout("request body came too slowly")

    @property
    def idle(self) -> bool:
        """Tell whether the connection waits for a request."""
        return self.cycle is None and self._head is None and not self.closing

    def _check_stall(self, now: float) -> None:
        size = self.transport.get_write_buffer_size()
        if size < self._stall_size:
            self._stall_at = now
        elif now - self._stall_at > self.settings.write_timeout_s:
            self.server.stats.stalled += 1
            self._gone()
            self.server.reset(self)
        self._stall_size = size

    def _expired(self, now: float) -> None:
        if self.closing:
            size = self.transport.get_write_buffer_size()
            if size and size != self._stall_size:  # still on its way out
                self._stall_size = size
                self.deadline = now + self.settings.write_timeout_s
            else:
                self.transport.abort()
        elif self.idle and (self._requests or self.server.draining):
            self._close()
        elif self.body is not None and self._body_waits:
            self.deadline = now + self.settings.body_timeout_s
        else:
            self._timeout("request did not arrive in time")

    def _timeout(self, message: str) -> None:
        self.server.stats.timeouts += 1
        self._broken(WireError(408, "request_timeout", message))

    def drain(self) -> None:
        """Close in a moment when idle; an answer without `connection: close` is a promise."""
        soon = self.server.now + self.settings.drain_idle_s
        self.deadline = min(self.deadline, soon) if self.idle else self.deadline

