"""An upstream's good answer on its way to the client.

What lives here: the pipe that fits it, the head that goes before it, delivery
under a server without the splice extension, and what is noted at its end.
What must not: choosing, retrying, judging. Heat: R.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from nbgate.call import ORIGIN, Call, ClientGone, monotonic
from nbgate.dialects import DIALECTS, Usage
from nbgate.meter import JsonPipe, RawPipe, SsePipe
from nbgate.server.waiter import Waiter
from nbgate.upstream import UpstreamError

if TYPE_CHECKING:
    from nbgate.relay import Plan
    from nbgate.upstream import Connection

_SSE_HEAD: Final = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
)
# Of the upstream's own fields only these go on (and the content type, above).
_KEPT: Final = (b"content-disposition", b"content-language")
_BYTES_PER_TOKEN: Final = 3


Answer = Callable[[int, bytes, bytes], str]


class MeteredPipe(Protocol):
    """A pipe that knows in the end what passed through it."""

    delivered: int
    error: bool

    @property
    def usage(self) -> Any: ...
    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...
    def fail(self, exc: Exception) -> bytes: ...


def pipe_for(call: Call, plan: Plan, conn: Connection) -> MeteredPipe:
    """Choose the pipe by what the answer is, not by what was asked for."""
    dialect = plan.match.route.dialect
    headers = conn.headers
    content_type = headers.get(b"content-type", b"")
    if content_type.startswith(b"text/event-stream"):
        fields = plan.fields
        return SsePipe(
            dialect,
            hide_usage=fields is not None and not fields.asked_usage,
            hold_bytes=call.state.hold_bytes,
            request_id=call.request_id,
            cut_shows=b"transfer-encoding" in headers or b"content-length" in headers,
        )
    if b"json" in content_type:
        return JsonPipe(dialect)
    return RawPipe()


async def deliver(call: Call, plan: Plan, conn: Connection, pipe: MeteredPipe) -> None:
    """Bring a good answer to the client, and note how it ended.

    Raises: ClientGone. Cancellation: the upstream is aborted.
    """
    call.begun = True
    log = call.record
    log.status = conn.status
    head = _head(call, plan, conn)
    answer: Answer | None = call.scope.get("nbgate.answer")
    if conn.complete and answer is not None:
        # PERF: a whole answer needs no splice: read, write, note.
        body = pipe.feed(conn.buffered) + pipe.finish() if conn.received else b""
        _settle(call, pipe, conn, answer(conn.status, head, body))
        return
    stream = isinstance(pipe, SsePipe)
    length = conn.headers.get(b"content-length")
    message: dict[str, Any] = {
        "type": "nbgate.splice",
        "status": conn.status,
        "head": head,
        "source": conn,
        "pipe": pipe,
        "length": int(length) if length is not None and not stream and not conn.complete else None,
        "keepalive": DIALECTS[plan.match.route.dialect].ping if stream else b"",
        "outcome": "",
    }
    try:
        if "nbgate.splice" in call.scope.get("extensions", ()):
            await call.send(message)
        else:
            await without_splice(call, message)
    finally:
        _settle(call, pipe, conn, message["outcome"])


def _head(call: Call, plan: Plan, conn: Connection) -> bytes:
    """Write the head of an answer, but for its framing."""
    headers = conn.headers
    content_type = headers.get(b"content-type", b"application/octet-stream")
    log = call.record
    now = monotonic()
    log.upstream_s = now - conn.sent_at
    log.overhead_s = overhead_s = conn.sent_at - call.started
    text = call.request_id.encode("ascii")
    processing_ms = int((now - call.started) * 1000)
    if content_type.startswith(b"text/event-stream"):
        head = b"%bx-request-id: %b\r\nopenai-processing-ms: %d\r\n" % (_SSE_HEAD, text, processing_ms)
    else:
        head = b"content-type: %b\r\nx-request-id: %b\r\nopenai-processing-ms: %d\r\nx-nbgate-overhead-ms: %.3f\r\n" % (
            content_type,
            text,
            processing_ms,
            overhead_s * 1000,
        )
    if plan.claude:
        head += b"request-id: %b\r\n" % text
    allowance = call.allowance
    if allowance is not None:
        head += allowance.headers(call.started, call.app.wall() if plan.claude else 0.0, claude=plan.claude)
    for name in _KEPT:
        if name in headers:
            head += b"%b: %b\r\n" % (name, headers[name])
    if call.values[ORIGIN] is not None:
        head += call.cors_lines()
    return head


def _settle(call: Call, pipe: MeteredPipe, conn: Connection, outcome: str) -> None:
    """Note what was delivered and used, whatever the end was."""
    log = call.record
    log.outcome = outcome or "client_gone"
    log.bytes_out = pipe.delivered
    log.first_byte_s = conn.first_byte_at - call.started if conn.first_byte_at else 0.0
    if outcome != "complete":
        if outcome == "upstream_failed":
            log.error, log.error_source = "upstream_error", "upstream"
        elif outcome == "drained":
            log.error, log.error_source = "service_unavailable", "gate"
        else:
            log.status = 499
            log.error, log.error_source = "client_closed_request", "client"
    elif pipe.error:  # told in the upstream's own words
        log.error, log.error_source = "upstream_error", "upstream"
    usage = pipe.usage
    if usage is not None:
        log.usage = counters(usage)
    elif outcome != "complete" and call.match is not None and call.match.route.billed == "usage":
        made = pipe.delivered // _BYTES_PER_TOKEN
        log.usage = (log.bytes_in // _BYTES_PER_TOKEN, 0, 0, 0, made, 0, 0, 0, 0, 0)
        log.estimated = True


def counters(usage: Usage) -> tuple[int, ...]:
    """Return the counters of a usage in the order of `logs.USAGE_KINDS`."""
    return (
        usage.input,
        usage.cached_read,
        usage.cached_write,
        usage.cached_write_1h,
        usage.output,
        usage.reasoning,
        usage.audio_in,
        usage.audio_out,
        usage.image_in,
        usage.image_out,
    )


# servers without the extension


class _Inbox:
    """Collect what a source delivers, for an app that sends messages itself."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.parts: list[bytes] = []
        self.outcome = ""
        self.waiter: Waiter | None = None

    def feed(self, data: bytes) -> None:
        out = self.pipe.feed(data)
        if out:
            self.parts.append(out)
            self.wake()

    def finish(self) -> None:
        self._end(self.pipe.finish(), "complete")

    def fail(self, exc: Exception) -> None:
        self._end(self.pipe.fail(exc), "upstream_failed")

    def _end(self, last: bytes, outcome: str) -> None:
        if last:
            self.parts.append(last)
        self.outcome = outcome
        self.wake()

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.wake()


