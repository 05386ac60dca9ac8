"""The words to systemd, on a real datagram socket."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbgate.notify import SYSTEMD_VARIABLES, Notifier, forget


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def test_notify_sends_each_state_in_one_datagram(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()}, 42)
    before = time.monotonic_ns() // 1000
    notifier.ready("all is\nwell")
    notifier.reloading()
    notifier.status("x")
    notifier.watchdog()
    notifier.stopping()
    assert manager.recv(999) == b"READY=1\nMAINPID=42\nSTATUS=all is well"
    found = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", manager.recv(999))
    assert found and before <= int(found.group(1)) <= time.monotonic_ns() // 1000
    assert [manager.recv(999) for _ in range(3)] == [b"STATUS=x", b"WATCHDOG=1", b"STOPPING=1\nSTATUS=draining"]


def test_notify_knows_abstract_sockets(tmp_path: Path) -> None:
    name = f"nbgate-test{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(10)
        Notifier({"NOTIFY_SOCKET": "@" + name}, 1).watchdog()
        assert sock.recv(99) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "relative", "/does/not/exist", "@" + "x" * 200])
def test_notify_is_silent_without_a_manager(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address} if address else {}, 1).ready("x")


def test_notify_never_waits_for_a_manager_that_reads_nothing(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()}, 1)
    for _ in range(2_000):
        notifier.status("x" * 1_000)
    assert manager.recv(9_999).startswith(b"STATUS=x")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, 0.0),
        ({"WATCHDOG_USEC": "-1"}, 0.0),
        ({"WATCHDOG_USEC": "٣"}, 0.0),
    ],
)
def test_notify_reads_half_of_the_watchdogs_interval(env: dict[str, str], expected: float) -> None:
    assert Notifier(env, 7).watchdog_s == expected


def test_notify_forgets_what_children_must_not_inherit() -> None:
    env = dict.fromkeys(SYSTEMD_VARIABLES, "x") | {"PATH": "/bin"}
    forget(env)
    assert env == {"PATH": "/bin"}
