"""The worker's own parts: what it describes, the bounds it hands on, and a whole node that reloads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
