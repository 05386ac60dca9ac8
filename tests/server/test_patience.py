"""How long the server waits for a small body before the app may speak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serverkit import Bench

Make = Callable[..., Bench]


def test_small_body_that_takes_long_is_not_waited_for_before_the_app_speaks(bench: Make) -> None:
    async def stranger(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"who?"})

    stranger.nbgate_eager = True  # type: ignore[attr-defined]
    one = bench(stranger, body_patience_s=1.0)
    client = one.connect()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nab")
    one.advance(0.9, step=0.3)
    assert not client.out
    one.advance(0.9, step=0.3)
    assert client.out.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in client.out


def test_small_body_that_takes_long_reaches_the_app_whole(bench: Make) -> None:
    seen: list[bytes] = []

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        seen.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    patient.nbgate_eager = True  # type: ignore[attr-defined]
    one = bench(patient, body_patience_s=1.0)
    client = one.connect()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab")
    one.advance(3.0, step=0.5)
    client.send(b"cd")
    assert seen == [b"abcd"]
    assert client.out.startswith(b"HTTP/1.1 200 ")
