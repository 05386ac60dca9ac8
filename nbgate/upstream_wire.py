"""An upstream socket and its response parser.

What lives here: `Wire`, and every judgement of an answer's framing. What must
not: waiting, deadlines and held bodies (`exchange.py`), pooling. Heat: K, R, C.

Law: framing is judged here and never forwarded: what does not parse strictly is
`framing`, and whatever follows an answer unasked closes the wire. The parser's
callbacks only take notes; everything is acted on after it has returned, for
acting may end the exchange and start the wire's next one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httptools

from nbgate.exchange import Connection
from nbgate.inflate import CODINGS

if TYPE_CHECKING:
    from nbgate.upstream import Lane, Pool

WANTED = frozenset((
    b"content-type", b"content-length", b"content-encoding", b"content-disposition", b"content-language",
    b"transfer-encoding", b"connection", b"retry-after", b"retry-after-ms", b"x-request-id", b"request-id",
    b"x-should-retry", b"location", b"openai-processing-ms",
))  # fmt: skip
# Lists: two lines of these mean one joined line (RFC 9110 5.3). Of any other the first counts.
JOINED = frozenset((b"content-encoding", b"transfer-encoding", b"connection", b"content-language"))

MAX_HEADERS = 200
MAX_INTERIM = 16  # 1xx answers before the final one

# Phases of a wire: what the parser is at.
HEAD, BODY, ENDED, EXCESS = range(4)


class Wire:
    """Hold one upstream socket and its parser; an asyncio protocol by its methods."""

    __slots__ = (
        "chunked", "count", "exchange", "feed", "generation", "gone", "idle_since", "interim", "keep", "lane", "mark",
        "max_head_bytes", "old", "on_body", "parser", "phase", "pieces", "pool", "quiet_bytes", "status", "to_eof",
        "transport", "version", "wanted",
    )  # fmt: skip

    def __init__(self, pool: Pool, lane: Lane) -> None:
        # connection
        self.pool = pool
        self.lane = lane
        self.generation = lane.generation
        self.wanted = lane.wanted
        self.max_head_bytes = pool.limits.max_head_bytes
        self.transport: Any = None
        self.parser: Any = None
        self.feed: Any = None
        self.pieces: list[bytes] = []
        # PERF: a C method, so a body chunk costs no Python frame before data_received goes on.
        self.on_body = self.pieces.append
        self.idle_since = 0.0
        self.gone = False
        # exchange; the first seven are as an exchange must find them
        self.exchange: Connection | None = None
        self.phase = HEAD
        self.count = 0
        self.interim = 0
        self.quiet_bytes = 0  # read since the last body byte
        self.old = False  # HTTP/1.0
        self.keep = False
        self.version = ""  # of an answer that has ended
        self.mark = 0  # pieces that belong to the first message
        self.status = 0
        self.to_eof = False
        self.chunked = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with a fresh parser."""
        self.transport = transport
        self.parser = httptools.HttpResponseParser(self)
        self.feed = self.parser.feed_data

    def data_received(self, data: bytes) -> None:
        """Parse what came and act on it."""
        exchange = self.exchange
        if exchange is None:  # unasked bytes
            self.close()
            return
        exchange.touched = True
        if self.phase == HEAD:
            if not self._read_head(exchange, data):
                return
        else:
            try:
                self.feed(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
                if not self._torn(exchange, exc):
                    return
        if self.phase > BODY:
            self._end(exchange, data)
            return
        pieces = self.pieces
        if pieces:
            self.quiet_bytes = 0
            if len(pieces) == 1:
                body = pieces.pop()
            else:
                body = b"".join(pieces)
                pieces.clear()
            if exchange.sink is not None and exchange.inflater is None:
                exchange.received += len(body)
                exchange.sink.feed(body)
                return
            exchange.take(body)
        else:
            self.quiet_bytes += len(data)
            if self.quiet_bytes > self.max_head_bytes:
                exchange.fail("framing", "endless chunk extension or trailers")
        if exchange.sink is None and exchange.error is None:
            exchange.ask_ready()

    def eof_received(self) -> None:
        """Take the peer's end as the end; the transport closes."""
        self._lose(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Break the cycle with the parser, and whatever was under way."""
        self._lose(exc)
        self.parser = self.feed = None

    # httptools callbacks: notes only

    def on_message_begin(self) -> None:
        """Note a message after the answer."""
        if self.phase != HEAD:
            self.phase = EXCESS

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a wanted header; trailers come here too and are dropped."""
        self.count += 1
        name = name.lower()
        if name in self.wanted and self.phase == HEAD and self.exchange is not None:
            headers = self.exchange.headers
            if name not in headers:
                headers[name] = value
            elif name in JOINED:
                headers[name] += b", " + value

    def on_headers_complete(self) -> None:
        """Note the status; a 1xx is not the head we wait for."""
        if self.phase == HEAD:
            self.status = status = self.parser.get_status_code()
            if not 100 <= status < 200:
                self.phase = BODY

    def on_message_complete(self) -> None:
        """Note the end, and what was read up to it."""
        if self.phase == BODY:
            self.phase = ENDED
            self.mark = len(self.pieces)
            self.keep = self.parser.should_keep_alive()
            self.version = self.parser.get_http_version()
        elif self.phase == HEAD:
            self.interim += 1
            if self.pieces:  # RFC 9110 15.2: a 1xx has no body, whatever its fields say
                self.pieces.clear()
                self.interim = MAX_INTERIM + 1
            if self.exchange is not None:
                self.exchange.headers.clear()

    # steps of an answer

    def _read_head(self, exchange: Connection, data: bytes) -> bool:
        """Parse in search of the head; True once it is there and sound."""
        seen = exchange.head_bytes
        exchange.head_bytes = total = seen + len(data)
        if not seen:
            exchange.first_byte_at = self.pool.clock()
        limit = self.max_head_bytes
        if total > limit and data.find(b"\r\n\r\n", 0, limit - seen + 4) < 0:
            exchange.fail("too_large", f"head over {limit} bytes")
            return False
        try:
            self.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if self.phase < ENDED:
                exchange.fail("framing", str(exc) or "an upgrade nobody asked for")
                return False
            self.phase = EXCESS
        if self.count > MAX_HEADERS:
            exchange.fail("framing", f"over {MAX_HEADERS} header lines")
        elif self.interim > MAX_INTERIM:
            exchange.fail("framing", f"over {MAX_INTERIM} interim answers, or one with a body")
        elif self.phase != HEAD:
            return self._judge(exchange, data, seen)
        elif total > limit:
            exchange.fail("too_large", f"head over {limit} bytes")
        return False

    def _judge(self, exchange: Connection, data: bytes, seen: int) -> bool:
        """Refuse a head whose framing leaves room for doubt."""
        status = self.status
        headers = exchange.headers
        if seen or self.interim or not data.startswith(b"HTTP/1.1 "):
            # NOTE: after the end the parser may tell the version of what follows.
            version = self.version if self.phase >= ENDED else self.parser.get_http_version()
            self.old = version == "1.0"
            if not self.old and version != "1.1":
                exchange.fail("framing", f"HTTP version {version}")
                return False
        if not 200 <= status <= 599:
            exchange.fail("framing", f"status {status}")
            return False
        transfer = headers.get(b"transfer-encoding")
        self.chunked = chunked = transfer is not None
        if transfer is not None and (self.old or transfer.lower() != b"chunked"):
            exchange.fail("framing", "transfer-encoding other than chunked in HTTP/1.1")
            return False
        self.to_eof = not chunked and b"content-length" not in headers
        if b"content-encoding" in headers:
            coding = headers.pop(b"content-encoding").lower()
            if coding in CODINGS:
                exchange.decode(coding)
            elif coding not in (b"", b"identity"):
                exchange.fail("framing", "content-encoding not asked for and not known")
                return False
        exchange.status = status
        exchange.head_at = self.pool.clock() if seen else exchange.first_byte_at
        return True

    def _torn(self, exchange: Connection, exc: Exception) -> bool:
        """Pass on what was sound before the fault; True if all of it was."""
        if self.phase >= ENDED:
            self.phase = EXCESS
            return True
        if self.pieces:
            body = b"".join(self.pieces)
            self.pieces.clear()
            exchange.take(body)
        exchange.fail("framing", str(exc))
        return False

    def _end(self, exchange: Connection, data: bytes) -> None:
        """Pass on the last bytes, let the wire go, then tell."""
        pieces = self.pieces
        if self.mark < len(pieces):
            del pieces[self.mark :]
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            exchange.take(body)
            if exchange.error is not None:
                return
        else:
            body = b""
        exchange.detach()
        self.exchange = None
        transport = self.transport
        # The parser skips line ends between messages in silence, so we look for them ourselves.
        clean = data.endswith(body) if body and not self.chunked else not data.endswith(b"\r\n\r\n\r\n")
        # An answer before the end of our request leaves the rest of the request in between: not reused.
        if clean and self.keep and self.phase == ENDED and not self.old and not transport.get_write_buffer_size():
            if exchange.paused:
                transport.resume_reading()
            self.phase = HEAD
            self.count = self.interim = self.quiet_bytes = 0
            self.pool.put(self)
        else:
            self.close()
        exchange.finish()

    def _lose(self, exc: Exception | None) -> None:
        """Settle what the end of the connection means; once."""
        if self.gone:
            return
        exchange = self.exchange
        if exchange is None:
            self.close()
        elif exc is None and self.phase == BODY and self.to_eof:
            exchange.detach()
            self.exchange = None
            self.close()
            exchange.finish()
        else:
            exchange.fail("lost", str(exc) if exc is not None else "closed by the upstream")

    def close(self) -> None:
        """Close the socket now and leave the pool; idempotent."""
        if not self.gone:
            self.gone = True
            self.exchange = None
            self.pool.forget(self)
            if self.transport is not None:
                self.transport.abort()
