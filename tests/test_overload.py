"""Overload: when a worker keeps no connections, when it refuses calls, when it is itself again."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from harness import KEY, Asked, Gateway, Peer, ScriptedUpstream, channel, config

from nbgate.overload import NO_KEEPALIVE, NONE, REFUSING, Overload

GB = 1 << 30
CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
CLAUDE = {**CHAT, "model": "claude-x", "max_tokens": 5}
AUTH = {"authorization": f"Bearer {KEY}"}
Upstreams = Callable[..., ScriptedUpstream]
Gateways = Callable[..., Gateway]


# -- the decision


def memory_states(*shares: float) -> list[int]:
    overload = Overload(GB)
    states = []
    for at, share in enumerate(shares):
        overload.look(at * 0.1, 0.0, int(share * GB))
        states.append(overload.memory)
    return states


@pytest.mark.parametrize(
    ("shares", "states"),
    [
        ((0.5, 0.919, 0.921, 0.949, 0.951), (NONE, NONE, NO_KEEPALIVE, NO_KEEPALIVE, REFUSING)),
        ((0.96, 0.94, 0.931, 0.929), (REFUSING, REFUSING, REFUSING, NO_KEEPALIVE)),
        ((0.925, 0.91, 0.901, 0.899, 0.91), (NO_KEEPALIVE, NO_KEEPALIVE, NO_KEEPALIVE, NONE, NONE)),
        ((1.5, 0.1), (REFUSING, NONE)),
    ],
)
def test_memory_marks_begin_a_state_and_an_eased_mark_ends_it(shares: Any, states: Any) -> None:
    assert memory_states(*shares) == list(states)


def test_memory_without_a_bound_is_no_matter() -> None:
    overload = Overload()
    assert overload.look(0.0, 0.0, GB) == [] and overload.memory == NONE


def lag_states(*lags: float, every_s: float = 0.25) -> list[int]:
    overload = Overload(GB)
    states = []
    for at, lag in enumerate(lags):
        overload.look(at * every_s, lag, 0)
        states.append(overload.lag)
    return states


def test_lag_refuses_after_a_second_of_late_looks_and_ends_after_a_calm_one() -> None:
    late, calm = [0.21] * 5, [0.09] * 5
    assert lag_states(*late, *calm) == [NONE] * 4 + [REFUSING] * 5 + [NONE]


@pytest.mark.parametrize(
    "lags",
    [[0.3, 0.3, 0.3, 0.2, 0.3, 0.3, 0.3, 0.3], [0.0, 9.0, 0.0, 0.0], [0.2] * 20],
    ids=["a look in time", "one long stall", "at the mark"],
)
def test_lag_that_does_not_last_refuses_nothing(lags: list[float]) -> None:
    assert set(lag_states(*lags)) == {NONE}


def test_lag_between_the_marks_changes_nothing() -> None:
    assert lag_states(*[0.3] * 5, *[0.15] * 20, 0.05, 0.05, 0.05, 0.15, *[0.05] * 5)[-2:] == [REFUSING, NONE]


def test_each_change_is_told_once_with_its_numbers() -> None:
    overload = Overload(1000 << 20)
    told = [line for at in range(20) for line in overload.look(at * 0.1, 0.25, 960 << 20)]
    assert told == [
        "overload: memory is at 960 MiB of 1,000 MiB: refusing new calls",
        "overload: the event loop runs 250 ms late: refusing new calls",
    ]
    assert overload.refusing == "memory"
    overload.look(2.0, 0.25, 0)
    assert overload.refusing == "lag"


# -- the gateway


def press(gate: Gateway, share: float) -> None:
    """Make the worker believe in this share of its memory bound."""

    def look() -> None:
        gate.app.overload.memory_bytes = GB
        gate.app.watch(time.monotonic(), 0.0, int(share * GB))

    gate.loop_thread.run(look)


def ask(gate: Gateway, path: str, body: Any = None, **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=20) as client:
        if body is None:
            return client.get(gate.url + path, headers={**AUTH, **headers})
        return client.post(gate.url + path, json=body, headers={**AUTH, **headers})


def answer(asked: Asked, peer: Peer) -> None:
    peer.json(200, b'{"id":"x","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}')


OPEN = 'metrics_networks = ["127.0.0.1"]\n'


def opened(url: str) -> str:
    more = channel("b", url, type="anthropic", models='"claude-x"')
    return config(channel("a", url), more, more=f"[admin]\n{OPEN}")


def test_gateway_keeps_no_connection_near_the_bound(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(config(channel("a", scripted(answer).url)))
    press(gate, 0.93)
    found = ask(gate, "/v1/chat/completions", CHAT)
    assert found.status_code == 200 and found.headers["connection"] == "close"
    assert ask(gate, "/readyz").status_code == 200
    press(gate, 0.5)
    assert "connection" not in ask(gate, "/v1/chat/completions", CHAT).headers


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [("/v1/chat/completions", CHAT, ("error", "code")), ("/v1/messages", CLAUDE, ("error", "type"))],
)
def test_gateway_refuses_calls_at_the_bound_in_the_clients_dialect(
    scripted: Upstreams, gateway: Gateways, path: str, body: Any, where: tuple[str, str]
) -> None:
    up = scripted(answer)
    gate = gateway(opened(up.url))
    press(gate, 0.96)
    found = ask(gate, path, body, **{"x-request-id": "mine-1"})
    assert found.status_code == 503 and not up.asked
    assert 1 <= int(found.headers["retry-after"]) <= 3
    assert found.headers["x-request-id"] == "mine-1"
    word = {"/v1/messages": "overloaded_error"}.get(path, "service_unavailable")
    assert found.json()[where[0]][where[1]] == word
    if path == "/v1/messages":
        assert found.json()["request_id"] == "mine-1"
    press(gate, 0.5)
    assert ask(gate, path, body).status_code == 200


def test_gateway_that_refuses_says_so_and_still_answers_by_itself(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(opened(scripted(answer).url))
    press(gate, 0.96)
    assert [ask(gate, "/v1/chat/completions", CHAT).status_code for _ in range(3)] == [503] * 3
    assert ask(gate, "/readyz").status_code == 503
    assert ask(gate, "/healthz").status_code == 200
    assert ask(gate, "/v1/models").status_code == 200
    metrics = ask(gate, "/metrics").text
    assert 'nbgate_overload_state{reason="memory",worker="0"} 2.0\n' in metrics
    assert 'nbgate_overload_state{reason="lag",worker="0"} 0.0\n' in metrics
    assert 'nbgate_shed_total{reason="memory"} 3.0\n' in metrics
    press(gate, 0.5)
    assert ask(gate, "/readyz").status_code == 200


def test_gateway_counts_what_its_server_ends(scripted: Upstreams, gateway: Gateways) -> None:
    gate = gateway(opened(scripted(answer).url))

    def count() -> None:
        stats = gate.server.stats
        stats.refused, stats.timeouts, stats.stalled, stats.rejected = 1, 2, 3, 4

    gate.loop_thread.run(count)
    for _ in range(2):
        metrics = ask(gate, "/metrics").text
    assert "nbgate_connections_refused_total 1.0\n" in metrics
    assert 'nbgate_timeouts_total{kind="request"} 2.0\n' in metrics
    assert 'nbgate_timeouts_total{kind="stalled"} 3.0\n' in metrics
    assert "nbgate_requests_rejected_total 4.0\n" in metrics


def test_overload_cuts_no_stream(scripted: Upstreams, gateway: Gateways) -> None:
    go = threading.Event()

    async def slowly(asked: Asked, peer: Peer) -> None:
        peer.sse_head()
        peer.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
        await gate.loop_thread.loop.run_in_executor(None, go.wait, 20)
        peer.chunk(b"data: [DONE]\n\n")
        peer.end()

    gate = gateway(config(channel("a", scripted(slowly).url)))
    with (
        httpx.Client(trust_env=False, timeout=20) as client,
        client.stream(
            "POST", gate.url + "/v1/chat/completions", content=json.dumps({**CHAT, "stream": True}), headers=AUTH
        ) as found,
    ):
        lines = found.iter_lines()
        assert '"a"' in next(lines)
        press(gate, 0.99)
        assert ask(gate, "/v1/chat/completions", CHAT).status_code == 503
        go.set()
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_each_change_is_one_warning(
    scripted: Upstreams, gateway: Gateways, caplog: pytest.LogCaptureFixture
) -> None:
    gate = gateway(config(channel("a", scripted(answer).url)))
    for share in (0.96, 0.97, 0.96, 0.5, 0.4):
        press(gate, share)
    lines = [r.getMessage() for r in caplog.records if r.name == "nbgate.app"]
    assert [line.rpartition(": ")[2] for line in lines] == ["refusing new calls", "serving as ever"]
    assert {r.levelno for r in caplog.records if r.name == "nbgate.app"} == {logging.WARNING}
