"""An upstream's good answer on its way to the client.

What lives here: the pipe that fits it, the head that goes before it, delivery
under a server without the splice extension, and what is noted at its end.
What must not: choosing, retrying, judging. Heat: R.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Protocol

from nbgate.call import ORIGIN, Call, ClientGone, monotonic
from nbgate.dialects import DIALECTS, Usage
from nbgate.errors import GateError
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


class MeteredPipe(Protocol):
    """A pipe that knows in the end what passed through it."""

    delivered: int

    @property
    def usage(self) -> Any: ...
    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...
    def fail(self, exc: Exception) -> bytes: ...


class GatePipe:
    """Word the failures of an upstream for the dialect's own error event."""

    __slots__ = ("feed", "finish", "inner")

    def __init__(self, inner: MeteredPipe) -> None:
        self.inner = inner
        # PERF: the inner pipe's own methods, so that a chunk costs one call and not two.
        self.feed = inner.feed
        self.finish = inner.finish

    @property
    def mid_frame(self) -> bool:
        """Tell whether a frame is only partly out."""
        return bool(getattr(self.inner, "mid_frame", False))

    def fail(self, exc: Exception) -> bytes:
        """Return the last bytes of a broken answer."""
        return self.inner.fail(gate_error(exc))


def gate_error(exc: Exception) -> GateError:
    """Map what ended an answer to what the client is told."""
    if isinstance(exc, GateError):
        return exc
    if isinstance(exc, UpstreamError):
        return GateError("upstream_timeout" if exc.kind.startswith("timeout") else "upstream_error")
    return GateError("service_unavailable")


def pipe_for(call: Call, plan: Plan, conn: Connection) -> MeteredPipe:
    """Choose the pipe by what the answer is, not by what was asked for."""
    dialect = plan.match.route.dialect
    content_type = conn.headers.get(b"content-type", b"")
    if content_type.startswith(b"text/event-stream"):
        fields = plan.fields
        hide = fields is not None and not fields.asked_usage
        return SsePipe(dialect, hide_usage=hide, hold_bytes=call.state.hold_bytes, request_id=call.request_id)
    if b"json" in content_type:
        return JsonPipe(dialect)
    return RawPipe()


def message(call: Call, plan: Plan, conn: Connection, pipe: MeteredPipe) -> dict[str, Any]:
    """Return the splice message: head, source, pipe."""
    headers = conn.headers
    content_type = headers.get(b"content-type", b"application/octet-stream")
    stream = content_type.startswith(b"text/event-stream")
    log = call.record
    now = monotonic()
    log.upstream_s = now - conn.sent_at
    log.overhead_s = overhead_s = conn.sent_at - call.started
    text = call.request_id.encode("ascii")
    processing_ms = int((now - call.started) * 1000)
    if stream:
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
    length = headers.get(b"content-length")
    plain = length is not None and not stream and not conn.complete
    return {
        "type": "nbgate.splice",
        "status": conn.status,
        "head": head,
        "source": conn,
        "pipe": GatePipe(pipe) if stream else pipe,
        "length": int(length) if plain and length is not None else None,
        "keepalive": DIALECTS[plan.match.route.dialect].ping if stream else b"",
        "outcome": "",
    }


def settle(call: Call, pipe: MeteredPipe, conn: Connection, sent: dict[str, Any]) -> None:
    """Note what was delivered and used, whatever the end was."""
    log = call.record
    outcome = sent["outcome"] or "client_gone"
    log.outcome = outcome
    log.bytes_out = pipe.delivered
    log.first_byte_s = conn.first_byte_at - call.started if conn.first_byte_at else 0.0
    if outcome == "client_gone":
        log.status = 499
        log.error, log.error_source = "client_closed_request", "client"
    elif outcome == "upstream_failed":
        log.error, log.error_source = "upstream_error", "upstream"
    usage = pipe.usage
    if usage is not None:
        log.usage = counters(usage)
    elif log.status < 400 or outcome != "complete":
        log.usage = (0, 0, 0, 0, pipe.delivered // _BYTES_PER_TOKEN, 0, 0, 0, 0, 0)
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

    Raises: ClientGone. Cancellation: the upstream is aborted.
    """
    source = splice["source"]
    inbox = _Inbox(splice["pipe"])
    lines: bytes = splice["head"]
    headers = [(n, v) for n, _, v in (line.partition(b": ") for line in lines.split(b"\r\n") if line)]
    watcher = asyncio.ensure_future(_watch(call, inbox))
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
        if ended == "client_gone":
            raise ClientGone
        if ended == "upstream_failed" and not splice["keepalive"]:
            raise UpstreamError("lost", "the answer was cut")  # the server cuts the connection
        await call.send({"type": "http.response.body", "body": b""})
    finally:
        watcher.cancel()
        source.abort()


async def _watch(call: Call, inbox: _Inbox) -> None:
    """Wait for the client's departure."""
    while (await call.receive())["type"] != "http.disconnect":
        pass
    if not inbox.outcome:
        inbox.outcome = "client_gone"
        inbox.wake()
