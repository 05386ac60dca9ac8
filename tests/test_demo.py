"""The demo upstream answers in shapes that the official SDKs take whole."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from anthropic import types as claude
from openai import types
from openai.types import chat
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from nbgate.demo.app import App
from nbgate.demo.models import KINDS, MODELS
from nbgate.demo.words import example, split

ROOT = Path(__file__).resolve().parent.parent
SAY = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 3},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 2},
        "note": {"type": "string"},
    },
    "required": ["city", "unit", "days", "tags"],
    "$defs": {"tag": {"type": "string", "const": "t"}},
}
MADE = {"city": "demo city", "unit": "c", "days": 3, "tags": ["t", "t"]}
CHAT_TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]
FLAT_TOOLS = [{"type": "function", **tool["function"], "strict": False} for tool in CHAT_TOOLS]  # type: ignore[dict-item]
CLAUDE_TOOLS = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in FLAT_TOOLS]


def call(
    path: str, body: Any = None, method: str = "POST", headers: tuple[tuple[bytes, bytes], ...] = ()
) -> tuple[int, dict[bytes, bytes], list[bytes]]:
    """Run the app on one request without any server; return what it sent."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    sent: list[Any] = []

    async def run() -> None:
        inbox = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return inbox.pop() if inbox else await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await App(pace_s=0, clock=lambda: 1_700_000_000)(scope, receive, send)

    asyncio.run(run())
    return sent[0]["status"], dict(sent[0]["headers"]), [message["body"] for message in sent[1:]]


def ask(path: str, **body: Any) -> Any:
    status, _, parts = call(path, body)
    answer = json.loads(b"".join(parts))
    assert status == 200, answer
    return answer


def stream(path: str, **body: Any) -> list[dict[str, Any]]:
    status, headers, parts = call(path, {**body, "stream": True})
    assert status == 200, parts
    assert headers[b"content-type"].startswith(b"text/event-stream")
    events = []
    for part in parts:
        assert not part or part.endswith(b"\n\n"), "whole frames per write"
    for frame in b"".join(parts).split(b"\n\n"):
        for line in frame.split(b"\n"):
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if frame.startswith(b"event: "):
                    assert frame.split(b"\n")[0] == b"event: " + event["type"].encode()
                events.append(event)
    return events


def strict(kind: Any, value: Any) -> Any:
    """Parse into an SDK model; a missing or wrong field raises."""
    return TypeAdapter(kind).validate_python(value)


# --- whole answers ----------------------------------------------------------------------------------------------------
def test_models_hold_every_name_of_the_public_documentation() -> None:
    documented = "gpt-4o gpt-4-turbo gpt-3.5-turbo claude-3-5-sonnet claude-3-opus text-embedding-3-small dall-e-3"
    assert set(documented.split()) <= set(MODELS)


@pytest.mark.parametrize("model", [name for name, kind in KINDS.items() if kind == "chat"])
def test_chat_answers_for_each_model_with_or_without_v1(model: str) -> None:
    for path in ("/v1/chat/completions", "/chat/completions"):
        parsed = strict(chat.ChatCompletion, ask(path, model=model, messages=SAY))
        assert f"demo model {model}" in parsed.choices[0].message.content
        assert parsed.choices[0].message.content.endswith("Hello")
        assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens > 2


def test_the_same_question_gets_the_same_answer() -> None:
    body = {"model": "gpt-4o", "messages": SAY}
    assert call("/v1/chat/completions", body) == call("/v1/chat/completions", body)


def test_answers_come_in_the_language_of_the_question() -> None:
    question = [{"role": "user", "content": "什么是人工智能？"}]
    text = ask("/v1/chat/completions", model="gpt-4o", messages=question)["choices"][0]["message"]["content"]
    assert "演示模型 gpt-4o" in text
    assert "什么是人工智能？" in text
    assert "".join(split(text)) == text
    assert len(split(text)) > 10


def test_chat_cuts_at_max_tokens_and_says_length() -> None:
    choice = ask("/v1/chat/completions", model="gpt-4o", messages=SAY, max_tokens=3, n=2)["choices"]
    assert [(one["finish_reason"], one["message"]["content"]) for one in choice] == [("length", "This is nbgate's")] * 2


