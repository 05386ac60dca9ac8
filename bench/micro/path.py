"""The whole way of a request inside one process, on transports that do nothing.

What lives here: the wiring for the micro benchmarks: a client connection, the
app with everything on, an upstream connection that is idle in the pool. So the
figures are nbgate's own Python, without the kernel. Not for: throughput.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from nbgate.app import App
from nbgate.config import parse
from nbgate.server.listener import Server
from nbgate.server.protocol import HttpProtocol
from nbgate.upstream_wire import Wire
from nbgate.worker import settings

KEY = "sk-micro-0123456789abcdefghijklmnopqrstuvwxyz012345678"
CONFIG = f"""
[logging]
access = "{{folder}}/access.jsonl"
[channels.up]
type = "openai"
base_url = "http://127.0.0.1:9/v1"
keys = ["up-key"]
models = ["*"]
dialects = ["chat", "responses", "messages", "embeddings", "completions", "moderations", "images"]
[[keys]]
key = "{KEY}"
account = "micro"
rpm = 100000000
[billing]
mode = "off"
"""
BODY = b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"gpt-4o-mini","stream":true,"messages":[{"role":"user","content":"hi"}]}'
ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hello!"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}'
)
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}],"usage":null}\n\n'
)


def request(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """Write a request as common clients do."""
    return (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        b"User-Agent: bench\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
    ) % (path.encode(), KEY.encode(), len(body), body)


def chunked(data: bytes) -> bytes:
    """Frame one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Transport:
    """Count what is written, do nothing."""

    def __init__(self) -> None:
        self.bytes = 0
        self.last: Any = b""

    def write(self, data: bytes) -> None:
        self.bytes += len(data)
        self.last = data

    def writelines(self, parts: list[bytes]) -> None:
        self.last = parts

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1234)

    def set_write_buffer_limits(self, high: int = 0) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...
    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


class Path_:
    """One client connection and one upstream wire, joined by the app."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        config = parse(CONFIG.replace("{folder}", self.folder.name), {})
        self.loop = asyncio.new_event_loop()
        self.app = App(config, run_dir=self.folder.name)
        self.server = Server(self.app, settings(config))
        self.app.attach(self.server)
        self.server.loop = self.loop
        self.client = HttpProtocol(self.server)
        self.out = Transport()
        self.client.connection_made(self.out)  # type: ignore[arg-type]
        pool = self.app.pool
        target = self.app.state.table.targets[0]
        lane = pool.lane(target.wire.endpoint)
        self.wire = Wire(pool, lane)
        self.up = Transport()
        self.wire.connection_made(self.up)  # type: ignore[arg-type]
        lane.total += 1
        pool.total += 1
        pool._wires.add(self.wire)
        pool.put(self.wire)
        self.plain = request(BODY)
        self.stream = request(STREAM)

    def json(self) -> None:
        """Relay one JSON call from head to log record."""
        self.client.data_received(self.plain)
        self.wire.data_received(REPLY)

    def begin_stream(self) -> None:
        """Begin a stream; `chunk` and `end_stream` follow."""
        self.client.data_received(self.stream)
        self.wire.data_received(STREAM_HEAD + chunked(CHUNK))

    def chunk(self) -> None:
        """Relay one SSE chunk."""
        self.wire.data_received(_CHUNKED)

    def end_stream(self) -> None:
        """End the stream."""
        self.wire.data_received(chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def close(self) -> None:
        """Let go of files."""
        self.app.access.close()
        self.loop.close()
        self.folder.cleanup()


_CHUNKED = chunked(CHUNK)
HERE = Path(__file__).resolve().parent
