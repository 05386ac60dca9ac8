"""The same app under another ASGI server, which knows nothing of the splice."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from harness import KEY, Asked, LoopThread, Peer, ScriptedUpstream, channel, config
from station import until

from nbgate.app import App
from nbgate.config import parse

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = b'{"id":"c-1","choices":[{"message":{"content":"hello"}}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
Upstreams = Callable[..., ScriptedUpstream]


class Foreign:
    """nbgate's app on uvicorn, in a thread of its own."""

    def __init__(self, text: str, folder: Path) -> None:
        self.app = App(parse(text, {}), run_dir=str(folder))
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        options = uvicorn.Config(self.app, lifespan="on", log_config=None, timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(options)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started or not self.thread.is_alive(), 10, "the start of uvicorn")

    def _run(self) -> None:
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        asyncio.run(self.server.serve([self.sock]))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Callable[[str], Foreign]]:
    """Serve the app under uvicorn; it must end in order after the test."""
    made: list[Foreign] = []

    def make(text: str) -> Foreign:
        made.append(Foreign(text, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def delta(text: str) -> bytes:
    return b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


DONE = b"data: [DONE]\n\n"


def test_fallback_answers_json(scripted: Upstreams, foreign: Callable[[str], Foreign]) -> None:
    up = scripted(lambda asked, peer: peer.json(200, ANSWER))
    gate = foreign(config(channel("a", up.url)))
    with httpx.Client(trust_env=False, headers=HEADERS) as client:
        for _ in range(3):
            answer = client.post(gate.url + "/v1/chat/completions", json=CHAT)
            assert (answer.status_code, answer.content) == (200, ANSWER)
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-request-id"]
        assert client.get(gate.url + "/healthz").status_code == 200
    assert up.connections == 1


def test_fallback_answers_long_json_whole(scripted: Upstreams, foreign: Callable[[str], Foreign]) -> None:
    long = b'{"pad":"%b","usage":{"prompt_tokens":1,"completion_tokens":2}}' % (b"x" * 3_000_000)
    gate = foreign(config(channel("a", scripted(lambda asked, peer: peer.json(200, long)).url)))
    with httpx.Client(trust_env=False, headers=HEADERS) as client:
        assert client.post(gate.url + "/v1/chat/completions", json=CHAT).content == long


def test_fallback_streams_each_frame_as_it_comes(
    scripted: Upstreams, foreign: Callable[[str], Foreign], loop_thread: LoopThread
) -> None:
    go = asyncio.Event()

    async def two(asked: Asked, peer: Peer) -> None:
        peer.sse_head()
        peer.chunk(delta("a"))
        await go.wait()
        peer.chunk(delta("b")[:20])
        await asyncio.sleep(0.02)
        peer.chunk(delta("b")[20:] + DONE)
        peer.end()

    gate = foreign(config(channel("a", scripted(two).url)))
    with (
        httpx.Client(trust_env=False, headers=HEADERS) as client,
        client.stream("POST", gate.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        parts = answer.iter_bytes()
        assert next(parts) == delta("a")
        loop_thread.run(go.set)
        assert next(parts) == delta("b") + DONE
        assert list(parts) == []


def test_fallback_ends_a_cut_stream_with_an_error(scripted: Upstreams, foreign: Callable[[str], Foreign]) -> None:
    def cut(asked: Asked, peer: Peer) -> None:
        peer.sse_head()
        peer.chunk(delta("a"))
        peer.reset()

    gate = foreign(config(channel("a", scripted(cut).url)))
    answer = httpx.post(
        gate.url + "/v1/chat/completions", json={**CHAT, "stream": True}, headers=HEADERS, trust_env=False
    )
    assert answer.content.startswith(delta("a"))
    assert b"[DONE]" not in answer.content
    assert json.loads(answer.content[len(delta("a")) :].removeprefix(b"data: "))["error"]["code"] == "upstream_error"


def test_fallback_cuts_a_plain_answer_that_its_upstream_cut(
    scripted: Upstreams, foreign: Callable[[str], Foreign]
) -> None:
    def cut(asked: Asked, peer: Peer) -> None:
        peer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900000\r\n\r\n{")
        peer.write(b" " * 600_000)
        peer.writer.close()

    gate = foreign(config(channel("a", scripted(cut).url)))
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(gate.url + "/v1/chat/completions", json=CHAT, headers=HEADERS, trust_env=False)


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "code"),
    [
        ("/v1/chat/completions", {}, b"{}", 401, "invalid_api_key"),
        ("/v1/chat/completions", HEADERS, b"nonsense", 400, "invalid_json"),
        ("/v1/chat/completions", HEADERS, b'{"model":"nobody"}', 404, "model_not_found"),
        ("/v1/nothing", HEADERS, b"{}", 404, "not_found"),
    ],
)
def test_fallback_refuses(
    scripted: Upstreams,
    foreign: Callable[[str], Foreign],
    path: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    code: str,
) -> None:
    up = scripted(lambda asked, peer: peer.json(200, ANSWER))
    gate = foreign(config(channel("a", up.url, models='"gpt-4o"')))
    answer = httpx.post(gate.url + path, content=body, headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert not up.asked


@pytest.mark.parametrize("when", ["before head", "plain call", "mid stream"])
def test_fallback_closes_the_upstream_when_the_client_leaves(
    scripted: Upstreams, foreign: Callable[[str], Foreign], when: str
) -> None:
    async def endless(asked: Asked, peer: Peer) -> None:
        if when == "mid stream":
            peer.sse_head()
            peer.chunk(delta("a"))
        await peer.closed()

    up = scripted(endless)
    gate = foreign(config(channel("a", up.url)))
    body: Any = json.dumps({**CHAT, "stream": when != "plain call"}).encode()
    with socket.create_connection(("127.0.0.1", gate.sock.getsockname()[1]), 10) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        sock.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        if when == "mid stream":
            received = b""
            while delta("a") not in received:
                received += sock.recv(65536)
        else:
            until(lambda: up.asked, 5, "the upstream's request")
    left = time.monotonic()
    until(lambda: up.closed_at, 5, "the close")
    assert up.closed_at[0] - left < 1.0
    assert not gate.app.pool.lent


def test_fallback_runs_the_lifespan(scripted: Upstreams, foreign: Callable[[str], Foreign]) -> None:
    gate = foreign(config(channel("a", scripted(lambda asked, peer: peer.json(200, ANSWER)).url)))
    assert gate.app.ready
    assert httpx.get(gate.url + "/readyz", trust_env=False).status_code == 200
    gate.stop()
    assert not gate.app.ready
    assert gate.app.pool.total == 0
