"""What a client sends: one request head, one chunked body."""

from __future__ import annotations

import re

from fuzzkit import Target, pieces, read_chunks

from nbgate.server.head import RequestHead
from nbgate.server.wire import ChunkedBody, WireError

MAX_HEADERS = 20
MAX_BODY = 4096
NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def _read_head(parts: list[bytes]) -> RequestHead | WireError:
    head = RequestHead()
    try:
        for part in parts:
            head.feed(part)
        head.finish(MAX_HEADERS, b"".join(parts))
    except WireError as exc:
        return exc
    return head


def _by_hand(data: bytes) -> tuple[bytes, bytes, bytes, list[tuple[bytes, bytes]]]:
    """Read a head in the plain way; whoever accepts more than this repairs."""
    first, *lines = data[:-4].split(b"\r\n")
    method, target, version = first.split(b" ")
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        assert colon and not CONTROL.search(value), line
        fields.append((name.lower(), value.strip(b" \t")))
    return method, target, version, fields


def head(data: bytes) -> None:
    """Only WireError comes out; what is accepted is what stands there; cuts change nothing."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        _read_head([data])
        return
    data = data[:end]
    whole = _read_head([data])
    for salt in (0, 1):
        cut = _read_head(pieces(data, salt))
        assert isinstance(cut, WireError) == isinstance(whole, WireError), (whole, cut)
        if isinstance(whole, RequestHead) and isinstance(cut, RequestHead):
            for name in ("method", "raw_path", "query", "headers", "length", "keep_alive", "expects_continue"):
                assert getattr(whole, name) == getattr(cut, name), name
    if isinstance(whole, WireError):
        assert 400 <= whole.status < 600
        return
    method, target, version, fields = _by_hand(data)
    assert whole.method.encode() == method and version == b"HTTP/" + whole.version.encode()
    assert whole.headers == fields, (whole.headers, fields)
    assert all(NAME.fullmatch(name) for name, _ in fields)
    assert len(fields) <= MAX_HEADERS
    if target[:1] == b"/":
        assert whole.raw_path + (b"?" if b"?" in target else b"") + whole.query == target
    hosts = [value for name, value in fields if name == b"host"]
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    assert len(hosts) <= 1 and (hosts or whole.version == "1.0")
    assert len(lengths) + len(codings) <= 1, "framing in doubt"
    assert whole.length == (-1 if codings else int(lengths[0]) if lengths else 0)


Outcome = tuple[str, bytes, bytes]


def _decode(parts: list[bytes]) -> Outcome:
    body = ChunkedBody(MAX_BODY)
    out: list[bytes] = []
    for at, part in enumerate(parts):
        try:
            out.append(body.feed(part))
        except WireError:
            return "refused", b"", b""
        if body.done:
            return "done", b"".join(out), body.rest + b"".join(parts[at + 1 :])
    return "open", b"".join(out), b""


def chunked(data: bytes) -> None:
    """Cuts change nothing; what is accepted is what a plain decoder reads."""
    whole = _decode([data])
    for salt in (0, 1, 2):
        cut = _decode(pieces(data, salt))
        assert cut == whole, (whole, cut)
    kind, body, rest = whole
    if kind == "done":
        found = read_chunks(data)
        assert found is not None, "accepted, but a plain decoder cannot read it"
        assert body == found[0] and rest == data[found[1] :], (found, body, rest)
        assert len(body) <= MAX_BODY


TARGETS: dict[str, Target] = {"head": head, "chunked": chunked}
