"""What all fuzz targets share: seeds, cuts, and readers that are too simple to be wrong.

What lives here: the corpus, `pieces`, an independent reader of chunked bodies, a
loop that is stepped. What must not: invariants (`fuzz_*.py`), processes (`run.py`).

A target is a function of bytes that raises when an invariant is broken. All that
varies besides (cuts, who leaves when) is drawn from the bytes, so that an input alone
replays what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

Target = Callable[[bytes], None]

CORPUS = Path(__file__).resolve().parent / "corpus"
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_PLAIN = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}
_MAX_TURNS = 20_000


def seed(path: Path) -> bytes:
    r"""Read a seed: `.txt` knows \r \n \t \\ \xNN and ignores real line ends, else as it stands."""
    data = path.read_bytes()
    if path.suffix != ".txt":
        return data
    joined = data.replace(b"\r", b"").replace(b"\n", b"")
    return _ESCAPE.sub(lambda m: bytes.fromhex(m[1].decode()) if m[1] else _PLAIN[m[2]], joined)


def seeds(name: str) -> list[Path]:
    """List a target's seed files."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def chance(data: bytes, salt: int = 0) -> random.Random:
    """Give the randomness that belongs to an input."""
    return random.Random(zlib.crc32(data) ^ salt)


def pieces(data: bytes, salt: int = 0) -> list[bytes]:
    """Cut an input at a few places that follow from it; salt 0 cuts everywhere if it is short."""
    if not salt and len(data) <= 256:
        return [data[i : i + 1] for i in range(len(data))]
    rng = chance(data, salt)
    places = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(rng.randint(1, 8)))})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def split_mode(data: bytes, modes: int) -> tuple[int, bytes]:
    """Take the mode off the front; the digits 0 to 9 stand for themselves."""
    return (data[0] % 16 % modes, data[1:]) if data else (0, b"")


def read_chunks(data: bytes) -> tuple[bytes, int] | None:
    """Decode a whole chunked body the plain way: (payload, where it ends); None if it is none."""
    body = b""
    pos = 0
    while True:
        end = data.find(b"\r\n", pos)
        digits = data[pos:end].partition(b";")[0].strip(b" \t")
        if end < 0 or not digits or digits.strip(b"0123456789abcdefABCDEF"):
            return None
        size = int(digits, 16)
        pos = end + 2
        if size == 0:
            break
        body += data[pos : pos + size]
        pos += size + 2
        if data[pos - 2 : pos] != b"\r\n":
            return None
    while (end := data.find(b"\r\n", pos)) > pos:
        pos = end + 2
    return (body, pos + 2) if end == pos else None


class StepLoop:
    """As much of an event loop as Tasks, Futures and call_soon need; runs when told."""

    def __init__(self) -> None:
        self.ready: deque[asyncio.Handle] = deque()
        self.complaints: list[dict[str, Any]] = []

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)  # type: ignore[arg-type]
        self.ready.append(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self)  # type: ignore[arg-type]

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.complaints.append(context)

    def run(self) -> None:
        """Run until nothing is left to run."""
        for _ in range(_MAX_TURNS):
            if not self.ready:
                break
            handle = self.ready.popleft()
            if not handle.cancelled():
                handle._run()
        else:
            raise AssertionError("the loop never comes to rest")
        if self.complaints:
            raise AssertionError(f"the loop complains: {self.complaints}") from self.complaints[0].get("exception")


@contextlib.contextmanager
def running_loop() -> Iterator[StepLoop]:
    """Make a loop that takes itself for the running one."""
    loop = StepLoop()
    asyncio._set_running_loop(loop)  # type: ignore[arg-type]
    try:
        yield loop
    finally:
        asyncio._set_running_loop(None)
