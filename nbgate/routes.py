"""Every path nbgate serves, in one table, and the way from a raw path to it.

What lives here: `ROUTES`, `find`, `nearest`. Documentation and metric labels
are drawn from the same table. What must not: behaviour of an endpoint.
Heat: R.

Law: what goes to an upstream is built from a row's template and from ids that
passed a safe-token check, never from the client's own path.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple
from urllib.parse import quote

from nbgate.errors import GateError

Billed = Literal["usage", "fixed", "job", "free"]

PATH_MAX_BYTES: Final = 2_048
SEGMENTS_MAX: Final = 24
SHOWN_MAX: Final = 100

_HEX: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_TOKEN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:=~-]{0,511}\Z")


class Route(NamedTuple):
    """One path with its methods.

    `path` has no `/v1`; `{id}` is one safe token, `{id:path}` the rest.
    `dialect` is "" where no upstream speaks; `upstream_path` then too, else it
    is relative to the provider's version root (`…/v1`) and may hold `{id}`.
    `exact` rows have no forgiving forms: a proxy may guard the plain path.
    """

    path: str
    methods: tuple[str, ...]
    dialect: str
    operation: str
    family: str
    billed: Billed
    upstream_path: str
    auth: bool = True
    exact: bool = False


def _openai(path: str, method: str, dialect: str, operation: str, billed: Billed) -> Route:
    return Route(path, (method,), dialect, operation, "openai", billed, path)


def _own(path: str, operation: str, *, auth: bool = False, exact: bool = False) -> Route:
    return Route(path, ("GET", "HEAD"), "", operation, "openai", "free", "", auth, exact)


ROUTES: Final[tuple[Route, ...]] = (
    _openai("/chat/completions", "POST", "chat", "chat.create", "usage"),
    _openai("/chat/completions", "GET", "chat", "chat.list", "free"),
    _openai("/chat/completions/{id}", "GET", "chat", "chat.get", "free"),
    _openai("/chat/completions/{id}", "POST", "chat", "chat.update", "free"),
    _openai("/chat/completions/{id}", "DELETE", "chat", "chat.delete", "free"),
    _openai("/chat/completions/{id}/messages", "GET", "chat", "chat.messages", "free"),
    _openai("/responses", "POST", "responses", "responses.create", "usage"),
    _openai("/responses/compact", "POST", "responses", "responses.compact", "usage"),
    _openai("/responses/input_tokens", "POST", "responses", "responses.input_tokens", "free"),
    _openai("/responses/{id}", "GET", "responses", "responses.get", "free"),
    _openai("/responses/{id}", "DELETE", "responses", "responses.delete", "free"),
    _openai("/responses/{id}/cancel", "POST", "responses", "responses.cancel", "free"),
    _openai("/responses/{id}/input_items", "GET", "responses", "responses.input_items", "free"),
    Route("/messages", ("POST",), "messages", "messages.create", "claude", "usage", "/messages"),
    Route(
        "/messages/count_tokens", ("POST",), "messages", "messages.count_tokens", "claude", "free",
        "/messages/count_tokens",
    ),
    _openai("/completions", "POST", "completions", "completions.create", "usage"),
    _openai("/embeddings", "POST", "embeddings", "embeddings.create", "usage"),
    _openai("/moderations", "POST", "moderations", "moderations.create", "fixed"),
    _openai("/images/generations", "POST", "images", "images.generate", "usage"),
    _own("/models", "models.list", auth=True),
    _own("/models/{id:path}", "models.get", auth=True),
    _own("/v1beta/models", "models.list", auth=True)._replace(family="gemini"),
    _own("/v1beta/models/{id:path}", "models.get", auth=True)._replace(family="gemini"),
    _own("/", "home"),
    _own("/healthz", "health.live"),
    _own("/readyz", "health.ready"),
    _own("/health/liveliness", "health.live"),
    _own("/health/readiness", "health.ready"),
    # APPSEC: exact, so that a proxy's rule for /metrics cannot be walked around.
    _own("/metrics", "metrics", exact=True),
)  # fmt: skip


class Match:
    """A route found, its parameters, and the path for the upstream.

    Shared between requests where nothing varies: never change one.
    """

    __slots__ = ("params", "route", "upstream_path")

    def __init__(self, route: Route, params: dict[str, str], upstream_path: bytes) -> None:
        self.route = route
        self.params = params
        self.upstream_path = upstream_path


class _Template:
    """A path with parameters, cut into segments, with its rows by method."""

    __slots__ = ("rest", "rows", "segments")

    def __init__(self, path: str) -> None:
        self.segments = path.strip("/").split("/")
        self.rest = path.endswith(":path}")
        self.rows: dict[str, Route] = {}

    def params(self, segments: list[str]) -> dict[str, str] | None:
        """Give the parameters if the segments fit, else None."""
        own = self.segments
        if len(segments) != len(own) and not (self.rest and len(segments) > len(own)):
            return None
        found: dict[str, str] = {}
        for at, want in enumerate(own):
            if want.startswith("{"):
                last = self.rest and at == len(own) - 1
                value = "/".join(segments[at:]) if last else segments[at]
                if not last and _TOKEN.match(value) is None:
                    return None
                found[want.strip("{}").removesuffix(":path")] = value
            elif want != segments[at]:
                return None
        return found


def _tables() -> tuple[dict[bytes, dict[str, Match]], dict[str, dict[str, Match]], list[_Template]]:
    """Index the table: raw paths, normal paths, templates."""
    raw: dict[bytes, dict[str, Match]] = {}
    normal: dict[str, dict[str, Match]] = {}
    templates: dict[str, _Template] = {}
    for route in ROUTES:
        if "{" in route.path:
            template = templates.setdefault(route.path, _Template(route.path))
            template.rows.update(dict.fromkeys(route.methods, route))
            continue
        match = Match(route, {}, route.upstream_path.encode())
        methods = dict.fromkeys(route.methods, match)
        forms = [route.path] if route.exact else [route.path, "/v1" + route.path]
        for form in forms:
            raw.setdefault(form.encode(), {}).update(methods)
        if not route.exact:
            normal.setdefault(route.path, {}).update(methods)
    return raw, normal, list(templates.values())


_RAW, _NORMAL, _TEMPLATES = _tables()


def find(raw_path: bytes, method: str) -> Match:
    """Find the route of a raw path, without its query, and a method.

    Raises GateError: `not_found` naming the nearest known path,
    `method_not_allowed` with an `allow` header, `invalid_request_error` for a
    path that no client sends by mistake.
    """
    # PERF: one dict of bytes for the plain forms, 0.1 us.
    rows = _RAW.get(raw_path)
    if rows is not None:
        match = rows.get(method)
        if match is not None:
            return match
        raise _wrong_method(raw_path, method, rows)
    return _find_slow(raw_path, method)


def methods(raw_path: bytes) -> tuple[str, ...]:
    """List the methods that a path takes, () if it is unknown."""
    rows = _RAW.get(raw_path)
    if rows is not None:
        return tuple(rows)
    try:
        segments = _segments(raw_path)
    except GateError:
        return ()
    static = _NORMAL.get("/" + "/".join(segments))
    if static is not None:
        return tuple(static)
    return tuple(next((t.rows for t in _TEMPLATES if t.params(segments) is not None), ()))


def _find_slow(raw_path: bytes, method: str) -> Match:
    segments = _segments(raw_path)
    static = _NORMAL.get("/" + "/".join(segments))
    if static is not None:
        match = static.get(method)
        if match is not None:
            return match
        raise _wrong_method(raw_path, method, static)
    for template in _TEMPLATES:
        params = template.params(segments)
        if params is None:
            continue
        route = template.rows.get(method)
        if route is None:
            raise _wrong_method(raw_path, method, template.rows)
        return Match(route, params, _fill(route.upstream_path, params))
    raise _unknown(raw_path, method)


def _segments(raw_path: bytes) -> list[str]:
    """Cut a path into clean segments, forgiving what base URLs do to it."""
    if len(raw_path) > PATH_MAX_BYTES:
        raise GateError("uri_too_long")
    if not raw_path.startswith(b"/"):
        raise GateError("invalid_request_error", "The request path must begin with a slash.")
    if raw_path.count(b"/") > SEGMENTS_MAX:
        raise _unknown(raw_path, "")
    segments = [_decoded(part) for part in raw_path.split(b"/") if part]
    if segments[:2] == ["v1beta", "openai"]:
        del segments[:2]
    while segments and segments[0] == "v1":
        del segments[0]
    # APPSEC: an escaped slash may name a model; no other parameter may hold one (_TOKEN).
    for segment in segments:
        if segment in (".", "..") or any(part in (".", "..") for part in segment.split("/")):
            raise GateError("not_found", "The request path may not hold `.` or `..` segments.")
    return segments


def _decoded(part: bytes) -> str:
    """Undo percent-encoding, once and strictly."""
    if b"%" in part:
        if _BAD_ESCAPE.search(part):
            raise GateError("invalid_request_error", "The request path has a broken percent-escape.")
        part = _HEX.sub(lambda found: bytes((int(found[1], 16),)), part)
    if _CONTROL.search(part) or b"\\" in part:
        raise GateError("invalid_request_error", "The request path has a control character or a backslash.")
    try:
        return part.decode()
    except UnicodeDecodeError:
        raise GateError("invalid_request_error", "The request path is not UTF-8.") from None


def _fill(template: str, params: dict[str, str]) -> bytes:
    for name, value in params.items():
        template = template.replace("{" + name + "}", quote(value, safe=":=~"))
    return template.encode()


def _wrong_method(raw_path: bytes, method: str, rows: dict[str, Match] | dict[str, Route]) -> GateError:
    allow = ", ".join(rows)
    text = f"{_shown(raw_path)} takes {allow}, not {method[:16]}."
    return GateError("method_not_allowed", text, headers=[(b"allow", allow.encode())])


def _unknown(raw_path: bytes, method: str) -> GateError:
    text = f"There is nothing at {method[:16]} {_shown(raw_path)}. The nearest known path is {nearest(raw_path)}."
    return GateError("not_found", text.replace("  ", " "))


def _shown(raw_path: bytes) -> str:
    """Make a path fit for a message: short, ASCII, no controls."""
    text = raw_path[:SHOWN_MAX].decode("ascii", "backslashreplace")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text + ("…" if len(raw_path) > SHOWN_MAX else "")


def _pairs(text: str) -> frozenset[str]:
    return frozenset(text[i : i + 2] for i in range(len(text) - 1))


_KNOWN: Final = tuple(
    ("/v1" + route.path.replace(":path}", "}"), _pairs(route.path))
    for route in {r.path: r for r in ROUTES if r.auth}.values()
)


def nearest(raw_path: bytes) -> str:
    """Name the known path that shares most letter pairs with this one.

    PERF: pair sets, not edit distance: a flood of unknown paths stays cheap.
    """
    text = raw_path[:SHOWN_MAX].decode("ascii", "replace").lower()
    pairs = _pairs(text.replace("/v1", ""))
    best, score = "/v1/chat/completions", 0.2
    for path, known in _KNOWN:
        likeness = 2.0 * len(pairs & known) / (len(pairs) + len(known) or 1)
        if likeness > score:
            best, score = path, likeness
    return best
