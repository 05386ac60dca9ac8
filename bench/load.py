"""Load generator for what wrk cannot do: fixed rates, streams, latency.

Run as a child of `saturate.py` (or by hand); prints one JSON object at the end.

- `rate`: open loop; requests are due at fixed times whether or not earlier
  ones are answered, and latency counts from when a request was due.
- `streams`: so many streams at once, so many times over; every one must bear
  exactly the bytes of `--expect`.
- `hold`: opens streams, prints `open N` once each has sent something, and holds
  them until stdin ends.
- `latency`: one connection, one request after another.

What lives here: client sockets, raw uvloop + httptools. What must not: CPU or
memory of others (`procs.py`), and anything of nbgate.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop
from procs import raise_fd_limit

TICK_S = 0.001


class Run:
    """One run: what to send, what must come back, what came."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.loop = asyncio.get_running_loop()
        body = Path(args.body).read_bytes()
        lines = [f"POST {args.path} HTTP/1.1", f"host: 127.0.0.1:{args.port}", "content-type: application/json"]
        lines += [f"authorization: Bearer {args.key}", f"content-length: {len(body)}"]
        self.request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self.expect = Path(args.expect).read_bytes() if args.expect else None
        self.ok = self.bytes = self.sent = 0
        self.failed: collections.Counter[str] = collections.Counter()
        self.times: list[float] = []
        self.first: list[float] = []
        self.idle: list[Link] = []
        self.due: collections.deque[float] = collections.deque()
        self.links: list[Link] = []
        self.opened = 0
        self.all_open = asyncio.Event()

    async def link(self) -> Link:
        """Open one connection."""
        _, link = await self.loop.create_connection(lambda: Link(self), "127.0.0.1", self.args.port)
        self.links.append(link)
        return link

    def judge(self, link: Link) -> None:
        """Count an answer as good only if status and bytes are right."""
        body = b"".join(link.parts)
        status = link.parser.get_status_code()
        self.bytes += len(body)
        if status != 200:
            self.failed[f"status {status}: {body[:200]!r}"] += 1
        elif self.expect is not None and (
            len(body) != len(self.expect) or (self.args.exact and body != self.expect) or b'"usage"' not in body
        ):
            self.failed[f"body of {len(body)} bytes, expected {len(self.expect)}"] += 1
        else:
            self.ok += 1
            self.times.append(time.perf_counter() - link.since)
            self.first.append(link.first - link.since)

    def report(self, seconds: float) -> str:
        """Sum up as JSON."""
        report: dict[str, Any] = {"ok": self.ok, "failed": dict(self.failed), "sent": self.sent, "bytes": self.bytes}
        report["seconds"] = seconds
        for name, times in (("time", self.times), ("first", self.first)):
            if len(times) > 1:
                cuts = statistics.quantiles(times, n=1000)
                report[name] = {"p50_us": cuts[499] * 1e6, "p99_us": cuts[989] * 1e6, "max_us": max(times) * 1e6}
        return json.dumps(report)


