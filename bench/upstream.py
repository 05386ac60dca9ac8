"""Scriptable fake upstream: pace, size, faults, and its own log of the truth.

Run `python bench/upstream.py --port 0`; it prints `listening PORT`. It answers
POST on any /v1/* path as a provider would; which answer, is said by the model
name or by the header `x-fake` (the mini-language is in `answers.py`), or for
everybody by `POST /_control {"fault": "500", "seconds": 5, "count": 3}`.
`GET /_log` gives one JSON line per request, `GET /_stats` counts, `POST
/_reset` forgets both.

What lives here: sockets, pacing, log. Raw uvloop + httptools, so that on its
own core it outruns what is measured. What must not: anything of nbgate.

Pacing: one ticker per gap, never a timer per stream. A ticker has slots of
about 2 ms over its gap, and streams are dealt to the slots in turn, so equal
streams do not all fire at once.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import re
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from contextlib import suppress
from typing import Any, cast

import httptools
import orjson
import uvloop
from answers import DIALECTS, FAULTS, SEQ, Answer, Ask, Mode, answer, head

MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]*)"')
STREAM = re.compile(rb'"stream"\s*:\s*true')
USAGE = re.compile(rb'"include_usage"\s*:\s*true')
PARSE_BELOW = 65_536  # longer bodies are only searched, so that a 400 KB prompt costs us little
MANY = 4096  # cached answers
SLOT_MS = 2


class Record:
    """One request as the log tells it."""

    __slots__ = ("body_bytes", "bytes", "closed_by_peer_at", "ended_at", "headers", "key", "mode", "model", "parts",
                 "path", "request_id", "seq", "started_at", "status", "stream", "usage")  # fmt: skip

    def __init__(self, seq: int, path: str, ask: Ask, body_bytes: int) -> None:
        self.seq, self.path, self.model, self.mode, self.stream = seq, path, ask.model, ask.mode, ask.stream
        self.body_bytes = body_bytes
        self.started_at = time.time()
        self.request_id: str | None = None
        self.key: str | None = None
        self.headers: dict[str, str] | None = None
        self.status = self.bytes = self.parts = 0
        self.usage: dict[str, Any] | None = None
        self.ended_at: float | None = None
        self.closed_by_peer_at: float | None = None

    def line(self) -> bytes:
        """Encode as one JSON line."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["x-request-id"] = fields.pop("request_id")
        fields["usage_given"] = fields.pop("usage")
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS) + b"\n"


