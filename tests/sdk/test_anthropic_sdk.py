"""The official Anthropic SDK reads what the station says, synchronously and not, and the header style of older ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import pytest
from station import Station

Sdk = Callable[..., Any]
HELLO: list[Any] = [{"role": "user", "content": "Hello Claude"}]
ASK: dict[str, Any] = {"model": "claude-3-5-sonnet", "max_tokens": 200, "messages": HELLO}
SAID = "This is nbgate's demo model claude-3-5-sonnet. It does not think, it repeats what you said: Hello Claude"


def test_anthropic_messages(anthropic_sdk: Sdk) -> None:
    answer = anthropic_sdk().do(lambda c: c.messages.create(**ASK))
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn")
    assert answer.content[0].text == SAID
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 5
    assert answer._request_id


def test_anthropic_stream_of_events(anthropic_sdk: Sdk) -> None:
    events = anthropic_sdk().stream(lambda c: c.messages.create(**ASK, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == SAID


def test_anthropic_stream_helper_gives_the_final_message(station: Station, key: str) -> None:
    with (
        anthropic.Anthropic(api_key=key, base_url=station.url, max_retries=0) as client,
        client.messages.stream(**ASK) as stream,
    ):
        assert "".join(stream.text_stream) == SAID
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (SAID, "end_turn")
    assert final.usage.output_tokens > 5


def test_anthropic_async_stream_helper_gives_the_final_message(station: Station, key: str) -> None:
    async def call() -> tuple[str, Any]:
        async with (
            anthropic.AsyncAnthropic(api_key=key, base_url=station.url, max_retries=0) as client,
            client.messages.stream(**ASK) as stream,
        ):
            text = "".join([part async for part in stream.text_stream])
            return text, await stream.get_final_message()

    text, final = asyncio.run(call())
    assert text == final.content[0].text == SAID


def test_anthropic_tools(anthropic_sdk: Sdk) -> None:
    tool = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    answer = anthropic_sdk().do(lambda c: c.messages.create(**ASK, tools=[tool], tool_choice={"type": "any"}))
    assert answer.stop_reason == "tool_use"
    block = answer.content[-1]
    assert (block.type, block.name) == ("tool_use", "get_weather")
    assert "city" in block.input


def test_anthropic_count_tokens(anthropic_sdk: Sdk) -> None:
    answer = anthropic_sdk().do(lambda c: c.messages.count_tokens(model="claude-3-5-sonnet", messages=HELLO))
    assert answer.input_tokens > 0


def test_anthropic_models(anthropic_sdk: Sdk) -> None:
    sdk = anthropic_sdk()
    names = [model.id for model in sdk.stream(lambda c: c.models.list())]
    assert {"gpt-4o", "claude-3-5-sonnet"} <= set(names)
    one = sdk.do(lambda c: c.models.retrieve("claude-3-opus"))
    assert (one.id, one.type) == ("claude-3-opus", "model")
    assert one.created_at.tzinfo is not None


def test_anthropic_request_id_is_the_header(anthropic_sdk: Sdk) -> None:
    raw = anthropic_sdk().do(lambda c: c.messages.with_raw_response.create(**ASK))
    assert raw.headers["request-id"] == raw.headers["x-request-id"]


# errors


def refused(sdk: Any, kind: type[Any], **ask: Any) -> Any:
    """Make a call that must fail, and return what the SDK raised."""
    with pytest.raises(kind) as caught:
        sdk.do(lambda c: c.messages.create(**{**ASK, **ask}))
    error = caught.value
    assert type(error) is kind
    assert error.body["type"] == "error"
    assert error.body["request_id"] == error.request_id == error.response.headers["request-id"]
    assert set(error.body["error"]) >= {"type", "message", "code"}
    return error


def test_anthropic_error_without_a_known_key(anthropic_sdk: Sdk) -> None:
    error = refused(anthropic_sdk("sk-unknown"), anthropic.AuthenticationError)
    assert (error.status_code, error.type) == (401, "authentication_error")
    assert error.body["error"]["code"] == "invalid_api_key"
    assert "sk-unknown" not in str(error)


def test_anthropic_error_for_an_unknown_model(anthropic_sdk: Sdk) -> None:
    error = refused(anthropic_sdk(), anthropic.NotFoundError, model="nobody")
    assert (error.type, error.body["error"]["code"]) == ("not_found_error", "model_not_found")


def test_anthropic_error_for_a_bad_request(anthropic_sdk: Sdk) -> None:
    assert refused(anthropic_sdk(), anthropic.BadRequestError, messages=[]).type == "invalid_request_error"


def test_anthropic_error_of_the_rate_limit_carries_when_to_retry(anthropic_sdk: Sdk, limited_key: str) -> None:
    sdk = anthropic_sdk(limited_key)
    for left in ("1", "0"):
        raw = sdk.do(lambda c: c.messages.with_raw_response.create(**ASK))
        assert raw.headers["anthropic-ratelimit-requests-limit"] == "2"
        assert raw.headers["anthropic-ratelimit-requests-remaining"] == left
        assert raw.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    error = refused(sdk, anthropic.RateLimitError)
    assert 25 <= int(error.response.headers["retry-after"]) <= 30
    assert (error.type, error.body["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")


@pytest.mark.parametrize("fault", ["reset-mid", "close-mid", "garbage"])
def test_anthropic_stream_raises_when_the_upstream_is_cut(anthropic_sdk: Sdk, fault: str) -> None:
    ask = {**ASK, "model": f"paced-20-1+fault-{fault}", "stream": True}
    with pytest.raises(anthropic.APIStatusError) as caught:
        anthropic_sdk().stream(lambda c: c.messages.create(**ask))
    assert caught.value.body["error"]["code"] == "upstream_error"
    assert caught.value.type == "api_error"


# older clients


def test_anthropic_header_style_of_older_clients(station: Station, key: str) -> None:
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01", "content-type": "application/json"}
    with httpx.Client(trust_env=False, headers=headers, base_url=station.url) as client:
        answer = client.post("/v1/messages", json=ASK)
        assert (answer.status_code, answer.json()["content"][0]["text"]) == (200, SAID)
        listed = client.get("/v1/models").json()
        assert {"data", "has_more", "first_id", "last_id"} <= set(listed)
        assert listed["data"][0]["type"] == "model"
        text = client.post("/v1/messages", json={**ASK, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert events[-1]["type"] == "message_stop"
