"""One call from admission to settlement, and the only retry loop.

Phases of a call: plan (read the body, find who serves it) → admit (the
caller's rates) → try (choose, send, judge; again on another target as the
failover law allows) → deliver (splice) → settle (usage, marks, log).

The failover law: a call is tried again only while no byte of an answer went to
the client, on a target not yet tried, within the retry budget. A reused
connection that died at once is no failure of the target: the same one is asked
once more. A non-streaming call is never repeated after a timeout.

What lives here: that law and the phases. What must not: framing, dialects,
arithmetic. Heat: R.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from nbgate import body as bodies
from nbgate import deliver, judge
from nbgate.auth import strip_query
from nbgate.call import ANTHROPIC_VERSION, Call, monotonic
from nbgate.channels import FREE_FAILURES, Candidates, Dice, Target, choose, forgive, mark_failed, mark_limited, mark_ok
from nbgate.errors import GateError
from nbgate.judge import Failure
from nbgate.outbound import Outbound, version_line
from nbgate.upstream import Connection, UpstreamError

if TYPE_CHECKING:
    from nbgate.body import Fields
    from nbgate.routes import Match

logger = logging.getLogger("nbgate.relay")

_STALE_S: Final = 1.0  # a reused connection that dies later may have worked, and been paid


class Plan:
    """What is to be sent, and to whom it may go."""

    __slots__ = ("claude", "fields", "found", "match", "model", "path", "raw", "stream")

    def __init__(self, match: Match, path: bytes) -> None:
        self.match = match
        self.path = path
        self.claude = match.route.family == "claude"
        self.fields: Fields | None = None
        self.found: Candidates = Candidates((), {})
        self.model = ""
        self.raw = b""
        self.stream = False


async def relay(call: Call) -> None:
    """Serve one call from an upstream.

    Raises: GateError for what the client is told, ClientGone. Cancellation: the
    upstream is aborted and the client's departure is logged.
    """
    raw = b""
    if call.scope["method"] == "POST":
        # PERF: a small body is there with its head, and costs no coroutine then.
        ready: bytes | None = call.scope.get("nbgate.body")
        raw = await call.body() if ready is None else call.decoded(ready)
    plan = _plan(call, raw)
    raw = b""
    _admit(call, plan)
    app = call.app
    app.budget.call(call.started)
    tried: list[Target] = []
    failures: list[Failure] = []
    tries = call.state.tries
    while len(tried) < tries:
        target = choose(plan.found, plan.model, tried, Dice(monotonic() if tried else call.started, app.random))
        if target is None or (failures and not _may_retry(call, failures[-1], tried[-1])):
            break
        tried.append(target)
        failure = await _try(call, plan, target)
        if failure is None:
            return
        failures.append(failure)
        if not failure.again:
            break
    await _give_up(call, plan, tried, failures)


def _may_retry(call: Call, failure: Failure, target: Target) -> bool:
    """Ask the retry budget; dial failures and a target's first ones are free."""
    if failure.free or (target.strikes <= FREE_FAILURES and not target.outs):
        return True
    return call.app.budget.allows(monotonic())


# plan


def _plan(call: Call, raw: bytes) -> Plan:
    """Read what is asked and find who serves it. Raises: GateError 400, 403, 404."""
    match = call.match
    assert match is not None
    route = match.route
    query: bytes = call.scope["query_string"]
    path = match.upstream_path
    if query:
        kept = strip_query(query)
        path = path + b"?" + kept if kept else path
    plan = Plan(match, path)
    log = call.record
    if raw or (route.billed == "usage" and call.scope["method"] == "POST"):
        plan.raw = raw
        plan.fields = fields = bodies.read(raw, route.dialect, stored=bool(match.params))
        log.stream = plan.stream = fields.stream
        log.model = plan.model = fields.model or call.state.default_models.get(route.dialect, "")
        store = fields.store
        call.stores = route.dialect == "responses" if store is None else store
    call.check(plan.model or None)
    _find(call, plan)
    return plan


def _find(call: Call, plan: Plan) -> None:
    """Find the targets of a call. Raises: GateError 400, 404."""
    assert call.key is not None
    state = call.state
    route = plan.match.route
    stated = call.app.pins.stated_id(plan.match, plan.fields)
    if stated:
        plan.found = call.app.pins.target(stated, call.key.account_id, state.table)
        return
    if plan.model:
        plan.found = state.table.candidates(plan.model, route.dialect, call.key.groups)
        if not plan.found.tiers:
            raise _nobody_serves(call, plan)
        call.record.model_known = True
        return
    if not state.default_channel:
        if plan.match.route.billed == "usage":
            raise GateError("missing_model", param="model")
        raise GateError("missing_model", "This call names no model, and the station has no default channel.")
    plan.found = state.table.named(state.default_channel)


def _nobody_serves(call: Call, plan: Plan) -> GateError:
    assert call.key is not None
    name = plan.model[:100]
    if call.state.table.knows(plan.model, call.key.groups):
        text = f"The model `{name}` is not served at this endpoint."
    else:
        text = f"The model `{name}` does not exist or you do not have access to it."
    return GateError("model_not_found", text, param="model")


