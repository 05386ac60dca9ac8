"""Ten thousand connections that wait: what one costs, and that the others are served meanwhile."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from loadkit import KEY, quantile, request
from station import Station, rss_bytes
from traffic import raise_fd_limit

COUNT = 10_000
BATCH = 100
SOURCES = 8  # addresses of ours, since one has only 28,000 ports
HOLD_S = 10.0
CONFIG = """
[channels.fake]
type = "station"
base_url = "{url}"
keys = ["up-secret-fake"]
models = ["*"]
[[keys]]
key = "{key}"
account = "load"
rpm = 100000000
"""
IDLE = b"GET /v1/models HTTP/1.1\r\nhost: idle\r\nauthorization: Bearer " + KEY.encode() + b"\r\n\r\n"


@pytest.fixture
def station(fake_upstream: str, tmp_path: Path) -> Iterator[Station]:
    """Serve with one worker that takes more connections than we open."""
    raise_fd_limit(COUNT + 2000)
    with Station(tmp_path, CONFIG.format(url=fake_upstream, key=KEY), f"max_connections = {COUNT * 6 // 5}") as one:
        yield one


def read_answer(sock: socket.socket) -> bytes:
    """Read one answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65536)
    assert head.startswith(b"HTTP/1.1 200 "), head
    return body


def call(port: int) -> float:
    """Make one call on a connection of its own; return how long it took."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(request("chat", "json-800", False))
        assert b'"usage"' in read_answer(sock)
    return time.monotonic() - began


class Others:
    """Calls of other clients, twenty a second, while this is open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.took: list[float] = []
        self.failed: list[BaseException] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.wait(0.05):
            try:
                self.took.append(call(self.port))
            except (OSError, AssertionError) as exc:
                self.failed.append(exc)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def open_idle(port: int, count: int) -> list[socket.socket]:
    """Open connections, each of which made one call and waits."""
    made: list[socket.socket] = []
    while len(made) < count:
        batch = []
        for number in range(BATCH):
            source = f"127.0.0.{2 + (len(made) + number) % SOURCES}"
            batch.append(socket.create_connection(("127.0.0.1", port), 10, (source, 0)))
        for sock in batch:
            sock.sendall(IDLE)
        for sock in batch:
            read_answer(sock)
        made += batch
    return made


def close_all(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def cpu_s(pid: int) -> float:
    """Read the CPU time that a process has used."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.long
def test_ten_thousand_idle_connections_cost_little_and_harm_nobody(station: Station) -> None:
    pid = station.worker()
    close_all(open_idle(station.port, 300))
    for _ in range(50):
        call(station.port)
    before = rss_bytes(pid)
    with Others(station.port) as others:
        began = time.monotonic()
        idle = open_idle(station.port, COUNT)
        took = time.monotonic() - began
        during, used = len(others.took), cpu_s(pid)
        time.sleep(HOLD_S)  # the time over which the cost of waiting is measured
        share = (cpu_s(pid) - used) / HOLD_S
        each = (rss_bytes(pid) - before) / COUNT
        assert len(os.listdir(f"/proc/{pid}/fd")) > COUNT
    for sock in idle[:: COUNT // 100]:
        sock.sendall(IDLE)
        read_answer(sock)
    close_all(idle)
    then = others.took[during:]
    print(f"\n{COUNT} idle connections: {each / 1024:.2f} KiB each, opened in {took:.1f} s; {share:.1%} of a core")
    print(f"  other calls while they opened: {during}, max {max(others.took[:during]) * 1e3:.0f} ms")
    print(f"  and then: {len(then)}, p50 {quantile(then, 0.5) * 1e3:.1f} ms, max {max(then) * 1e3:.0f} ms")
    assert not others.failed, others.failed[:3]
    assert during > 0
    assert each <= 8 * 1024
    assert max(others.took) < 1.0
    assert share < 0.2
