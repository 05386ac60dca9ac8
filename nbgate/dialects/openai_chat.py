"""OpenAI chat completions and the older text completions.

What lives here: usage, stream events and field tables of both. What must not:
bytes on their way (see `meter`), HTTP. Heat: R; C for events with usage.
Source: types of the openai SDK 3.54 (CompletionUsage, ChatCompletionChunk).
"""

from __future__ import annotations

from typing import Final

import msgspec

from nbgate.dialects.model import NOTHING, Dialect, Obj, Seen, Split, Usage, inner, last_wins, number, text
from nbgate.dialects.shapes import Chunk

PING: Final = b": ping\n\n"
DONE: Final = b"[DONE]"

ACTED_FIELDS: Final = frozenset({
    "model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "user", "prompt_cache_key",
    "safety_identifier", "store", "service_tier", "web_search_options", "modalities",
})  # fmt: skip
COMPLETIONS_FIELDS: Final = frozenset({
    "model", "stream", "stream_options", "n", "best_of", "max_tokens", "user", "echo", "service_tier",
})  # fmt: skip


_decode = msgspec.json.Decoder(Chunk).decode


def read_usage(obj: Obj) -> Usage | None:
    """Read a usage object; None if it counts nothing.

    OpenAI's prompt_tokens include cached and audio ones, completion_tokens
    include reasoning. Some speak otherwise: DeepSeek puts its cache hits and
    Moonshot its cached tokens beside them; xAI adds reasoning to the total.
    """
    get = obj.get
    prompt, completion, total = (
        number(get("prompt_tokens")),
        number(get("completion_tokens")),
        number(get("total_tokens")),
    )
    given, made = inner(obj, "prompt_tokens_details").get, inner(obj, "completion_tokens_details").get
    reasoning = number(made("reasoning_tokens"))
    if total and not prompt and not completion:
        prompt = total
    elif not completion and total > prompt:
        completion = total - prompt
    elif reasoning and completion and total == prompt + completion + reasoning:
        completion += reasoning
    if not prompt and not completion:
        return None
    cached = number(given("cached_tokens") or get("prompt_cache_hit_tokens") or get("cached_tokens"))
    if not (cached or reasoning or _has_parts(obj)):
        return Usage(prompt, 0, 0, 0, completion)
    into, out = Split(prompt), Split(completion)
    return Usage(
        cached_read=into.take(cached),
        cached_write=into.take(number(given("cache_write_tokens"))),
        audio_in=into.take(number(given("audio_tokens"))),
        image_in=into.take(number(given("image_tokens"))),
        input=into.rest,
        reasoning=out.take(reasoning),
        audio_out=out.take(number(made("audio_tokens"))),
        image_out=out.take(number(made("image_tokens"))),
        output=out.rest,
    )


def _has_parts(obj: Obj) -> bool:
    """Say whether any detail of a usage object counts something."""
    # PERF: most answers count no part of their own: 0.3 us against 1.4 us for taking them all.
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        details = obj.get(name)
        if details and isinstance(details, dict) and any(details.values()):
            return True
    return False


def read_event(event: bytes, data: bytes) -> Seen:
    """Read one stream event."""
    if data.startswith(DONE):
        return Seen(end=True)
    try:
        chunk = _decode(data)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return Seen(error=event == b"error")
    usage = chunk.usage if isinstance(chunk.usage, dict) else None
    bare = usage is not None and b"".join(bytes(chunk.choices).split()) == b"[]"
    error = bool(chunk.error) or event == b"error"
    if usage is None and not error and not chunk.id:
        return NOTHING
    return Seen(usage, False, error, text(chunk.id), bare)


CHAT: Final = Dialect(
    name="chat",
    family="openai",
    ping=PING,
    marks=(b'"usage"', DONE, b'"error"'),
    acted_fields=ACTED_FIELDS,
    read_usage=read_usage,
    read_event=read_event,
    merge_usage=last_wins,
)
COMPLETIONS: Final = CHAT._replace(name="completions", acted_fields=COMPLETIONS_FIELDS)
