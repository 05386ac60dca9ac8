"""Every error nbgate answers with, and how each client family reads it.

What lives here: the table of errors, `GateError`, the bytes and headers that
carry one to a client of the OpenAI, Claude or Gemini family, as a whole body
or in the middle of a stream, and the masking of an upstream's own errors.
What must not: I/O, clocks, retries. Heat: cold; errors are the exception.

Law: a client sees only the table's names and a message written here or masked;
never a trace, a key or an upstream's address.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack

import orjson

Family = Literal["openai", "claude", "gemini"]
Source = Literal["client", "gate", "upstream"]
Retry = Literal["no", "yes", "if_reused"]

LONG_WAIT_S: Final = 60.0  # the official SDKs wait at most this long by themselves
MAX_WAIT_S: Final = 31 * 86_400.0


class Row(NamedTuple):
    """One kind of error: what each family calls it and whose it is."""

    status: int
    code: str
    type: str
    claude_type: str
    gemini_status: str
    message: str
    source: Source = "client"
    retry: Retry = "no"


def _bad(message: str, code: str = "invalid_request_error", status: int = 400) -> Row:
    return Row(status, code, "invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT", message)


def _denied(code: str, message: str) -> Row:
    return Row(403, code, "permission_error", "permission_error", "PERMISSION_DENIED", message)


def _absent(code: str, message: str) -> Row:
    return Row(404, code, "invalid_request_error", "not_found_error", "NOT_FOUND", message)


ERRORS: Final[dict[str, Row]] = {
    "invalid_request_error": _bad("The request is malformed."),
    "invalid_json": _bad("The request body is not valid JSON.", "invalid_json"),
    "missing_model": _bad("You must provide a model parameter.", "missing_model"),
    "invalid_type": _bad("A parameter has the wrong type.", "invalid_type"),
    "invalid_value": _bad("A parameter is out of range.", "invalid_value"),
    "ambiguous_parameter": _bad("A parameter is named twice in different case.", "ambiguous_parameter"),
    "unsupported_parameter": _bad("A parameter is not supported here.", "unsupported_parameter"),
    "unpriced": _bad("A tier or tool of this request has no price here.", "unpriced"),
    "invalid_api_key": Row(
        401, "invalid_api_key", "authentication_error", "authentication_error", "UNAUTHENTICATED",
        "Incorrect or missing API key. Pass it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
    ),
    "insufficient_quota": Row(
        402, "insufficient_quota", "insufficient_quota", "billing_error", "FAILED_PRECONDITION",
        "The balance or the budget of this key is used up.",
    ),
    "account_disabled": _denied("account_disabled", "This account is disabled."),
    "ip_not_allowed": _denied("ip_not_allowed", "This key may not be used from your address."),
    "model_not_allowed": _denied("model_not_allowed", "This key may not use this model or endpoint."),
    "permission_denied": _denied("permission_denied", "This key may not do that."),
    "model_not_found": _absent("model_not_found", "The model does not exist or you do not have access to it."),
    "not_found": _absent("not_found", "There is nothing at this path."),
    "method_not_allowed": _bad("This path does not take this method.", "method_not_allowed", 405),
    "request_timeout": _bad("The request did not arrive in time.", "request_timeout", 408),
    "length_required": _bad("The request needs a content-length.", "length_required", 411),
    "request_too_large": Row(
        413, "request_too_large", "invalid_request_error", "request_too_large", "INVALID_ARGUMENT",
        "The request body is too large.",
    ),
    "uri_too_long": _bad("The request path is too long.", "uri_too_long", 414),
    "unsupported_media_type": _bad("The content type or encoding is not supported.", "unsupported_media_type", 415),
    "headers_too_large": _bad("The request headers are too large.", "headers_too_large", 431),
    "rate_limit_exceeded": Row(
        429, "rate_limit_exceeded", "rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED",
        "Rate limit exceeded. Please retry after {seconds} seconds. (rate_limit_exceeded)",
    ),
    # NOTE: never on the wire, only in logs and usage rows.
    "client_closed_request": Row(
        499, "client_closed_request", "invalid_request_error", "invalid_request_error", "CANCELLED",
        "The client closed the connection.",
    ),
    "internal_server_error": Row(
        500, "internal_server_error", "api_error", "api_error", "INTERNAL",
        "The gateway had an error while processing your request.", "gate",
    ),
    "upstream_error": Row(
        502, "upstream_error", "api_error", "api_error", "UNAVAILABLE",
        "The model's provider could not be reached or answered badly.", "upstream", "yes",
    ),
    "service_unavailable": Row(
        503, "service_unavailable", "api_error", "overloaded_error", "UNAVAILABLE",
        "The service is temporarily unavailable. Please retry shortly.", "gate",
    ),
    "upstream_timeout": Row(
        504, "upstream_timeout", "api_error", "timeout_error", "DEADLINE_EXCEEDED",
        "The model's provider did not answer in time.", "upstream",
    ),
}  # fmt: skip


class _More(TypedDict, total=False):
    source: Source
    retry: Retry
    retry_after_s: float | None
    headers: Iterable[tuple[bytes, bytes]]


class GateError(Exception):
    """Say what went wrong, whose fault it is, and whether to try again.

    `kind` is a key of `ERRORS`; what is not given comes from that row.
    `source` and `retry` are for the failover law, `retry_after_s` (float
    seconds or None) and `headers` (extra response headers) for the client.
    """

    __slots__ = ("headers", "kind", "message", "param", "retry", "retry_after_s", "source")

    def __init__(self, kind: str, message: str = "", param: str | None = None, **more: Unpack[_More]) -> None:
        row = ERRORS[kind]
        self.kind = kind
        self.param = param
        self.source: Source = more.get("source", row.source)
        self.retry: Retry = more.get("retry", row.retry)
        self.retry_after_s = more.get("retry_after_s")
        self.headers: list[tuple[bytes, bytes]] = list(more.get("headers", ()))
        if not message:
            message = row.message
            if kind == "rate_limit_exceeded":
                message = message.format(seconds=max(1, math.ceil(_wait_s(self))))
        self.message = message
        super().__init__(f"{kind}: {message}")

    @property
    def row(self) -> Row:
        """Give the table's row of this kind."""
        return ERRORS[self.kind]

    @property
    def status(self) -> int:
        """Give the HTTP status."""
        return ERRORS[self.kind].status

    @property
    def code(self) -> str:
        """Give the public error code."""
        return ERRORS[self.kind].code