def test_chat_gives_json_of_the_wanted_shape() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    answer = ask("/v1/chat/completions", model="gpt-4o", messages=SAY, response_format=wanted)
    assert json.loads(answer["choices"][0]["message"]["content"]) == MADE


def test_responses_take_the_documented_max_tokens() -> None:
    parsed = strict(Response, ask("/v1/responses", model="gpt-4o", input="Explain quantum computing", max_tokens=4))
    assert (parsed.status, parsed.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert parsed.usage.output_tokens == 4
    assert parsed.output_text == "This is nbgate's demo"


def test_messages_answer_as_claude_does() -> None:
    body = {"model": "claude-3-5-sonnet", "max_tokens": 1024, "messages": SAY, "system": "Be brief."}
    parsed = strict(claude.Message, ask("/v1/messages", **body))
    assert parsed.stop_reason == "end_turn"
    assert parsed.content[0].text.endswith("Hello")
    counted = strict(claude.MessageTokensCount, ask("/v1/messages/count_tokens", **body))
    assert counted.input_tokens == parsed.usage.input_tokens
    cut = ask("/v1/messages", **body, stop_sequences=["demo"])
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", "demo")
    assert "demo" not in cut["content"][0]["text"]


def test_completions_answer_and_stream() -> None:
    body = {"model": "gpt-3.5-turbo-instruct", "prompt": "Once", "max_tokens": 50}
    whole = strict(types.Completion, ask("/v1/completions", **body))
    events = stream("/v1/completions", **body)
    assert "".join(event["choices"][0]["text"] for event in events) == whole.choices[0].text
    assert strict(types.Completion, events[-1]).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("dimensions", [None, 8])
def test_embeddings_are_unit_vectors_in_both_encodings(dimensions: int | None) -> None:
    body = {"model": "text-embedding-3-small", "input": ["Hello world", "How are you"]}
    more = {} if dimensions is None else {"dimensions": dimensions}
    plain = strict(types.CreateEmbeddingResponse, ask("/v1/embeddings", **body, **more))
    coded = ask("/v1/embeddings", **body, **more, encoding_format="base64")
    for index in (0, 1):
        vector = plain.data[index].embedding
        assert len(vector) == (dimensions or 1536)
        assert math.isclose(sum(number * number for number in vector), 1.0, rel_tol=1e-9)
        decoded = struct.unpack(f"<{len(vector)}f", base64.b64decode(coded["data"][index]["embedding"]))
        assert decoded == pytest.approx(vector, abs=1e-6)
    assert plain.data[0].embedding != plain.data[1].embedding
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == 5


@pytest.mark.parametrize("form", ["url", "b64_json"])
def test_images_are_true_png_files(form: str) -> None:
    body = {"model": "dall-e-3", "prompt": "A sunset", "size": "1792x1024", "quality": "hd", "n": 3}
    parsed = strict(types.ImagesResponse, ask("/v1/images/generations", **body, response_format=form))
    coded = [getattr(image, form).removeprefix("data:image/png;base64,") for image in parsed.data]
    assert len(set(coded)) == 3
    data = base64.b64decode(coded[0])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kinds.append(data[at + 4 : at + 8])
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        assert crc == zlib.crc32(data[at + 4 : at + 8 + length])
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_moderations_flag_few_words_and_need_no_model() -> None:
    parsed = strict(types.ModerationCreateResponse, ask("/v1/moderations", input=["I like you", "I will kill you"]))
    assert [one.flagged for one in parsed.results] == [False, True]
    assert parsed.model == "omni-moderation-latest"
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = ask("/v1/moderations", input=[{"type": "text", "text": "hi"}, image])
    strict(types.ModerationCreateResponse, parts)
    assert len(parts["results"]) == 1


def test_models_are_listed_as_each_family_lists_them() -> None:
    _, _, parts = call("/v1/models", method="GET")
    assert [strict(types.Model, one).id for one in json.loads(parts[0])["data"]] == list(MODELS)
    version = ((b"anthropic-version", b"2023-06-01"),)
    _, _, parts = call("/v1/models", method="GET", headers=version)
    assert [strict(claude.ModelInfo, one).id for one in json.loads(parts[0])["data"]] == list(MODELS)
    _, _, parts = call("/models/gpt-4o", method="GET")
    assert json.loads(parts[0])["id"] == "gpt-4o"
    assert call("/v1/models/none", method="GET")[0] == 404


# --- streams ----------------------------------------------------------------------------------------------------------
def test_chat_stream_says_what_the_whole_answer_says_and_usage_only_when_asked() -> None:
    body = {"model": "gpt-4o", "messages": SAY}
    whole = ask("/v1/chat/completions", **body)
    plain = [strict(chat.ChatCompletionChunk, event) for event in stream("/v1/chat/completions", **body)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in plain) == whole["choices"][0]["message"]["content"]
    assert [chunk.choices[0].finish_reason for chunk in plain][-2:] == [None, "stop"]
    assert all(chunk.usage is None for chunk in plain)
    asked = stream("/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert (asked[-1]["choices"], asked[-1]["usage"]) == ([], whole["usage"])
    assert all(event["usage"] is None for event in asked[:-1])
    assert call("/v1/chat/completions", {**body, "stream": True})[2][-2].endswith(b"data: [DONE]\n\n")


def test_responses_stream_follows_the_whole_grammar() -> None:
    events = stream("/v1/responses", model="gpt-4o", input="Hello")
    for event in events:
        strict(ResponseStreamEvent, event)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    start = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == start + ["output_text.delta"] * deltas + end
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event.get("delta", "") for event in events)
    assert text == events[-1]["response"]["output"][0]["content"][0]["text"] == events[4 + deltas]["text"]
    assert events[-1]["response"]["usage"]["output_tokens"] == deltas


def test_messages_stream_follows_the_whole_grammar() -> None:
    events = stream("/v1/messages", model="claude-3-opus", max_tokens=100, messages=SAY)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    start, end = (
        ["message_start", "content_block_start", "ping"],
        ["content_block_stop", "message_delta", "message_stop"],
    )
    assert kinds == start + ["content_block_delta"] * deltas + end
    for event in events:
        if event["type"] != "ping":
            strict(claude.RawMessageStreamEvent, event)
    assert events[-2]["usage"]["output_tokens"] == deltas
    assert events[-2]["delta"]["stop_reason"] == "end_turn"


def test_a_stream_ends_when_the_client_goes_away() -> None:
    sent: list[Any] = []

    async def run() -> None:
        body = json.dumps({"model": "gpt-4o", "messages": SAY, "stream": True}).encode()
        inbox: list[Any] = [{"type": "http.disconnect"}, {"type": "http.request", "body": body}]

        async def receive() -> Any:
            return inbox.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": ()}
        await App(pace_s=60)(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), 5))
    assert len(sent) == 2


