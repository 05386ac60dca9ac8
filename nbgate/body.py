"""Read the few fields of a request body that matter, and edit by byte range.

What lives here: `read`, which judges a JSON body, and `Fields`, which knows
where its members stand and writes what goes to the upstream. What must not:
translation, prices, tokenizing. Heat: R.

Law: what is billed is what is forwarded. The walk below proves that each
top-level name occurs once, unescaped; a body that fails it is suspect, is
parsed once and goes on re-encoded from what was parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import orjson

from nbgate.dialects import DIALECTS
from nbgate.errors import GateError

DEPTH_MAX: Final = 200  # orjson loads 1,024 levels and cannot dump beyond 254
MODEL_MAX: Final = 256
CHOICES_MAX: Final = 128
TOKENS_MAX: Final = 2**31 - 1

# Calls of these may go to the router's default when they name no model.
MODEL_OPTIONAL: Final = frozenset(("moderations", "images", "responses"))
_STREAMS_USAGE: Final = frozenset(("chat", "completions"))
_BOUNDS: Final = {
    "n": (1, CHOICES_MAX),
    "max_tokens": (0, TOKENS_MAX),
    "max_completion_tokens": (0, TOKENS_MAX),
    "max_output_tokens": (0, TOKENS_MAX),
}

# APPSEC: only \u0030-\u007a can spell a name of ours; such a key stops the walk.
_KEY: Final = re.compile(rb'[ \t\n\r]*[,{][ \t\n\r]*"([^"\\]*(?:\\(?!u00[3-7]).[^"\\]*)*)"[ \t\n\r]*:[ \t\n\r]*')
_TAIL: Final = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*\Z")
_COPIED: Final = 16_384  # pieces of bodies up to this are copied, longer ones viewed
_SPLIT_AT_ONCE: Final = 65_536  # a longer value is split before its brackets are counted

# Names in common use that no acted field equals in another case.
_KNOWN: Final = frozenset({
    "messages", "input", "prompt", "temperature", "top_p", "top_k", "tools", "tool_choice", "parallel_tool_calls",
    "response_format", "stop", "stop_sequences", "system", "instructions", "text", "reasoning", "reasoning_effort",
    "thinking", "seed", "logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty",
    "encoding_format", "dimensions", "include", "truncation", "verbosity", "size", "quality", "functions",
    "function_call",
})  # fmt: skip

_UNREADABLE: Final = (ValueError, msgspec.MsgspecError, RecursionError)
# A member's name as it usually stands, quoted and with its colon.
_HEADS: Final = {
    name: b'"%s":' % name.encode() for name in _KNOWN.union(*(dialect.acted_fields for dialect in DIALECTS.values()))
}
Members = dict[str, msgspec.Raw]
Span = tuple[int, int]

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode = msgspec.json.Decoder().decode


class Fields:
    """What was read of one request body.

    `body` is what `forward` edits: the client's own bytes, or, if `suspect`,
    the re-encoded ones. `model` is "" only where none is needed; `n` and
    `max_tokens` (None if not given) are checked ints; `asked_usage` says that
    the client itself wants usage in its stream.
    """

    __slots__ = ("_merge", "_spans", "asked_usage", "body", "dialect", "max_tokens", "members", "model", "n", "stream",
                 "suspect")  # fmt: skip

    def __init__(self, body: bytes, dialect: str, members: Members, spans: dict[str, Span]) -> None:
        self.body = body
        self.dialect = dialect
        self.members = members
        self._spans = spans
        self.suspect = False
        self.model = _model(members)
        self.stream = False
        self.n = 1
        self.max_tokens: int | None = None
        self.asked_usage = False
        self._merge = b""
        raw = members.get("stream")
        if raw is not None:
            self.stream = _flag(raw, "stream")
        for name in spans:
            if name in _BOUNDS:
                self._bounded(name)
        if "stream_options" in members:
            self._stream_options(members["stream_options"])

    def _bounded(self, name: str) -> None:
        """Check an int; the most telling name of the output bound wins."""
        value = _int(self.members[name], name, *_BOUNDS[name])
        if value is None:
            return
        if name == "n":
            self.n = value
        elif self.max_tokens is None or value > self.max_tokens:
            # NOTE: several bounds at once: reserve for the larger, which one rules is the upstream's affair.
            self.max_tokens = value

    def _stream_options(self, raw: msgspec.Raw) -> None:
        value = _any(raw)
        if value is None:
            return
        if not isinstance(value, dict):
            raise _wrong_type("stream_options", "an object")
        asked = value.get("include_usage")
        if asked is not None and not isinstance(asked, bool):
            raise _wrong_type("stream_options.include_usage", "a boolean")
        for key in value:
            if key != "include_usage" and key.casefold() == "include_usage":
                raise _ambiguous(key, "include_usage")
        self.asked_usage = asked is True
        text = bytes(raw)
        if not self.asked_usage or _walk(text, _members(text), frozenset()) is None:
            try:
                self._merge = orjson.dumps({**value, "include_usage": True})
            except TypeError:  # integers beyond 64 bits, which the decoder takes
                why = "`stream_options` holds a value that cannot be written."
                raise GateError("invalid_value", why, param="stream_options") from None

    def value(self, name: str) -> Any:
        """Decode a top-level member, None if it is absent or a number beyond all range."""
        raw = self.members.get(name)
        try:
            return None if raw is None else _any(raw)
        except GateError:
            return None

    def text(self, name: str) -> str:
        """Give a top-level string of at most 512 characters, else ""."""
        found = self.value(name)
        return found if isinstance(found, str) and len(found) <= 512 else ""

    @property
    def user(self) -> str:
        """Give the end user that the client names, "" if none."""
        if self.dialect == "messages":
            found = self.value("metadata")
            user = found.get("user_id") if isinstance(found, dict) else None
            return user if isinstance(user, str) and len(user) <= 512 else ""
        return self.text("safety_identifier") or self.text("user")

    @property
    def affinity(self) -> str:
        """Give what keeps a conversation on one channel, "" if nothing does."""
        return self.text("prompt_cache_key") or self.user

    @property
    def service_tier(self) -> str:
        """Give the tier that the client asks for, "" if none."""
        return self.text("service_tier")

    @property
    def previous_response_id(self) -> str:
        """Give the response that this one continues, "" if none."""
        return self.text("previous_response_id")

    @property
    def background(self) -> bool:
        """Say whether a background response is asked for."""
        return self.value("background") is True

    @property
    def store(self) -> bool | None:
        """Give what the client says about storing, None if nothing."""
        found = self.value("store")
        return found if isinstance(found, bool) else None

    def forward(self, model: bytes | None, ask_usage: bool) -> list[bytes]:
        """Write the body for an upstream, as slices for `writelines`.

        `model` is the upstream's name (UTF-8, unquoted) or None for no change.
        With `ask_usage` a stream of chat or completions is made to tell usage.
        What needs no edit goes out as the very object that came in.
        """
        edits: list[tuple[int, int, bytes]] = []
        if model is not None:
            name = model.decode()
            if name != self.model:
                edits.append(self._set("model", orjson.dumps(name)))
        if ask_usage and self.stream and self.dialect in _STREAMS_USAGE:
            if "stream_options" not in self.members:
                edits.append(self._set("stream_options", b'{"include_usage":true}'))
            elif self._merge or not self.asked_usage:
                edits.append(self._set("stream_options", self._merge or b'{"include_usage":true}'))
        if self.dialect == "responses" and "max_tokens" in self.members and "max_output_tokens" not in self.members:
            start, end = self._spans["max_tokens:key"]
            edits.append((start, end, b"max_output_tokens"))
        return self._edited(edits) if edits else [self.body]

    def _set(self, name: str, value: bytes) -> tuple[int, int, bytes]:
        """Make the edit that gives a member a value, or adds it in front."""
        span = self._spans.get(name)
        if span is not None:
            return (*span, value)
        at = self.body.index(b"{") + 1
        return at, at, b'"%s":%s%s' % (name.encode(), value, b"," if self.members else b"")

    def _edited(self, edits: list[tuple[int, int, bytes]]) -> list[bytes]:
        # NOTE: long pieces are views, which writelines, len and join take as bytes: no second copy of a long body.
        body = self.body
        view: Any = memoryview(body) if len(body) > _COPIED else body
        out: list[Any] = []
        done = 0
        if len(edits) > 1:
            edits.sort(key=_start)
        for start, end, value in edits:
            if start > done:
                out.append(view[done:start])
            out.append(value)
            done = end
        out.append(view[done:])
        return out


def read(body: bytes, dialect: str, *, stored: bool = False) -> Fields:
    """Read a request body; one about a stored object need name no model.

    Raises GateError, source client: `invalid_json`, `missing_model`,
    `invalid_type`, `invalid_value`, `ambiguous_parameter`.
    """
    members = _parse(body)
    acted = DIALECTS[dialect].acted_fields
    for name in members:
        if name not in acted and name not in _KNOWN and name.casefold() in acted:
            raise _ambiguous(name, name.casefold())
    spans = _walk(body, members, acted)
    suspect = spans is None
    if suspect:
        body = _reencoded(body)
        members = _parse(body)
        spans = _walk(body, members, acted)
    if spans is None:
        raise GateError("invalid_json", "The request body names a member twice.")
    fields = Fields(body, dialect, members, spans)
    if not fields.model and not stored and dialect not in MODEL_OPTIONAL:
        raise GateError("missing_model", param="model")
    fields.suspect = suspect
    return fields


def _parse(body: bytes) -> Members:
    """Parse the top level and prove the rest to be JSON that we can handle."""
    try:
        members = _members(body)
        # NOTE: msgspec does not look at the UTF-8 of strings that it skips (0.22).
        if not body.isascii():
            body.decode()
    except UnicodeDecodeError:
        raise GateError("invalid_json", "The request body is not valid UTF-8.") from None
    except msgspec.ValidationError:
        raise GateError("invalid_json", "The request body must be a JSON object.") from None
    except RecursionError:
        raise _too_deep() from None
    except (ValueError, msgspec.MsgspecError) as exc:
        text = "The request body begins with a byte order mark." if body[:3] == b"\xef\xbb\xbf" else str(exc)
        raise GateError("invalid_json", f"The request body is not valid JSON: {text}.".replace("..", ".")) from None
    if len(body) > 2 * DEPTH_MAX and _any_deep(members.values(), DEPTH_MAX - 1, 3):
        raise _too_deep()
    return members


def _any_deep(children: Iterable[msgspec.Raw], room: int, splits: int) -> bool:
    """Say whether one of these values nests deeper than `room`.

    Brackets are counted, strings' own included; only a value with more of them
    than room is split into its children, at most three times, and judged by a
    full parse after that.
    """
    least = 2 * room  # bytes; a shorter value cannot
    for text in [text for text in map(bytes, children) if len(text) > least]:
        if text[0] not in b"{[":
            continue
        size = 2 * len(text)
        # PERF: deleting one character takes 0.08 us per KB, counting it 0.3 (CPython 3.11).
        if size < _SPLIT_AT_ONCE and size - len(text.replace(b"{", b"")) - len(text.replace(b"[", b"")) <= room:
            continue
        if not splits:
            if _depth(text) > room:
                return True
        elif _any_deep(_elements(text) if text[0] == 91 else _members(text).values(), room - 1, splits - 1):
            return True
    return False


def _depth(text: bytes) -> int:
    """Measure the nesting of a valid JSON text."""
    try:
        level: list[Any] = [orjson.loads(text)]
    except orjson.JSONDecodeError:
        return DEPTH_MAX + 1
    depth = 0
    while depth <= DEPTH_MAX:
        level = [x for x in level if isinstance(x, (dict, list))]
        if not level:
            break
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth


def _walk(body: bytes, members: Members, wanted: frozenset[str]) -> dict[str, Span] | None:
    """Prove that each member occurs once under an unescaped name.

    Gives the byte ranges of the wanted members' values (and `max_tokens:key`,
    of that name), or None if the proof fails. `members` keeps the text's order
    and, of duplicates, the last value; so if the members stand in the body one
    after the other with just these values, and the body ends there, there is no
    other. The body is valid JSON, so only what may vary is looked at.
    """
    spans: dict[str, Span] = {}
    at = 0  # of the brace or comma before a member
    for name, raw in members.items():
        # PERF: known names in the usual spacing by comparison, 0.1 us against 0.4 for the regex.
        head = _HEADS.get(name, b"\n")
        key = at + 2 if body[at + 1] == 32 else at + 1
        start = key + len(head)
        if body.startswith(head, key):
            if body[start] == 32:
                start += 1
        else:
            found = _KEY.match(body, at)
            if found is None:
                return None
            key, start = found.start(1) - 1, found.end()
        value = bytes(raw)
        if not body.startswith(value, start):
            return None
        at = start + len(value)
        if name in wanted:
            spans[name] = (start, at)
            if name == "max_tokens":
                spans["max_tokens:key"] = (key + 1, key + 11)
    if at == len(body) - 1 or not members:
        return spans
    return spans if _TAIL.match(body, at) is not None else None


def _reencoded(body: bytes) -> bytes:
    """Parse a suspect body, last name wins, and write it anew."""
    try:
        return orjson.dumps(orjson.loads(body))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):
        raise GateError("invalid_json") from None


def _model(members: Members) -> str:
    """Give the model's name, "" if there is none."""
    raw = members.get("model")
    model = _any(raw) if raw is not None else None
    if model is None:
        return ""
    if not isinstance(model, str):
        raise _wrong_type("model", "a string")
    if len(model) > MODEL_MAX or not model.isprintable():
        text = f"`model` must be at most {MODEL_MAX} printable characters."
        raise GateError("invalid_value", text, param="model")
    return model


