"""The neutral words that every dialect is read into.

What lives here: `Usage`, disjoint token counters; `Seen`, what one stream
event tells the meter; `Dialect`, a dialect's row of facts and functions.
What must not: knowledge of any one provider. Heat: R, and C where an event
carries usage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

COUNT_MAX: Final = 100_000_000  # tokens; more in one answer is a lie, ten times the largest context window

Obj = dict[str, Any]
NO_OBJ: Final[Obj] = {}


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer, in disjoint counters, each 0 or more.

    `input` excludes cached, image and audio tokens; `output` excludes
    reasoning, image and audio. `cached_write` has the short retention.
    `web_searches` counts calls of the provider's own search, not tokens.
    """

    input: int = 0
    cached_read: int = 0
    cached_write: int = 0
    cached_write_1h: int = 0
    output: int = 0
    reasoning: int = 0
    image_in: int = 0
    image_out: int = 0
    audio_in: int = 0
    audio_out: int = 0
    web_searches: int = 0

    @property
    def total_input(self) -> int:
        """Sum all tokens that went in."""
        cached = self.cached_read + self.cached_write + self.cached_write_1h
        return self.input + cached + self.image_in + self.audio_in

    @property
    def total_output(self) -> int:
        """Sum all tokens that came out."""
        return self.output + self.reasoning + self.image_out + self.audio_out


class Seen(NamedTuple):
    """What one event of a stream tells.

    `usage` is the raw object; `bare` says that the event carries nothing else
    (a chat chunk with no choices); `end` that the stream ended in good order.
    """

    usage: Obj | None = None
    end: bool = False
    error: bool = False
    id: str = ""
    bare: bool = False


NOTHING: Final = Seen()


class Dialect(NamedTuple):
    """The facts and functions of one dialect.

    `marks`: three byte strings; a chunk with none of them needs no look inside.
    `null_usage`: the usage mark in its empty form, which proves nothing.
    `acted_fields`: top-level request fields that nbgate acts on.
    """

    name: str
    family: str
    ping: bytes
    marks: tuple[bytes, bytes, bytes]
    acted_fields: frozenset[str]
    read_usage: Callable[[Obj], Usage | None]
    read_event: Callable[[bytes, bytes], Seen]
    merge_usage: Callable[[Obj | None, Obj], Obj]
    null_usage: bytes = b'"usage":null'
    end_events: tuple[bytes, ...] = ()


def last_wins(old: Obj | None, new: Obj) -> Obj:
    """Merge usage objects where each one is complete."""
    return new


def count(obj: object, *path: str) -> int:
    """Read one counter, 0 if it is absent or no sane number. Never raises."""
    for name in path:
        if not isinstance(obj, dict):
            return 0
        obj = obj.get(name)
    return number(obj)


def number(value: object) -> int:
    """Give a counter's value, 0 if it is no sane number. Never raises."""
    if type(value) is int and 0 <= value <= COUNT_MAX:
        return value
    # NOTE: JavaScript and Go upstreams may write 12 as 12.0.
    if isinstance(value, float) and value.is_integer() and 0 <= value <= COUNT_MAX:
        return int(value)
    return 0


def inner(obj: Obj, name: str) -> Obj:
    """Give a nested object, an empty one if there is none."""
    found = obj.get(name)
    return found if isinstance(found, dict) else NO_OBJ


def text(value: object, most: int = 512) -> str:
    """Give a string if it is one and not too long, else ""."""
    return value if isinstance(value, str) and len(value) <= most else ""


class Split:
    """Share a total out into disjoint parts, never more than it holds."""

    __slots__ = ("rest",)

    def __init__(self, total: int) -> None:
        self.rest = total

    def take(self, part: int) -> int:
        """Take a part out of what is left."""
        part = min(part, self.rest)
        self.rest -= part
        return part