def _wait_s(err: GateError) -> float:
    """Bound the wait that a client is told, in seconds; 1 where unknown."""
    wait = err.retry_after_s
    if wait is None or not wait >= 0.0:  # also NaN
        return 1.0
    return min(wait, MAX_WAIT_S)


def error_headers(err: GateError) -> list[tuple[bytes, bytes]]:
    """List the headers that go with an error, its own extra ones last."""
    out: list[tuple[bytes, bytes]] = []
    status = err.status
    if status == 429 or status == 503:
        wait = _wait_s(err)
        out.append((b"retry-after", b"%d" % math.ceil(wait)))
        out.append((b"retry-after-ms", b"%d" % math.ceil(wait * 1000.0)))
        if wait > LONG_WAIT_S:
            out.append((b"x-should-retry", b"false"))
    elif status == 402:
        out.append((b"x-should-retry", b"false"))
    out.extend(err.headers)
    return out


def _safe(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def dump(obj: dict[str, Any]) -> bytes:
    """Encode an error object, whatever its strings hold.

    NOTE: orjson refuses lone surrogates, which may come from a client's path.
    """
    try:
        return orjson.dumps(obj)
    except TypeError:
        inner = obj["error"] if isinstance(obj.get("error"), dict) else obj
        for key, value in inner.items():
            if isinstance(value, str):
                inner[key] = _safe(value)
        for key, value in obj.items():
            if isinstance(value, str):
                obj[key] = _safe(value)
        return orjson.dumps(obj)


def _message(err: GateError, request_id: str) -> str:
    """Give the message; our own faults quote the request id."""
    if err.status == 500 and request_id:
        return f"{err.message} (request id: {request_id})"
    return err.message


def shape(row: Row, message: str, family: str, more: tuple[str | None, str]) -> bytes:
    """Write one error body; `more` is (param, request id).

    Sources: openai.APIError reads message, type, param, code from `error`;
    anthropic reads `error.type`; google-genai reads `error.status`.
    """
    param, request_id = more
    if family == "claude":
        inner: dict[str, Any] = {"type": row.claude_type, "message": message, "code": row.code}
        return dump({"type": "error", "error": inner, "request_id": request_id})
    if family == "gemini":
        return dump({"error": {"code": row.status, "message": message, "status": row.gemini_status}})
    return dump({"error": {"message": message, "type": row.type, "param": param, "code": row.code}})


def error_body(err: GateError, family: str, request_id: str) -> bytes:
    """Write the JSON body of an error answer for a client family."""
    return shape(err.row, _message(err, request_id), family, (err.param, request_id))


def stream_error(err: GateError, dialect: str, request_id: str, sequence_number: int | None = None) -> bytes:
    """Write the frame that ends a begun stream; b"" where none exists.

    Never followed by `[DONE]`: a client that waits for it knows it was cut.
    """
    if dialect == "messages":
        return b"event: error\ndata: " + error_body(err, "claude", request_id) + b"\n\n"
    if dialect == "responses":
        event: dict[str, Any] = {
            "type": "error",
            "code": err.code,
            "message": _message(err, request_id),
            "param": err.param,
        }
        if sequence_number is not None:
            event["sequence_number"] = sequence_number
        return b"event: error\ndata: " + dump(event) + b"\n\n"
    if dialect == "chat" or dialect == "completions" or dialect == "images":
        return b"data: " + error_body(err, "openai", request_id) + b"\n\n"
    if dialect == "gemini":
        return b"data: " + error_body(err, "gemini", request_id) + b"\n\n"
    return b""


# ---- an upstream's own 4xx, made fit for our client ----

FOREIGN_MAX_BYTES: Final = 65_536  # a longer error body is not read
MESSAGE_MAX: Final = 4_096

_BY_STATUS: Final[dict[int, str]] = {
    400: "invalid_request_error", 401: "invalid_api_key", 402: "insufficient_quota", 403: "permission_denied",
    404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 411: "length_required",
    413: "request_too_large", 414: "uri_too_long", 415: "unsupported_media_type", 429: "rate_limit_exceeded",
    431: "headers_too_large", 502: "upstream_error", 503: "service_unavailable", 504: "upstream_timeout",
}  # fmt: skip
_CODE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}\Z")
_PARAM: Final = re.compile(r"[A-Za-z0-9_.\[\]\"'-]{1,200}\Z")

