"""The record of a call, the access log made of it, and the operator's log.

Purpose: one JSON line per request, and one plain line per event for who runs
the gateway. Lives here: `CallRecord`, which `metrics` reads as well. Must not:
keys, bodies, decisions. Heat: R for `CallRecord` and `AccessLog.add` (one list
append); lines are made in batches by `flush`.

Rule 1: one line is one valid JSON object of printable ASCII but for printable
Unicode, whatever a client sent: control characters and bytes that are no UTF-8
appear escaped (`\\x1b`), keys in queries are cut, every text is bounded.
Rule 2: a log that cannot be written never harms a call: lines are dropped and
counted, and one warning tells of each change between writing and dropping.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import orjson

from nbgate.auth import redact_query

log = logging.getLogger("nbgate.logs")

BATCH: Final = 64  # records held before `add` flushes by itself; PERF: while they are still in the cache
CHUNK: Final = 64  # lines per write
# What a pipe takes in one piece (Linux PIPE_BUF), so that lines of several workers do not mix.
PIECE_BYTES: Final = 4096
PATH_CHARS: Final = 1024
TEXT_CHARS: Final = 200
LINE_CHARS: Final = 16_384
_MAX_INT: Final = 2**63 - 1  # an upstream may report any usage; orjson writes 64 bits
# One table for the usage of a call: the names in logs, metrics and prices.
USAGE_KINDS: Final = (
    "input", "cached_read", "cached_write", "cached_write_1h", "output",
    "reasoning", "audio_in", "audio_out", "image_in", "image_out",
)  # fmt: skip
_OUTPUT: Final = USAGE_KINDS.index("output")
NO_USAGE: Final = (0,) * len(USAGE_KINDS)


class CallRecord(msgspec.Struct, gc=False, eq=False):
    """What is known of one call, filled in while it goes on.

    `started` is monotonic seconds; the `_s` fields are durations, 0 = not
    reached. `overhead_s` is the time in the gateway without waiting for the
    client's body or the upstream, below 0 = not measured. `model` is what the
    client asked for, `model_known` whether it named a served model. `key` is
    the display form. `target` the raw request target. `usage` holds disjoint
    counters in the order of `USAGE_KINDS`.
    """

    # PERF: a Struct with defaults is made in 0.10 us; a slots class with __init__ takes 0.21 us.
    started: float = 0.0
    request_id: str = ""
    method: str = ""
    target: bytes = b""
    status: int = 0
    operation: str = ""
    model: str = ""
    model_known: bool = False
    channel: str = ""
    key: str = ""
    account: str = ""
    peer: str = ""
    stream: bool = False
    bytes_in: int = 0
    bytes_out: int = 0
    duration_s: float = 0.0
    first_byte_s: float = 0.0
    overhead_s: float = -1.0
    upstream_s: float = 0.0
    attempts: int = 0
    outcome: str = ""
    error: str = ""
    error_source: str = ""
    usage: tuple[int, ...] = NO_USAGE
    estimated: bool = False
    user_agent: bytes = b""
    upstream_request_id: str = ""


# --- lines ---------------------------------------------------------------------------------------------------------


def escape(text: str | bytes, bound: int = TEXT_CHARS) -> str:
    """Make any text printable and at most `bound` characters long.

    Unprintable characters (controls, bidi marks, line separators) and bytes
    that are no UTF-8 become `\\x1b`, `\\u2028`, `\\U000e0001`.
    """
    if isinstance(text, bytes):
        text = text[:bound].decode("utf-8", "backslashreplace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _escaped(ord(c)) for c in text[:bound])
    return text[:bound]


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Line(msgspec.Struct, gc=False, omit_defaults=True):
    """A line as it is written; the members of `_fields`, in their order."""

    time: str
    request_id: str
    method: str
    path: str
    status: int
    operation: str
    model: str
    channel: str
    key: str
    account: str
    peer: str
    stream: bool
    bytes_in: int
    bytes_out: int
    duration_ms: float
    first_byte_ms: float
    overhead_ms: float | None
    upstream_ms: float
    attempts: int
    outcome: str
    user_agent: str
    error: str = ""
    error_source: str = ""
    usage: dict[str, int] | None = None
    estimated: bool = False
    upstream_request_id: str = ""


def _plain_line(record: CallRecord, at: str) -> _Line:
    """Fill a line in the order of its members."""
    target = record.target
    if b"?" in target:
        target = redact_query(target)
    usage = record.usage
    known: dict[str, int] | None = None
    if usage is not NO_USAGE:
        # PERF: most calls have these two alone: 0.2 us against 0.7 us for a walk over all kinds.
        known = {"input": usage[0], "output": usage[_OUTPUT]}
        if sum(usage) != usage[0] + usage[_OUTPUT]:
            known.update((kind, n) for kind, n in zip(USAGE_KINDS, usage, strict=True) if n)
    overhead_s = record.overhead_s
    return _Line(
        at,
        record.request_id,
        record.method,
        target[:PATH_CHARS].decode("latin-1"),
        record.status,
        record.operation,
        record.model[:TEXT_CHARS],
        record.channel,
        record.key,
        record.account,
        record.peer,
        record.stream,
        record.bytes_in,
        record.bytes_out,
        # Whole microseconds. PERF: round(x, 3) costs 0.39 us, this 0.08 us, and there are four.
        int(record.duration_s * 1e6) / 1e3,
        int(record.first_byte_s * 1e6) / 1e3,
        int(overhead_s * 1e6) / 1e3 if overhead_s >= 0.0 else None,
        int(record.upstream_s * 1e6) / 1e3,
        record.attempts,
        record.outcome,
        record.user_agent[:TEXT_CHARS].decode("latin-1"),
        record.error,
        record.error_source,
        known,
        record.estimated,
        record.upstream_request_id,
    )


_ABSENT: Final = frozenset(("error", "error_source", "usage", "estimated", "upstream_request_id"))
_encode: Final = msgspec.json.Encoder().encode


def line_of(record: CallRecord, at: str) -> bytes:
    """Write the line of one record; `at` is its time in RFC 3339."""
    # PERF: nearly every line is plain, so it is made and judged whole in C; text by text takes three times as long.
    try:
        line = _encode(_plain_line(record, at))
        if line.isascii() and b"\\" not in line and b"\x7f" not in line:
            return line + b"\n"
    except (TypeError, ValueError, OverflowError):  # a lone surrogate, or an integer beyond 64 bits
        pass
    plain = msgspec.structs.asdict(_plain_line(record, at))
    fields = {name: value for name, value in plain.items() if value or name not in _ABSENT}
    fields["path"] = escape(redact_query(record.target), PATH_CHARS)
    fields["user_agent"] = escape(record.user_agent)
    for name, value in fields.items():
        if isinstance(value, str) and name != "path":
            fields[name] = escape(value)
        elif isinstance(value, int):
            fields[name] = min(value, _MAX_INT)
    if "usage" in fields:
        fields["usage"] = {kind: min(n, _MAX_INT) for kind, n in fields["usage"].items()}
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


class _Clock:
    """Turn monotonic stamps into RFC 3339; the date is made once a second."""

    __slots__ = ("_prefix", "_second", "offset_s")

    def __init__(self) -> None:
        self.offset_s = 0.0
        self._second = -1
        self._prefix = ""

    def text(self, stamp: float) -> str:
        at = stamp + self.offset_s
        second = int(at)
        if second != self._second:
            self._second = second
            self._prefix = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        return f"{self._prefix}{int((at - second) * 1000):03d}Z"


# --- the access log ------------------------------------------------------------------------------------------------


class AccessLog:
    """Append one JSON line per call to a file, to stdout ("-") or nowhere ("").

    `add` per call; `flush` every quarter of a second, and before exit. Several
    workers may share one path: each write is whole lines in one append. Lines for a pipe or
    socket go in pieces that fit into it, and are dropped while it is full, for
    a reader that stopped must not stop the gateway.

    Raises:
        OSError: the file cannot be opened, at the start only.
    """

    def __init__(
        self, path: str, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        # process
        self._path = path
        self._clock = clock
        self._wall = wall
        self._times = _Clock()
        # file
        self._fd = -1
        self._regular = False
        self._torn = False  # the last write ended within a line
        self._failing = False
        # counts
        self.written = 0
        self.dropped = 0
        # batch
        self._pending: list[CallRecord] = []
        if path:
            self._open()

    @property
    def is_on(self) -> bool:
        """Tell whether lines go anywhere."""
        return self._fd >= 0

    def add(self, record: CallRecord) -> None:
        """Take a finished record; it must not change any more."""
        if self._fd < 0:
            return
        pending = self._pending
        pending.append(record)
        if len(pending) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        pending = self._pending
        if not pending:
            return
        self._pending = []
        times = self._times
        times.offset_s = self._wall() - self._clock()
        # PERF: 64 lines at a time: 2.7 us per line, 5.9 with 512, whose memory goes back to the kernel each time.
        for at in range(0, len(pending), CHUNK):
            self._write([line_of(record, times.text(record.started)) for record in pending[at : at + CHUNK]])

    def reopen(self) -> None:
        """Go on in a new file of the same name, after a rotation.

        The old file stays in use if that fails.
        """
        self.flush()
        if self._fd < 0 or self._path == "-":
            return
        try:
            self._open()
        except OSError as exc:
            log.warning("access log: cannot reopen %s, going on in the old file: %s", self._path, exc)

    def close(self) -> None:
        """Flush and end."""
        self.flush()
        if self._fd >= 0 and self._path != "-":
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> None:
        if self._path == "-":
            fd = 1
        else:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            # 0640: lines hold addresses and names of people.
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._torn = False

    def _write(self, lines: list[bytes]) -> None:
        pieces = [b"".join(lines)] if self._regular else _pieces(lines)
        lost = 0
        cause: OSError | None = None
        for piece in pieces:
            if cause is not None:
                lost += piece.count(b"\n")
                continue
            sent, cause = self._send(b"\n" + piece if self._torn else piece)
            if cause is not None:
                lost += piece.count(b"\n", sent)
        self.written += len(lines) - lost
        self.dropped += lost
        if cause is not None and not self._failing:
            self._failing = True
            log.warning("access log: cannot write %s, dropping lines: %s", self._path, cause)
        elif cause is None and self._failing:
            self._failing = False
            log.warning("access log: writing %s again, %d lines were dropped", self._path, self.dropped)

    def _send(self, data: bytes) -> tuple[int, OSError | None]:
        """Write all of it; say how much of the lines went out, and what stopped it."""
        first = 1 if self._torn else 0  # the newline that ends a torn line is none of ours
        sent = 0
        try:
            while sent < len(data):
                if not self._regular and not _has_room(self._fd):
                    raise BlockingIOError(errno.EAGAIN, "its reader does not read")
                # NOTE: a short write to a file means that the disk is full; the next one says so.
                sent += os.write(self._fd, data[sent:] if sent else data)
        except OSError as exc:
            if sent:
                self._torn = data[sent - 1] != 0x0A
            return max(0, sent - first), exc
        self._torn = False
        return sent - first, None


def _pieces(lines: list[bytes]) -> list[bytes]:
    """Join lines to pieces that a pipe takes at once."""
    out: list[bytes] = []
    held: list[bytes] = []
    size = 0
    for line in lines:
        if held and size + len(line) > PIECE_BYTES:
            out.append(b"".join(held))
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        out.append(b"".join(held))
    return out


def _has_room(fd: int) -> bool:
    """Tell whether a write of one piece will not block."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


# --- the operator's log --------------------------------------------------------------------------------------------

# sd-daemon(3): <3> error, <4> warning, <6> info, <7> debug; journald takes the level from the prefix.
_PRIORITIES: Final = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (0, "<7>"))


class LineFormatter(logging.Formatter):
    """Write each event on one line, tracebacks too, unprintables escaped."""

    def __init__(self, journal: bool) -> None:
        # journald stamps and names by itself.
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._journal = journal

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Give RFC 3339 with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        """Give the line, without its end."""
        text = super().format(record).replace("\n", " | ")
        text = escape(text, LINE_CHARS)
        if not self._journal:
            return text
        return next(prefix for level, prefix in _PRIORITIES if record.levelno >= level) + text


def setup(level: str = "info") -> None:
    """Send the log of the process to stderr, one line per event.

    With priority prefixes when stderr goes to journald (JOURNAL_STREAM). May
    be called again with another level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(_is_journal(os.environ.get("JOURNAL_STREAM", ""))))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h.formatter, LineFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # A line per connection of the loop is nobody's wish.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _is_journal(stream: str) -> bool:
    """Tell whether stderr is what JOURNAL_STREAM ("device:inode") names.

    systemd.exec(5): programs should compare, for a child may be redirected.
    """
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"
