"""The worker's own parts: what it describes, the bounds it hands on, and a whole node that reloads."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import KEY
from station import Station

from nbgate import config as c
from nbgate import worker

ROOT = Path(__file__).parent.parent


def test_worker_translates_every_bound_into_bytes_and_seconds() -> None:
    text = (
        "[server]\nmax_line_kb = 4\nmax_head_kb = 5\nmax_headers = 60\nmax_body_mb = 7\nmax_upload_mb = 8\n"
        "memory_mb = 400\nhead_timeout_s = 9\nbody_timeout_s = 11\nbody_min_bytes_per_s = 12\nkeepalive_s = 13\n"
        "max_connections = 14\nmax_connections_per_address = 15\nmax_requests_per_connection = 16\nwrite_high_kb = 17\n"
        "write_timeout_s = 18\ntrusted_proxies = ['10.0.0.0/8']\n[streaming]\nkeepalive_s = 19\n"
    )
    made = worker.settings(c.parse(text, {}))
    assert (made.max_line_bytes, made.max_head_bytes, made.max_headers) == (4 << 10, 5 << 10, 60)
    assert (made.max_body_bytes, made.max_upload_bytes, made.body_memory_bytes) == (7 << 20, 8 << 20, 100 << 20)
    assert (made.head_timeout_s, made.body_timeout_s, made.body_min_bytes_per_s) == (9, 11, 12)
    assert (made.keepalive_s, made.max_connections, made.max_connections_per_address) == (13, 14, 15)
    assert (made.max_requests_per_connection, made.write_high_bytes, made.write_timeout_s) == (16, 17 << 10, 18)
    assert (made.trusted_proxies, made.stream_keepalive_s) == (("10.0.0.0/8",), 19)


def test_worker_bounds_connections_by_the_fd_limit_when_the_file_does_not() -> None:
    assert 0 < worker.settings(c.parse("", {})).max_connections <= 20_000


def test_worker_describes_what_the_supervisor_needs() -> None:
    text = (
        '[server]\nlisten = ["[::1]:80", "unix:/x"]\nworkers = 3\n[channels.d]\ntype = "demo"\nmodels = ["a-*", "b"]\n'
    )
    found = worker.describe(c.parse(text, {}))
    assert found["listen"] == [("", "::1", 80), ("/x", "", 0)]
    assert (found["workers"], found["demo"], found["demo_model"], found["admin_key"]) == (3, True, "b", False)


def test_worker_describe_of_a_bad_file_exits_78_with_its_lines() -> None:
    argv = [sys.executable, "-m", "nbgate.worker", "--describe", "-c", "/dev/stdin", "--name", "my.toml"]
    done = subprocess.run(argv, cwd=ROOT, input="[server]\nworkers = -1\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("my.toml:2: server.workers: expected ")


def until(condition: Callable[[], Any], within_s: float = 30.0) -> Any:
    """Poll until the condition holds; fail at the deadline."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.02)
    return found