class Ticker:
    """Step every stream of one gap once per gap, spread over its slots."""

    def __init__(self, loop: asyncio.AbstractEventLoop, gap_ms: int) -> None:
        self.loop = loop
        count = max(1, gap_ms // SLOT_MS)
        self.slot_s = gap_ms / 1000 / count
        self.slots: list[list[Exchange]] = [[] for _ in range(count)]
        self.deal = self.turn = self.open = 0
        self.due = 0.0

    def add(self, exchange: Exchange) -> None:
        """Deal `exchange` to the next slot; start ticking if asleep."""
        self.slots[self.deal].append(exchange)
        self.deal = (self.deal + 1) % len(self.slots)
        self.open += 1
        if self.open == 1:
            self.due = self.loop.time() + self.slot_s
            self.loop.call_at(self.due, self.tick)

    def tick(self) -> None:
        """Step one slot; a late ticker does not catch up in a burst."""
        slot = self.slots[self.turn]
        if slot:
            kept = [exchange for exchange in slot if exchange.step()]
            self.open -= len(slot) - len(kept)
            self.slots[self.turn] = kept
        self.turn = (self.turn + 1) % len(self.slots)
        if self.open:
            self.due = max(self.due + self.slot_s, self.loop.time())
            self.loop.call_at(self.due, self.tick)


class State:
    """All that outlives a connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, args: argparse.Namespace) -> None:
        self.loop, self.args = loop, args
        self.default = Mode(args.chunks, args.gap_ms, args.size, 0, dribble_ms=args.dribble_ms)
        self.answers: dict[Ask, Answer] = {}
        self.asks: dict[tuple[bytes, bytes], Ask] = {}
        self.tickers: dict[int, Ticker] = {}
        self.log: collections.deque[Record] = collections.deque(maxlen=args.log_max)
        self.fault, self.fault_until, self.fault_left = "", 0.0, 0
        self.open_sockets = self.busy = 0
        self.server: asyncio.AbstractServer
        self.reset()

    def reset(self) -> None:
        """Forget the log and the counts; what is under way stays counted."""
        self.log.clear()
        self.requests = self.closed_early = self.connections = self.completed = 0
        self.max_parallel = self.busy

    def stats(self) -> dict[str, int]:
        """Count what `/_stats` shows."""
        names = ["requests", "completed", "closed_early", "connections", "open_sockets", "max_parallel"]
        return {**{name: getattr(self, name) for name in names}, "open_streams": self.busy}

    async def listen(self) -> None:
        """Listen on the port or path; port 0 is chosen once and kept."""
        args = self.args
        context = None
        if args.tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*args.tls)
        if args.unix:
            self.server = await self.loop.create_unix_server(lambda: Client(self), args.unix, ssl=context)
            return
        sock = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((args.host, args.port))
        args.port = sock.getsockname()[1]
        self.server = await self.loop.create_server(lambda: Client(self), sock=sock, backlog=4096, ssl=context)

    def refuse(self, seconds: float) -> None:
        """Refuse connections for `seconds`, then listen on the same port."""
        self.server.close()
        self.loop.call_later(seconds, lambda: self.loop.create_task(self.listen()))

    def answer(self, ask: Ask) -> Answer:
        """Look up or make the answer; KeyError for an unknown fault."""
        found = self.answers.get(ask)
        if found is None:
            found = answer(ask, self.default)
            if len(self.answers) >= MANY:
                self.answers.clear()
            self.answers[ask] = found
        return found

    def forced(self) -> str:
        """Name the process-wide fault in force, and use it up by one."""
        if not self.fault or self.loop.time() >= self.fault_until or self.fault_left == 0:
            self.fault = ""
            return ""
        self.fault_left -= 1
        return self.fault

    def ask(self, path: bytes, body: bytes) -> Ask:
        """Read what a request asks for; small equal bodies are read once."""
        found = self.asks.get((path, body)) if len(body) < 1024 else None
        if found is not None:
            return found
        dialect = DIALECTS.get(path.removeprefix(b"/v1"), "chat")
        fields: Any = None
        if len(body) < PARSE_BELOW:
            with suppress(orjson.JSONDecodeError):
                fields = orjson.loads(body)
        if isinstance(fields, dict):
            options = fields.get("stream_options")
            wants = isinstance(options, dict) and options.get("include_usage") is True
            model = str(fields.get("model", ""))
            ask = Ask(dialect, model, fields.get("stream") is True, wants, model)
        else:
            match = MODEL.search(body)
            model = match[1].decode("utf-8", "replace") if match else ""
            ask = Ask(dialect, model, bool(STREAM.search(body)), bool(USAGE.search(body)), model)
        if len(body) < 1024:
            if len(self.asks) >= MANY:
                self.asks.clear()
            self.asks[path, body] = ask
        return ask


class Exchange:
    """One answer under way on one connection."""

    __slots__ = ("answer", "at", "client", "live", "record")

    def __init__(self, client: Client, reply: Answer, record: Record) -> None:
        self.client, self.answer, self.record = client, reply, record
        self.at = 0
        self.live = True

    def start(self) -> None:
        """Write head and first part together, then leave it to the ticker."""
        if not self.live:
            return
        reply, state = self.answer, self.client.state
        self.record.status = reply.status
        if reply.gap_ms <= 0 or (len(reply.parts) < 2 and reply.end == "keep"):
            self.flow(reply.head)
            return
        first = reply.parts[0] if reply.parts else b""
        self.write(reply.head + first.replace(SEQ, b"%08d" % self.record.seq, 1))
        self.at = 1
        ticker = state.tickers.get(reply.gap_ms)
        if ticker is None:
            ticker = state.tickers[reply.gap_ms] = Ticker(state.loop, reply.gap_ms)
        ticker.add(self)

    def flow(self, prefix: bytes = b"") -> None:
        """Write all parts as fast as the peer reads them."""
        parts = self.answer.parts
        if prefix:
            first = parts[0] if parts else b""
            self.write(prefix + first.replace(SEQ, b"%08d" % self.record.seq, 1))
            self.at = 1
        while self.at < len(parts) and not self.client.paused:
            self.write(parts[self.at])
            self.at += 1
        if self.at >= len(parts):
            if self.answer.end in ("reset", "close") and prefix and not self.answer.usage and len(parts) < 2:
                # NOTE: a reset right behind the bytes would destroy them before the peer has read them.
                self.client.state.loop.call_later(0.05, self.finish)
            else:
                self.finish()

    def step(self) -> bool:
        """Write the next part; False when there is no further one."""
        if not self.live:
            return False
        parts = self.answer.parts
        if self.at < len(parts):
            self.write(parts[self.at])
            self.at += 1
            if self.at < len(parts) or self.answer.end in ("reset", "close"):
                return True
        self.finish()
        return False

    def write(self, data: bytes) -> None:
        """Write and count."""
        if data:
            self.client.transport.write(data)
            self.record.bytes += len(data)

    def finish(self) -> None:
        """End as the answer says."""
        if not self.live:
            return
        self.record.parts = self.at
        if self.answer.end == "hang":
            return
        self.live = False
        self.record.usage = self.answer.usage
        self.record.ended_at = time.time()
        self.client.finished(self.answer.end)


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.transport: asyncio.Transport
        self.parser = httptools.HttpRequestParser(self)
        self.waiting: collections.deque[tuple[bytes, bytes, dict[bytes, bytes], bool]] = collections.deque()
        self.exchange: Exchange | None = None
        self.paused = False
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.body: list[bytes] = []

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.state.open_sockets += 1
        self.state.connections += 1

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()
            return
        if self.waiting and self.exchange is None:
            self.next()

    def connection_lost(self, exc: Exception | None) -> None:
        self.state.open_sockets -= 1
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            if exchange.live:
                exchange.live = False
                exchange.record.parts = exchange.at
                exchange.record.closed_by_peer_at = time.time()
                self.state.closed_early += 1
            self.state.busy -= 1

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        exchange = self.exchange
        if exchange is not None and exchange.live and exchange.answer.gap_ms <= 0:
            exchange.flow()

    # httptools callbacks
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = {}
        self.body = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self.headers.get(b"expect") == b"100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        # NOTE: answered after feed_data returned, never from inside the parser.
        self.waiting.append((self.url, body, self.headers, self.parser.should_keep_alive()))

    # answering
    def next(self) -> None:
        """Answer the oldest request that waits."""
        url, body, headers, _ = self.waiting[0]
        path = url.partition(b"?")[0]
        if path.startswith(b"/_") or self.parser.get_method() == b"GET":
            self.own(path, body)
            return
        state = self.state
        ask = state.ask(path, body)
        mode = headers.get(b"x-fake")
        forced = state.forced() if state.fault else ""
        if mode is not None or forced:
            word = "fault-" + forced if forced else (mode or b"").decode("latin-1")
            ask = ask._replace(mode=f"{ask.model}+{word}")
        state.requests += 1
        record = Record(state.requests, path.decode("latin-1"), ask, len(body))
        if b"x-request-id" in headers:
            record.request_id = headers[b"x-request-id"].decode("latin-1")
        key = headers.get(b"authorization") or headers.get(b"x-api-key")
        record.key = key.decode("latin-1") if key else None
        if state.args.log_headers:
            record.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        state.log.append(record)
        state.busy += 1
        state.max_parallel = max(state.max_parallel, state.busy)
        try:
            reply = state.answer(ask)
        except KeyError as exc:
            text = orjson.dumps({"error": {"message": f"unknown fault {exc}; one of {sorted(FAULTS)}"}})
            reply = Answer(400, head(400, len(text)), (text,), 0, 0, "keep", None, False)
        self.exchange = Exchange(self, reply, record)
        if reply.delay_ms:
            state.loop.call_later(reply.delay_ms / 1000, self.exchange.start)
        else:
            self.exchange.start()

    def finished(self, end: str) -> None:
        """Go on after an answer: keep, close or reset."""
        self.exchange = None
        self.state.busy -= 1
        self.state.completed += 1
        keep_alive = self.waiting.popleft()[3]
        if end == "reset":
            sock = self.transport.get_extra_info("socket")
            with suppress(OSError):  # a unix socket knows no RST
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        elif end == "close" or not keep_alive:
            self.transport.close()
        elif self.waiting:
            self.state.loop.call_soon(self.resume)

    def resume(self) -> None:
        """Answer what was pipelined meanwhile."""
        if self.waiting and self.exchange is None and not self.transport.is_closing():
            self.next()

    def own(self, path: bytes, body: bytes) -> None:
        """Answer the pages that are ours: control, log, counts, models."""
        state, status = self.state, 200
        keep_alive = self.waiting.popleft()[3]
        out = b"{}"
        if path == b"/_log":
            out = b"".join(record.line() for record in list(state.log))
        elif path == b"/_stats":
            out = orjson.dumps(state.stats())
        elif path == b"/_reset":
            state.reset()
        elif path == b"/_control":
            status = self.control(orjson.loads(body or b"{}"))
        elif path.removeprefix(b"/v1") == b"/models":
            models = [{"id": "gpt-4o", "object": "model", "created": 1, "owned_by": "fake"}]
            out = orjson.dumps({"object": "list", "data": models})
        else:
            status = 404
        self.transport.write(head(status, len(out)) + out)
        if not keep_alive:
            self.transport.close()
        elif self.waiting:
            state.loop.call_soon(self.resume)

    def control(self, wish: dict[str, Any]) -> int:
        """Set the process-wide fault; `refuse` closes the listener a while."""
        state = self.state
        fault, seconds = str(wish.get("fault", "")), float(wish.get("seconds", 3600))
        if fault == "refuse":
            state.loop.call_soon(state.refuse, seconds)
            return 200
        if fault and not fault.isdecimal() and fault.rstrip("-0123456789") not in FAULTS and fault not in FAULTS:
            return 400
        state.fault, state.fault_until = fault, state.loop.time() + seconds
        state.fault_left = int(wish.get("count", -1))
        return 200


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="upstream.py", description="Scriptable fake upstream.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, printed")
    parser.add_argument("--unix", default="", metavar="PATH", help="listen on a unix socket instead")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"))
    parser.add_argument("--chunks", type=int, default=51, help="of a stream whose model says nothing")
    parser.add_argument("--gap-ms", type=int, default=20)
    parser.add_argument("--size", type=int, default=0, help="bytes of a JSON answer; 0: as it comes")
    parser.add_argument("--dribble-ms", type=int, default=1000, help="per byte of fault-dribble")
    parser.add_argument("--log-max", type=int, default=1_000_000, help="records kept, the oldest go first")
    parser.add_argument("--log-headers", action="store_true", help="log every request header")
    return parser.parse_args()


async def main(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    state = State(loop, args)
    await state.listen()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    print("listening", args.unix or args.port, flush=True)
    await stop.wait()
    state.server.close()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    uvloop.run(main(read_arguments()))
    sys.exit(0)