# APPSEC: one pass over at most MESSAGE_MAX characters; each branch starts only
# where a word starts and none nests a repeat in a repeat over the same letters.
_GENERIC: Final = r"""
  (?P<told>(?i:api[\ _-]?key\ provided:?\s*|bearer\s+))\S{1,512}
| (?P<key>(?<![\w-])(?:sk|pk|rk|gsk|xai|AIza|ya29|hf)[-_.*…](?=[\w*.…-]{3})[\w*…-]{0,512}(?:\.+[\w*…-]{1,512}){0,8}
  |(?<![\w-])AIza[\w-]{8,512})
| (?P<cut>(?<![\w*…-])[\w-]{0,64}(?:\*{3,512}|(?<=\w)…|(?<=\w)\.{3})(?=[\w-]{2})[\w-]{1,64}|\*{4,512})
| (?P<url>(?<![\w])(?:https?|wss?)://[^\s"'<>\\)\]}]{1,2048})
| (?P<org>(?<![\w-])(?:org|proj|projects/|organizations/)(?:(?<=/)|[-_])[\w-]{3,128})
| (?P<ids>(?<![\w-])(?:user|acct|account)[-_](?=[A-Za-z_-]{0,64}[0-9])[\w-]{3,128}|arn:aws[\w:/.-]{4,512})
| (?P<host>(?<![\w.@-])(?:[\w-]{1,63}\.){1,8}(?:com|net|org|io|ai|cn|dev|app|cloud|internal|local|svc)
    (?![\w-])(?::\d{1,5})?
  |(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?(?![\w.]))
"""
_SHOWN_AS: Final = {"key": "sk-***", "cut": "***", "url": "[url]", "org": "[id]", "ids": "[id]", "host": "[host]"}


