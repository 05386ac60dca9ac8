"""The Responses API of the demo, stateless. Pure.

Shapes: OpenAI's, as released in its Python SDK 3.54. The event grammar is
whole: created, in_progress, then per item added, parts, deltas, done, and
completed (or incomplete), with sequence numbers without gaps. The documented
`max_tokens` is taken for `max_output_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .chat import shape_of
from .refusal import Refusal, model_of, need, whole
from .words import Asked, Call, Reply, Tool, measure, reply, slices, sse, texts


def question_of(items: list[Any]) -> tuple[str, str | None]:
    """Find what the user said last, and the function results behind it."""
    question, results = "", list[str]()
    for item in items:
        if not isinstance(item, dict):
            raise Refusal("Each of 'input' must be an object.", param="input", code="invalid_type")
        if item.get("type") == "function_call_output":
            results.append(" ".join(texts(item.get("output"))))
        elif item.get("role") == "user":
            question, results = " ".join(texts(item.get("content"))), []
    return question, "; ".join(results) if results else None


def read(body: dict[str, Any], id_: str) -> Asked:
    """Read a Responses request."""
    model = model_of(body, "chat")
    given = need(body, "input", (str, list))
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if body.get("previous_response_id"):
        text = "The demo keeps no responses, so there is no previous one."
        raise Refusal(text, 400, "previous_response_id", "previous_response_not_found")
    question, result = question_of(items)
    tools = [one for one in body.get("tools") or () if isinstance(one, dict) and one.get("type") == "function"]
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        choice = choice.get("name", "auto")
    limits = [whole(body, name, 1, 10**7) for name in ("max_output_tokens", "max_tokens")]
    instructions = body.get("instructions")
    return Asked(
        model, question, measure(items, " ".join(texts(instructions)), tools), result,
        tuple(Tool(str(one.get("name", "")), one.get("parameters") or {}) for one in tools), choice,
        body.get("parallel_tool_calls") is not False, limits[0] or limits[1], (),
        shape_of((body.get("text") or {}).get("format")), f"call_{id_}",
    )  # fmt: skip


def message_item(id_: str, text: str | None, status: str) -> dict[str, Any]:
    """Shape the message item; without text it has no content yet."""
    content = [] if text is None else [text_part(text)]
    return {"id": f"msg_{id_}", "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str) -> dict[str, Any]:
    """Shape a text part."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(id_: str, index: int, call: Call, arguments: str, status: str) -> dict[str, Any]:
    """Shape a function call item."""
    return {"id": f"fc_{id_}{index}", "type": "function_call", "status": status, "call_id": call.id,
            "name": call.name, "arguments": arguments}  # fmt: skip


def output_of(said: Reply, id_: str) -> list[dict[str, Any]]:
    """Shape the finished output items."""
    if said.calls:
        return [call_item(id_, index, call, call.arguments, "completed") for index, call in enumerate(said.calls)]
    return [message_item(id_, said.text, "incomplete" if said.stop == "length" else "completed")]


def response_of(body: dict[str, Any], said: Reply | None, id_: str, now: int) -> dict[str, Any]:
    """Shape the response; without a reply, as it is in progress."""
    asked = read(body, id_)
    cut = said is not None and said.stop == "length"
    usage = None
    if said is not None:
        total = asked.input_tokens + said.output_tokens
        usage = {
            "input_tokens": asked.input_tokens, "output_tokens": said.output_tokens, "total_tokens": total,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
    return {
        "id": f"resp_{id_}", "object": "response", "created_at": now,
        "status": "in_progress" if said is None else "incomplete" if cut else "completed",
        "background": False, "error": None, "model": asked.model,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.get("instructions"), "max_output_tokens": asked.max_tokens, "max_tool_calls": None,
        "output": [] if said is None else output_of(said, id_), "usage": usage,
        "parallel_tool_calls": asked.parallel, "previous_response_id": None, "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None}, "safety_identifier": None, "service_tier": "default",
        "store": False, "temperature": body.get("temperature", 1.0),
        "text": body.get("text", {"format": {"type": "text"}}),
        "tool_choice": body.get("tool_choice") or "auto", "tools": tools_of(body), "top_logprobs": 0,
        "top_p": body.get("top_p", 1.0), "truncation": "disabled", "user": None, "metadata": body.get("metadata") or {},
    }  # fmt: skip


def tools_of(body: dict[str, Any]) -> list[Any]:
    """Echo the tools with the defaults filled in, as OpenAI does."""
    plain: dict[str, Any] = {"description": None, "parameters": None, "strict": True}
    return [{**plain, **tool} if tool.get("type") == "function" else tool for tool in body.get("tools") or ()]


def answer(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer a Responses request as one object."""
    return response_of(body, reply(read(body, id_)), id_, now)


def events(body: dict[str, Any], id_: str, now: int) -> Iterator[bytes]:
    """Answer a Responses request as a stream; one item per write."""
    said = reply(read(body, id_))
    for number, event in enumerate(grammar(body, said, id_, now)):
        kind = "response." + event.pop("kind")
        yield sse({"type": kind, "sequence_number": number, **event}, kind)


def grammar(body: dict[str, Any], said: Reply, id_: str, now: int) -> Iterator[dict[str, Any]]:
    """Yield the events in their order, without numbers."""
    start, end = response_of(body, None, id_, now), response_of(body, said, id_, now)
    yield {"kind": "created", "response": start}
    yield {"kind": "in_progress", "response": start}
    yield from (call_events(said, id_) if said.calls else text_events(said, id_))
    yield {"kind": end["status"], "response": end}


def text_events(said: Reply, id_: str) -> Iterator[dict[str, Any]]:
    """Yield the events of the message item."""
    place = {"item_id": f"msg_{id_}", "output_index": 0, "content_index": 0}
    yield {"kind": "output_item.added", "output_index": 0, "item": message_item(id_, None, "in_progress")}
    yield {"kind": "content_part.added", **place, "part": text_part("")}
    for piece in said.pieces:
        yield {"kind": "output_text.delta", **place, "delta": piece, "logprobs": []}
    yield {"kind": "output_text.done", **place, "text": said.text, "logprobs": []}
    yield {"kind": "content_part.done", **place, "part": text_part(said.text)}
    yield {"kind": "output_item.done", "output_index": 0, "item": output_of(said, id_)[0]}


def call_events(said: Reply, id_: str) -> Iterator[dict[str, Any]]:
    """Yield the events of each function call item."""
    for index, call in enumerate(said.calls):
        place = {"item_id": f"fc_{id_}{index}", "output_index": index}
        item = call_item(id_, index, call, "", "in_progress")
        yield {"kind": "output_item.added", "output_index": index, "item": item}
        for part in slices(call.arguments):
            yield {"kind": "function_call_arguments.delta", **place, "delta": part}
        yield {"kind": "function_call_arguments.done", **place, "name": call.name, "arguments": call.arguments}
        done = call_item(id_, index, call, call.arguments, "completed")
        yield {"kind": "output_item.done", "output_index": index, "item": done}
