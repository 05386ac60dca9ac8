"""The official OpenAI SDK reads what the station says: both kinds of client, `/v1` in the base URL or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import openai
import pytest

Sdk = Callable[..., Any]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SAID = "This is nbgate's demo model gpt-4o. It does not think, it repeats what you said: Hello"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_openai_chat(openai_sdk: Sdk) -> None:
    answer = openai_sdk().do(lambda c: c.chat.completions.create(model="gpt-4o", messages=HELLO))
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    assert answer._request_id


def test_openai_chat_stream_tells_usage_only_when_asked(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    chunks = sdk.stream(lambda c: c.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    options = {"include_usage": True}
    told = sdk.stream(
        lambda c: c.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True, stream_options=options)
    )
    assert len(told) == len(chunks) + 1
    assert told[-1].choices == []
    assert told[-1].usage.completion_tokens > 5


def test_openai_chat_tools_and_their_results(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    ask: dict[str, Any] = {"model": "gpt-4o", "messages": HELLO, "tools": [TOOL], "tool_choice": "required"}
    first = sdk.do(lambda c: c.chat.completions.create(**ask))
    choice = first.choices[0]
    call = choice.message.tool_calls[0]
    assert (choice.finish_reason, call.type, call.function.name) == ("tool_calls", "function", "get_weather")
    assert set(json.loads(call.function.arguments)) == {"city"}
    turn = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = sdk.do(lambda c: c.chat.completions.create(model="gpt-4o", messages=turn, tools=[TOOL]))
    assert "sunny" in second.choices[0].message.content
    chunks = sdk.stream(lambda c: c.chat.completions.create(**ask, stream=True))
    parts = [one.function.arguments or "" for x in chunks for one in x.choices[0].delta.tool_calls or ()]
    assert "".join(parts) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_responses(openai_sdk: Sdk) -> None:
    answer = openai_sdk().do(lambda c: c.responses.create(model="gpt-4o", input="Hello"))
    assert (answer.status, answer.output_text) == ("completed", SAID)
    assert answer.usage.output_tokens > 5


def test_openai_responses_stream_keeps_the_grammar_of_events(openai_sdk: Sdk) -> None:
    events = openai_sdk().stream(lambda c: c.responses.create(model="gpt-4o", input="Hello", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAID
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.usage.total_tokens > 5


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_embeddings(openai_sdk: Sdk, encoding: str | None) -> None:
    more = {"encoding_format": encoding} if encoding else {}
    inputs = ["Hello world", "How are you"]
    answer = openai_sdk().do(lambda c: c.embeddings.create(model="text-embedding-3-small", input=inputs, **more))
    assert [row.index for row in answer.data] == [0, 1]
    if encoding != "base64":
        assert math.isclose(sum(x * x for x in answer.data[0].embedding), 1.0, rel_tol=1e-3)
    assert answer.usage.total_tokens > 0


def test_openai_images(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    answer = sdk.do(lambda c: c.images.generate(model="dall-e-3", prompt="A sunset", size="1024x1024", n=2))
    assert [image.url[:22] for image in answer.data] == ["data:image/png;base64,"] * 2
    coded = sdk.do(lambda c: c.images.generate(prompt="A sunset", response_format="b64_json"))
    assert coded.data[0].b64_json


def test_openai_moderations(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    assert not sdk.do(lambda c: c.moderations.create(input="Hello")).results[0].flagged
    answer = sdk.do(lambda c: c.moderations.create(model="omni-moderation-latest", input="kill them"))
    assert answer.results[0].flagged
    assert answer.results[0].categories.violence


def test_openai_completions(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    ask: dict[str, Any] = {"model": "gpt-3.5-turbo-instruct", "prompt": "Hello", "max_tokens": 100}
    answer = sdk.do(lambda c: c.completions.create(**ask))
    assert answer.choices[0].text.endswith("Hello")
    chunks = sdk.stream(lambda c: c.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_openai_models(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    names = [model.id for model in sdk.stream(lambda c: c.models.list())]
    assert {"gpt-4o", "claude-3-5-sonnet", "text-embedding-3-small"} <= set(names)
    assert len(names) == len(set(names))
    one = sdk.do(lambda c: c.models.retrieve("gpt-4o"))
    assert (one.id, one.object) == ("gpt-4o", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.do(lambda c: c.models.retrieve("no/such-model"))
    assert caught.value.code == "model_not_found"


def test_openai_request_id_is_the_header(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    ask: dict[str, Any] = {"model": "gpt-4o", "messages": HELLO}
    raw = sdk.do(lambda c: c.chat.completions.with_raw_response.create(**ask))
    assert raw.headers["x-request-id"] == raw.request_id == raw.parse()._request_id
    assert float(raw.headers["x-nbgate-overhead-ms"]) > 0
    given = {"x-request-id": "mine-1.2"}
    raw = sdk.do(lambda c: c.chat.completions.with_raw_response.create(**ask, extra_headers=given))
    assert raw.headers["x-request-id"] == "mine-1.2"


# errors


def refused(sdk: Any, kind: type[Any], **ask: Any) -> Any:
    """Make a chat call that must fail, and return what the SDK raised."""
    with pytest.raises(kind) as caught:
        sdk.do(lambda c: c.chat.completions.create(**{"model": "gpt-4o", "messages": HELLO, **ask}))
    error = caught.value
    assert type(error) is kind
    assert error.request_id == error.response.headers["x-request-id"]
    assert set(error.body) == {"message", "type", "param", "code"}
    return error


def test_openai_error_without_a_known_key(openai_sdk: Sdk) -> None:
    error = refused(openai_sdk("sk-unknown"), openai.AuthenticationError)
    assert (error.status_code, error.code, error.type) == (401, "invalid_api_key", "authentication_error")
    assert "sk-unknown" not in str(error)


def test_openai_error_for_an_unknown_model(openai_sdk: Sdk) -> None:
    error = refused(openai_sdk(), openai.NotFoundError, model="nobody")
    assert (error.code, error.type, error.param) == ("model_not_found", "invalid_request_error", "model")


@pytest.mark.parametrize(
    ("ask", "code"),
    [({"model": ""}, "missing_model"), ({"model": 5}, "invalid_type"), ({"temperature": 7}, "invalid_value")],
)
def test_openai_error_for_a_bad_request(openai_sdk: Sdk, ask: dict[str, Any], code: str) -> None:
    error = refused(openai_sdk(), openai.BadRequestError, **ask)
    assert (error.code, error.type) == (code, "invalid_request_error")


def test_openai_error_of_the_rate_limit_carries_when_to_retry(openai_sdk: Sdk, limited_key: str) -> None:
    sdk = openai_sdk(limited_key)
    for left in ("1", "0"):
        raw = sdk.do(lambda c: c.chat.completions.with_raw_response.create(model="gpt-4o", messages=HELLO))
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == left
    error = refused(sdk, openai.RateLimitError)
    wait = int(error.response.headers["retry-after"])
    assert 25 <= wait <= 30
    assert 0 <= wait * 1000 - int(error.response.headers["retry-after-ms"]) < 1000
    assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert str(error).endswith(f"Rate limit exceeded. Please retry after {wait} seconds. (rate_limit_exceeded)")


def test_openai_error_of_every_upstream_status_has_its_class(openai_sdk: Sdk) -> None:
    sdk = openai_sdk()
    error = refused(sdk, openai.UnprocessableEntityError, model="fault-422")
    assert error.type == "invalid_request_error"
    assert refused(sdk, openai.RateLimitError, model="fault-429").response.headers["retry-after"] == "7"
    assert refused(sdk, openai.InternalServerError, model="fault-500").code == "upstream_error"
    assert refused(sdk, openai.InternalServerError, model="fault-401").status_code == 503
    assert refused(sdk, openai.InternalServerError, model="fault-200-error").status_code == 502


CUTS = ["reset-mid", "close-mid", "garbage"]


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_openai_stream_raises_when_the_upstream_is_cut(openai_sdk: Sdk, dialect: str, fault: str) -> None:
    sdk, got = openai_sdk(), []
    ask: dict[str, Any] = {"model": f"paced-20-1+fault-{fault}", "stream": True}

    def parts(stream: Any) -> Any:
        return Noted(stream, got)

    with pytest.raises(openai.APIError) as caught:
        if dialect == "chat":
            sdk.stream(lambda c: parts(c.chat.completions.create(**ask, messages=HELLO)))
        else:
            sdk.stream(lambda c: parts(c.completions.create(**ask, prompt="Hello")))
    assert (caught.value.code, caught.value.type) == ("upstream_error", "api_error")
    assert len(got) == 10


@pytest.mark.parametrize("fault", CUTS)
def test_openai_responses_stream_ends_with_an_error_event_when_the_upstream_is_cut(openai_sdk: Sdk, fault: str) -> None:
    # The SDK gives this dialect's error as an event of its own type; it raises nothing.
    model = f"paced-20-1+fault-{fault}"
    events = openai_sdk().stream(lambda c: c.responses.create(model=model, input="Hello", stream=True))
    last = events[-1]
    assert type(last).__name__ == "ResponseErrorEvent"
    assert (last.type, last.code, last.param) == ("error", "upstream_error", None)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "response.completed" not in [event.type for event in events]


class Noted:
    """Iterate a stream of either kind and note what came before it broke."""

    def __init__(self, stream: Any, got: list[Any]) -> None:
        self.stream, self.got = stream, got

    def __iter__(self) -> Any:
        for one in self.stream:
            self.got.append(one)
            yield one

    async def __aiter__(self) -> Any:
        async for one in await self.stream:
            self.got.append(one)
            yield one


def test_openai_helpers_put_streams_together(station: Any, key: str) -> None:
    with openai.OpenAI(api_key=key, base_url=station.url, max_retries=0) as client:
        with client.chat.completions.stream(model="gpt-4o", messages=HELLO) as chat:
            chat.until_done()
            assert chat.get_final_completion().choices[0].message.content == SAID
        with client.responses.stream(model="gpt-4o", input="Hello") as answer:
            answer.until_done()
            assert answer.get_final_response().output_text == SAID
