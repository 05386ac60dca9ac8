"""Start, pin, measure and end the processes of a benchmark.

What lives here: children of ours and nothing else: `Procs` ends what it
started, however the run ends, and never looks for a process by name. Figures
come from /proc: CPU from `task/*/schedstat` (nanoseconds), memory from
`statm`. What must not: any knowledge of HTTP or of a candidate.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).resolve().parent
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PR_SET_PDEATHSIG = 1
STOP_S = 10.0


def raise_fd_limit() -> int:
    """Raise RLIMIT_NOFILE to its hard limit; children inherit it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port() -> int:
    """Name a TCP port that is free just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def wait_for_port(port: int, proc: Proc, timeout_s: float = 15.0) -> None:
    """Return once something accepts on `port`.

    Raises: RuntimeError when `proc` died or the time is over; with its output.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
            return
        if proc.popen.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"{proc.name} does not listen on {port}: {proc.tail()}")


class Proc:
    """One child with all its descendants."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], errors: Path) -> None:
        self.name, self.popen, self.errors = name, popen, errors
        self.pid = popen.pid

    def tail(self) -> str:
        """Show the last of what it wrote to stderr."""
        return self.errors.read_text("utf-8", "replace")[-2000:] if self.errors.exists() else ""

    def family(self) -> list[int]:
        """List its pid and those of its living descendants."""
        parents: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    stat = Path(f"/proc/{entry}/stat").read_text()
                    parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
        found = [self.pid]
        for pid in found:
            found.extend(parents.get(pid, []))
        return found

    def role(self, pid: int) -> str:
        """Name what a member of the family does: main, control, worker."""
        if pid == self.pid:
            return "main"
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/comm").read_text()
            for role in ("control", "demo"):
                if role in text.replace("--control", ""):
                    return role
        return "worker"

    def cpu_ns(self) -> dict[str, int]:
        """Sum the CPU time so far by role, in nanoseconds."""
        sums: dict[str, int] = {}
        for pid in self.family():
            with contextlib.suppress(OSError):
                total = 0
                for task in os.listdir(f"/proc/{pid}/task"):
                    total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
                role = self.role(pid)
                sums[role] = sums.get(role, 0) + total
        return sums

    def rss_bytes(self) -> dict[str, int]:
        """Sum the resident memory by role, in bytes."""
        sums: dict[str, int] = {}
        for pid in self.family():
            with contextlib.suppress(OSError):
                role = self.role(pid)
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                sums[role] = sums.get(role, 0) + pages * PAGE_BYTES
        return sums

    def read_line(self, timeout_s: float = 15.0) -> str:
        """Read one line that it prints; RuntimeError when none comes."""
        out = self.popen.stdout
        assert out is not None
        line, deadline = b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"{self.name} printed nothing in {timeout_s} s: {self.tail()}")
            byte = os.read(out.fileno(), 1)
            if not byte:
                raise RuntimeError(f"{self.name} ended: {self.tail()}")
            line += byte
        return line.decode().rstrip("\n")

    def stop(self) -> None:
        """End it and what it left behind: TERM, then KILL its own session."""
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_S)
        # NOTE: start_new_session made the child the leader of a group that holds its descendants alone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Procs:
    """Everything that a run started; ends it all on exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alive: list[Proc] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for proc in reversed(self.alive):
            proc.stop()
        self.alive.clear()

    def start(self, name: str, argv: list[str], core: int | None = None, env: dict[str, str] | None = None) -> Proc:
        """Start a child in a session of its own, pinned, that dies with us."""
        cores = os.sched_getaffinity(0) if core is None else {core}
        libc = ctypes.CDLL(None, use_errno=True)

        def prepare() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.sched_setaffinity(0, cores)

        errors = self.folder / f"{name}-{len(self.alive)}-{time.monotonic_ns()}.err"
        with errors.open("wb") as sink:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509
                env={**os.environ, **(env or {})},
            )
        proc = Proc(name, popen, errors)
        self.alive.append(proc)
        return proc

    def stop(self, proc: Proc) -> None:
        """End one child now."""
        proc.stop()
        self.alive.remove(proc)

    def upstream(self, *options: str, core: int | None = None) -> tuple[Proc, int]:
        """Start the fake upstream; returns it and its port (0 for a unix socket)."""
        proc = self.start("upstream", [sys.executable, str(HERE / "upstream.py"), *options], core)
        match = re.fullmatch(r"listening (.*)", proc.read_line())
        assert match, "the upstream says where it listens"
        return proc, int(match[1]) if match[1].isdecimal() else 0
