"""The rest of a call: its path, its key, its address; an upstream's refusal."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import unquote_to_bytes

import orjson
from fuzzkit import Target, split_mode

from nbgate import auth, errors, routes
from nbgate.errors import GateError

METHODS = ("POST", "GET", "DELETE", "HEAD", "PATCH")
SAFE_PATH = re.compile(rb"(?:/[A-Za-z0-9_.:=~%-]+)*")
FAMILIES = ("openai", "claude", "gemini")


def path(data: bytes) -> None:
    """Only GateError comes out; the upstream's path is safe and of the route's own shape."""
    mode, data = split_mode(data, len(METHODS))
    method = METHODS[mode]
    known = routes.methods(data)
    try:
        match = routes.find(data, method)
    except GateError as exc:
        assert exc.message.isprintable() and len(exc.message) < 1000
        for name, value in errors.error_headers(exc):
            assert re.fullmatch(rb"[\t\x20-\x7e]*", value), (name, value)
        orjson.loads(errors.error_body(exc, "openai", "id"))
        assert exc.kind != "method_not_allowed" or (known and method not in known)
        return
    assert method in known and method in match.route.methods
    up = match.upstream_path
    assert SAFE_PATH.fullmatch(up), up
    assert up.count(b"/") == match.route.upstream_path.count("/"), "a parameter made segments"
    assert not {b"..", b"."} & set(unquote_to_bytes(up).split(b"/"))
    for value in match.params.values():
        assert value.isprintable() or match.route.path.endswith(":path}")


def query(data: bytes) -> None:
    """What is taken for a key is neither logged nor sent upstream, and all else is."""
    mode, data = split_mode(data, len(FAMILIES))
    if b"\n" in data or b"#" in data:  # no query has them
        return
    key = auth.pick_key(FAMILIES[mode], (None, None, None), data)
    logged = auth.redact_query(data)
    sent = auth.strip_query(data)
    assert auth.redact_query(logged) == logged
    for family in FAMILIES:
        again = auth.pick_key(family, (None, None, None), logged)
        assert again in (None, b"***") or again.startswith(b"***"), "a key in the log"
        assert auth.pick_key(family, (None, None, None), sent) is None, "a key goes upstream"
    if key is not None and len(key) >= 8:
        raw = next(p for p in data.split(b"&") if unquote_to_bytes(p.partition(b"=")[2]) == key).partition(b"=")[2]
        for part in re.split(rb"[&;?]", raw):
            assert len(part) < 8 or data.count(part) > 1 or part not in logged, "part of a key in the log"
    kept = [p for p in data.split(b"&") if b"=" not in p]
    if data and not any(unquote_to_bytes(p).lower() in (b"key", b"api_key") for p in kept):
        assert [p for p in sent.split(b"&") if b"=" not in p and p] == [p for p in kept if p]


def key(data: bytes) -> None:
    """Headers in, key out: it is a piece of one of them, without blanks around it."""
    mode, data = split_mode(data, len(FAMILIES))
    lines = [line or None for line in (data.split(b"\n") + [b""] * 4)[:4]]
    found = auth.pick_key(FAMILIES[mode], (lines[0], lines[1], lines[2]), lines[3] or b"")
    if found is not None:
        assert found
        headers = b"\n".join(line for line in lines[:3] if line)
        assert found in headers or found in unquote_to_bytes(lines[3] or b"")
    protocol = auth.pick_protocol_key(lines[0])
    assert protocol is None or (protocol and protocol in (lines[0] or b""))
    auth.Directory().find(found or b"")


PROXIES = ("10.0.0.0/8", "::1", "fd00::/8", "unix:")


def address(data: bytes) -> None:
    """The caller's address is the peer's or parses as one; only trusted peers are believed."""
    peer, _, forwarded = data.partition(b"\n")
    name = peer.decode("latin-1")
    proxies = auth.Proxies(PROXIES)
    found = auth.peer_address(name, forwarded, proxies)
    assert found == auth.peer_address(name, forwarded, proxies), "kept answers differ"
    if found != name:
        ip_address(found)
        assert proxies.trusts(name)
    assert auth.peer_address(name, forwarded, auth.Proxies()) == name


SECRET = "sk-live-0123456789abcdefABCDEF"
HOST = "api.provider-x.example"
MODEL = "gpt-hidden-1"
MASK = errors.Mask((SECRET,), (HOST,), MODEL, "gpt-public")
# NOTE: what touched a key that is stars now had no end of its own.
OWN_HOST = re.compile(r"(?<![\w*-])" + re.escape(HOST) + r"(?![\w*-])", re.IGNORECASE)
OWN_MODEL = re.compile(r"(?<![\w.*-])" + re.escape(MODEL) + r"(?![\w.:/@*-])")


def refusal(data: bytes) -> None:
    """A foreign error becomes one of ours and names neither key, host nor model.

    `{K}`, `{H}` and `{M}` in the input stand for these.
    """
    mode, data = split_mode(data, len(FAMILIES))
    for mark, text in ((b"{K}", SECRET), (b"{H}", HOST), (b"{M}", MODEL)):
        data = data.replace(mark, text.encode())
    status = (400, 401, 404, 429, 500, 529)[len(data) % 6]
    told = orjson.loads(errors.masked(data, status, FAMILIES[mode], MASK, "req-1"))
    inner = told["error"]
    assert isinstance(inner["message"], str) and inner["message"]
    for text in (v for v in (*inner.values(), *told.values()) if isinstance(v, str)):
        assert SECRET not in text and SECRET[:12] not in text, text
        assert not OWN_HOST.search(text), text
        assert not OWN_MODEL.search(text), text
    assert len(inner["message"]) <= 4 * errors.MESSAGE_MAX


TARGETS: dict[str, Target] = {"path": path, "query": query, "key": key, "address": address, "refusal": refusal}
