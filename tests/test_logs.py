"""The access log: one valid, harmless JSON line each, or a counted loss."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgate import logs
from nbgate.logs import BATCH, CHUNK, NO_USAGE, USAGE_KINDS, AccessLog, CallRecord, LineFormatter, escape, line_of

AT = "2026-01-01T00:00:00.000Z"


def record(**fields: Any) -> CallRecord:
    return CallRecord(**{"started": 1.0, "target": b"/v1/chat/completions", "status": 200, **fields})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "access.jsonl"


@pytest.fixture
def access(path: Path) -> Iterator[AccessLog]:
    made = AccessLog(str(path), clock=lambda: 100.0, wall=lambda: 1_700_000_099.5)
    yield made
    made.close()


def test_line_says_all_of_a_call() -> None:
    usage = list(NO_USAGE)
    usage[USAGE_KINDS.index("input")] = 10
    usage[USAGE_KINDS.index("cached_read")] = 3
    usage[USAGE_KINDS.index("output")] = 7
    line = line_of(
        record(
            request_id="r1", method="POST", operation="chat.create", model="gpt-4o", channel="main", key="sk-abc…wxyz",
            account="acme", peer="1.2.3.4", stream=True, bytes_in=5, bytes_out=6, duration_s=1.2345678,
            first_byte_s=0.25, overhead_s=0.000123, upstream_s=1.2, attempts=2, outcome="complete",
            usage=tuple(usage), user_agent=b"curl/8", error="upstream_error", error_source="upstream",
        ),
        AT,
    )  # fmt: skip
    assert json.loads(line) == {
        "time": AT, "request_id": "r1", "method": "POST", "path": "/v1/chat/completions", "status": 200,
        "operation": "chat.create", "model": "gpt-4o", "channel": "main", "key": "sk-abc…wxyz", "account": "acme",
        "peer": "1.2.3.4", "stream": True, "bytes_in": 5, "bytes_out": 6, "duration_ms": 1234.567,
        "first_byte_ms": 250.0, "overhead_ms": 0.123, "upstream_ms": 1200.0, "attempts": 2, "outcome": "complete",
        "user_agent": "curl/8", "error": "upstream_error", "error_source": "upstream",
        "usage": {"input": 10, "cached_read": 3, "output": 7},
    }  # fmt: skip


def test_line_without_measured_overhead_says_null() -> None:
    assert json.loads(line_of(record(), AT))["overhead_ms"] is None


def test_line_cuts_keys_out_of_the_path() -> None:
    line = line_of(record(target=b"/v1/models?api_key=sk-PLANTED&%6Bey=sk-PLANTED&a=\xff"), AT)
    assert b"PLANTED" not in line
    assert json.loads(line)["path"] == "/v1/models?api_key=***&%6Bey=***&a=\\xff"


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/%1b[31m%0d%0aX", "/%1b[31m%0d%0aX"),
        (b"/\x1b[31m\r\nX\x7f", "/\\x1b[31m\\x0d\\x0aX\\x7f"),
        (b"/\xff\xfe", "/\\xff\\xfe"),
        ("/é/\u202e/\u2028".encode(), "/é/\\u202e/\\u2028"),
        (b'/"\\', '/"\\'),
    ],
)
def test_line_escapes_what_a_terminal_would_obey(target: bytes, path: str) -> None:
    line = line_of(record(target=target), AT)
    assert json.loads(line)["path"] == path
    assert line.count(b"\n") == 1
    assert line[:-1].decode().isprintable()


@given(
    target=st.binary(max_size=3000),
    agent=st.binary(max_size=500),
    model=st.text(st.characters(), max_size=300),
    channel=st.text(st.characters(categories=["Cc", "Cf", "Cs", "L"]), max_size=20),
)
def test_line_is_one_printable_json_object_whatever_comes(
    target: bytes, agent: bytes, model: str, channel: str
) -> None:
    line = line_of(record(target=target, user_agent=agent, model=model, channel=channel, usage=(2**70,) * 10), AT)
    assert line.endswith(b"\n")
    text = line[:-1].decode()
    assert text.isprintable()
    fields = json.loads(text)
    assert all(value.isprintable() for value in fields.values() if isinstance(value, str))
    assert len(fields["user_agent"]) <= 200
    assert len(fields["model"]) <= 200
    assert len(fields["path"]) <= 1024


def test_escape_bounds_after_escaping() -> None:
    assert escape(b"\x00" * 10_000, 50) == "\\x00" * 12 + "\\x"


def test_flush_stamps_by_the_calls_start(access: AccessLog, path: Path) -> None:
    access.add(record(started=100.0))
    access.add(record(started=99.25))
    access.flush()
    assert [line["time"] for line in lines_of(path)] == ["2023-11-14T22:14:59.500Z", "2023-11-14T22:14:58.750Z"]


def test_add_flushes_by_itself_at_a_full_batch(access: AccessLog, path: Path) -> None:
    for _ in range(BATCH - 1):
        access.add(record())
    assert path.stat().st_size == 0
    access.add(record())
    assert len(lines_of(path)) == BATCH == access.written


def test_reopen_goes_on_in_a_new_file(access: AccessLog, path: Path) -> None:
    access.add(record(request_id="old"))
    path.rename(path.with_suffix(".1"))
    access.reopen()
    access.add(record(request_id="new"))
    access.flush()
    assert [line["request_id"] for line in lines_of(path.with_suffix(".1"))] == ["old"]
    assert [line["request_id"] for line in lines_of(path)] == ["new"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_reopen_keeps_the_old_file_when_it_fails(
    access: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> int:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        access.reopen()
    assert len(caplog.records) == 1
    access.add(record())
    access.close()
    assert len(lines_of(path)) == 1


def test_off_takes_nothing() -> None:
    access = AccessLog("")
    access.add(record())
    access.flush()
    access.reopen()
    access.close()
    assert not access.is_on
    assert (access.written, access.dropped) == (0, 0)


class Disk:
    """Stands for os.write: takes `room` bytes, at most `most` at once, then is full."""

    def __init__(self, room: int, most: int = 1 << 30) -> None:
        self.room = room
        self.most = most
        self.real = os.write

    def write(self, fd: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.real(fd, data[: min(self.room, self.most)])
        self.room -= taken
        return taken


def test_short_writes_are_continued(access: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", Disk(1 << 30, most=7).write)
    for n in range(5):
        access.add(record(request_id=str(n)))
    access.flush()
    assert [line["request_id"] for line in lines_of(path)] == list("01234")
    assert (access.written, access.dropped) == (5, 0)


def test_full_disk_drops_counts_and_warns_once_per_change(
    access: AccessLog, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = len(line_of(record(), AT))
    disk = Disk(size + 10)
    monkeypatch.setattr(os, "write", disk.write)
    for _ in range(3):
        for _ in range(4):
            access.add(record())
        access.flush()
    assert (access.written, access.dropped) == (1, 11)
    assert len(caplog.records) == 1
    disk.room = 1 << 30
    for _ in range(2):
        access.add(record())
        access.flush()
    assert (access.written, access.dropped) == (3, 11)
    assert len(caplog.records) == 2
    lines = path.read_bytes().splitlines()
    assert len(lines) == 4
    good = [line for line in lines if line.endswith(b"}")]
    assert len([json.loads(line) for line in good]) == 3, "the torn line harms no other"


def test_pipe_nobody_reads_never_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        access = AccessLog(str(path))
        for _ in range(2000):
            access.add(record())
        access.flush()
        assert access.dropped > 0
        assert access.written > 0
        assert access.written + access.dropped == 2000
        read = os.read(reader, 1 << 20)
        assert len([json.loads(line) for line in read.splitlines()]) == access.written
        access.add(record(request_id="again"))
        access.flush()
        assert json.loads(os.read(reader, 1 << 20))["request_id"] == "again"
        access.close()
    finally:
        os.close(reader)


def test_stdout_is_never_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    access = AccessLog("-")
    access.reopen()
    access.close()
    assert os.fstat(1)


def test_workers_sharing_a_file_do_not_mix_lines(path: Path) -> None:
    logs_of_two = [AccessLog(str(path)), AccessLog(str(path))]
    for n in range(3 * CHUNK):
        for access in logs_of_two:
            access.add(record(request_id=str(n)))
        if n % 50 == 0:
            logs_of_two[n % 2].flush()
    for access in logs_of_two:
        access.close()
    assert len(lines_of(path)) == 6 * CHUNK


# --- the operator's log


def event(message: str, level: int = logging.WARNING, exc: BaseException | None = None) -> logging.LogRecord:
    info = (type(exc), exc, exc.__traceback__) if exc is not None else None
    return logging.LogRecord("nbgate.x", level, __file__, 1, message, None, info)


def test_events_are_one_line_each_also_with_a_traceback() -> None:
    try:
        raise RuntimeError("broken\nin two \x1b[31m")
    except RuntimeError as exc:
        text = LineFormatter(journal=False).format(event("failed\r\nbadly", exc=exc))
    assert text.isprintable()
    assert "failed\\x0d | badly" in text
    assert "RuntimeError: broken" in text
    assert " WARNING nbgate.x: " in text


@pytest.mark.parametrize(
    ("level", "prefix"),
    [(logging.CRITICAL, "<3>"), (logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (10, "<7>")],
)
def test_events_for_journald_carry_their_priority(level: int, prefix: str) -> None:
    assert LineFormatter(journal=True).format(event("hello", level)) == prefix + "hello"


def test_setup_twice_writes_each_event_once(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        logs.setup("debug")
        logs.setup("warning")
        logging.getLogger("nbgate.test").warning("seen")
        logging.getLogger("nbgate.test").info("unseen")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert stream.getvalue().count("\n") == 1
    assert "seen" in stream.getvalue()


def test_journal_is_known_by_device_and_inode() -> None:
    found = os.fstat(2)
    assert logs._is_journal(f"{found.st_dev}:{found.st_ino}")
    assert not logs._is_journal(f"{found.st_dev}:{found.st_ino + 1}")
    assert not logs._is_journal("")