def models(port: int, key: str) -> list[str]:
    """Ask a gateway for its models."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return sorted(row["id"] for row in json.load(answer)["data"])


def test_worker_serves_reloads_and_ends_under_the_real_supervisor(tmp_path: Path) -> None:
    file, out = tmp_path / "nbgate.toml", tmp_path / "out"
    text = f'[server]\nlisten = ["127.0.0.1:0"]\nworkers = 1\ndata_dir = "{tmp_path}/data"\n[logging]\naccess = ""\n'
    file.write_text(text + '[channels.d]\ntype = "demo"\nmodels = ["gpt-4o"]\n')
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NBGATE_", "NOTIFY_", "RUNTIME_"))}
    argv = [sys.executable, "-m", "nbgate", "serve", "-c", str(file)]
    with open(out, "wb") as stdout, subprocess.Popen(argv, cwd=ROOT, stdout=stdout, env=env) as process:
        try:
            until(lambda: "curl" in out.read_text() or process.poll() is not None)
            found = re.search(r"127\.0\.0\.1:(\d+)/\nDemo key:  (\S+)\n", out.read_text())
            assert found
            port, key = int(found.group(1)), found.group(2)
            assert models(port, key) == ["gpt-4o"]
            file.write_text(text + '[channels.d]\ntype = "demo"\nmodels = ["gpt-4o", "gpt-4o-mini"]\n')
            process.send_signal(signal.SIGHUP)
            until(lambda: models(port, key) == ["gpt-4o", "gpt-4o-mini"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


CHANNEL = """
[channels.slow]
type = "openai"
base_url = "{url}/v1"
keys = ["up-secret"]
models = ["slow"]
[[keys]]
key = "{key}"
account = "test"
"""


class Slow:
    """An upstream whose one stream goes on until told."""

    def __init__(self, scripted: Callable[..., Any]) -> None:
        self.go = threading.Event()
        self.url = scripted(self._answer).url

    async def _answer(self, asked: Any, peer: Any) -> None:
        peer.sse_head()
        peer.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
        await asyncio.get_running_loop().run_in_executor(None, self.go.wait, 20)
        peer.chunk(b"data: [DONE]\n\n")
        peer.end()


def stream(one: Station) -> Iterator[bytes]:
    """Begin a stream; give its lines as they come."""
    body = json.dumps({"model": "slow", "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(f"{one.url}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=20) as found:
        yield from found


def test_old_worker_of_a_roll_lets_streams_end_beyond_the_drain(scripted: Callable[..., Any], tmp_path: Path) -> None:
    slow = Slow(scripted)
    with Station(tmp_path, CHANNEL.format(url=slow.url, key=KEY), drain_s=1) as one:
        lines = stream(one)
        assert b'"a"' in next(lines)
        old = one.worker()
        one.process.send_signal(signal.SIGUSR2)
        until(lambda: "is now pid" in one.err.read_text())
        with pytest.raises(AssertionError, match="deadline"):
            until(lambda: old not in {pid for _, pid in one.workers()}, within_s=2.5)
        slow.go.set()
        assert [line for line in lines if line.strip()] == [b"data: [DONE]\n"]
        until(lambda: old not in {pid for _, pid in one.workers()})


def test_old_worker_of_a_roll_ends_with_the_station(scripted: Callable[..., Any], tmp_path: Path) -> None:
    slow = Slow(scripted)
    with Station(tmp_path, CHANNEL.format(url=slow.url, key=KEY), drain_s=1) as one:
        lines = stream(one)
        assert b'"a"' in next(lines)
        one.process.send_signal(signal.SIGUSR2)
        until(lambda: "is now pid" in one.err.read_text())
        one.process.send_signal(signal.SIGTERM)
        rest = b"".join(lines)
        assert b'"error"' in rest and b"[DONE]" not in rest
        assert one.process.wait(20) == 0
        assert "SIGKILL" not in one.err.read_text()
        slow.go.set()


def test_connections_that_nobody_accepted_yet_are_served_when_the_station_ends(tmp_path: Path) -> None:
    with Station(tmp_path, "", drain_s=5) as one:
        pid = one.worker()
        os.kill(pid, signal.SIGSTOP)
        clients = [socket.create_connection(("127.0.0.1", one.port), 20) for _ in range(50)]
        for client in clients[::2]:
            client.sendall(b"GET /readyz HTTP/1.1\r\nhost: a\r\n\r\n")
        one.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in one.err.read_text())
        os.kill(pid, signal.SIGCONT)
        for number, client in enumerate(clients):
            with client:  # its end is a clean one: recv would raise after a reset
                data = b"".join(iter(lambda: client.recv(65536), b""))  # noqa: B023
            assert data.count(b"HTTP/1.1 ") == (number % 2 == 0), data
        assert one.process.wait(20) == 0


def test_worker_gives_way_as_long_as_the_longest_answer_may_take() -> None:
    text = '[channels.{}]\ntype = "demo"\nmodels = ["x"]\nenabled = {}\ntimeouts = {{ total_s = {} }}\n'
    assert worker.roll_s(c.parse("", {})) == 300
    parts = [text.format("a", "true", 700), text.format("b", "true", 900), text.format("d", "false", 7000)]
    assert worker.roll_s(c.parse("".join(parts), {})) == 900
    assert worker.describe(c.parse(parts[0], {}))["drain_roll_s"] == 700


def test_worker_knows_and_gives_back_its_memory() -> None:
    assert worker.resident_bytes() > 1 << 20
    worker.relieve()
