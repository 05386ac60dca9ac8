"""Claude messages of the demo. Pure.

Shapes: Anthropic's, as released in its Python SDK 2.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from .refusal import Refusal, model_of, need, whole
from .words import Asked, Reply, Tool, measure, reply, slices, sse, texts

STOP = {"stop": "end_turn", "sequence": "stop_sequence", "length": "max_tokens", "tools": "tool_use"}


def question_of(messages: list[Any]) -> tuple[str, str | None]:
    """Find what the user said last, and the tool results of that turn."""
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise Refusal("messages: each must be an object with a role.", param="messages")
    question, result = "", None
    for message in messages:
        if message["role"] != "user":
            continue
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        results = [one for one in blocks if isinstance(one, dict) and one.get("type") == "tool_result"]
        plain = " ".join(texts([one for one in blocks if one not in results]))
        result = "; ".join(" ".join(texts(one.get("content", ""))) for one in results) if results else None
        question = plain if plain.strip() or not results else question
    return question, result


def read(body: dict[str, Any], id_: str) -> Asked:
    """Read a messages request."""
    model = model_of(body, "chat")
    messages = need(body, "messages", list)
    need(body, "max_tokens", int)
    question, result = question_of(messages)
    tools = [tool for tool in body.get("tools") or () if isinstance(tool, dict)]
    choice = body.get("tool_choice") or {}
    kind = choice.get("type", "auto") if isinstance(choice, dict) else "auto"
    wanted = (body.get("output_config") or {}).get("format") or {}
    return Asked(
        model, question, measure(messages, " ".join(texts(body.get("system"))), tools), result,
        tuple(Tool(str(one.get("name", "")), one.get("input_schema") or {}) for one in tools),
        choice.get("name", "auto") if kind == "tool" else kind,
        not (isinstance(choice, dict) and choice.get("disable_parallel_tool_use")),
        whole(body, "max_tokens", 1, 10**7), tuple(body.get("stop_sequences") or ()),
        wanted.get("schema") if isinstance(wanted, dict) else None, f"toolu_{id_}",
    )  # fmt: skip


def usage_of(asked: Asked, output_tokens: int) -> dict[str, Any]:
    """Count as Anthropic does; the cached tokens stand apart."""
    return {"input_tokens": asked.input_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "output_tokens": output_tokens, "service_tier": "standard"}  # fmt: skip


def message_of(asked: Asked, said: Reply | None, id_: str) -> dict[str, Any]:
    """Shape the message; without a reply, as it is at the start."""
    content: list[dict[str, Any]] = []
    if said is not None and said.calls:
        content = [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": orjson.loads(call.arguments)}
            for call in said.calls
        ]
    elif said is not None:
        content = [{"type": "text", "text": said.text}]
    return {
        "id": f"msg_{id_}", "type": "message", "role": "assistant", "model": asked.model, "content": content,
        "stop_reason": STOP[said.stop] if said else None, "stop_sequence": said.sequence if said else None,
        "usage": usage_of(asked, said.output_tokens if said else 1),
    }  # fmt: skip


def answer(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer a messages request as one object."""
    asked = read(body, id_)
    return message_of(asked, reply(asked), id_)


def count_tokens(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Count the input tokens, as the message itself would."""
    return {"input_tokens": read({"max_tokens": 1, **body}, id_).input_tokens}


def events(body: dict[str, Any], id_: str, now: int) -> Iterator[bytes]:
    """Answer a messages request as a stream; one item per write."""
    asked = read(body, id_)
    said = reply(asked)

    def event(kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, **fields}, kind)

    def delta(index: int, kind: str, field: str, part: str) -> bytes:
        return event("content_block_delta", index=index, delta={"type": kind, field: part})

    yield event("message_start", message=message_of(asked, None, id_))
    if not said.calls:
        start = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        yield start + event("ping")
        for piece in said.pieces:
            yield delta(0, "text_delta", "text", piece)
        yield event("content_block_stop", index=0)
    for index, call in enumerate(said.calls):
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield event("content_block_start", index=index, content_block=block) + (b"" if index else event("ping"))
        yield delta(index, "input_json_delta", "partial_json", "")
        for part in slices(call.arguments):
            yield delta(index, "input_json_delta", "partial_json", part)
        yield event("content_block_stop", index=index)
    end = {"stop_reason": STOP[said.stop], "stop_sequence": said.sequence}
    yield event("message_delta", delta=end, usage=usage_of(asked, said.output_tokens)) + event("message_stop")
