"""The gateways that a run compares, each started with one worker.

What lives here: how to configure and start nbgate and nginx, and how to check
from nbgate's own access log that it saw what the load saw. What must not: load,
figures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import orjson
from procs import Proc, Procs, free_port, wait_for_port

ROOT = Path(__file__).resolve().parent.parent
COMPILED = ROOT / "build" / "compiled"
KEY = "sk-" + "bench" * 9 + "key"
NGINX = "/usr/sbin/nginx"
NGINX_CONFIG = """
{user}daemon off; worker_processes 1; worker_rlimit_nofile {fds}; pid {folder}/nginx.pid; error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
    access_log off; keepalive_requests 1000000000; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    upstream up {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
            client_max_body_size 64m; client_body_buffer_size 1m; proxy_read_timeout 600s;
        }}
    }}
}}
"""
NBGATE_CONFIG = """
[server]
listen = ["127.0.0.1:{port}"]
workers = 1
data_dir = "{folder}"

[channels.up]
type = "openai"
base_url = "http://127.0.0.1:{upstream}/v1"
keys = ["k"]
models = ["*"]
dialects = ["chat", "responses", "messages", "embeddings", "completions", "moderations", "images"]

[[keys]]
key = "{key}"
account = "bench"
usd = "unlimited"
rpm = 100000000

[billing]
mode = "off"

[logging]
access = "{folder}/access.jsonl"
"""


class Running(NamedTuple):
    """A candidate that serves."""

    name: str
    proc: Proc
    port: int
    access_log: Path | None


def start_nginx(procs: Procs, upstream_port: int, folder: Path, core: int | None) -> Running:
    """Start nginx as a bare reverse proxy: keep-alive, unbuffered answers, no log."""
    port = free_port()
    user = "user root; " if os.geteuid() == 0 else ""
    fds = min(40_000, os.sysconf("SC_OPEN_MAX"))
    text = NGINX_CONFIG.format(
        user=user, fds=fds, connections=fds - 1000, folder=folder, upstream=upstream_port, port=port
    )
    path = folder / "nginx.conf"
    path.write_text(text)
    proc = procs.start("nginx", [NGINX, "-c", str(path), "-p", str(folder)], core)
    wait_for_port(port, proc)
    return Running("nginx", proc, port, None)


def start_nbgate(procs: Procs, upstream_port: int, folder: Path, core: int | None) -> Running:
    """Start nbgate as an operator would: one worker, one key with a limit, access log."""
    return _start(procs, upstream_port, (folder, core), {"PYTHONPATH": str(ROOT)}, "nbgate")


def start_compiled(procs: Procs, upstream_port: int, folder: Path, core: int | None) -> Running:
    """Start the same on the rooms that `make compile` built."""
    if not (COMPILED / ".stamp").exists():
        raise RuntimeError("there are no compiled rooms: make compile")
    env = {"PYTHONPATH": str(COMPILED), "PYTHONSAFEPATH": "1"}
    return _start(procs, upstream_port, (folder, core), env, "compiled")


def _start(
    procs: Procs, upstream_port: int, place: tuple[Path, int | None], env: dict[str, str], name: str
) -> Running:
    folder, core = place
    port = free_port()
    path = folder / "nbgate.toml"
    path.write_text(NBGATE_CONFIG.format(port=port, folder=folder, upstream=upstream_port, key=KEY))
    path.chmod(0o600)
    argv = [sys.executable, "-m", "nbgate", "serve", "-c", str(path)]
    proc = procs.start(name, argv, core, env)
    wait_for_port(port, proc)
    return Running(name, proc, port, folder / "access.jsonl")


CANDIDATES: dict[str, Callable[[Procs, int, Path, int | None], Running]] = {
    "nginx": start_nginx,
    "nbgate": start_nbgate,
    "compiled": start_compiled,
}


def wait_until_answers(running: Running, body: bytes, timeout_s: float = 20.0) -> None:
    """Return once a call passes; RuntimeError with the last failure otherwise."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{running.port}/v1/chat/completions"
    deadline = time.monotonic() + timeout_s
    failure = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as reply:
                reply.read()
                return
        except urllib.error.HTTPError as exc:
            failure = f"{exc.code} {exc.read(300)!r}"
        except OSError as exc:
            failure = str(exc)
        time.sleep(0.1)
    raise RuntimeError(f"{running.name} does not answer: {failure}; {running.proc.tail()}")


class LogCheck:
    """Compares the access log of a row with what the load counted."""

    def __init__(self, running: Running, quiet_s: float = 0.6) -> None:
        """Begin behind what was logged before, once that has come to rest.

        `quiet_s` is longer than the quarter of a second that lines may wait.
        """
        self.path = running.access_log
        self.offset = -1
        while self.offset != (size := self.size()):
            self.offset = size
            time.sleep(quiet_s)

    def size(self) -> int:
        """Measure the log; 0 when there is none."""
        return self.path.stat().st_size if self.path and self.path.exists() else 0

    def read(self, usage: tuple[int, int]) -> tuple[int, int, str]:
        """Count good and other lines since; and show a wrong usage."""
        assert self.path is not None
        good = odd = 0
        wrong = ""
        for line in self.path.read_bytes()[self.offset :].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            fields = orjson.loads(line)
            if fields.get("status") != 200 or fields.get("outcome") != "complete":
                odd += 1
                continue
            good += 1
            seen = fields.get("usage") or {}
            if (seen.get("input"), seen.get("output")) != usage:
                wrong = f"the access log says usage {seen}, the upstream gave {usage}"
        return good, odd, wrong

    def wrong(self, least: int, most: int, usage: tuple[int, int], timeout_s: float = 5.0) -> str:
        """Say what is wrong with the lines since; "" when all is right.

        `least` to `most` calls with status 200, each with exactly `usage`;
        up to `most - least` others were cut off by the load at its end.
        """
        if self.path is None:
            return ""
        deadline = time.monotonic() + timeout_s
        while True:
            good, odd, wrong = self.read(usage)
            if good >= least or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if not wrong and (not least <= good <= most or odd > most - least):
            return f"the access log holds {good} good and {odd} other lines, expected {least} to {most} good ones"
        return wrong


def versions() -> dict[str, str]:
    """Name the versions of what takes part."""
    found = {"python": sys.version.split()[0]}
    for name, argv in (("nginx", [NGINX, "-v"]), ("wrk", ["wrk", "-v"])):
        if shutil.which(argv[0]):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
            found[name] = (done.stderr + done.stdout).splitlines()[0].strip()
    code = "import uvloop,httptools,orjson;print(uvloop.__version__,httptools.__version__,orjson.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    found.update(zip(("uvloop", "httptools", "orjson"), done.stdout.split(), strict=False))
    return found
