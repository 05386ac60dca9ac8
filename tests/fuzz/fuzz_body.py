"""What a client asks for: request bodies, and what is forwarded of them.

The first digit chooses the dialect. Upstreams are written in languages whose JSON
parsers take the first, the last, or (Go) a name in any case; all of them must read in
the forwarded bytes what is billed.
"""

from __future__ import annotations

import json
from typing import Any

from fuzzkit import Target, split_mode

from nbgate.body import DEPTH_MAX, Fields, read
from nbgate.dialects import DIALECTS
from nbgate.errors import GateError

NAMES = ("chat", "responses", "messages", "completions", "embeddings", "moderations", "images")
OUTPUT_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ABSENT = object()


class Pairs(list[Any]):
    """The members of an object in their order, duplicates and all."""


def _load(text: bytes) -> Any:
    # NOTE: integers as floats: a suspect body is written anew, and orjson makes floats of those beyond 64 bits.
    return json.loads(text, object_pairs_hook=Pairs, parse_int=float)


def _seen(pairs: Pairs, name: str) -> Any:
    """Give what every kind of parser reads under a name; they must agree."""
    exact = [value for found, value in pairs if found == name]
    loose = [value for found, value in pairs if found.casefold() == name]
    assert exact == loose, f"{name} stands there in another case"
    assert len(exact) <= 1, f"{name} stands there {len(exact)} times"
    return exact[0] if exact else ABSENT


def _last(value: Any) -> Any:
    """Let the last of equal names win, at every depth."""
    if isinstance(value, Pairs):
        return {name: _last(inner) for name, inner in value}
    return [_last(inner) for inner in value] if isinstance(value, list) else value


def _deep(value: Any) -> int:
    level, depth = [value], 0
    while level := [x for x in level if isinstance(x, list)]:
        depth += 1
        level = [y[1] if isinstance(x, Pairs) else y for x in level for y in x]
    return depth


def _check(fields: Fields, body: bytes, out: bytes, model: str | None, asks: bool) -> None:
    pairs = _load(out)
    assert isinstance(pairs, Pairs)
    known = {name: _seen(pairs, name) for name in DIALECTS[fields.dialect].acted_fields}
    found = known["model"]
    assert found == (model or fields.model) or (model is None and not fields.model and found in (ABSENT, None)), found
    assert (known.get("stream", ABSENT) is True) == fields.stream or "stream" not in known
    if "n" in known:
        assert fields.n == (1 if known["n"] in (ABSENT, None) else known["n"])
    bounds = [known[name] for name in OUTPUT_BOUNDS if known.get(name, ABSENT) not in (ABSENT, None)]
    if bounds:
        assert fields.max_tokens == max(bounds)
    if asks and fields.stream and fields.dialect in ("chat", "completions"):
        options = known["stream_options"]
        assert isinstance(options, Pairs) and _seen(options, "include_usage") is True, options
    before, after = _last(_load(body)), _last(pairs)
    for name in ("model", "stream_options", *OUTPUT_BOUNDS):
        before.pop(name, None)
        after.pop(name, None)
    assert before == after, "something else changed"


def body(data: bytes) -> None:
    """Only GateError comes out; the forwarded bytes say what Fields says, to every parser."""
    mode, data = split_mode(data, len(NAMES))
    try:
        fields = read(data, NAMES[mode])
    except GateError as exc:
        assert 400 <= exc.status < 500, exc
        return
    for name in ("user", "affinity", "service_tier", "previous_response_id", "background", "store"):
        getattr(fields, name)
    assert _deep(_load(data)) <= DEPTH_MAX
    for model, asks in ((None, False), (b"other-model", True), (None, True)):
        out = b"".join(fields.forward(model, asks))
        _check(fields, data, out, model.decode() if model else None, asks)
    if not fields.suspect:
        assert fields.forward(None, False)[0] is data or fields.dialect == "responses"


TARGETS: dict[str, Target] = {"body": body}
