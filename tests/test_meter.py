"""Pipes: bytes go on as they came, usage is read as it passes."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgate.dialects import Usage
from nbgate.errors import GateError
from nbgate.meter import JsonPipe, RawPipe, SsePipe, is_error_event, is_error_json

DELTA = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"gpt-4o","choices":'
    b'[{"index":0,"delta":{"content":" hello"},"finish_reason":null}]%s}\n\n'
)
PLAIN = DELTA % b""
NULL = DELTA % b',"usage":null'
USED = b'data: {"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13}}\n\n'
DONE = b"data: [DONE]\n\n"
COUNTED = Usage(input=9, output=4)

CLAUDE = b"".join(
    b"event: %s\ndata: %s\n\n" % (json.loads(d)["type"].encode(), d)
    for d in (
        b'{"type":"message_start","message":{"id":"msg_1","usage":{"input_tokens":10,"cache_read_input_tokens":5,'
        b'"cache_creation_input_tokens":7,"cache_creation":{"ephemeral_5m_input_tokens":3,'
        b'"ephemeral_1h_input_tokens":4},"output_tokens":1}}}',
        b'{"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"say \\"usage\\": {\\"x\\": 1}"}}',
        b'{"type":"ping"}',
        b'{"type":"content_block_start","index":1,"content_block":{"type":"tool_use",'
        b'"input":{"usage":{"output_tokens":99}}}}',
        b'{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":42}}',
        b'{"type":"message_stop"}',
    )
)
CLAUDE_COUNTED = Usage(input=10, cached_read=5, cached_write=3, cached_write_1h=4, output=42)

RESPONSES = b"".join(
    b"event: %s\ndata: %s\n\n" % (json.loads(d)["type"].encode(), d)
    for d in (
        b'{"type":"response.created","sequence_number":0,"response":{"id":"resp_1","usage":null,"error":null}}',
        b'{"type":"response.output_text.delta","sequence_number":1,"delta":"\\"usage\\":{}"}',
        b'{"type":"response.output_item.done","sequence_number":2,"item":{"usage":{"input_tokens":1}}}',
        b'{"type":"response.completed","sequence_number":3,"response":{"id":"resp_1","output":[{"usage":{}}],"usage":'
        b'{"input_tokens":100,"input_tokens_details":{"cached_tokens":60},"output_tokens":30,'
        b'"output_tokens_details":{"reasoning_tokens":20},"total_tokens":130}}}',
    )
)
RESPONSES_COUNTED = Usage(input=40, cached_read=60, output=10, reasoning=20)


def run(pipe: Any, chunks: list[bytes]) -> bytes:
    return b"".join([pipe.feed(c) for c in chunks if c] + [pipe.finish()])


def chat(hide: bool = False, hold: int = 262_144) -> SsePipe:
    return SsePipe("chat", hide_usage=hide, hold_bytes=hold, request_id="req_1")


# streams


def test_whole_chunk_goes_on_as_the_same_object() -> None:
    pipe = chat(hide=True)
    for data in (PLAIN, NULL, DONE):
        assert pipe.feed(data) is data


def test_usage_is_read_and_the_end_is_seen() -> None:
    pipe = chat()
    assert run(pipe, [PLAIN, USED, DONE]) == PLAIN + USED + DONE
    assert (pipe.usage, pipe.ended, pipe.error, pipe.response_id) == (COUNTED, True, False, "chatcmpl-1")
    assert pipe.delivered == len(PLAIN + USED + DONE)


def test_usage_chunk_is_removed_only_when_the_client_did_not_ask() -> None:
    pipe = chat(hide=True)
    assert run(pipe, [PLAIN + USED + DONE]) == PLAIN + DONE
    assert pipe.usage == COUNTED
    assert pipe.delivered == len(PLAIN + DONE)
    pipe = chat(hide=True)
    assert run(pipe, [PLAIN, USED, DONE]) == PLAIN + DONE


@pytest.mark.parametrize("frame", [
    NULL, DELTA % b',"usage":{"prompt_tokens":1,"completion_tokens":1}', b'data: {"choices":[],"usage":null}\n\n',
    b'data: {"choices":[],"prompt_filter_results":[]}\n\n', b'data: {"usage":{"prompt_tokens":1}}\n\n',
])  # fmt: skip
def test_other_chunks_are_never_removed(frame: bytes) -> None:
    assert run(chat(hide=True), [PLAIN, frame, DONE]) == PLAIN + frame + DONE


@pytest.mark.parametrize("frame", [
    b'data: {"choices": [ ],\t"usage" : {"prompt_tokens":9,"completion_tokens":4}}\n\n',
    b'data:{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\r\n\r\n',
    b'data: {"choices":[],\ndata: "usage":\ndata: {"prompt_tokens":9,"completion_tokens":4}}\n\n',
    b': note\nid: 5\ndata: {"usage":{"prompt_tokens":9.0,"completion_tokens":4},"choices":[]}\r\r',
])  # fmt: skip
def test_usage_is_read_in_any_spacing(frame: bytes) -> None:
    pipe = chat(hide=True)
    assert run(pipe, [PLAIN, frame, DONE]) == PLAIN + DONE
    assert pipe.usage == COUNTED


def test_last_usage_wins_in_any_chunk() -> None:
    early = DELTA % b',"usage":{"prompt_tokens":1,"completion_tokens":1}'
    pipe = chat()
    run(pipe, [early, NULL, USED, NULL, DONE])
    assert pipe.usage == COUNTED


@pytest.mark.parametrize("inner", [
    b'"delta":{"content":"say \\"usage\\":{\\"prompt_tokens\\":99}"}',
    b'"delta":{"tool_calls":[{"usage":{"prompt_tokens":99,"completion_tokens":9}}]}',
    b'"delta":{"content":"[DONE]"}', b'"delta":{"content":"\\ndata: [DONE]\\n\\n"}', b'"error":{"message":"x"}',
])  # fmt: skip
def test_decoys_do_not_count(inner: bytes) -> None:
    frame = b'data: {"choices":[{%s}]}\n\n' % inner
    pipe = chat()
    assert run(pipe, [frame]) == frame
    assert (pipe.usage, pipe.ended, pipe.error) == (None, False, False)


@pytest.mark.parametrize("value", [
    b"[]", b'"x"', b"5", b'{"prompt_tokens":-1,"completion_tokens":9223372036854775808}', b'{"prompt_tokens":1.5}',
    b'{"prompt_tokens":"9"}', b"{}", b'{"prompt_tokens":true}', b'{"prompt_tokens":1e400}', b"{",
    b'{"prompt_tokens":[]}',
])  # fmt: skip
def test_hostile_usage_is_ignored(value: bytes) -> None:
    pipe = chat()
    frame = b'data: {"choices":[],"usage":%s}\n\n' % value
    assert run(pipe, [frame, DONE]) == frame + DONE
    assert pipe.usage is None


def test_messages_usage_is_merged() -> None:
    pipe = SsePipe("messages", hide_usage=True)
    assert run(pipe, [CLAUDE]) == CLAUDE
    assert (pipe.usage, pipe.ended, pipe.response_id) == (CLAUDE_COUNTED, True, "msg_1")


def test_messages_cut_early_still_tells_the_input() -> None:
    pipe = SsePipe("messages", hide_usage=False)
    pipe.feed(CLAUDE[: CLAUDE.index(b"event: message_delta")])
    assert pipe.usage == Usage(input=10, cached_read=5, cached_write=3, cached_write_1h=4, output=1)
    assert not pipe.ended


def test_responses_usage_is_the_response_s() -> None:
    pipe = SsePipe("responses", hide_usage=True)
    assert run(pipe, [RESPONSES]) == RESPONSES
    assert (pipe.usage, pipe.ended, pipe.error, pipe.response_id) == (RESPONSES_COUNTED, True, False, "resp_1")


@pytest.mark.parametrize(("dialect", "frame"), [
    ("chat", b'data: {"error":{"message":"x","code":500}}\n\n'), ("chat", b"event: error\ndata: {\"error\":\"x\"}\n\n"),
    ("messages", b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'),
    ("responses", b'event: error\ndata: {"type":"error","code":"x","message":"y"}\n\n'),
    ("responses", b'data: {"type":"response.failed","response":{"id":"r","error":{"code":"x"}}}\n\n'),
    ("images", b'data: {"error":{"message":"x"}}\n\n'),
])  # fmt: skip
def test_error_event_is_seen(dialect: str, frame: bytes) -> None:
    pipe = SsePipe(dialect, hide_usage=True)
    assert pipe.feed(frame) == frame
    assert pipe.error
    assert is_error_event(frame, dialect)
    assert pipe.fail(OSError()) == b""


@pytest.mark.parametrize(("dialect", "frame"), [
    ("chat", PLAIN), ("chat", DONE), ("messages", CLAUDE[: CLAUDE.index(b"\n\n") + 2]), ("chat", b"data: nonsense\n\n"),
    ("responses", RESPONSES[: RESPONSES.index(b"\n\n") + 2]), ("chat", b'data: {"error":null,"choices":[]}\n\n'),
])  # fmt: skip
def test_good_event_is_no_error(dialect: str, frame: bytes) -> None:
    assert not is_error_event(frame, dialect)


def test_begun_waits_for_an_event_that_is_no_comment() -> None:
    pipe = chat()
    pipe.feed(b": ping\n\n")
    assert not pipe.begun
    pipe.feed(PLAIN)
    assert pipe.begun


def test_end_mark_behind_a_missing_blank_line_counts() -> None:
    pipe = chat()
    assert run(pipe, [PLAIN, b"data: [DONE]"]) == PLAIN + b"data: [DONE]"
    assert pipe.ended


def test_image_stream_ends_and_counts() -> None:
    usage = b'{"input_tokens":50,"output_tokens":200,"total_tokens":250,"input_tokens_details":{"image_tokens":10}}'
    frame = b'event: image_generation.completed\ndata: {"type":"image_generation.completed","usage":%s}\n\n' % usage
    pipe = SsePipe("images", hide_usage=False)
    pipe.feed(frame)
    assert pipe.ended
    assert pipe.usage == Usage(input=40, image_in=10, image_out=200)


# failures


def test_failed_stream_ends_with_an_error_and_no_done() -> None:
    pipe = chat()
    pipe.feed(PLAIN + PLAIN[:30])
    last = pipe.fail(OSError("upstream went away at 10.0.0.1"))
    assert last.startswith(b'data: {"error":{')
    assert b"[DONE]" not in last
    assert b"10.0.0.1" not in last
    assert json.loads(last[6:])["error"]["code"] == "upstream_error"


def test_failed_stream_says_what_the_gate_knows() -> None:
    pipe = chat()
    pipe.feed(PLAIN)
    assert b"insufficient_quota" in pipe.fail(GateError("insufficient_quota"))


def test_long_frame_is_closed_before_the_error() -> None:
    pipe = chat(hold=50)
    out = pipe.feed(PLAIN[:100])
    assert out == PLAIN[:100]
    assert pipe.mid_frame
    assert pipe.fail(OSError()).startswith(b"\n\ndata: {")
    assert not pipe.mid_frame


def test_nothing_follows_the_end() -> None:
    pipe = chat()
    pipe.feed(PLAIN + DONE)
    assert pipe.fail(OSError()) == b""


def test_failed_responses_stream_goes_on_counting() -> None:
    pipe = SsePipe("responses", hide_usage=False)
    pipe.feed(RESPONSES[: RESPONSES.index(b"event: response.completed")])
    assert json.loads(pipe.fail(OSError()).partition(b"data: ")[2])["sequence_number"] == 3


# cuts


STREAMS = {
    "chat": (PLAIN + b": ping\n\n" + NULL + USED + NULL + DONE, COUNTED),
    "messages": (CLAUDE, CLAUDE_COUNTED),
    "responses": (RESPONSES, RESPONSES_COUNTED),
}


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({c % (len(data) + 1) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@pytest.mark.parametrize("dialect", STREAMS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("hold", [262_144, 100, 0])
def test_stream_byte_by_byte_is_the_stream_whole(dialect: str, end: bytes, hold: int) -> None:
    data, usage = STREAMS[dialect]
    data = b"\xef\xbb\xbf" + data.replace(b"\n", end)
    pipe = SsePipe(dialect, hide_usage=False, hold_bytes=hold)
    assert run(pipe, [data[i : i + 1] for i in range(len(data))]) == data
    assert pipe.usage == usage
    if hold:
        assert pipe.ended


@settings(max_examples=200, deadline=None)
@given(dialect=st.sampled_from(list(STREAMS)), cuts=st.lists(st.integers(0, 5_000), max_size=20), hide=st.booleans())
def test_stream_cut_anywhere_is_the_stream_whole(dialect: str, cuts: list[int], hide: bool) -> None:
    data, usage = STREAMS[dialect]
    pipe = SsePipe(dialect, hide_usage=hide, hold_bytes=262_144)
    want = data.replace(USED, b"") if hide else data
    assert run(pipe, cut(data, cuts)) == want
    assert (pipe.usage, pipe.ended, pipe.error) == (usage, True, False)
    assert pipe.delivered == len(want)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=40) | st.sampled_from([USED, DONE, b"\n\n", b'data: {"usage":', b"\r"]), max_size=12)
)
def test_any_bytes_pass_unaltered(chunks: list[bytes]) -> None:
    for dialect in STREAMS:
        assert run(SsePipe(dialect, hide_usage=False, hold_bytes=64), chunks) == b"".join(chunks)


@pytest.mark.parametrize("step", [1, 7, 1_000, 70_000])
def test_usage_of_a_frame_too_long_to_hold_is_read(step: int) -> None:
    text = json.dumps('lorem {[ \\ "usage": ipsum ' * 400)
    event = {
        "type": "response.completed",
        "response": {
            "id": "resp_9", "output": [{"text": text, "usage": {"input_tokens": 1}}],
            "usage": {"input_tokens": 5, "output_tokens": 3}, "error": None,
        },
    }  # fmt: skip
    data = b"event: response.completed\ndata: " + json.dumps(event).encode() + b"\n\n" + DONE
    pipe = SsePipe("responses", hide_usage=False, hold_bytes=500)
    assert run(pipe, [data[i : i + step] for i in range(0, len(data), step)]) == data
    assert (pipe.usage, pipe.ended, pipe.error, pipe.response_id) == (Usage(input=5, output=3), True, False, "resp_9")


def test_endless_line_is_bounded_in_memory() -> None:
    pipe = chat()
    chunk = b"x" * 65_536
    pipe.feed(b'data: {"choices":"')
    tracemalloc.start()
    passed = sum(len(pipe.feed(chunk)) for _ in range(1_600))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert passed > 1_590 * 65_536
    assert peak < 2_000_000


# JSON


def body(**more: Any) -> bytes:
    return json.dumps({
        "id": "chatcmpl-7", "object": "chat.completion", "model": "gpt-4o", "error": None,
        "choices": [{"message": {"content": 'a "usage": {} \\" }]', "usage": {"prompt_tokens": 99}}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "d": {"usage": {"x": "}"}}}, "tail": {"usage": {}},
        **more,
    }).encode()  # fmt: skip


def test_json_in_one_chunk_is_read() -> None:
    pipe = JsonPipe("chat")
    data = body()
    assert pipe.feed(data) is data
    assert pipe.finish() == b""
    assert (pipe.usage, pipe.error, pipe.ended) == (COUNTED, False, True)
    assert (pipe.response_id, pipe.model, pipe.delivered) == ("chatcmpl-7", "gpt-4o", len(data))


@pytest.mark.parametrize("indent", [None, 1])
def test_json_cut_at_every_byte_is_read(indent: int | None) -> None:
    data = json.dumps(json.loads(body()), indent=indent).encode()
    for at in range(1, len(data)):
        pipe = JsonPipe("chat")
        assert run(pipe, [data[:at], data[at:]]) == data
        assert (pipe.usage, pipe.error, pipe.response_id, pipe.model) == (COUNTED, False, "chatcmpl-7", "gpt-4o")
    pipe = JsonPipe("chat")
    run(pipe, [data[i : i + 1] for i in range(len(data))])
    assert (pipe.usage, pipe.response_id) == (COUNTED, "chatcmpl-7")


@pytest.mark.parametrize("value", [{"message": "x"}, "flat"])
def test_json_error_is_seen(value: Any) -> None:
    data = json.dumps({"error": value}).encode()
    for chunks in ([data], [data[:5], data[5:]]):
        pipe = JsonPipe("chat")
        run(pipe, chunks)
        assert pipe.error


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"<html>", b'{"usage":', b"\xff\xfe", b"]]]]}}}}", b'"\\'])
def test_what_is_no_json_object_has_no_usage(data: bytes) -> None:
    for chunks in ([data], [data[i : i + 1] for i in range(len(data))]):
        pipe = JsonPipe("chat")
        assert run(pipe, chunks) == data
        assert pipe.usage is None


def test_json_usage_too_long_to_be_one_is_not_kept() -> None:
    data = json.dumps({"usage": {"prompt_tokens": 9, "x": "y" * 100_000}}).encode()
    pipe = JsonPipe("chat")
    run(pipe, [data])
    assert pipe.usage is None


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(['"', "\\", "}{", "usage", '"usage":{', "é", ":", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["usage", "error", "id", 'a"', "\\", "x", "response"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    value=st.dictionaries(st.sampled_from(["usage", "id", "x", "model", "choices"]), JSONS, max_size=5),
    cuts=st.lists(st.integers(0, 3_000), min_size=1, max_size=10),
    indent=st.sampled_from([None, 0, 2]),
)
def test_json_scan_finds_what_a_parser_finds(value: dict[str, Any], cuts: list[int], indent: int | None) -> None:
    value["tail"] = 1
    data = json.dumps(value, indent=indent).encode()
    chunks = cut(data, cuts)
    pipe, whole = JsonPipe("chat"), JsonPipe("chat")
    run(pipe, [b" ", *chunks])
    run(whole, [data])
    assert pipe._raw == (value["usage"] if isinstance(value.get("usage"), dict) else None)
    assert (pipe.usage, pipe.response_id, pipe.model) == (whole.usage, whole.response_id, whole.model)


@pytest.mark.parametrize("first", [True, False])
def test_long_embedding_answer_costs_little(first: bool) -> None:
    rows = [{"object": "embedding", "index": i, "embedding": [0.0123456 * i] * 1_536} for i in range(100)]
    usage = {"usage": {"prompt_tokens": 8, "total_tokens": 8}}
    whole = {**usage, "data": rows} if first else {"object": "list", "data": rows, "model": "m", **usage}
    data = json.dumps(whole).encode()
    chunks = [data[i : i + 65_536] for i in range(0, len(data), 65_536)]
    pipe = JsonPipe("embeddings")
    begun = time.thread_time()
    run(pipe, chunks)
    spent = time.thread_time() - begun
    assert pipe.usage == Usage(input=8)
    assert spent / (len(data) / 1e6) < 0.005  # a bound for slow machines; about 0.0005 is usual


@pytest.mark.parametrize(("data", "error"), [
    (b'{"error":{"message":"x"}}', True), (b'{"type":"error","error":{"type":"api_error"}}', True),
    (b'{"error":"x"}', True), (b'{"error":null,"choices":[{}]}', False), (b'{"choices":[{"error":{"x":1}}]}', False),
    (b'{"object":"response","error":{"code":"x"},"output":[{}]}', False), (b'{"error":', False), (b"[]", False),
    (b'{"object":"response","status":"failed","error":{"code":"x"},"output":[],"usage":null}', True), (b"{}", False),
])  # fmt: skip
def test_error_json_is_an_error_and_nothing_else(data: bytes, error: bool) -> None:
    assert is_error_json(data) is error


def test_raw_pipe_counts_only() -> None:
    pipe = RawPipe()
    data = b"\x00\x01"
    assert pipe.feed(data) is data
    assert pipe.finish() == b""
    assert (pipe.delivered, pipe.usage, pipe.ended) == (2, None, True)
    assert pipe.fail(OSError()) == b""