async def without_splice(call: Call, splice: dict[str, Any]) -> None:
    """Deliver by plain ASGI messages; slower, for foreign servers.

    Raises: UpstreamError for a cut answer that has no way to say so.
    Cancellation: the upstream is aborted.
    """
    source = splice["source"]
    inbox = _Inbox(splice["pipe"])
    lines: bytes = splice["head"]
    headers = [(n, v) for n, _, v in (line.partition(b": ") for line in lines.split(b"\r\n") if line)]
    try:
        await call.send({"type": "http.response.start", "status": splice["status"], "headers": headers})
        source.attach(inbox)
        while True:
            ended = inbox.outcome
            body, inbox.parts = b"".join(inbox.parts), []
            if body:
                source.pause()
                await call.send({"type": "http.response.body", "body": body, "more_body": True})
                source.resume()
            elif ended:
                break
            else:
                inbox.waiter = Waiter()
                await inbox.waiter
        splice["outcome"] = ended
        if ended == "upstream_failed" and not splice["keepalive"]:
            raise UpstreamError("lost", "the answer was cut")  # the server cuts the connection
        await call.send({"type": "http.response.body", "body": b""})
    finally:
        source.abort()


async def attended(call: Call, work: Callable[[Call], Awaitable[None]]) -> None:
    """Do the work of a call, and cancel it when its client leaves.

    nbgate's own server throws `CancelledError` into an app whose client left;
    others only answer `receive`, so that someone must ask. The work runs in a
    task of its own. Raises: ClientGone, and what the work raises. Cancellation:
    the work is cancelled, and over when this ends.
    """
    ears = _Ears(call)
    task = asyncio.ensure_future(work(call))
    watcher = asyncio.ensure_future(ears.departure())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        left = not task.done()
        if left:
            task.cancel()
            await asyncio.wait((task,))
    if left and (task.cancelled() or task.exception() is not None):
        raise ClientGone
    task.result()


class _Ears:
    """Hear the departure of a client, once its body was read.

    `receive` may have one caller at a time: first the call, for the body.
    """

    def __init__(self, call: Call) -> None:
        self._receive = call.receive
        self._read = asyncio.Event()
        self._gone = False
        if call.scope["method"] == "POST":
            call.receive = self.receive
        else:
            self._read.set()

    async def receive(self) -> dict[str, Any]:
        """Hand on a part of the body."""
        message = await self._receive()
        self._gone = message["type"] != "http.request"
        if self._gone or not message.get("more_body"):
            self._read.set()
        return message

    async def departure(self) -> None:
        """Return when the client has left."""
        await self._read.wait()
        while not self._gone:
            self._gone = (await self._receive())["type"] != "http.request"
