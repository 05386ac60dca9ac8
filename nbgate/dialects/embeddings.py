"""Embeddings, moderations and images: one request, one JSON answer.

What lives here: usage and field tables of the plain OpenAI calls, and the
event stream of partial images. What must not: bytes on their way. Heat: R.
Source: types of the openai SDK 3.54 (CreateEmbeddingResponse, ImagesResponse).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from nbgate.dialects import openai_chat, openai_responses
from nbgate.dialects.model import Dialect, Obj, Seen, Usage, count, last_wins

IMAGE_ENDS: Final = (b"image_generation.completed", b"image_edit.completed")


class _Event(msgspec.Struct):
    type: Any = None
    usage: Any = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def read_embedding_usage(obj: Obj) -> Usage | None:
    """Read a usage object of an answer that has no output tokens."""
    total = count(obj, "prompt_tokens") or count(obj, "total_tokens") or count(obj, "input_tokens")
    return openai_chat.read_usage({**obj, "prompt_tokens": total, "total_tokens": total}) if total else None


def read_image_usage(obj: Obj) -> Usage | None:
    """Read a usage object of an image answer: undivided output is image."""
    usage = openai_responses.read_usage(obj)
    if usage is None or isinstance(obj.get("output_tokens_details"), dict):
        return usage
    return msgspec.structs.replace(usage, image_out=usage.image_out + usage.output, output=0)


def read_image_event(event: bytes, data: bytes) -> Seen:
    """Read one event of a stream of partial images."""
    if data.startswith(b"[DONE]"):
        return Seen(end=True)
    try:
        found = _decode(data)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return Seen(error=event == b"error")
    kind = found.type if isinstance(found.type, str) else event.decode("ascii", "replace")
    usage = found.usage if isinstance(found.usage, dict) else None
    return Seen(usage, kind.encode() in IMAGE_ENDS, bool(found.error) or kind == "error")


EMBEDDINGS: Final = openai_chat.CHAT._replace(
    name="embeddings",
    acted_fields=frozenset({"model", "user", "dimensions"}),
    read_usage=read_embedding_usage,
)
MODERATIONS: Final = EMBEDDINGS._replace(name="moderations", acted_fields=frozenset({"model"}))
IMAGES: Final = Dialect(
    name="images",
    family="openai",
    ping=openai_chat.PING,
    marks=(b'"usage"', b".completed", b'"error"'),
    acted_fields=frozenset({"model", "stream", "n", "size", "quality", "partial_images", "user"}),
    read_usage=read_image_usage,
    read_event=read_image_event,
    merge_usage=last_wins,
    end_events=IMAGE_ENDS,
)
