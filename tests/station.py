"""A whole station in processes of its own: `nbgate serve`, its pids, what it wrote."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Of the variables that would configure a station or a client, none may reach the children.
_FOREIGN = re.compile(r"(NBGATE|NOTIFY|LISTEN|RUNTIME|OPENAI|ANTHROPIC)_|(https?|all|no)_proxy$", re.IGNORECASE)


def clean_env(**more: str) -> dict[str, str]:
    """Give the environment without what would change a station or an SDK."""
    return {**{k: v for k, v in os.environ.items() if not _FOREIGN.match(k)}, **more}


def until(condition: Callable[[], Any], within_s: float = 30.0, what: str = "the condition") -> Any:
    """Poll until the condition holds; fail at the deadline."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {within_s} s"
        time.sleep(0.005)
    return found


def rss_bytes(pid: int) -> int:
    """Read the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


class Station:
    """`nbgate serve` on a free port; `text` is its file without [server] and [logging]."""

    def __init__(self, folder: Path, text: str, server: str = "", workers: int = 1, drain_s: int = 1) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.err = folder / "err"
        self.access = folder / "access.jsonl"
        self.file = folder / "station.toml"
        head = f'[server]\nlisten = ["127.0.0.1:0"]\nworkers = {workers}\ndata_dir = "{folder}/data"\n'
        ends = f"drain_s = {drain_s}\ndrain_streams_s = {drain_s}\n{server}\n"
        self.head = f'{head}{ends}[logging]\naccess = "{self.access}"\n'
        self.file.write_text(self.head + text)
        argv = [sys.executable, "-m", "nbgate", "serve", "-c", str(self.file)]
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=err, env=clean_env())
        self.port = 0

    def __enter__(self) -> Self:
        try:
            until(lambda: self._find_port() or self.process.poll() is not None, what="the start")
            assert self.process.poll() is None, self.err.read_text()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _find_port(self) -> bool:
        found = re.search(r"^URL: +http://127\.0\.0\.1:(\d+)/$", self.out.read_text(), re.MULTILINE)
        self.port = int(found[1]) if found else 0
        return bool(found)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[tuple[int, int]]:
        """List slot and pid of each worker process, those that drain too."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = []
        for pid in pids:
            with contextlib.suppress(OSError):  # it ended meanwhile
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"nbgate.worker" in words and b"--slot" in words:
                    found.append((int(words[words.index(b"--slot") + 1]), int(pid)))
        return found

    def worker(self) -> int:
        """Name the one worker's pid."""
        found = self.workers()
        assert len(found) == 1, found
        return found[0][1]

    def stop(self) -> None:
        """Drain and end it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait(20)
