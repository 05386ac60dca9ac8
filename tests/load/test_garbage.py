"""Calls leave no cycles: the worker's collector runs seldom, and what it would find is memory meanwhile."""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Callable

import pytest
from harness import KEY, Asked, Gateway, LoopThread, Peer, ScriptedUpstream, channel, config
from station import until

FRAME = b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
Upstreams = Callable[..., ScriptedUpstream]


def answer(asked: Asked, peer: Peer) -> None:
    if b'"stream":true' in asked.body:
        peer.sse_head()
        peer.chunk(FRAME)
        peer.chunk(FRAME + b"data: [DONE]\n\n")
        peer.end()
    else:
        peer.json(200, b'{"id":"a","usage":{"prompt_tokens":1,"completion_tokens":2}}')


def call(port: int, body: bytes, end: bytes, leave: bool) -> None:
    """Make one call on a connection of its own, and read it whole or leave."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
        )
        sock.sendall(head % (KEY.encode(), len(body)) + body)
        out = b""
        while not leave and end not in out:
            out += sock.recv(65536)


@pytest.mark.parametrize("leave", [False, True], ids=["whole", "client leaves"])
@pytest.mark.parametrize(
    ("body", "end"),
    [
        (b'{"model":"gpt-4o","messages":[]}', b"}}"),
        (b'{"model":"gpt-4o","messages":[],"stream":true}', b"[DONE]\n\n"),
        (b"nonsense", b"}}"),
    ],
    ids=["json", "stream", "refused"],
)
def test_calls_leave_nothing_for_the_collector(
    scripted: Upstreams,
    gateway: Callable[..., Gateway],
    loop_thread: LoopThread,
    body: bytes,
    end: bytes,
    leave: bool,
) -> None:
    gate = gateway(config(channel("a", scripted(answer).url)))

    def calls(count: int) -> None:
        for _ in range(count):
            call(gate.port, body, end, leave)
        until(lambda: not gate.server.connections and not gate.server.stats.active_requests, 5, "the end of all calls")

    calls(5)
    loop_thread.run(gc.collect)
    gc.disable()
    try:
        calls(50)
        gc.set_debug(gc.DEBUG_SAVEALL)
        loop_thread.run(gc.collect)
        found = Counter(type(one).__qualname__ for one in gc.garbage if type(one).__module__.startswith("nbgate"))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found, found
