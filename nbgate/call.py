"""One request of a client on its way through the data plane.

What lives here: `Call`, the context that every later room shares: who asks,
what the headers said, how to answer, what is written into the log in the end.
What must not: routing, upstreams, retries. Heat: R.

Law: the caller's credentials are read here and go nowhere else.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from nbgate.auth import KeyRecord, check, peer_address, pick_key
from nbgate.errors import GateError, error_body, error_headers
from nbgate.logs import CallRecord

if TYPE_CHECKING:
    from nbgate.allowance import Allowance
    from nbgate.app import App, State
    from nbgate.routes import Match

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

monotonic = time.monotonic

# The request fields that matter, by slot; every other one is dropped unseen.
(
    AUTHORIZATION,
    X_API_KEY,
    X_GOOG_API_KEY,
    FORWARDED_FOR,
    REQUEST_ID,
    CONTENT_TYPE,
    CONTENT_ENCODING,
    USER_AGENT,
    ORIGIN,
    ANTHROPIC_VERSION,
    FIRST_FORWARDED,
) = range(11)
_FORWARDED: Final = (
    b"accept",
    b"anthropic-beta",
    b"openai-beta",
    b"openai-organization",
    b"openai-project",
    b"idempotency-key",
    b"traceparent",
)
_SLOTS: Final[dict[bytes, int]] = {
    b"authorization": AUTHORIZATION,
    b"x-api-key": X_API_KEY,
    b"x-goog-api-key": X_GOOG_API_KEY,
    b"x-forwarded-for": FORWARDED_FOR,
    b"x-request-id": REQUEST_ID,
    b"content-type": CONTENT_TYPE,
    b"content-encoding": CONTENT_ENCODING,
    b"user-agent": USER_AGENT,
    b"origin": ORIGIN,
    b"anthropic-version": ANTHROPIC_VERSION,
    **{name: FIRST_FORWARDED + i for i, name in enumerate(_FORWARDED)},
}
_EMPTY: Final[list[bytes | None]] = [None] * (FIRST_FORWARDED + len(_FORWARDED))
_SAFE_ID: Final = re.compile(rb"[A-Za-z0-9._:=/+@~-]{1,128}")
_JSON: Final = b"application/json"
# PERF: whole blocks of forwarded lines by what they are made of; clients of one kind send the same ones.
_blocks: dict[tuple[bytes | None, ...], bytes] = {}
_BLOCKS_MAX: Final = 1024
INFLATE_RATIO: Final = 10


class ClientGone(Exception):
    """The client left before it was answered."""


class Call:
    """Everything about one request that more than one room needs."""

    __slots__ = (
        "allowance",
        "app",
        "begun",
        "key",
        "match",
        "peer",
        "receive",
        "record",
        "request_id",
        "reserved",
        "scope",
        "send",
        "started",
        "state",
        "stores",
        "values",
    )

    def __init__(self, app: App, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.started = monotonic()
        self.app = app
        self.state: State = app.state
        self.scope = scope
        self.receive = receive
        self.send = send
        values = _EMPTY.copy()
        for name, value in scope["headers"]:
            slot = _SLOTS.get(name)
            if slot is not None:
                known = values[slot]
                if known is None:
                    values[slot] = value
                elif slot == FORWARDED_FOR or slot > FIRST_FORWARDED:
                    values[slot] = known + b", " + value
        self.values = values
        given = values[REQUEST_ID]
        if given is not None and _SAFE_ID.fullmatch(given) is not None:
            self.request_id = given.decode("ascii")
        else:
            self.request_id = app.next_id()
        client = scope["client"]
        self.peer: str = client[0] if client else ""
        if values[FORWARDED_FOR] is not None:
            self.peer = peer_address(self.peer, values[FORWARDED_FOR], self.state.proxies)
        self.match: Match | None = None
        self.key: KeyRecord | None = None
        self.allowance: Allowance | None = None
        self.reserved = 0
        self.begun = False  # an answer has begun: nothing else can be said
        self.stores = False  # the upstream keeps the answer under an id
        query: bytes = scope["query_string"]
        raw_path: bytes = scope["raw_path"]
        self.record = CallRecord(
            started=self.started,
            request_id=self.request_id,
            method=scope["method"],
            target=raw_path + b"?" + query if query else raw_path,
            peer=self.peer,
        )

    # who asks

    @property
    def family(self) -> str:
        """Give the client family whose error shape is used."""
        match = self.match
        if match is not None:
            return match.route.family
        raw: bytes = self.scope["raw_path"]
        return "claude" if b"/messages" in raw else "openai"

    def authenticate(self, family: str) -> KeyRecord:
        """Find the caller's record. Raises: GateError 401."""
        values = self.values
        state = self.state
        key = pick_key(
            family,
            (values[AUTHORIZATION], values[X_API_KEY], values[X_GOOG_API_KEY]),
            self.scope["query_string"],
            state.allow_query_key,
        )
        record = state.directory.find(key) if key is not None else None
        if record is None:
            raise GateError("invalid_api_key")
        self.key = record
        log = self.record
        log.key = record.display
        log.account = record.account_id
        if not record.plain:
            self.check(None)
        return record

    def check(self, model: str | None) -> None:
        """Let the caller pass or not; None = no model yet. Raises: GateError 401, 403."""
        key = self.key
        assert key is not None
        if not key.plain:
            check(key, now_s=time.time(), peer=self.peer, endpoint=self.record.operation, model=model)

    def admit(self, tokens: int) -> None:
        """Take the caller's rates. Raises: GateError 429."""
        assert self.key is not None
        now = self.started
        allowance = self.app.allowances.of(self.key, now)
        self.allowance = allowance
        if allowance.limited:
            refusal = allowance.take(now, tokens)
            if refusal is not None:
                self.allowance = None
                error = refusal.error()
                if refusal.elsewhere:  # another worker may hold what this one has no share of
                    error.headers.append((b"connection", b"close"))
                error.headers += allowance.header_list(now, time.time(), claude=self.family == "claude")
                raise error
            self.reserved = tokens
        else:
            self.allowance = None

    # the body

    async def body(self) -> bytes:
        """Read the whole body. Raises: ClientGone, GateError 413, 415."""
        message = await self.receive()
        if message["type"] != "http.request":
            raise ClientGone
        data: bytes = message["body"]
        if message["more_body"]:
            data = await self._rest(data)
        return self.decoded(data)

    def decoded(self, data: bytes) -> bytes:
        """Undo a content-encoding. Raises: GateError 400, 413, 415."""
        self.record.bytes_in = len(data)
        encoding = self.values[CONTENT_ENCODING]
        if encoding is not None and encoding.lower() != b"identity":
            data = inflate(data, encoding.lower(), self.state.max_body_bytes)
        return data

    async def _rest(self, first: bytes) -> bytes:
        parts = [first]
        size = len(first)
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                raise ClientGone
            parts.append(message["body"])
            size += len(message["body"])
            if size > self.state.max_body_bytes:
                raise GateError("request_too_large")
            if not message["more_body"]:
                return b"".join(parts)

    def forwarded_lines(self) -> bytes:
        """Write the request fields that go on to an upstream, with CRLF."""
        values = self.values
        picked = (values[CONTENT_TYPE], *values[FIRST_FORWARDED:])
        block = _blocks.get(picked)
        if block is None:
            lines = [b"content-type: %b\r\n" % (picked[0] or _JSON)]
            lines += [b"%b: %b\r\n" % (n, v) for n, v in zip(_FORWARDED, picked[1:], strict=True) if v is not None]
            block = b"".join(lines)
            if len(_blocks) < _BLOCKS_MAX and len(block) < 512 and picked[-1] is None and picked[-2] is None:
                _blocks[picked] = block
        return block

    # answers

    def id_lines(self, claude: bool) -> bytes:
        """Write the request id fields of an answer, with CRLF."""
        text = self.request_id.encode("ascii")
        lines = b"x-request-id: %b\r\n" % text
        if claude:
            lines += b"request-id: %b\r\n" % text
        return lines + self.cors_lines() if self.values[ORIGIN] is not None else lines

    def cors_lines(self) -> bytes:
        """Write the CORS fields for an allowed origin, else nothing."""
        origin = self.values[ORIGIN]
        origins = self.state.cors
        if origin is None or not origins or not (origin in origins or b"*" in origins):
            return b""
        return b"access-control-allow-origin: %b\r\nvary: origin\r\naccess-control-expose-headers: *\r\n" % origin

    async def answer(
        self, status: int, content_type: bytes, body: bytes, more: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Send a whole answer of our own."""
        text = self.request_id.encode("ascii")
        headers = [(b"content-type", content_type), (b"x-request-id", text)]
        if self.family == "claude":
            headers.append((b"request-id", text))
        if more:
            headers += more
        if self.values[ORIGIN] is not None:
            lines = self.cors_lines().split(b"\r\n")
            headers += [(n, v) for n, _, v in (line.partition(b": ") for line in lines if line)]
        self.begun = True
        log = self.record
        log.status = status
        log.bytes_out = len(body)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, error: GateError) -> None:
        """Send an error in the client's dialect."""
        log = self.record
        log.error = error.code
        log.error_source = error.source
        log.outcome = "refused" if error.source == "client" else "failed"
        body = error_body(error, self.family, self.request_id)
        await self.answer(error.status, _JSON, body, error_headers(error))

    def close(self) -> None:
        """Write what happened into log and metrics, give back what is held."""
        now = monotonic()
        log = self.record
        log.duration_s = now - self.started
        if self.allowance is not None:
            self.allowance.settle(now, self.reserved, sum(log.usage))
        agent = self.values[USER_AGENT]
        if agent is not None:
            log.user_agent = agent
        self.app.note(log)


def inflate(data: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """Decode a compressed request body, bounded.

    At most ten times the size received and at most `max_bytes`. Raises:
    GateError 413, 415, 400.
    """
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        raise GateError("unsupported_media_type", "The content-encoding is not supported; send it plain or as gzip.")
    bound = min(max_bytes, max(len(data) * INFLATE_RATIO, 1024))
    decoder = zlib.decompressobj(47 if encoding != b"deflate" else 15)
    try:
        out = decoder.decompress(data, bound + 1)
    except zlib.error:
        raise GateError("invalid_request_error", "The body does not decode as its content-encoding says.") from None
    if len(out) > bound:
        raise GateError("request_too_large", "The decoded body is too large.")
    if not decoder.eof or decoder.unused_data:
        raise GateError("invalid_request_error", "The body does not decode as its content-encoding says.")
    return out
