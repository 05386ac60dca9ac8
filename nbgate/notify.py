"""Words to systemd: sd_notify over a datagram socket.

Purpose: say READY, RELOADING, STOPPING, STATUS, WATCHDOG and MAINPID to whoever started us.
Lives here: the wire form of sd_notify(3). Must not: anything but the standard library, decisions. Heat: cold.
"""

from __future__ import annotations

import socket
import time
from collections.abc import MutableMapping
from typing import Final

SYSTEMD_VARIABLES: Final = (
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
)  # fmt: skip


class Notifier:
    """Sends states to the service manager; silent where there is none."""

    def __init__(self, env: MutableMapping[str, str], pid: int) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        self._pid = pid
        self.watchdog_s = self._watchdog(env)

    def _watchdog(self, env: MutableMapping[str, str]) -> float:
        """Read half of the watchdog's interval; 0 = none is asked for."""
        usec, pid = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", str(self._pid))
        if not usec.isascii() or not usec.isdecimal() or pid != str(self._pid):
            return 0.0
        return int(usec) / 2_000_000

    def ready(self, status: str) -> None:
        """Say that start or reload is over."""
        self._send(f"READY=1\nMAINPID={self._pid}\nSTATUS={_one_line(status)}")

    def reloading(self) -> None:
        """Say that a reload begins (Type=notify-reload wants the stamp)."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={usec}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1\nSTATUS=draining")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        self._send(f"STATUS={_one_line(text)}")

    def watchdog(self) -> None:
        """Say that we are alive."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # A full or missing manager must not stop us.
                sock.setblocking(False)
                sock.sendto(state.encode(), address)
        except OSError:
            pass


def forget(env: MutableMapping[str, str]) -> None:
    """Remove systemd's variables, so that children do not speak for us."""
    for name in SYSTEMD_VARIABLES:
        env.pop(name, None)


def _one_line(text: str) -> str:
    return " ".join(text.split())
