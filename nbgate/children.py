"""One child process of the supervisor, and the pipes that tie them together.

Purpose: start a worker or the demo with its sockets, follow its heartbeat, restart it with back-off.
Lives here: `Child` (one process), `Slot` (a place that must be filled). Must not: decisions, third parties, the app.
Heat: cold.

A worker holds two pipes. *Beat*: it writes `R` once it serves, then `.` every few seconds; a worker that is silent
for BEAT_LIMIT_S is killed. *Control*: it only reads; end of file means that the supervisor is gone, so drain and exit.
The demo holds the control pipe alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from signal import SIGTERM
from typing import Final, NamedTuple

READY: Final = b"R"
BEAT: Final = b"."
BEAT_LIMIT_S: Final = 60.0
FIRST_DELAY_S: Final = 0.1
LAST_DELAY_S: Final = 5.0
# A life this long resets the back-off. NOTE: longer, and a worker that is killed every few seconds is missed for up to
# LAST_DELAY_S, by all connections of its slot; this long, one that always crashes costs a start every two seconds.
STEADY_S: Final = 2.0
# Exit codes that mean "do not restart me" (sysexits.h; systemd: RestartPreventExitStatus=77 78).
EX_NOPERM: Final = 77  # an address, a folder or a lock cannot be had
EX_CONFIG: Final = 78  # the configuration is wrong
FINAL_CODES: Final = (EX_NOPERM, EX_CONFIG)


class Launch(NamedTuple):
    """What to start: the words of the command and the sockets it gets."""

    argv: Sequence[str]
    socks: Sequence[socket.socket]
    env: Mapping[str, str]
    control: str  # the option that names the fd of the control pipe
    beat: str = ""  # and of the beat pipe; empty: it has none


class Child:
    """One running process. `beat` is -1 for a child without that pipe."""

    def __init__(self, name: str, launch: Launch) -> None:
        self.name = name
        self.started_at = self.last_beat = time.monotonic()
        self.ready = not launch.beat
        self.reload_pending = False
        self.kill_at = 0.0  # absolute; 0 = never
        self.beat = -1
        theirs, self._control = os.pipe()
        given = [theirs]
        argv = [*launch.argv, launch.control, str(theirs)]
        if launch.beat:
            self.beat, theirs = os.pipe()
            os.set_blocking(self.beat, False)
            given.append(theirs)
            argv += [launch.beat, str(theirs)]
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                pass_fds=[*given, *(sock.fileno() for sock in launch.socks)],
                env=dict(launch.env),
                # Ctrl-C reaches the supervisor alone, which then drains.
                process_group=0,
            )
        except OSError:
            self.close()
            raise
        finally:
            for fd in given:
                os.close(fd)
        self.pid = self._process.pid

    def read_beats(self) -> bytes:
        """Take what the child wrote; b"" when it closed its end."""
        try:
            found = os.read(self.beat, 4096)
        except BlockingIOError:
            return BEAT
        self.last_beat = time.monotonic()
        return found

    def silent(self, now: float) -> bool:
        """Tell whether it has shown no life for too long."""
        return self.beat >= 0 and now - self.last_beat > BEAT_LIMIT_S

    def signal(self, number: int) -> None:
        """Send a signal, if it still lives."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def end(self, within_s: float, number: int = SIGTERM) -> None:
        """Ask it to drain, and mark when it is killed if it does not.

        What was asked before holds where it is sooner.
        """
        moment = time.monotonic() + within_s
        self.kill_at = min(self.kill_at, moment) if self.kill_at else moment
        self.signal(number)

    def poll(self) -> int | None:
        """Reap; the exit code, negative for a signal, None while it lives."""
        return self._process.poll()

    def lived_s(self) -> float:
        return time.monotonic() - self.started_at

    def close(self) -> None:
        """Close our ends of the pipes."""
        for fd in (self.beat, self._control):
            if fd >= 0:
                os.close(fd)
        self.beat = self._control = -1


class Slot:
    """A place for one process: the one that serves, its heir, those draining."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Child | None = None
        self.heir: Child | None = None  # started by a roll, not ready yet
        self.draining: list[Child] = []
        self.failures = 0
        self.start_at = 0.0  # absolute; when an empty slot is filled
        self.gave_up = 0  # the exit code that said "do not restart me"

    def children(self) -> list[Child]:
        """List every process of this slot."""
        return [child for child in (self.current, self.heir, *self.draining) if child is not None]

    def empty(self) -> bool:
        """Tell whether the slot waits to be filled, at `start_at`."""
        return self.current is None and self.heir is None and not self.gave_up

    def remove(self, child: Child) -> None:
        """Forget a child that has ended."""
        if child is self.current:
            self.current = None
        elif child is self.heir:
            self.heir = None
        elif child in self.draining:
            self.draining.remove(child)

    def back_off(self, lived_s: float) -> float:
        """Work out and note how long to wait after a crash."""
        self.failures = 1 if lived_s >= STEADY_S else self.failures + 1
        delay: float = min(FIRST_DELAY_S * 2 ** min(self.failures - 1, 16), LAST_DELAY_S)
        self.start_at = time.monotonic() + delay
        return delay


def describe_code(code: int) -> str:
    """Say an exit code in words."""
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