def _any(raw: msgspec.Raw) -> Any:
    """Decode a member's value."""
    try:
        return _decode(raw)
    except msgspec.MsgspecError:  # a number such as 1e400, which the walk over the members does not read
        raise GateError("invalid_value", "A number in the request body is out of range.") from None


def _flag(raw: msgspec.Raw, name: str) -> bool:
    value = _any(raw)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong_type(name, "a boolean")
    return value


def _int(raw: msgspec.Raw, name: str, least: int, most: int) -> int | None:
    value = _any(raw)
    if value is None:
        return None
    if type(value) is not int:
        raise _wrong_type(name, "an integer")
    if not least <= value <= most:
        raise GateError("invalid_value", f"`{name}` must be between {least} and {most}.", param=name)
    return value


def _wrong_type(name: str, want: str) -> GateError:
    return GateError("invalid_type", f"`{name}` must be {want}.", param=name)


def _ambiguous(name: str, meant: str) -> GateError:
    shown = name[:64]
    return GateError("ambiguous_parameter", f"`{shown}` is not `{meant}`: parameter names are lower case.", param=shown)


def _too_deep() -> GateError:
    return GateError("invalid_json", f"The request body nests deeper than {DEPTH_MAX} levels.")


def _start(edit: tuple[int, int, bytes]) -> int:
    return edit[0]