# --- tools ------------------------------------------------------------------------------------------------------------
def test_example_fits_its_schema() -> None:
    assert example(SCHEMA) == MADE
    assert example({"anyOf": [{"type": "null"}, {"type": "string"}]}) is None
    assert example({"type": ["null", "number"]}) == 1.0
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}}
    assert isinstance(example(endless), dict)


def test_chat_calls_tools_then_answers_with_text() -> None:
    question = {"role": "user", "content": "Use both tools in parallel"}
    body: dict[str, Any] = {"model": "gpt-4o", "messages": [question], "tools": CHAT_TOOLS}
    parsed = strict(chat.ChatCompletion, ask("/v1/chat/completions", **body))
    made = parsed.choices[0].message.tool_calls
    assert parsed.choices[0].finish_reason == "tool_calls"
    assert [(one.function.name, json.loads(one.function.arguments)) for one in made] == [
        ("weather", MADE),
        ("clock", {}),
    ]
    assert len({one.id for one in made}) == 2
    pieces = {0: "", 1: ""}
    for event in stream("/v1/chat/completions", **body):
        for one in strict(chat.ChatCompletionChunk, event).choices[0].delta.tool_calls or ():
            pieces[one.index] += one.function.arguments
    assert [pieces[0], pieces[1]] == [one.function.arguments for one in made]
    results = [{"role": "tool", "tool_call_id": one.id, "content": f"{one.function.name} fine"} for one in made]
    turn = {"role": "assistant", "tool_calls": [one.model_dump() for one in made]}
    last = ask("/v1/chat/completions", **{**body, "messages": [question, turn, *results]})
    assert last["choices"][0]["message"]["content"].endswith("weather fine; clock fine")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, ["weather"]),
        ({"messages": [{"role": "user", "content": "call clock"}]}, ["clock"]),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"]),
        ({"tool_choice": "required"}, ["weather"]),
        ({"messages": [{"role": "user", "content": "both"}], "parallel_tool_calls": False}, ["weather"]),
        ({"tool_choice": "none"}, []),
    ],
)
def test_chat_tool_choice_decides(more: dict[str, Any], names: list[str]) -> None:
    body = {"model": "gpt-4o", "messages": SAY, "tools": CHAT_TOOLS, **more}
    message = ask("/v1/chat/completions", **body)["choices"][0]["message"]
    assert [one["function"]["name"] for one in message.get("tool_calls", ())] == names