class Link(asyncio.Protocol):
    """One keep-alive connection; at most one request under way."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.transport: asyncio.Transport
        self.parser = httptools.HttpResponseParser(self)
        self.parts: list[bytes] = []
        self.busy = self.complete = False
        self.keep = True
        self.since = self.first = 0.0
        self.left = 0
        self.opened = False

    def send(self, due: float) -> None:
        """Send the request; its time counts from `due`."""
        self.since, self.first = due, 0.0
        self.parts = []
        self.busy, self.complete = True, False
        self.run.sent += 1
        self.transport.write(self.run.request)

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.run.failed[f"framing: {exc}"] += 1
            self.transport.abort()
            return
        if self.complete:
            keep = self.keep
            self.run.judge(self)
            self.busy = self.complete = False
            self.parser = httptools.HttpResponseParser(self)
            if not keep:
                self.run.failed["connection not kept"] += 1
            self.finished(keep)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self.run.failed[f"connection lost: {exc}"] += 1
            self.busy = False
            self.finished(False)

    def finished(self, alive: bool) -> None:
        """Take the next request; replaced by mode."""
        run = self.run
        if not alive:
            return
        if run.due:
            self.send(run.due.popleft())
        elif self.left:
            self.left -= 1
            self.send(time.perf_counter())
        else:
            run.idle.append(self)

    # httptools callbacks
    def on_body(self, body: bytes) -> None:
        if not self.first:
            self.first = time.perf_counter()
            if not self.opened:
                self.opened = True
                self.run.opened += 1
                if self.run.opened == self.run.args.connections:
                    self.run.all_open.set()
        if self.run.args.command != "hold":
            self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True
        self.keep = self.parser.should_keep_alive()  # llhttp forgets it once the next message may begin


async def rate(run: Run) -> None:
    """Send at a fixed rate over a fixed set of connections."""
    args = run.args
    for _ in range(args.connections):
        run.idle.append(await run.link())
    begin = time.perf_counter()
    total, scheduled = int(args.rate * args.seconds), 0
    while scheduled < total:
        now = time.perf_counter()
        ready = min(total, int((now - begin) * args.rate))
        for number in range(scheduled, ready):
            due = begin + number / args.rate
            if run.idle:
                run.idle.pop().send(due)
            else:
                run.due.append(due)
        scheduled = ready
        await asyncio.sleep(TICK_S)
    await settle(run, total, 10.0)


async def settle(run: Run, total: int, timeout_s: float) -> None:
    """Wait until `total` requests have ended one way or the other."""
    deadline = time.perf_counter() + timeout_s
    while run.ok + sum(run.failed.values()) < total:
        if time.perf_counter() > deadline or not any(link.busy for link in run.links):
            run.failed["no answer"] += total - run.ok - sum(run.failed.values())
            return
        await asyncio.sleep(0.01)


async def streams(run: Run) -> None:
    """Run so many streams at once, each connection so many times."""
    args = run.args
    for number in range(args.connections):
        link = await run.link()
        link.left = args.rounds - 1
        link.send(time.perf_counter())
        if number % 10 == 9:
            await asyncio.sleep(args.ramp_s * 10 / args.connections)
    await settle(run, args.connections * args.rounds, args.seconds)


async def hold(run: Run) -> None:
    """Open streams and hold them until stdin ends."""
    args = run.args
    for number in range(args.connections):
        (await run.link()).send(time.perf_counter())
        if number % 20 == 19:
            await asyncio.sleep(0.01)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(run.all_open.wait(), args.seconds)
    print("open", sum(link.opened and link.busy for link in run.links), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    still = sum(link.busy for link in run.links)
    run.ok = still
    for link in run.links:
        link.busy = False
        link.transport.abort()


async def latency(run: Run) -> None:
    """Send one request after another on one connection."""
    link = await run.link()
    link.left = run.args.rounds - 1
    link.send(time.perf_counter())
    await settle(run, run.args.rounds, run.args.seconds)


async def main(args: argparse.Namespace) -> int:
    """Run one command; 0 when nothing failed."""
    run = Run(args)
    gc.disable()
    begin = time.perf_counter()
    await {"rate": rate, "streams": streams, "hold": hold, "latency": latency}[args.command](run)
    print(run.report(time.perf_counter() - begin), flush=True)
    for link in run.links:
        link.busy = False
        link.transport.abort()
    return 1 if run.failed else 0


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="load.py", description="Load at fixed rates, streams, latency.")
    parser.add_argument("command", choices=("rate", "streams", "hold", "latency"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/chat/completions")
    parser.add_argument("--key", default="none")
    parser.add_argument("--body", required=True, help="file with the request body")
    parser.add_argument("--expect", default="", help="file with the body that must come")
    parser.add_argument("--exact", action="store_true", help="compare bytes, not only the length")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1000.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=1, help="requests per connection")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load; for streams, hold, latency the bound")
    parser.add_argument("--ramp-s", type=float, default=0.5)
    return parser.parse_args()


if __name__ == "__main__":
    raise_fd_limit()
    sys.exit(uvloop.run(main(read_arguments())))
