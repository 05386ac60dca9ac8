"""The relay as its clients and upstreams see it: failover, streams, errors, edits."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from harness import KEY, Asked, Gateway, Peer, ScriptedUpstream, channel, config

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }
).encode()
Upstreams = Callable[..., ScriptedUpstream]
Gateways = Callable[..., Gateway]


def good(asked: Asked, peer: Peer) -> None:
    peer.json(200, ANSWER)


def status(code: int, body: bytes = b'{"error":{"message":"no"}}', more: bytes = b"") -> Callable[[Asked, Peer], None]:
    return lambda asked, peer: peer.json(code, body, more)


def stream(*frames: bytes, end: bool = True) -> Callable[[Asked, Peer], None]:
    def handler(asked: Asked, peer: Peer) -> None:
        peer.sse_head()
        for frame in frames:
            peer.chunk(frame)
        if end:
            peer.end()
        else:
            peer.reset()

    return handler


def delta(text: str, more: str = "") -> bytes:
    return b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"%b"}}]%b}\n\n' % (
        text.encode(),
        more.encode(),
    )


USAGE = (
    b'data: {"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}\n\n'
)
DONE = b"data: [DONE]\n\n"


def post(gateway: Gateway, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **headers}
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.post(gateway.url + path, content=content, headers=given)


def test_relay_sends_body_and_answer_as_they_came(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(good)
    body = b'{"model" : "gpt-4o", "messages":[{"role":"user","content":"\\u00e9 hi"}],"unknown":[1.50, 2e3]}'
    answer = post(gateway(config(channel("a", up.url))), body)
    assert answer.status_code == 200
    assert answer.content == ANSWER
    assert up.asked[0].body == body
    assert up.asked[0].path == "/v1/chat/completions"
    assert up.asked[0].headers["authorization"] == "Bearer up-secret-a"
    assert answer.headers["x-request-id"]
    assert float(answer.headers["x-nbgate-overhead-ms"]) < 1000


@pytest.mark.parametrize("name", ["cookie", "x-stainless-lang", "x-forwarded-for", "x-api-key", "via", "x-custom"])
def test_relay_drops_headers_that_are_nobodys_business(scripted: Upstreams, gateway: Gateways, name: str) -> None:
    up = scripted(good)
    assert post(gateway(config(channel("a", up.url))), CHAT, **{name: "private-value"}).status_code == 200
    assert "private-value" not in up.asked[0].head.decode()


@pytest.mark.parametrize("name", ["openai-organization", "openai-beta", "idempotency-key", "traceparent", "accept"])
def test_relay_forwards_the_headers_of_the_contract(scripted: Upstreams, gateway: Gateways, name: str) -> None:
    up = scripted(good)
    post(gateway(config(channel("a", up.url))), CHAT, **{name: "value-1"})
    assert up.asked[0].headers[name] == "value-1"


def test_relay_maps_the_model_in_place(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(good)
    text = config(channel("a", up.url, more='map = { "gpt-4o" = "gpt-4o-2024-11-20" }'))
    body = b'{"messages":[{"role":"user","content":"say gpt-4o"}],  "model":"gpt-4o"}'
    post(gateway(text), body)
    assert up.asked[0].body == body.replace(b':"gpt-4o"}', b':"gpt-4o-2024-11-20"}')


def test_relay_asks_for_stream_usage_and_hides_it(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(stream(delta("a"), delta("b"), USAGE, DONE))
    gate = gateway(config(channel("a", up.url)))
    answer = post(gate, {**CHAT, "stream": True})
    assert json.loads(up.asked[0].body)["stream_options"] == {"include_usage": True}
    assert answer.content == delta("a") + delta("b") + DONE
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    told = post(gate, {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert told.content == delta("a") + delta("b") + USAGE + DONE


@pytest.mark.parametrize("code", [500, 502, 503, 429, 403, 401])
def test_relay_tries_another_channel_when_one_refuses(scripted: Upstreams, gateway: Gateways, code: int) -> None:
    bad, up = scripted(status(code)), scripted(good)
    gate = gateway(config(channel("bad", bad.url, more="priority = 1"), channel("up", up.url)))
    assert post(gate, CHAT).status_code == 200
    assert (len(bad.asked), len(up.asked)) == (1, 1)


@pytest.mark.parametrize(
    "handler",
    [
        lambda asked, peer: peer.reset(),
        lambda asked, peer: peer.write(b"garbage\r\n\r\n"),
        status(200, b'{"error":{"message":"hidden","code":"x"}}'),
        lambda asked, peer: (peer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n"), None)[1],
        lambda asked, peer: peer.write(
            b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n"
        ),
    ],
    ids=["reset", "garbage", "error-in-200", "two-lengths", "redirect"],
)
def test_relay_tries_another_channel_when_an_answer_is_bad(
    scripted: Upstreams, gateway: Gateways, handler: Any
) -> None:
    bad, up = scripted(handler), scripted(good)
    gate = gateway(config(channel("bad", bad.url, more="priority = 1"), channel("up", up.url)))
    answer = post(gate, CHAT)
    assert (answer.status_code, answer.content) == (200, ANSWER)
    assert len(bad.asked) == 1


def test_relay_tries_another_channel_when_the_first_event_is_an_error(scripted: Upstreams, gateway: Gateways) -> None:
    bad = scripted(stream(b": hello\n\n", b'data: {"error":{"message":"overloaded"}}\n\n'))
    up = scripted(stream(delta("a"), DONE))
    gate = gateway(config(channel("bad", bad.url, more="priority = 1"), channel("up", up.url)))
    assert post(gate, {**CHAT, "stream": True}).content == delta("a") + DONE


@pytest.mark.parametrize("code", [400, 404, 413, 422])
def test_relay_passes_a_refusal_of_the_request_on(scripted: Upstreams, gateway: Gateways, code: int) -> None:
    body = b'{"error":{"message":"bad param at up-secret-a on 127.0.0.1","type":"invalid_request_error","param":"n"}}'
    bad, up = scripted(status(code, body)), scripted(good)
    gate = gateway(config(channel("a", bad.url, more="priority = 1"), channel("up", up.url)))
    answer = post(gate, CHAT)
    error = answer.json()["error"]
    assert answer.status_code == code
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"]
    assert error["param"] == "n"
    assert "up-secret-a" not in answer.text
    assert "127.0.0.1" not in answer.text
    assert not up.asked


def test_relay_never_retries_a_plain_call_after_a_timeout(scripted: Upstreams, gateway: Gateways) -> None:
    async def hang(asked: Asked, peer: Peer) -> None:
        await peer.closed()

    bad, up = scripted(hang), scripted(good)
    slow = channel("bad", bad.url, more="priority = 1\ntimeouts = { answer_s = 0.3, first_byte_s = 0.3 }")
    gate = gateway(config(slow, channel("up", up.url)))
    answer = post(gate, CHAT)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_timeout"
    assert not up.asked


def test_relay_retries_a_stream_after_a_first_byte_timeout(scripted: Upstreams, gateway: Gateways) -> None:
    async def hang(asked: Asked, peer: Peer) -> None:
        await peer.closed()

    bad, up = scripted(hang), scripted(stream(delta("a"), DONE))
    slow = channel("bad", bad.url, more="priority = 1\ntimeouts = { first_byte_s = 0.3 }")
    gate = gateway(config(slow, channel("up", up.url)))
    assert post(gate, {**CHAT, "stream": True}).content == delta("a") + DONE


def test_relay_never_retries_after_the_first_byte(scripted: Upstreams, gateway: Gateways) -> None:
    bad, up = scripted(stream(delta("a"), end=False)), scripted(stream(delta("b"), DONE))
    gate = gateway(config(channel("bad", bad.url, more="priority = 1"), channel("up", up.url)))
    content = post(gate, {**CHAT, "stream": True}).content
    assert content.startswith(delta("a"))
    assert b"[DONE]" not in content
    error = json.loads(content[len(delta("a")) :].removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_error"
    assert not up.asked


@pytest.mark.parametrize(
    ("path", "body", "first", "mark"),
    [
        (
            "/v1/messages",
            {"model": "m", "max_tokens": 5, "stream": True},
            b'event: ping\ndata: {"type":"ping"}\n\n',
            b"event: error\n",
        ),
        (
            "/v1/responses",
            {"model": "m", "input": "x", "stream": True},
            b'event: response.created\n'
            b'data: {"type":"response.created","sequence_number":0,"response":{"id":"resp_1"}}\n\n',
            b"event: error\n",
        ),
        (
            "/v1/completions",
            {"model": "m", "prompt": "x", "stream": True},
            b'data: {"id":"c","choices":[{"text":"a"}]}\n\n',
            b"data: ",
        ),
    ],
)
def test_relay_ends_a_cut_stream_in_the_clients_dialect(
    scripted: Upstreams, gateway: Gateways, path: str, body: Any, first: bytes, mark: bytes
) -> None:
    up = scripted(stream(first, end=False))
    gate = gateway(config(channel("a", up.url, "station")))
    content = post(gate, body, path).content
    assert content.startswith(first)
    last = content[len(first) :]
    assert last.startswith(mark)
    assert b'"error"' in last
    assert last.endswith(b"\n\n")


def test_relay_tries_no_more_often_than_configured(scripted: Upstreams, gateway: Gateways) -> None:
    ups = [scripted(status(500)) for _ in range(5)]
    gate = gateway(config(*(channel(f"c{i}", up.url) for i, up in enumerate(ups)), more="[router]\ntries = 3"))
    answer = post(gate, CHAT)
    assert answer.status_code == 502
    assert sum(len(up.asked) for up in ups) == 3
    assert max(len(up.asked) for up in ups) == 1


def test_relay_answers_502_when_nobody_listens(gateway: Gateways) -> None:
    answer = post(gateway(config(channel("a", "http://127.0.0.1:9"))), CHAT)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_error"


def test_relay_asks_a_stale_connection_again_on_the_same_channel(scripted: Upstreams, gateway: Gateways) -> None:
    served: dict[int, int] = {}

    def once(asked: Asked, peer: Peer) -> None:
        count = served[id(peer.writer)] = served.get(id(peer.writer), 0) + 1
        if count > 1:
            peer.reset()  # this upstream hangs up on reuse, as idle timeouts make them do
        else:
            peer.json(200, ANSWER)

    up = scripted(once)
    gate = gateway(config(channel("a", up.url)))
    assert [post(gate, CHAT).status_code for _ in range(3)] == [200, 200, 200]
    assert up.connections == 3


def test_relay_gives_the_client_what_all_channels_said_alike(scripted: Upstreams, gateway: Gateways) -> None:
    body = b'{"error":{"message":"slow down","type":"rate_limit_error","code":"rate_limit_exceeded"}}'
    ups = [scripted(status(429, body, b"retry-after: 7\r\n")) for _ in range(2)]
    gate = gateway(config(*(channel(f"c{i}", up.url) for i, up in enumerate(ups))))
    answer = post(gate, CHAT)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["message"] == "slow down"


def test_relay_hides_trouble_with_our_own_credential(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(status(401, b'{"error":{"message":"Incorrect API key provided: up-secret-a"}}'))
    answer = post(gateway(config(channel("a", up.url))), CHAT)
    assert answer.status_code == 503
    assert "key" not in answer.text.lower()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"nonsense", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"messages":[]}', "missing_model"),
        (b'{"model":5}', "invalid_type"),
        (b'{"model":"gpt-4o","stream":"yes"}', "invalid_type"),
        (b'{"model":"gpt-4o","n":1e29}', "invalid_type"),
        (b'{"model":"gpt-4o","Model":"dear"}', "ambiguous_parameter"),
        (b"\xef\xbb\xbf" + b'{"model":"gpt-4o"}', "invalid_json"),
        (b'{"model":"gpt-4o","x":"\xff"}', "invalid_json"),
        (b'{"model":"gpt-4o","x":' + b"[" * 300 + b"]" * 300 + b"}", "invalid_json"),
    ],
)
def test_relay_refuses_bad_bodies(scripted: Upstreams, gateway: Gateways, body: bytes, code: str) -> None:
    up = scripted(good)
    answer = post(gateway(config(channel("a", up.url))), body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]
    assert not up.asked


def test_relay_sends_a_suspect_body_as_it_read_it(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(good)
    post(gateway(config(channel("a", up.url))), b'{"model":"cheap","mod\\u0065l":"dear"}')
    assert json.loads(up.asked[0].body) == {"model": "dear"}
    assert b"cheap" not in up.asked[0].body


def test_relay_says_when_nobody_serves_a_model(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(config(channel("a", scripted(good).url, models='"gpt-4o"')))
    answer = post(gate, {**CHAT, "model": "nope"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "wrong", [{}, {"authorization": "Bearer sk-wrong"}, {"authorization": "Basic x"}, {"x-api-key": "' OR 1=1--"}]
)
def test_relay_needs_a_key(scripted: Upstreams, gateway: Gateways, wrong: dict[str, str]) -> None:
    up = scripted(good)
    with httpx.Client(trust_env=False) as client:
        answer = client.post(
            gateway(config(channel("a", up.url))).url + "/v1/chat/completions", json=CHAT, headers=wrong
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert not up.asked


def test_relay_limits_the_rate_of_a_key(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(config(channel("a", scripted(good).url), rates="rpm = 3"))
    answers = [post(gate, CHAT) for _ in range(5)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
    refused = answers[3]
    assert refused.headers["retry-after"] == "20"
    assert (
        refused.json()["error"]["message"]
        == "Rate limit exceeded. Please retry after 20 seconds. (rate_limit_exceeded)"
    )


def test_stored_responses_go_back_to_their_channel_and_owner(scripted: Upstreams, gateway: Gateways) -> None:
    made = json.dumps(
        {"id": "resp_abc123", "object": "response", "usage": {"input_tokens": 1, "output_tokens": 1}}
    ).encode()
    ups = [scripted(status(200, made)) for _ in range(3)]
    more = f'[[keys]]\nkey = "{KEY}2"\naccount = "other"\n'
    gate = gateway(config(*(channel(f"c{i}", up.url) for i, up in enumerate(ups))) + "\n" + more)
    assert post(gate, {"model": "m", "input": "x"}, "/v1/responses").status_code == 200
    maker = next(up for up in ups if up.asked)

    def get(key: str, path: str) -> int:
        with httpx.Client(trust_env=False) as client:
            return client.get(gate.url + path, headers={"authorization": f"Bearer {key}"}).status_code

    for _ in range(5):
        assert get(KEY, "/v1/responses/resp_abc123") == 200
    assert len(maker.asked) == 6
    assert maker.asked[-1].path == "/v1/responses/resp_abc123"
    assert get(KEY + "2", "/v1/responses/resp_abc123") == 404
    assert get(KEY, "/v1/responses/resp_unknown") == 404
    follow = {"model": "m", "input": "y", "previous_response_id": "resp_abc123"}
    assert post(gate, follow, "/v1/responses").status_code == 200
    assert len(maker.asked) == 7


def test_claude_paths_carry_the_version_and_the_key_as_claude_does(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(status(200, b'{"type":"message","usage":{"input_tokens":5,"output_tokens":2}}'))
    gate = gateway(config(channel("a", up.url, "anthropic")))
    body = {"model": "claude-3-opus", "max_tokens": 10, "messages": []}
    answer = post(gate, body, "/v1/messages")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert up.asked[0].path == "/v1/messages"
    assert up.asked[0].headers["x-api-key"] == "up-secret-a"
    assert "authorization" not in up.asked[0].headers
    assert up.asked[0].headers["anthropic-version"] == "2023-06-01"
    post(gate, body, "/messages", **{"anthropic-version": "2026-10-21"})
    assert up.asked[1].headers["anthropic-version"] == "2026-10-21"


def test_the_upstream_closes_when_the_client_leaves(scripted: Upstreams, gateway: Gateways) -> None:
    async def endless(asked: Asked, peer: Peer) -> None:
        peer.sse_head()
        peer.chunk(delta("a"))
        await peer.closed()

    up = scripted(endless)
    gate = gateway(config(channel("a", up.url)))
    with (
        httpx.Client(trust_env=False) as client,
        client.stream(
            "POST",
            gate.url + "/v1/chat/completions",
            json={**CHAT, "stream": True},
            headers={"authorization": f"Bearer {KEY}"},
        ) as answer,
    ):
        assert next(answer.iter_bytes()) == delta("a")
    left = time.monotonic()
    deadline = left + 5
    while not up.closed_at and time.monotonic() < deadline:
        time.sleep(0.005)
    assert up.closed_at[0] - left < 0.1


def test_calls_leave_no_cycles_for_the_collector(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(config(channel("a", scripted(good).url)))
    for _ in range(20):
        post(gate, CHAT)
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            post(gate, CHAT)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = [type(o).__name__ for o in gc.garbage if type(o).__module__.startswith("nbgate")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours


def test_a_stream_that_ends_with_its_connection_must_say_that_it_ended(scripted: Upstreams, gateway: Gateways) -> None:
    def until_close(*frames: bytes) -> Callable[[Asked, Peer], None]:
        def handler(asked: Asked, peer: Peer) -> None:
            peer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(frames))
            peer.writer.close()

        return handler

    whole = gateway(config(channel("a", scripted(until_close(delta("a"), DONE)).url)))
    assert post(whole, {**CHAT, "stream": True}).content == delta("a") + DONE
    cut = gateway(config(channel("a", scripted(until_close(delta("a"))).url)))
    content = post(cut, {**CHAT, "stream": True}).content
    assert content.startswith(delta("a"))
    assert b"upstream_error" in content
    assert b"[DONE]" not in content


def test_models_come_in_three_shapes(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(config(channel("a", scripted(good).url, models='"gpt-4o", "org/with-slash", "glob-*"')))

    def get(path: str, **headers: str) -> Any:
        with httpx.Client(trust_env=False) as client:
            answer = client.get(gate.url + path, headers={"authorization": f"Bearer {KEY}", **headers})
        return answer.json()

    assert [m["id"] for m in get("/v1/models")["data"]] == ["gpt-4o", "org/with-slash"]
    assert get("/models/org/with-slash")["object"] == "model"
    claude = get("/v1/models", **{"anthropic-version": "2023-06-01"})
    assert (claude["first_id"], claude["has_more"], claude["data"][0]["type"]) == ("gpt-4o", False, "model")
    assert [m["name"] for m in get("/v1beta/models")["models"]] == ["models/gpt-4o", "models/org/with-slash"]
    assert get("/v1beta/models/gpt-4o")["name"] == "models/gpt-4o"
    assert get("/v1/models/nope")["error"]["code"] == "model_not_found"
    assert get("/v1beta/models/nope")["error"]["status"] == "NOT_FOUND"


def test_an_answer_pins_its_own_id_and_none_that_it_repeats(scripted: Upstreams, gateway: Gateways) -> None:
    repeats = {"metadata": {"id": "resp_theirs"}, "id": "resp_mine", "object": "response"}
    event = {"type": "response.created", "sequence_number": 0, "response": {**repeats, "id": "resp_streamed"}}
    whole = json.dumps(repeats).encode()
    begun = b"event: response.created\ndata: %b\n\n" % json.dumps(event).encode()

    def handler(asked: Asked, peer: Peer) -> None:
        stream(begun)(asked, peer) if b'"stream"' in asked.body else peer.json(200, whole)

    gate = gateway(config(channel("a", scripted(handler).url)))
    post(gate, {"model": "m", "input": "x"}, "/v1/responses")
    post(gate, {"model": "m", "input": "x", "stream": True}, "/v1/responses")
    assert set(gate.app.pins._pins) == {"resp_mine", "resp_streamed"}


def test_a_stored_chat_completion_is_updated_without_a_model(scripted: Upstreams, gateway: Gateways) -> None:
    up = scripted(good)
    gate = gateway(config(channel("a", up.url)))
    assert post(gate, {**CHAT, "store": True}).status_code == 200
    assert post(gate, {"metadata": {"a": "b"}}, "/v1/chat/completions/chatcmpl-1").status_code == 200
    assert (up.asked[1].path, up.asked[1].body) == ("/v1/chat/completions/chatcmpl-1", b'{"metadata": {"a": "b"}}')
