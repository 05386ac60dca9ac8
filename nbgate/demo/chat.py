"""Chat completions and the older completions of the demo. Pure.

Shapes: OpenAI's, as released in its Python SDK 3.54. Usage in a stream is sent
only when `stream_options.include_usage` asks for it, as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .refusal import Refusal, model_of, need, whole
from .words import Asked, Reply, Tool, count, measure, reply, slices, sse, texts

FINISH = {"stop": "stop", "sequence": "stop", "length": "length", "tools": "tool_calls"}


def stops_of(value: Any) -> tuple[str, ...]:
    """Read `stop`, one string or several."""
    return (value,) if isinstance(value, str) else tuple(one for one in value or () if isinstance(one, str))


def question_of(messages: list[Any]) -> tuple[str, str | None]:
    """Find what the user said last, and the tool results behind it."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal("Each of 'messages' must be an object with a role.", param="messages", code="invalid_type")
    said = [" ".join(texts(message.get("content"))) for message in messages if message["role"] == "user"]
    results = []
    for message in reversed(messages):
        if message["role"] not in ("tool", "function"):
            break
        results.append(" ".join(texts(message.get("content"))))
    return said[-1] if said else "", "; ".join(reversed(results)) if results else None


def shape_of(wanted: Any) -> dict[str, Any] | None:
    """Read the JSON schema out of `response_format` or `text.format`."""
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_object", "json_schema"):
        return None
    schema = wanted.get("json_schema", wanted)
    found = schema.get("schema") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def read(body: dict[str, Any], id_: str) -> Asked:
    """Read a chat request."""
    model = model_of(body, "chat")
    messages = need(body, "messages", list)
    question, result = question_of(messages)
    temperature = body.get("temperature")
    if temperature is not None and not (type(temperature) in (int, float) and 0 <= temperature <= 2):
        raise Refusal("'temperature' must be from 0 to 2.", param="temperature", code="invalid_value")
    functions = [tool["function"] for tool in body.get("tools") or () if isinstance(tool, dict) and "function" in tool]
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        choice = (choice.get("function") or {}).get("name", "auto")
    limits = [whole(body, name, 1, 10**7) for name in ("max_completion_tokens", "max_tokens")]
    return Asked(
        model, question, measure(messages, functions), result,
        tuple(Tool(str(one.get("name", "")), one.get("parameters") or {}) for one in functions),
        choice, body.get("parallel_tool_calls") is not False, limits[0] or limits[1],
        stops_of(body.get("stop")), shape_of(body.get("response_format")), f"call_{id_}",
    )  # fmt: skip


def usage_of(asked: Asked, said: Reply, times: int) -> dict[str, Any]:
    """Count as OpenAI does; the cached tokens are part of the prompt's."""
    out = said.output_tokens * times
    details = {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }
    return {
        "prompt_tokens": asked.input_tokens, "completion_tokens": out, "total_tokens": asked.input_tokens + out,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "completion_tokens_details": details,
    }  # fmt: skip


def calls_of(said: Reply) -> list[dict[str, Any]]:
    """Shape the tool calls."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in said.calls
    ]


def answer(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer a chat request as one object."""
    asked = read(body, id_)
    times = whole(body, "n", 1, 8) or 1
    said = reply(asked)
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None, "annotations": []}
    if said.calls:
        message.update(content=None, tool_calls=calls_of(said))
    choice = {"message": message, "logprobs": None, "finish_reason": FINISH[said.stop]}
    return {
        "id": f"chatcmpl-{id_}", "object": "chat.completion", "created": now, "model": asked.model,
        "choices": [{"index": index, **choice} for index in range(times)], "usage": usage_of(asked, said, times),
        "service_tier": "default", "system_fingerprint": "fp_demo",
    }  # fmt: skip


def deltas(said: Reply) -> Iterator[dict[str, Any]]:
    """Yield the deltas of one choice."""
    yield {"role": "assistant", "content": None if said.calls else "", "refusal": None}
    for piece in said.pieces:
        yield {"content": piece}
    for index, call in enumerate(calls_of(said)):
        arguments = call["function"]["arguments"]
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        for part in slices(arguments):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


def events(body: dict[str, Any], id_: str, now: int) -> Iterator[bytes]:
    """Answer a chat request as a stream; one item per write."""
    asked = read(body, id_)
    times = whole(body, "n", 1, 8) or 1
    said = reply(asked)
    asks_usage = (body.get("stream_options") or {}).get("include_usage") is True
    base: dict[str, Any] = {"id": f"chatcmpl-{id_}", "object": "chat.completion.chunk", "created": now}
    base.update(model=asked.model, service_tier="default", system_fingerprint="fp_demo")
    null = {"usage": None} if asks_usage else {}

    def frame(index: int, delta: dict[str, Any], finish: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse({**base, "choices": [choice], **null})

    for index in range(times):
        for delta in deltas(said):
            yield frame(index, delta, None)
        yield frame(index, {}, FINISH[said.stop])
    last = sse({**base, "choices": [], "usage": usage_of(asked, said, times)}) if asks_usage else b""
    yield last + b"data: [DONE]\n\n"


def read_completion(body: dict[str, Any], id_: str) -> Asked:
    """Read a request of the older completions."""
    model = model_of(body, "completions")
    prompt = " ".join(texts(need(body, "prompt", (str, list))))
    return Asked(model, prompt, count(prompt), max_tokens=whole(body, "max_tokens", 0, 10**7) or 16,
                 stops=stops_of(body.get("stop")), id=id_)  # fmt: skip


def complete(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer a completion as one object."""
    asked = read_completion(body, id_)
    said = reply(asked)
    choice = {"index": 0, "text": said.text, "logprobs": None, "finish_reason": FINISH[said.stop]}
    return {"id": f"cmpl-{id_}", "object": "text_completion", "created": now, "model": asked.model,
            "choices": [choice], "usage": usage_of(asked, said, 1)}  # fmt: skip


def complete_events(body: dict[str, Any], id_: str, now: int) -> Iterator[bytes]:
    """Answer a completion as a stream."""
    asked = read_completion(body, id_)
    said = reply(asked)
    asks_usage = (body.get("stream_options") or {}).get("include_usage") is True
    base = {"id": f"cmpl-{id_}", "object": "text_completion", "created": now, "model": asked.model}
    null = {"usage": None} if asks_usage else {}
    for piece in said.pieces:
        yield sse({**base, "choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": None}], **null})
    end = {"index": 0, "text": "", "logprobs": None, "finish_reason": FINISH[said.stop]}
    last = sse({**base, "choices": [], "usage": usage_of(asked, said, 1)}) if asks_usage else b""
    yield sse({**base, "choices": [end], **null}) + last + b"data: [DONE]\n\n"
