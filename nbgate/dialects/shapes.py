"""The few members of bodies and events that are looked at.

What lives here: msgspec structs of members of any type, for the decoders of
`meter` and of the dialects that `make compile` builds. What must not: functions.

NOTE: mypyc (2.4) loses annotations of `Any` and `object`, by which msgspec
decodes; so this room is never compiled.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Body(msgspec.Struct):
    """A whole answer."""

    id: Any = None
    model: Any = None
    type: Any = None
    usage: Any = None
    error: Any = None


class ErrorBody(msgspec.Struct):
    """An answer that may be an error, with all that would make it more."""

    type: Any = None
    error: Any = None
    usage: Any = None
    choices: Any = None
    content: Any = None
    output: Any = None
    data: Any = None


class Chunk(msgspec.Struct):
    """One event of a chat or completions stream."""

    id: Any = None
    choices: msgspec.Raw = msgspec.Raw(b"")
    usage: Any = None
    error: Any = None
