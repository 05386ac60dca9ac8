"""One request and its answer: the ASGI side of a connection.

Rule 1: an app that declares `nbgate_eager = True` is driven here without a
Task, so a request that needs no wait is answered inside the read that brought
it; any other app gets a Task.
Rule 2: every answer is framed here, whatever the app says about framing.

What lives here: scope, receive, send, the eager driver. What must not: parsing
and sockets (`protocol`), payload of splices (`splice`). Heat: R.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from . import wire
from .splice import Splice
from .waiter import Waiter

if TYPE_CHECKING:
    from .head import RequestHead
    from .protocol import HttpProtocol

logger = logging.getLogger("nbgate.server")

_ASGI = {"version": "3.0", "spec_version": "2.4"}
_EXTENSIONS: dict[str, dict[str, Any]] = {"nbgate.splice": {}}
_DISCONNECT = {"type": "http.disconnect"}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_FRAMING_FIELDS = frozenset((b"content-length", b"transfer-encoding", b"connection", b"date", b"keep-alive"))


class Cycle:
    """Run the app for one request on one connection."""

    __slots__ = (
        "_blocked",
        "_body_given",
        "_chunks",
        "_coro",
        "_http10",
        "_left",
        "_receive_waiter",
        "_start",
        "_task",
        "app_done",
        "body_done",
        "buffered",
        "chunked",
        "counted",
        "ended",
        "expects_continue",
        "gone",
        "head_only",
        "head_sent",
        "keep_alive",
        "protocol",
        "raw_path",
        "scope",
        "splice",
        "started",
        "transport",
    )

    def __init__(self, protocol: HttpProtocol, head: RequestHead) -> None:
        self.protocol = protocol
        self.transport = protocol.transport
        self.keep_alive = head.keep_alive
        self.head_only = head.method == "HEAD"
        self.raw_path = head.raw_path
        self._http10 = head.version == "1.0"
        self.expects_continue = head.expects_continue  # until 100 is sent or the body comes
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "client": protocol.peer,
            "server": protocol.sockname,
            "extensions": _EXTENSIONS,
        }
        # body
        self._chunks: list[bytes] = []
        self._body_given = False
        self._receive_waiter: Waiter | None = None
        self.body_done = False
        self.buffered = 0
        self.counted = 0  # of server.stats.body_bytes
        # app
        self._coro: Coroutine[Any, Any, None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._blocked: Any = None
        self.started = False
        self.app_done = False
        # answer
        self._start: dict[str, Any] | None = None
        self._left = -1  # bytes of a content-length that the app named; -1 = none
        self.head_sent = False
        self.chunked = False
        self.ended = False
        self.gone = False
        self.splice: Splice | None = None

    # body, called by the protocol

    def push(self, data: bytes, done: bool) -> None:
        """Add received body bytes."""
        if data:
            self._chunks.append(data)
            self.buffered += len(data)
        self.body_done = done
        waiter = self._receive_waiter
        if waiter is not None:
            self._receive_waiter = None
            waiter.wake()

    # driving the app

    def start(self) -> None:
        """Run the app, or its first step."""
        self.started = True
        server = self.protocol.server
        app = server.app
        if server.eager:
            # PERF: a whole body and a whole answer pass without a coroutine each.
            if self.body_done and len(self._chunks) <= 1:
                self.scope["nbgate.body"] = self._chunks[0] if self._chunks else b""
            self.scope["nbgate.answer"] = self.answer
        try:
            coro = app(self.scope, self.receive, self.send)
        except Exception as exc:
            self._finished(exc)
            return
        if server.eager:
            self._coro = coro
            self._step()
        else:
            self._task = task = server.loop.create_task(coro)
            server.tasks.add(task)
            task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.protocol.server.tasks.discard(task)
        exc = None if task.cancelled() else task.exception()
        self._finished(exc)

    def _step(self, _future: object = None) -> None:
        coro = self._coro
        if coro is None:
            return
        self._blocked = None
        outer, Waiter.driven = Waiter.driven, True
        try:
            awaited = coro.send(None)
        except StopIteration:
            Waiter.driven = outer
            self._finished(None)
        except (Exception, asyncio.CancelledError) as exc:
            Waiter.driven = outer
            self._finished(exc)
        else:
            Waiter.driven = outer
            self._suspend(awaited)

    def _suspend(self, awaited: Any) -> None:
        self._blocked = awaited
        if type(awaited) is Waiter:
            awaited.resume = self._step
        elif awaited is None:
            self._blocked = self.protocol.server.loop.call_soon(self._step)
        else:
            # The asyncio protocol of a yielded Future: see asyncio.tasks.Task.__step.
            awaited._asyncio_future_blocking = False
            awaited.add_done_callback(self._step)

    def _cancel(self) -> None:
        """Throw CancelledError into an eager app that sleeps."""
        coro, blocked = self._coro, self._blocked
        if coro is None or blocked is None:
            return
        self._blocked = None
        if type(blocked) is Waiter:
            blocked.resume = None
            blocked.done = True
        elif hasattr(blocked, "remove_done_callback"):
            blocked.remove_done_callback(self._step)
        else:
            blocked.cancel()  # the handle of a bare yield
        outer, Waiter.driven = Waiter.driven, True
        try:
            awaited = coro.throw(asyncio.CancelledError())
        except StopIteration:
            Waiter.driven = outer
            self._finished(None)
        except (Exception, asyncio.CancelledError) as exc:
            Waiter.driven = outer
            self._finished(exc)
        else:
            Waiter.driven = outer
            self._suspend(awaited)

    def _finished(self, exc: BaseException | None) -> None:
        self._coro = self._task = None
        self.app_done = True
        self.scope.pop("nbgate.answer", None)  # it holds this cycle, which holds the scope
        if exc is not None and not (self.gone and isinstance(exc, asyncio.CancelledError)):
            # APPSEC: the raw path, since a decoded one may hold line feeds and escapes.
            logger.error("app failed on %s", self.raw_path[:200].decode("latin-1"), exc_info=exc)
        if not self.gone and not self.ended:
            if not self.head_sent:
                self.refuse(500, "internal_server_error", "The server had an error while processing your request.")
            else:
                self.keep_alive = False
                self.protocol.cut()
        self.protocol.cycle_done(self)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the app."""
        lines, body = self.protocol.server.reject(status, code, message, self.raw_path)
        self.keep_alive = False
        self.respond(status, lines, body)

    # the client leaves

    def client_gone(self) -> None:
        """Tell whoever waits; the app ends by itself."""
        if self.gone:
            return
        self.gone = True
        self.keep_alive = False
        if self.splice is not None:
            self.splice.client_gone()
        elif self._receive_waiter is not None:
            waiter, self._receive_waiter = self._receive_waiter, None
            waiter.wake()
        elif self._coro is not None:
            self._cancel()
        elif not self.started:
            self.app_done = True
            self.protocol.cycle_done(self)

    # ASGI

    async def receive(self) -> dict[str, Any]:
        """Return the next part of the body, or the disconnect."""
        while not self.gone:
            if not self._body_given:
                if self._chunks or self.body_done:
                    return self._take()
                if self.expects_continue and self._start is None:
                    self.expects_continue = False
                    self.write(_CONTINUE)
                    self.protocol.restart_body_clock()
            elif self.ended:
                break
            self._receive_waiter = waiter = Waiter()
            await waiter
        return _DISCONNECT

    def _take(self) -> dict[str, Any]:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self.expects_continue = False
        self._body_given = done = self.body_done
        self.buffered = 0
        if not done:
            self.protocol.body_taken()
        return {"type": "http.request", "body": body, "more_body": not done}

    async def send(self, message: dict[str, Any]) -> None:
        """Take one message of the answer."""
        kind = message["type"]
        if kind == "nbgate.splice":
            if self._start is not None or self.head_sent:
                raise RuntimeError("nbgate.splice after the start of an answer")
            if self.gone:
                message["source"].abort()
                message["outcome"] = "client_gone"
                return
            splice = Splice(self, message)
            self._chunks = []
            self.scope.pop("nbgate.body", None)
            await splice.run(message["status"], message["head"])
            message["outcome"] = splice.outcome
        elif kind == "http.response.start":
            if self._start is not None:
                raise RuntimeError("http.response.start sent twice")
            if not 200 <= message["status"] <= 999:
                raise RuntimeError(f"status {message['status']!r} is not one of a final answer")
            self._start = message
        elif kind == "http.response.body":
            if self._start is None:
                raise RuntimeError("http.response.body before http.response.start")
            await self._body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"unknown ASGI message {kind!r}")

    def answer(self, status: int, lines: bytes, body: bytes) -> str:
        """Take a whole answer; `lines` are ready header lines without framing.

        Returns the outcome: `complete` or `client_gone`.
        """
        if self._start is not None or self.head_sent:
            raise RuntimeError("nbgate.answer after the start of an answer")
        if self.gone:
            return "client_gone"
        self.respond(status, lines, body)
        return "complete"

    async def _body(self, body: bytes, more: bool) -> None:
        if self.gone or self.ended:
            return
        start = self._start
        assert start is not None
        if not self.head_sent:
            lines, length = self._lines(start.get("headers", ()))
            status = start["status"]
            if not more:
                self._check_length(status, length, len(body))
                self.respond(status, lines, body, length)
                return
            self.write(self.head(status, lines, length))
            self._left = -1 if length is None or self.head_only else length
        self._part(body, more)
        if more and self.protocol.paused:
            await self.protocol.writable()

    def _check_length(self, status: int, length: int | None, size: int) -> None:
        if length is not None and length != size and not self.head_only and status not in (204, 304):
            raise RuntimeError(f"content-length said {length}, the body has {size} bytes")

    def _part(self, body: bytes, more: bool) -> None:
        if self._left >= 0:
            left = self._left - len(body)
            if left < 0 or (not more and left):
                raise RuntimeError("the body does not have the length that content-length said")
            self._left = left
        if self.head_only:
            body = b""
        elif self.chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body)) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        if body:
            self.write(body)
        if not more:
            self._end()

    def _end(self) -> None:
        self.ended = True
        if self._receive_waiter is not None:  # a Task of the app waits for the disconnect
            waiter, self._receive_waiter = self._receive_waiter, None
            waiter.wake()

    def _lines(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, int | None]:
        length = None
        out: list[bytes] = []
        for name, value in headers:
            name = name.lower()
            if name in _FRAMING_FIELDS:
                if name == b"content-length":
                    length = wire.parse_length(value)
                elif name == b"connection" and value.lower() == b"close":
                    self.keep_alive = False
                continue
            if not wire.check_response_field(name, value):
                raise RuntimeError(f"response field {name!r} would break the framing")
            out.append(b"%b: %b\r\n" % (name, value))
        return b"".join(out), length

    # writing

    def head(self, status: int, lines: bytes, length: int | None) -> bytes:
        """Return the whole response head; settles framing and keep-alive."""
        protocol = self.protocol
        server = protocol.server
        self.head_sent = True
        if status in (204, 304):
            self.head_only = True
            framing = b""
        elif length is not None:
            framing = b"content-length: %d\r\n" % length
        elif self._http10:
            self.keep_alive = False
            framing = b""
        else:
            self.chunked = not self.head_only
            framing = b"transfer-encoding: chunked\r\n"
        if self.keep_alive and (
            protocol.body is not None or server.draining or server.overloaded or protocol.exhausted()
        ):
            self.keep_alive = False
        if not self.keep_alive:
            connection = b"connection: close\r\n\r\n"
        elif self._http10:
            connection = b"connection: keep-alive\r\n\r\n"
        else:
            connection = b"\r\n"
        return b"".join((wire.status_line(status), lines, server.date_line, framing, connection))

    def respond(self, status: int, lines: bytes, body: bytes, length: int | None = None) -> None:
        """Write a whole answer at once."""
        if self.gone:
            return
        head = self.head(status, lines, len(body) if length is None else length)
        if self.head_only or not body:
            self.transport.write(head)
        elif len(body) <= 65536:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))
        self._end()

    def truncate(self, status: int, lines: bytes, length: int, body: bytes) -> None:
        """Write an answer that its source cut short, and close."""
        self.keep_alive = False
        self.write(self.head(status, lines, length) + body)
        self.ended = True

    def write(self, data: bytes) -> None:
        """Write bytes unless the client is gone."""
        if not self.gone:
            self.transport.write(data)

    # splices

    def spliced(self, splice: Splice) -> None:
        """A splice goes on beyond this call."""
        self.splice = splice
        self.protocol.server.splices.add(splice)
        self.protocol.server.stats.streams += 1
        if self.protocol.paused:
            splice.source.pause()

    def unspliced(self, splice: Splice) -> None:
        """A splice ended."""
        self._end()
        if self.splice is splice:
            self.splice = None
            self.protocol.server.splices.discard(splice)
            self.protocol.server.stats.streams -= 1