def _admit(call: Call, plan: Plan) -> None:
    """Take the caller's rates. Raises: GateError 429."""
    key = call.key
    assert key is not None
    tokens = 0
    if key.limits.tpm or key.account_limits.tpm:
        # An estimate without a tokenizer: bytes / 3 + what may come out.
        fields = plan.fields
        if fields is not None:
            tokens = len(plan.raw) // 3 + min(fields.max_tokens or 1024, 1024) * (fields.n or 1)
    call.admit(tokens)


# try


async def _try(call: Call, plan: Plan, target: Target) -> Failure | None:
    """Send to one target and deliver its answer; or say how it failed."""
    out: Outbound = target.wire
    log = call.record
    log.channel = target.name
    log.attempts += 1
    parts = _parts(call, plan, target)
    timeouts = out.stream if plan.stream else out.plain
    pool = call.app.pool
    fresh = False
    target.in_flight += 1
    try:
        while True:
            conn = None if fresh else pool.idle(out.endpoint)
            try:
                if conn is None:
                    conn = await pool.acquire(out.endpoint, timeouts.connect_s, fresh)
                conn.send(parts, timeouts, judge.ready, call.state.keepalive_s if plan.stream else 0.0)
                await conn.answer()
                break
            except UpstreamError as exc:
                if fresh or not _is_stale(exc):
                    return _failed(call, plan.stream, target, exc, conn is not None and conn.status != 0)
                fresh = True
            except asyncio.CancelledError:
                if conn is not None:
                    conn.abort()
                raise
        failure = judge.answer(conn, plan.match.route.dialect)
        if failure is not None:
            return _refused(plan, target, conn, failure)
        mark_ok(target)
        if call.stores:
            call.app.pins.note(conn, plan.match.route.dialect, target, call)
        pipe = deliver.pipe_for(call, plan, conn)
        plan.raw, plan.fields, parts = b"", None, []  # a stream may be long: what was sent is not kept
        await deliver.deliver(call, plan, conn, pipe)
        return None
    finally:
        target.in_flight -= 1


def _is_stale(exc: UpstreamError) -> bool:
    return exc.reused and exc.kind == "lost" and not exc.bytes_read and exc.since_write_s < _STALE_S


def _parts(call: Call, plan: Plan, target: Target) -> list[bytes]:
    """Return the request for one target: its head, then the body's pieces."""
    out: Outbound = target.wire
    head = out.head(call.scope["method"], plan.path, plan.claude)
    lines = call.forwarded_lines()
    if plan.claude:
        lines += version_line(call.values[ANTHROPIC_VERSION])
    fields = plan.fields
    if fields is None:
        if call.scope["method"] != "POST":
            return [head + lines + b"\r\n"]
        return [b"%b%bcontent-length: 0\r\n\r\n" % (head, lines)]
    public = plan.model
    name = plan.found.upstream_models.get(target.name, public)
    pieces = fields.forward(name.encode() if name != public else None, plan.stream)
    if len(pieces) == 1:
        body = pieces[0]
        start = b"%b%bcontent-length: %d\r\n\r\n" % (head, lines, len(body))
        return [start + body] if len(body) < 4096 else [start, body]
    return [b"%b%bcontent-length: %d\r\n\r\n" % (head, lines, sum(map(len, pieces))), *pieces]


def _failed(call: Call, stream: bool, target: Target, exc: UpstreamError, head_seen: bool) -> Failure:
    """Judge an answer that did not come."""
    failure = judge.no_answer(exc, stream, head_seen)
    if failure.strike:
        _strike(target)
    logger.info("call %s on %s: %s", call.request_id, target.label, exc)
    return failure


def _strike(target: Target) -> None:
    if mark_failed(target, monotonic()):
        logger.warning("channel %s is out after failures in a row", target.label)


def _refused(plan: Plan, target: Target, conn: Connection, failure: Failure) -> Failure:
    """Let go of a bad answer, and mark the target for it."""
    conn.abort()
    if failure.strike:
        _strike(target)
    elif failure.limits:
        mark_limited(target, plan.model, monotonic(), failure.retry_after_s)
    return failure


# give up


async def _give_up(call: Call, plan: Plan, tried: list[Target], failures: list[Failure]) -> None:
    """Answer with the last failure, or with what all channels said alike."""
    if not failures:
        raise GateError("service_unavailable", "No channel for this model is available.", retry_after_s=5.0)
    last = failures[-1]
    if last.limits and all(f.status == last.status for f in failures):
        forgive(tried, plan.model)
    if last.error is not None:
        raise last.error
    out: Outbound = tried[-1].wire
    names: dict[str, Any] = {
        "model": plan.found.upstream_models.get(tried[-1].name, plan.model),
        "public": plan.model,
    }
    verbatim = tried[-1].channel.upstream_errors == "verbatim"
    status, body, headers = judge.passed_on(last, call, out, {**names, "verbatim": verbatim})
    log = call.record
    log.error = f"upstream_{last.status}"
    log.error_source = "upstream"
    log.outcome = "upstream_refused"
    await call.answer(status, b"application/json", body, headers)
