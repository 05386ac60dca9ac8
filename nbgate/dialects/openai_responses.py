"""OpenAI Responses.

What lives here: usage, stream events and field tables. What must not: bytes
on their way (see `meter`), HTTP. Heat: R; C for events with a response.
Source: types of the openai SDK 3.54 (ResponseUsage, ResponseStreamEvent).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from nbgate.dialects.model import NOTHING, Dialect, Obj, Seen, Split, Usage, inner, last_wins, number, text
from nbgate.dialects.openai_chat import PING

ACTED_FIELDS: Final = frozenset({
    "model", "stream", "max_output_tokens", "max_tokens", "user", "prompt_cache_key", "safety_identifier", "store",
    "previous_response_id", "conversation", "background", "service_tier", "prompt",
})  # fmt: skip
END_EVENTS: Final = (b"response.completed", b"response.failed", b"response.incomplete", b"response.cancelled")
_ENDS: Final = frozenset(name.decode() for name in END_EVENTS)


class _Inner(msgspec.Struct):
    id: Any = None
    usage: Any = None


class _Event(msgspec.Struct):
    type: Any = None
    response: _Inner | None = None


_decode = msgspec.json.Decoder(_Event).decode


def read_usage(obj: Obj) -> Usage | None:
    """Read a usage object; None if it counts nothing.

    input_tokens include cached ones, output_tokens include reasoning.
    """
    get = obj.get
    given, made, total = number(get("input_tokens")), number(get("output_tokens")), number(get("total_tokens"))
    if not made and total > given:
        made = total - given
    if not given and not made:
        return None
    details, told = inner(obj, "input_tokens_details").get, inner(obj, "output_tokens_details").get
    into, out = Split(given), Split(made)
    return Usage(
        cached_read=into.take(number(details("cached_tokens"))),
        cached_write=into.take(number(details("cache_write_tokens"))),
        image_in=into.take(number(details("image_tokens"))),
        audio_in=into.take(number(details("audio_tokens"))),
        input=into.rest,
        reasoning=out.take(number(told("reasoning_tokens"))),
        image_out=out.take(number(told("image_tokens"))),
        audio_out=out.take(number(told("audio_tokens"))),
        output=out.rest,
    )


def read_event(event: bytes, data: bytes) -> Seen:
    """Read one stream event."""
    if data.startswith(b"[DONE]"):  # some relays add it; the real end is the event
        return NOTHING
    try:
        found = _decode(data)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return Seen(error=event == b"error")
    kind = text(found.type) or event.decode("ascii", "replace")
    error = kind == "error" or kind == "response.failed"
    response = found.response
    if response is None:
        return Seen(error=error)
    usage = response.usage if isinstance(response.usage, dict) else None
    return Seen(usage, kind in _ENDS, error, text(response.id))


RESPONSES: Final = Dialect(
    name="responses",
    family="openai",
    ping=PING,
    # PERF: only events with a whole response have this key, so two searches do.
    marks=(b'"response"', b'"error"', b""),
    acted_fields=ACTED_FIELDS,
    read_usage=read_usage,
    read_event=read_event,
    merge_usage=last_wins,
    null_usage=b"",
    end_events=END_EVENTS,
)
