"""The ASGI app of the demo upstream.

What lives here: the table of paths, reading a body, pacing a stream. Plain
ASGI 3 with no extension: any server may serve it, each request in a task.
What must not: what is said, which is in `words` and the room of each dialect.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import orjson

from . import chat, messages, other, responses
from .refusal import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PACE_S = 0.03  # per word
MAX_BODY_BYTES = 32 * 1_048_576


class Route(NamedTuple):
    """One path: how errors look, how to answer whole, how to stream."""

    family: str
    answer: Callable[[dict[str, Any], str, int], dict[str, Any]]
    events: Callable[[dict[str, Any], str, int], Iterator[bytes]] | None = None


ROUTES = {  # without /v1, which may be absent
    "/chat/completions": Route("openai", chat.answer, chat.events),
    "/completions": Route("openai", chat.complete, chat.complete_events),
    "/responses": Route("openai", responses.answer, responses.events),
    "/messages": Route("claude", messages.answer, messages.events),
    "/messages/count_tokens": Route("claude", messages.count_tokens),
    "/embeddings": Route("openai", other.embed),
    "/images/generations": Route("openai", other.draw),
    "/moderations": Route("openai", other.moderate),
}


class App:
    """The demo upstream; `pace_s` is the pause before each piece of a stream."""

    def __init__(self, pace_s: float = PACE_S, clock: Callable[[], float] = time.time) -> None:
        self.pace_s, self.clock = pace_s, clock

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        elif scope["type"] == "http":
            await self.http(scope, receive, send)

    async def lifespan(self, receive: Receive, send: Send) -> None:
        """Agree to start and to stop."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def http(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; what fails is said in the dialect's own shape."""
        path = str(scope["path"]).rstrip("/").removeprefix("/v1")
        version = any(name == b"anthropic-version" for name, _ in scope["headers"])
        route = ROUTES.get(path)
        family = route.family if route else "claude" if version else "openai"
        id_ = "demo"
        try:
            if path == "/models" or path.startswith("/models/"):
                name = path.removeprefix("/models").removeprefix("/")
                await reply_json(send, 200, other.model(name, version) if name else other.models(version))
                return
            if route is None:
                raise Refusal(f"The demo does not serve {scope['path']}.", 404, code="not_found")
            if scope["method"] != "POST":
                raise Refusal("Only POST is allowed here.", 405, code="method_not_allowed")
            data = await read_body(receive)
            if data is None:
                return
            id_ = hashlib.blake2b(data, digest_size=12).hexdigest()
            body = parse(data)
            now = int(self.clock())
            if route.events is not None and body.get("stream") is True:
                await self.stream(route.events(body, id_, now), receive, send)
            else:
                await reply_json(send, 200, route.answer(body, id_, now))
        except Refusal as exc:
            await reply_json(send, exc.status, exc.body(family, f"req_{id_}"))
        except (AttributeError, KeyError, TypeError, ValueError):
            # NOTE: only a body whose fields have the wrong shape gets here; the demo does not check each of them.
            refusal = Refusal("A field of the body has the wrong type.", code="invalid_type")
            await reply_json(send, 400, refusal.body(family, f"req_{id_}"))

    async def stream(self, frames: Iterator[bytes], receive: Receive, send: Send) -> None:
        """Send one frame per pause, until the client is gone.

        Cancellation: safe at any point; the watcher of the client ends too.
        """
        first = next(frames)  # before the head, so that a refusal still has its status
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        gone = asyncio.ensure_future(receive())
        try:
            for frame in frames:
                await asyncio.wait([gone], timeout=self.pace_s)
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()


async def read_body(receive: Receive) -> bytes | None:
    """Read the whole body; None when the client is gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise Refusal("The body is too large.", 413, code="request_too_large")
        if not message.get("more_body"):
            return b"".join(parts)


def parse(data: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise Refusal(f"The body is no valid JSON: {exc}.", code="invalid_json") from exc
    if not isinstance(body, dict):
        raise Refusal("The body must be a JSON object.", code="invalid_json")
    return body


async def reply_json(send: Send, status: int, body: dict[str, Any]) -> None:
    """Answer with one JSON object."""
    data = orjson.dumps(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    if status == 405:
        headers.append((b"allow", b"POST"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
