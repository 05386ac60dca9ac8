"""A gateway that is attacked, and everything that it said and wrote meanwhile."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from harness import Asked, Gateway, LoopThread, Peer, ScriptedUpstream

from nbgate.routes import ROUTES, Route

KEY = "sk-planted0client1key2aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaAbC"
OTHER = "sk-planted9other8client7bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbXyZ"
ADMIN = "sk-planted5admin4cccccccccccccccccccccccccccccccccccccccQrS"
UNKNOWN = "sk-planted3unknown2ddddddddddddddddddddddddddddddddddddddTuV"
UPSTREAM = "up-planted6upstream5eeeeeeeeeeeeeeeeeeeeeeeee"
SECRETS = (KEY, OTHER, ADMIN, UNKNOWN, UPSTREAM)
# Long enough to prove a leak, short enough to see one that was cut; keys may be shown by 6 and 4 characters.
TRACES = tuple(secret[6:16] for secret in SECRETS)

CONFIG = """
[logging]
access = "{folder}/access.jsonl"
[admin]
key = "{admin}"
[router]
default_channel = "up"
[channels.up]
type = "station"
base_url = "{url}"
keys = ["{upstream}"]
models = ["*"]
[[keys]]
key = "{key}"
account = "first"
[[keys]]
key = "{other}"
account = "second"
"""


class Reply(NamedTuple):
    """One answer, raw."""

    status: int
    head: bytes
    body: bytes

    @property
    def code(self) -> str:
        """Name the error; Gemini's code is the status, and its status the name."""
        error = json.loads(self.body)["error"]
        found = error["code"] if isinstance(error["code"], str) else error["status"]
        assert isinstance(found, str)
        return found


class House:
    """The gateway under attack; `ask` notes each answer."""

    def __init__(self, loop: LoopThread, folder: Path) -> None:
        self.loop, self.folder = loop, folder
        self.replies: list[Reply] = []
        self.operator: list[str] = []
        self.upstream = loop.call(ScriptedUpstream.start(self.serve))
        text = CONFIG.format(folder=folder, url=self.upstream.url, admin=ADMIN, upstream=UPSTREAM, key=KEY, other=OTHER)
        self.gateway = loop.call(Gateway.start(text, folder, {}))
        self.handler = logging.Handler()
        self.handler.emit = self._note  # type: ignore[method-assign]
        self.logger = logging.getLogger("nbgate")
        self.level = self.logger.level
        self.logger.setLevel(logging.DEBUG)
        self.logger.addHandler(self.handler)

    def _note(self, record: logging.LogRecord) -> None:
        self.operator.append(logging.Formatter().format(record))

    def serve(self, asked: Asked, peer: Peer) -> None:
        """Answer as an upstream that repeats all it knows of us in its errors."""
        body = json.loads(asked.body) if asked.body else {}
        model = str(body.get("model", ""))
        if model.startswith("fail-"):
            told = {"message": f"Incorrect API key provided: {UPSTREAM}. You sent {asked.head.decode('latin-1')}"}
            error = {"error": {**told, "type": UPSTREAM, "code": UPSTREAM, "param": UPSTREAM, "key": UPSTREAM}}
            more = f"x-key: {UPSTREAM}\r\nset-cookie: key={UPSTREAM}\r\nx-request-id: {UPSTREAM}\r\n".encode()
            peer.json(int(model[5:]), json.dumps(error).encode(), more)
        else:
            peer.json(200, b'{"id":"resp_mine","object":"response","usage":{"input_tokens":1,"output_tokens":1}}')

    def raw(self, data: bytes) -> Reply:
        """Send bytes, read to the end."""
        out = b""
        with socket.create_connection(("127.0.0.1", self.gateway.port), 10) as sock:
            with contextlib.suppress(ConnectionError):  # what was refused early need not be read whole
                sock.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(65536):
                    out += part
        head, _, body = out.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 "), (data[:300], out[:300])
        reply = Reply(int(head[9:12]), head, body)
        self.replies.append(reply)
        return reply

    def ask(self, method: str, path: str | bytes, *headers: bytes, body: Any = None) -> Reply:
        """Make one request on a connection of its own."""
        target = path if isinstance(path, bytes) else path.encode()
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [method.encode() + b" " + target + b" HTTP/1.1", b"host: nbgate.test", b"connection: close", *headers]
        if body is not None or method == "POST":
            lines += [b"content-type: application/json", b"content-length: %d" % len(data)]
        return self.raw(b"\r\n".join(lines) + b"\r\n\r\n" + data)

    def access(self) -> list[str]:
        """Read the access log, once it holds a line for each answer."""
        path = self.folder / "access.jsonl"
        deadline = time.monotonic() + 5
        while True:
            lines = path.read_text("utf-8").split("\n")[:-1]
            if len(lines) >= len(self.replies) or time.monotonic() > deadline:
                return lines
            time.sleep(0.02)

    def metrics(self) -> str:
        """Read the metrics as the operator does."""
        return self.ask("GET", "/metrics", bearer(ADMIN)).body.decode()

    def stop(self) -> None:
        """End it, and prove that nothing of a secret was said or written."""
        metrics = self.metrics()
        lines = self.access()
        self.logger.removeHandler(self.handler)
        self.logger.setLevel(self.level)
        self.loop.call(self.gateway.stop())
        self.loop.call(self.upstream.close())
        said = b"\n".join(reply.head + reply.body for reply in self.replies).decode("latin-1")
        assert len(lines) == len(self.replies), "each answer has one line"
        for where, text in {
            "an answer": said,
            "the access log": "\n".join(lines),
            "the operator's log": "\n".join(self.operator),
            "the metrics": metrics,
        }.items():
            found = [trace for trace in TRACES if trace in text]
            assert not found, f"{where} holds {found}: {text[max(0, text.find(found[0]) - 300) :][:700]}"


def bearer(key: str | bytes) -> bytes:
    """Write the usual header."""
    return b"authorization: Bearer " + (key if isinstance(key, bytes) else key.encode())


def paths(route: Route, stated: str = "resp_mine") -> list[str]:
    """Give the paths of a route as clients write them."""
    path = route.path.replace("{id:path}", "gpt-4o").replace("{id}", stated)
    return [path] if route.exact else [path, "/v1" + path]


def calls(auth: bool | None = None) -> list[tuple[str, str]]:
    """List every method and path that is served."""
    return [
        (method, path)
        for route in ROUTES
        if auth is None or route.auth is auth
        for method in route.methods
        for path in paths(route)
    ]


def escaped(raw: bytes) -> bytes:
    """Percent-encode all but what every query may hold."""
    return quote(raw, safe="").encode()