class Mask(NamedTuple):
    """What must not be read in a foreign error, and the model's two names."""

    secrets: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    model: str = ""
    public: str = ""


class _Foreign(NamedTuple):
    """What could be read of a foreign error."""

    message: str
    type: str
    param: str | None
    code: str


@lru_cache(maxsize=256)
def _pattern(secrets: tuple[str, ...], hosts: tuple[str, ...], model: str) -> re.Pattern[str]:
    parts: list[str] = []
    exact = [re.escape(s) for s in secrets if s]
    # A provider shows the first letters of a key and dots or stars.
    exact += [re.escape(s[:7]) + r"[\w*.…-]{0,512}" for s in secrets if len(s) >= 16]
    if exact:
        parts.append("(?P<secret>" + "|".join(exact) + ")")
    if model:
        parts.append(r"(?P<model>(?<![\w.-])" + re.escape(model) + r"(?!\w|[-.:/@]\w))")
    if hosts:
        names = "|".join(re.escape(h) for h in sorted(hosts, key=len, reverse=True) if h)
        parts.append(r"(?P<own>(?<![\w-])(?i:" + names + r")(?![\w-])(?::\d{1,5})?)" if names else "(?!)")
    parts.append(_GENERIC)
    # Literals hold no unescaped blank or #: re.escape covers both for re.X.
    return re.compile("|".join(parts), re.VERBOSE)


def mask_text(text: str, mask: Mask) -> str:
    """Replace keys, hosts, URLs, ids and the upstream's model name."""

    def shown(found: re.Match[str]) -> str:
        kind = found.lastgroup or ""
        if kind == "model":
            return mask.public or mask.model
        if kind == "secret":
            return "***"
        if kind == "told":
            return found["told"] + "***"
        return _SHOWN_AS.get(kind, "[host]")

    return _pattern(mask.secrets, mask.hosts, mask.model).sub(shown, text[:MESSAGE_MAX])


def _word(value: object) -> str:
    return value if isinstance(value, str) and _CODE.match(value) else ""


def _read_foreign(body: bytes) -> _Foreign:
    """Read an error of any provider's shape; what is absent stays empty."""
    none = _Foreign("", "", None, "")
    if len(body) > FOREIGN_MAX_BYTES:
        return none
    try:
        obj = orjson.loads(body)
    except orjson.JSONDecodeError:
        return none
    if isinstance(obj, list) and obj:
        obj = obj[0]
    if not isinstance(obj, dict):
        return none
    inner = obj.get("error", obj)
    if isinstance(inner, str):
        return _Foreign(inner, "", None, _word(obj.get("code")))
    if not isinstance(inner, dict):
        return none
    message = next((v for k in ("message", "detail", "msg") if isinstance(v := inner.get(k), str) and v), "")
    param = inner.get("param")
    kind = _word(inner.get("type"))
    code = _word(inner.get("code"))
    return _Foreign(message, kind, param if isinstance(param, str) and _PARAM.match(param) else None, code)


def masked(body: bytes, status: int, family: str, mask: Mask, request_id: str) -> bytes:
    """Rewrite an upstream's error body for our client; cost is bounded.

    The result has the client family's shape, complete with `code` and `type`,
    and says nothing of keys, hosts, URLs, ids or the upstream's model name.
    Only known members go on: providers put their own trouble into the others.
    """
    kind = _BY_STATUS.get(status, "invalid_request_error" if status < 500 else "upstream_error")
    row = ERRORS[kind]._replace(status=status)
    foreign = _read_foreign(body)
    code = _word(mask_text(foreign.code, mask)) or row.code
    row = row._replace(code=code, type=_word(mask_text(foreign.type, mask)) or row.type)
    if family == "claude" and foreign.type in _CLAUDE_TYPES:
        row = row._replace(claude_type=foreign.type)
    message = mask_text(foreign.message, mask)
    if not message:
        message = f"The model's provider refused the request with status {status}."
    param = mask_text(foreign.param, mask) if foreign.param else None
    return shape(row, message, family, (param, request_id))


_CLAUDE_TYPES: Final = frozenset(row.claude_type for row in ERRORS.values())