def test_messages_call_tools_each_in_its_own_block() -> None:
    question = {"role": "user", "content": "同时调用"}
    body: dict[str, Any] = {"model": "claude-3-opus", "max_tokens": 99, "messages": [question], "tools": CLAUDE_TOOLS}
    parsed = strict(claude.Message, ask("/v1/messages", **body))
    assert parsed.stop_reason == "tool_use"
    assert [(one.name, one.input) for one in parsed.content] == [("weather", MADE), ("clock", {})]
    events = [event for event in stream("/v1/messages", **body) if event["type"] != "ping"]
    for event in events:
        strict(claude.RawMessageStreamEvent, event)
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
    assert [event["index"] for event in events if "index" in event] == sorted(
        event["index"] for event in events if "index" in event
    )
    results = [{"type": "tool_result", "tool_use_id": one.id, "content": "fine"} for one in parsed.content]
    turns = [question, {"role": "assistant", "content": [one.model_dump(exclude_none=True) for one in parsed.content]}]
    last = ask("/v1/messages", **{**body, "messages": [*turns, {"role": "user", "content": results}]})
    assert last["content"][0]["text"].endswith("工具的返回结果是：fine; fine")


def test_responses_call_functions_with_the_whole_grammar() -> None:
    body: dict[str, Any] = {"model": "gpt-4o", "input": "Use both", "tools": FLAT_TOOLS}
    parsed = strict(Response, ask("/v1/responses", **body))
    assert [(one.name, json.loads(one.arguments)) for one in parsed.output] == [("weather", MADE), ("clock", {})]
    events = stream("/v1/responses", **body)
    for event in events:
        strict(ResponseStreamEvent, event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [event["arguments"] for event in done] == [one.arguments for one in parsed.output]
    made = [one.model_dump(exclude_none=True) for one in parsed.output]
    results = [{"type": "function_call_output", "call_id": one.call_id, "output": "fine"} for one in parsed.output]
    last = strict(
        Response, ask("/v1/responses", **{**body, "input": [{"role": "user", "content": "Use both"}, *made, *results]})
    )
    assert last.output_text.endswith("fine; fine")


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", {"model": "gpt-4o"}, 400, "messages"),
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": ["hi"]}, 400, "messages"),
        ("/v1/chat/completions", {"messages": SAY}, 400, "model"),
        ("/v1/chat/completions", {"model": "gpt-9", "messages": SAY}, 404, "model"),
        ("/v1/chat/completions", {"model": "dall-e-3", "messages": SAY}, 400, "model"),
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": SAY, "temperature": 3}, 400, "temperature"),
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": SAY, "max_tokens": True}, 400, "max_tokens"),
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": SAY, "tools": 5}, 400, None),
        ("/v1/chat/completions", {"model": "gpt-9", "messages": SAY, "stream": True}, 404, "model"),
        ("/v1/chat/completions", b"{", 400, None),
        ("/v1/chat/completions", b"[]", 400, None),
        ("/v1/responses", {"model": "gpt-4o"}, 400, "input"),
        ("/v1/responses", {"model": "gpt-4o", "input": "x", "previous_response_id": "r"}, 400, "previous_response_id"),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": ""}, 400, "input"),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x", "dimensions": 1537}, 400, "dimensions"),
        ("/v1/images/generations", {"prompt": "x", "size": "10x10"}, 400, "size"),
        ("/v1/images/generations", {"prompt": "x", "n": 11}, 400, "n"),
        ("/v1/images/generations", {"prompt": "x", "quality": "ultra"}, 400, "quality"),
        ("/v1/nowhere", {}, 404, None),
    ],
)
def test_a_bad_request_is_refused_in_openai_shape(path: str, body: Any, status: int, param: str | None) -> None:
    got, _, parts = call(path, body)
    error = json.loads(parts[0])["error"]
    assert (got, set(error), error["param"]) == (status, {"message", "type", "param", "code"}, param)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "claude-3-opus", "messages": SAY}, 400, "invalid_request_error"),
        ({"model": "claude-3-opus", "max_tokens": 5}, 400, "invalid_request_error"),
        ({"model": "claude-9", "max_tokens": 5, "messages": SAY}, 404, "not_found_error"),
    ],
)
def test_a_bad_request_is_refused_in_claude_shape(body: Any, status: int, kind: str) -> None:
    got, _, parts = call("/v1/messages", body)
    answer = json.loads(parts[0])
    assert (got, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    strict(claude.ErrorResponse, answer)


def test_a_wrong_method_is_405_with_allow() -> None:
    status, headers, _ = call("/v1/chat/completions", method="GET")
    assert (status, headers[b"allow"]) == (405, b"POST")


# --- the process ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        argv = [sys.executable, "-m", "nbgate.demo", "--fd", str(sock.fileno()), "--pace-ms", "1"]
        process = subprocess.Popen(argv, pass_fds=[sock.fileno()], cwd=ROOT)
        port = sock.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", process
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_the_openai_client_talks_to_the_process(served: tuple[str, Any]) -> None:
    with openai.OpenAI(api_key="k", base_url=served[0], max_retries=0, timeout=10) as client:
        answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hello"}])
        parts = client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == answer.choices[0].message.content
        vector = client.embeddings.create(model="text-embedding-3-small", input="Hello").data[0].embedding
        assert len(vector) == 1536
        with client.responses.stream(model="gpt-4o", input="Hello") as events:
            assert events.get_final_response().output_text == text
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hello"}])


def test_the_anthropic_client_talks_to_the_process(served: tuple[str, Any]) -> None:
    with anthropic.Anthropic(api_key="k", base_url=served[0], max_retries=0, timeout=10) as client:
        with client.messages.stream(
            model="claude-3-opus", max_tokens=64, messages=[{"role": "user", "content": "both"}],
            tools=CLAUDE_TOOLS,  # type: ignore[arg-type]
        ) as events:  # fmt: skip
            final = events.get_final_message()
        assert [block.input for block in final.content if block.type == "tool_use"] == [MADE, {}]
        assert next(iter(client.models.list())).id == MODELS[0]


def test_the_process_serves_a_unix_socket_and_ends_with_its_parent(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "demo.sock"))
        sock.listen(64)
        argv = [sys.executable, "-m", "nbgate.demo", "--fd", str(sock.fileno()), "--parent-fd", str(reader)]
        process = subprocess.Popen(argv, pass_fds=[sock.fileno(), reader], cwd=ROOT)
    os.close(reader)
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(tmp_path / "demo.sock"))
            link.sendall(b"GET /v1/models/gpt-4o HTTP/1.1\r\nhost: demo\r\n\r\n")
            reply = http.client.HTTPResponse(link)
            reply.begin()
            assert (reply.status, json.loads(reply.read())["id"]) == (200, "gpt-4o")
            reply.close()
        os.close(writer)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
