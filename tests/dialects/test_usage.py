"""Usage of every dialect, in disjoint counters."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import MessageDeltaUsage
from anthropic.types import Usage as ClaudeUsage
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CompletionUsage
from openai.types.create_embedding_response import Usage as EmbeddingUsage
from openai.types.images_response import Usage as ImageUsage
from openai.types.responses import ResponseUsage

from nbgate.dialects import DIALECTS, Usage
from nbgate.dialects.claude import merge_usage
from nbgate.dialects.model import COUNT_MAX, count

CASES: list[tuple[str, dict[str, Any], Usage]] = [
    ("chat", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, Usage(input=10, output=5)),
    (
        "chat",
        {
            "prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
            "prompt_tokens_details": {
                "cached_tokens": 60, "audio_tokens": 10, "cache_write_tokens": 5, "image_tokens": 4,
            },
            "completion_tokens_details": {"reasoning_tokens": 20, "audio_tokens": 7, "rejected_prediction_tokens": 3},
        },
        Usage(input=21, cached_read=60, cached_write=5, audio_in=10, image_in=4, output=23, reasoning=20, audio_out=7),
    ),
    ("chat", {"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 8}, Usage(2, 8, output=5)),
    ("chat", {"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 4}, Usage(6, 4, output=5)),
    (
        "chat",  # reasoning beside the completion, as the total shows
        {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 45,
         "completion_tokens_details": {"reasoning_tokens": 30}},
        Usage(input=10, output=5, reasoning=30),
    ),
    (
        "chat",  # parts that claim more than the whole
        {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 99, "audio_tokens": 9},
         "completion_tokens_details": {"reasoning_tokens": 99}},
        Usage(cached_read=10, reasoning=5),
    ),
    ("chat", {"prompt_tokens": 10, "total_tokens": 15}, Usage(input=10, output=5)),
    ("chat", {"prompt_tokens": 3, "prompt_tokens_details": None, "completion_tokens": 1}, Usage(input=3, output=1)),
    ("completions", {"prompt_tokens": 3, "completion_tokens": 1}, Usage(input=3, output=1)),
    (
        "responses",
        {
            "input_tokens": 100, "output_tokens": 40, "total_tokens": 140,
            "input_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 20},
            "output_tokens_details": {"reasoning_tokens": 25},
        },
        Usage(input=50, cached_read=30, cached_write=20, output=15, reasoning=25),
    ),
    (
        "messages",
        {
            "input_tokens": 10, "output_tokens": 50, "cache_read_input_tokens": 1000,
            "cache_creation_input_tokens": 300,
            "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
            "output_tokens_details": {"thinking_tokens": 30}, "server_tool_use": {"web_search_requests": 2},
        },
        Usage(10, 1000, 100, 200, output=20, reasoning=30, web_searches=2),
    ),
    ("messages", {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 7}, Usage(10, 0, 7, output=5)),
    ("messages", {"output_tokens": 5, "cache_creation": {"ephemeral_1h_input_tokens": 7}}, Usage(0, 0, 0, 7, output=5)),
    ("embeddings", {"prompt_tokens": 4, "total_tokens": 4}, Usage(input=4)),
    ("embeddings", {"total_tokens": 4}, Usage(input=4)),
    (
        "images",
        {"input_tokens": 50, "output_tokens": 200, "total_tokens": 250,
         "input_tokens_details": {"image_tokens": 40, "text_tokens": 10}},
        Usage(input=10, image_in=40, image_out=200),
    ),
    (
        "images",
        {"input_tokens": 50, "output_tokens": 200, "output_tokens_details": {"image_tokens": 190, "text_tokens": 10}},
        Usage(input=50, output=10, image_out=190),
    ),
]  # fmt: skip
SDK = {
    "chat": CompletionUsage, "responses": ResponseUsage, "messages": ClaudeUsage, "embeddings": EmbeddingUsage,
    "images": ImageUsage,
}  # fmt: skip
COUNTERS = [name for name in Usage.__struct_fields__ if name != "web_searches"]


@pytest.mark.parametrize(("dialect", "raw", "usage"), CASES)
def test_usage_is_read_into_disjoint_counters(dialect: str, raw: dict[str, Any], usage: Usage) -> None:
    read = DIALECTS[dialect].read_usage(raw)
    assert read == usage
    assert read is not None
    assert read.total_input + read.total_output == sum(getattr(read, name) for name in COUNTERS)


@pytest.mark.parametrize("dialect", ["chat", "responses", "embeddings", "images"])
def test_counters_add_up_to_the_provider_s_total(dialect: str) -> None:
    for name, raw, _ in CASES:
        if name == dialect and "total_tokens" in raw:
            read = DIALECTS[dialect].read_usage(raw)
            assert read is not None
            assert read.total_input + read.total_output == raw["total_tokens"]


@pytest.mark.parametrize("dialect", SDK)
def test_member_names_are_the_sdk_s_own(dialect: str) -> None:
    known = set(SDK[dialect].model_fields)
    extra = {"prompt_cache_hit_tokens", "cached_tokens"}
    for name, raw, _ in CASES:
        if name == dialect:
            assert set(raw) <= known | extra
    assert set(MessageDeltaUsage.model_fields) <= set(ClaudeUsage.model_fields)


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(2**63),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NAMES = sorted({key for _, raw, _ in CASES for key in raw})
DETAILS = sorted({key for _, raw, _ in CASES for v in raw.values() if isinstance(v, dict) for key in v})
RAW = st.dictionaries(
    st.sampled_from(NAMES), HOSTILE | st.dictionaries(st.sampled_from(DETAILS), HOSTILE | st.integers(0, 500))
    | st.integers(0, 1_000), max_size=8,
)  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@given(raw=RAW)
def test_hostile_usage_never_raises_and_never_goes_below_zero(dialect: str, raw: dict[str, Any]) -> None:
    read = DIALECTS[dialect].read_usage(raw)
    if read is not None:
        for name in Usage.__struct_fields__:
            value = getattr(read, name)
            assert type(value) is int
            assert 0 <= value <= 3 * COUNT_MAX
    merged = DIALECTS[dialect].merge_usage({"input_tokens": 1}, raw)
    DIALECTS[dialect].read_usage(merged)


@pytest.mark.parametrize(("value", "read"), [
    (5, 5), (5.0, 5), (0, 0), (-1, 0), (2**63, 0), (COUNT_MAX, COUNT_MAX), (COUNT_MAX + 1, 0), (1.5, 0), (True, 0),
    ("5", 0), (None, 0), (float("inf"), 0), (float("nan"), 0), (1e29, 0), ([], 0),
])  # fmt: skip
def test_count_takes_sane_numbers_only(value: object, read: int) -> None:
    assert count({"a": {"b": value}}, "a", "b") == read


def test_claude_merge_keeps_the_split_of_cache_writes() -> None:
    start = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 100,
        "cache_creation": {"ephemeral_1h_input_tokens": 100},
    }
    delta = {"output_tokens": 50, "cache_creation_input_tokens": 100, "input_tokens": 0}
    merged = merge_usage(merge_usage(None, start), delta)
    assert DIALECTS["messages"].read_usage(merged) == Usage(input=10, cached_write_1h=100, output=50)


def test_claude_input_told_only_at_the_end_counts() -> None:
    merged = merge_usage(merge_usage(None, {"input_tokens": 0}), {"input_tokens": 12, "output_tokens": 3})
    assert DIALECTS["messages"].read_usage(merged) == Usage(input=12, output=3)


def test_pings_are_comments_or_the_dialect_s_own_event() -> None:
    assert DIALECTS["messages"].ping == b'event: ping\ndata: {"type": "ping"}\n\n'
    assert {d.ping for d in DIALECTS.values() if d.name != "messages"} == {b": ping\n\n"}


def test_every_dialect_acts_on_the_model() -> None:
    assert all(
        "model" in d.acted_fields and d.acted_fields == {f.lower() for f in d.acted_fields} for d in DIALECTS.values()
    )
