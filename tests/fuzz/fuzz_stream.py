"""What passes from upstream to client: event streams and JSON bodies that are metered.

The first digit chooses the dialect.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
from fuzzkit import Target, pieces, split_mode

from nbgate import sse
from nbgate.dialects import DIALECTS
from nbgate.json_scan import CAPTURE_MAX, WORD_MAX, JsonScan
from nbgate.meter import JsonPipe, SsePipe, first_event, is_error_event, is_error_json

NAMES = ("chat", "responses", "messages", "completions", "embeddings")
NESTED = frozenset((b"response", b"message"))
SMALL = 64


def _held(pipe: SsePipe) -> int:
    return len(pipe._framer._held)


def _pass(parts: list[bytes], name: str, hide: bool, hold: int) -> tuple[bytes, SsePipe]:
    pipe = SsePipe(name, hide_usage=hide, hold_bytes=hold)
    out = b""
    for part in parts:
        out += pipe.feed(part)
        assert _held(pipe) <= hold + len(part), "more is held than may be"
    out += pipe.finish()
    assert pipe.delivered == len(out)
    return out, pipe


def _told(pipe: SsePipe) -> tuple[object, ...]:
    return pipe.usage, pipe.ended, pipe.error, pipe.response_id


def events(data: bytes) -> None:
    """Bytes pass untouched and held ones are few; cuts change neither them nor what is read."""
    mode, data = split_mode(data, len(NAMES))
    name = NAMES[mode]
    out, whole = _pass([data], name, False, 1 << 20)
    assert out == data
    hidden, hider = _pass([data], name, True, 1 << 20)
    for salt in (0, 1, 2):
        parts = [part for part in pieces(data, salt) if part]
        out, cut = _pass(parts, name, False, 1 << 20)
        assert out == data
        assert _told(cut) == _told(whole), (_told(whole), _told(cut))
        out, cut = _pass(parts, name, True, 1 << 20)
        assert out == hidden, "cuts decide what is hidden"
        assert _told(cut) == _told(hider)
        out, _ = _pass(parts, name, False, SMALL)
        assert out == data, "bytes of a long frame changed"
    assert len(hidden) <= len(data)


def broken_events(data: bytes) -> None:
    """A stream that breaks anywhere ends in whole frames, and never tells [DONE]."""
    mode, data = split_mode(data, len(NAMES))
    pipe = SsePipe(NAMES[mode], hide_usage=bool(len(data) & 1), hold_bytes=SMALL)
    out = b"".join(pipe.feed(part) for part in pieces(data, 3) if part)
    over = pipe.ended or pipe.error
    last = pipe.fail(ConnectionResetError("lost"))
    assert not (over and last), "something after the end"
    assert b"[DONE]" not in last
    if last:
        assert last.endswith(b"\n\n")
        told = [sse.fields(last[a:b]) for a, b in sse.frames(last)]
        found = [data for _, data in told if data is not None]
        assert len(found) == 1 and isinstance(orjson.loads(found[0]), dict)
        assert out.endswith((b"\n\n", b"\r\r", b"\n\r\n")) or not out or last.startswith(b"\n\n"), "in mid-frame"


def frames(data: bytes) -> None:
    """Frames cover the bytes in order; readers of foreign frames never raise."""
    at = 0
    for start, end in sse.frames(data):
        assert start == at < end
        at = end
        for name in NAMES:
            is_error_event(data[start:end], name)
            event, text = sse.fields(data[start:end])
            DIALECTS[name].read_event(event, text or b"")
    assert at == len(data)
    first_event(data)
    is_error_json(data)


class Pairs(list[Any]):
    """The members of an object in their order, duplicates and all."""


def _scan(parts: list[bytes]) -> JsonScan:
    scan = JsonScan(NESTED)
    for part in parts:
        scan.feed(part)
    return scan


def _json_told(scan: JsonScan) -> tuple[object, ...]:
    return scan.usage, sorted(scan.words.items()), scan.error


def scan(data: bytes) -> None:
    """On valid JSON cuts change nothing, and the scanner reads what a parser reads."""
    whole = _scan([data])
    cuts = [_scan(pieces(data, salt)) for salt in (0, 1, 2)]
    assert all(len(one._capture or b"") <= CAPTURE_MAX + 1 for one in (whole, *cuts))
    top = _valid(data)
    if top is None:
        return
    for cut in cuts:
        assert _json_told(cut) == _json_told(whole), (_json_told(whole), _json_told(cut))
    if b"\\" in data or any(name == "error" and type(value) is list for name, value in top):
        return  # names and words are compared as they are written
    usage = None
    error = False
    for name, value in top:
        if name == "usage" and isinstance(value, Pairs):
            usage = value
        if name == "error" and isinstance(value, (Pairs, str)) and value:
            error = True
        if name in ("response", "message") and isinstance(value, Pairs):
            for inner, found in value:
                if inner == "usage" and isinstance(found, Pairs):
                    usage = found
    if len(data) <= CAPTURE_MAX:
        assert (whole.usage is None) == (usage is None), (whole.usage, usage)
        if usage is not None:
            # NOTE: through float, for parsers differ on integers beyond 64 bits.
            assert _floats(whole.usage) == _floats(_plain(usage)), (whole.usage, usage)
    assert whole.error == error
    for word in ("id", "model", "type"):
        texts = [v for n, v in top if n == word and isinstance(v, str)]
        if texts and all(len(t.encode()) <= WORD_MAX for t in texts):
            assert whole.words.get(word.encode()) == texts[-1]


def _valid(data: bytes) -> Pairs | None:
    """Parse an object that every parser takes, None if it is none."""
    try:
        orjson.loads(data)
        top = json.loads(data, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return None
    return top if isinstance(top, Pairs) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Pairs):
        return {name: _plain(inner) for name, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _floats(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def answer(data: bytes) -> None:
    """A JSON answer passes untouched; long way and short way read the same of valid ones."""
    mode, data = split_mode(data, len(NAMES))
    pipes = []
    for parts in ([data], pieces(data, 1), pieces(data, 0)):
        pipe = JsonPipe(NAMES[mode])
        out = b"".join(pipe.feed(part) for part in parts if part) + pipe.finish()
        assert out == data and pipe.delivered == len(data) and pipe.ended
        pipes.append(pipe)
    if b"\\" in data or len(data) > WORD_MAX:
        return
    top = _valid(data)
    if top is None or len({name for name, _ in top}) < len(top):
        return
    if any(name == "error" and not isinstance(value, (Pairs, str, type(None))) for name, value in top):
        return  # no provider's: the long way does not see them
    told = [(p.usage, p.error, p.model, p.response_id) for p in pipes]
    assert told[0] == told[1] == told[2], told


TARGETS: dict[str, Target] = {
    "events": events,
    "broken_events": broken_events,
    "frames": frames,
    "scan": scan,
    "answer": answer,
}
