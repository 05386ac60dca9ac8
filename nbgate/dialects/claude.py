"""Anthropic messages.

What lives here: usage, stream events and field tables. What must not: bytes
on their way (see `meter`), HTTP. Heat: R; C for events with usage.
Source: types of the anthropic SDK 2.12 (Usage, MessageDeltaUsage, streaming).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from nbgate.dialects.model import NOTHING, Dialect, Obj, Seen, Split, Usage, count, text

PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
END: Final = b"message_stop"

ACTED_FIELDS: Final = frozenset({"model", "stream", "max_tokens", "metadata", "service_tier", "speed", "inference_geo"})

_INPUTS: Final = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
_NESTED: Final = (
    ("cache_creation", "ephemeral_5m_input_tokens"),
    ("cache_creation", "ephemeral_1h_input_tokens"),
    ("output_tokens_details", "thinking_tokens"),
    ("server_tool_use", "web_search_requests"),
)


class _Inner(msgspec.Struct):
    id: Any = None
    usage: Any = None


class _Event(msgspec.Struct):
    type: Any = None
    message: _Inner | None = None
    usage: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def read_usage(obj: Obj) -> Usage | None:
    """Read a usage object; None if it counts nothing.

    input_tokens do not include what the cache read or wrote; output_tokens
    include thinking.
    """
    given, read, written, made = (count(obj, name) for name in _INPUTS)
    short, long, thinking, searches = (count(obj, *path) for path in _NESTED)
    written = max(written, short + long)
    if not (given or read or written or made):
        return None
    wrote, out = Split(written), Split(made)
    return Usage(
        input=given,
        cached_read=read,
        cached_write_1h=wrote.take(long),
        cached_write=wrote.rest,
        reasoning=out.take(thinking),
        output=out.rest,
        web_searches=searches,
    )


def merge_usage(old: Obj | None, new: Obj) -> Obj:
    """Merge message_start with message_delta: counters only ever grow.

    NOTE: some relays state the input only at the end, and zeros before; the
    split of cache writes stands in message_start alone.
    """
    out: Obj = {name: max(count(old, name), count(new, name)) for name in _INPUTS}
    for outer, inner in _NESTED:
        out.setdefault(outer, {})[inner] = max(count(old, outer, inner), count(new, outer, inner))
    return out


def read_event(event: bytes, data: bytes) -> Seen:
    """Read one stream event."""
    try:
        found = _decode(data)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return Seen(error=event == b"error")
    kind = text(found.type) or event.decode("ascii", "replace")
    if kind == "message_start" and found.message is not None:
        usage = found.message.usage
        return Seen(usage if isinstance(usage, dict) else None, id=text(found.message.id))
    if kind == "message_delta":
        return Seen(found.usage) if isinstance(found.usage, dict) else NOTHING
    return Seen(end=kind == "message_stop", error=kind == "error")


MESSAGES: Final = Dialect(
    name="messages",
    family="claude",
    ping=PING,
    marks=(b'"usage"', END, b'"error"'),
    acted_fields=ACTED_FIELDS,
    read_usage=read_usage,
    read_event=read_event,
    merge_usage=merge_usage,
)
