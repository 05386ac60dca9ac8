"""Is this answer good, whose fault is it, and may another be asked?

What lives here: when an answer can be judged (`ready`), the verdict on a
missing or bad one (`Failure`), and what of an upstream's refusal goes on to the
client. What must not: sending, waiting, retrying. Heat: R.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbgate.errors import GateError, Mask, masked
from nbgate.meter import first_event, is_error_event, is_error_json

if TYPE_CHECKING:
    from nbgate.call import Call
    from nbgate.outbound import Outbound
    from nbgate.upstream import Connection, UpstreamError

HELD_BYTES: Final = 64 * 1024  # of an answer that is looked at before it goes on
_SECONDS: Final = re.compile(rb"[0-9]{1,9}")


class Failure(NamedTuple):
    """Why a try gave no answer.

    `again`: another target may be asked. `strike`: it counts against the
    target. `free`: trying again costs no retry budget. `limits`: it may concern
    the request, so it cools down only this credential for this model. With
    `error` None, `status`, `body` and `headers` are the upstream's own.
    """

    error: GateError | None
    again: bool = False
    strike: bool = False
    free: bool = False
    limits: bool = False
    status: int = 0
    body: bytes = b""
    retry_after_s: float | None = None


def ready(conn: Connection) -> bool:
    """Tell whether enough of an answer is there to judge it."""
    if conn.complete:
        return True
    content_type = conn.headers.get(b"content-type", b"")
    if conn.status < 400 and content_type.startswith(b"text/event-stream"):
        return first_event(conn.buffered) is not None
    if conn.status < 400 and b"json" not in content_type:
        return True
    return conn.received >= HELD_BYTES


_TIMEOUTS: Final = frozenset(("timeout_first_byte", "timeout_idle", "timeout_total"))
_DIAL: Final = frozenset(("dial", "dns", "tls", "timeout_connect"))


def no_answer(exc: UpstreamError, stream: bool, head_seen: bool) -> Failure:
    """Judge an answer that did not come at all, or not whole."""
    kind = exc.kind
    if kind == "busy":
        return Failure(GateError("service_unavailable", retry_after_s=1.0), again=True, free=True)
    if kind in _DIAL:
        error = GateError("upstream_timeout" if kind == "timeout_connect" else "upstream_error")
        return Failure(error, again=True, strike=True, free=True)
    if kind in _TIMEOUTS:
        # NOTE: a non-streaming call may have been worked on, and be paid: never twice.
        return Failure(GateError("upstream_timeout"), again=stream and kind == "timeout_first_byte", strike=True)
    return Failure(GateError("upstream_error"), again=not head_seen, strike=True)


def answer(conn: Connection, dialect: str) -> Failure | None:
    """Judge an answer that came; None = good."""
    status = conn.status
    if 200 <= status < 300:
        return _hidden_error(conn, dialect)
    body = conn.buffered[:HELD_BYTES]
    wait = retry_after(conn.headers)
    if status in (401, 402):
        # APPSEC: our own credential's trouble is never the client's to read.
        error = GateError("service_unavailable", source="upstream")
        return Failure(error, again=True, limits=True, status=status, retry_after_s=wait)
    if status in (403, 429):
        return Failure(None, again=True, limits=True, status=status, body=body, retry_after_s=wait)
    if status >= 500:
        return Failure(_server_error(status, wait), True, True, False, False, status, body, wait)
    if status < 200 or 300 <= status < 400:
        return Failure(GateError("upstream_error"), again=True, strike=True, status=status)
    return Failure(None, again=False, status=status, body=body, retry_after_s=wait)


def _server_error(status: int, wait: float | None) -> GateError | None:
    if status == 529:
        return None  # Anthropic's own "overloaded" goes on as it is
    if status == 503:
        return GateError("service_unavailable", source="upstream", retry_after_s=wait)
    return GateError("upstream_timeout" if status == 504 else "upstream_error")


def _hidden_error(conn: Connection, dialect: str) -> Failure | None:
    """Find the error that hides behind a 200."""
    content_type = conn.headers.get(b"content-type", b"")
    if content_type.startswith(b"text/event-stream"):
        event = first_event(conn.buffered)
        if event is not None and b"error" in event and is_error_event(event, dialect):
            return Failure(GateError("upstream_error"), again=True, strike=True, status=conn.status)
    elif conn.complete and b"json" in content_type:
        data = conn.buffered
        if b'"error"' in data and is_error_json(data):
            return Failure(GateError("upstream_error"), again=True, strike=True, status=conn.status)
    return None


def retry_after(headers: dict[bytes, bytes]) -> float | None:
    """Read how long an upstream wants us to wait, in seconds."""
    value = headers.get(b"retry-after-ms")
    if value is not None and _SECONDS.fullmatch(value):
        return int(value) / 1000.0
    value = headers.get(b"retry-after")
    if value is not None and _SECONDS.fullmatch(value):
        return float(int(value))
    return None


def passed_on(
    failure: Failure, call: Call, out: Outbound, names: dict[str, Any]
) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Write an upstream's own refusal for our client: status, body, headers."""
    headers: list[tuple[bytes, bytes]] = []
    if failure.retry_after_s is not None and failure.status in (429, 529):
        headers.append((b"retry-after", b"%d" % max(1, round(failure.retry_after_s + 0.499))))
        headers.append((b"retry-after-ms", b"%d" % (failure.retry_after_s * 1000)))
    if names["verbatim"]:
        return failure.status, failure.body, headers
    mask = Mask(secrets=out.secrets, hosts=out.hosts, model=names["model"], public=names["public"])
    return failure.status, masked(failure.body, failure.status, call.family, mask, call.request_id), headers
