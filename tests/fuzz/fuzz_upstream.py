"""What an upstream sends: head and body, cut anywhere, ended by FIN or reset.

Modes (first digit): 1 a sink is attached from the start, 2 the sink pauses after
each piece, 4 the end is a reset.
"""

from __future__ import annotations

import re

from fuzzkit import StepLoop, Target, pieces, read_chunks, running_loop, split_mode
from upstream_script import Offline

from nbgate.inflate import CODINGS
from nbgate.upstream import Connection, UpstreamError

_MAX_RESUMES = 5_000
_STATUS = re.compile(rb"HTTP/1\.[01] +(\d{3})(?: [^\r\n]*)?")


class Sink:
    """Take the body; anything after the end is a fault."""

    def __init__(self, conn: Connection, pauses: bool) -> None:
        self.conn = conn
        self.pauses = pauses
        self.body = b""
        self.ends: list[object] = []

    def feed(self, data: bytes) -> None:
        assert data, "an empty piece"
        assert not self.ends, "bytes after the end"
        self.body += data
        if self.pauses:
            self.conn.pause()

    def finish(self) -> None:
        assert not self.ends, "ended twice"
        self.ends.append("finish")

    def fail(self, exc: Exception) -> None:
        assert not self.ends, "ended twice"
        assert isinstance(exc, UpstreamError), repr(exc)
        self.ends.append(exc)


async def _wait(conn: Connection) -> None:
    """Wait as the relay does: `answer` returns or raises UpstreamError, nothing else."""
    try:
        await conn.answer()
    except UpstreamError:
        pass


def _run(loop: StepLoop, parts: list[bytes], mode: int) -> tuple[Offline, tuple[object, ...], bytes]:
    line = Offline()
    conn = line.conn
    answer = loop.create_task(_wait(conn)) if not mode & 1 else None
    sink = None
    loop.run()
    if mode & 1:
        sink = Sink(conn, bool(mode & 2))
        conn.attach(sink)
    for part in parts:
        if line.transport.aborted:
            break
        line.wire.data_received(part)
        _resume(conn)
        loop.run()
    if not line.transport.aborted and not mode & 4:
        line.wire.eof_received()
    line.wire.connection_lost(ConnectionResetError() if mode & 4 else None)
    _resume(conn)
    loop.run()
    if answer is not None:
        assert answer.done(), "nobody wakes who waits for the answer"
        answer.result()
    assert conn.complete != (conn.error is not None), "ended twice, or not at all"
    if sink is None:
        body = conn.buffered
    else:
        assert len(sink.ends) == 1 and (sink.ends[0] == "finish") == conn.complete, sink.ends
        body = sink.body
    if not conn.complete:
        return line, ("error",), body
    return line, (conn.status, tuple(sorted(conn.headers.items())), body), body


def _resume(conn: Connection) -> None:
    for _ in range(_MAX_RESUMES):
        if not conn.paused:
            return
        conn.resume()
    raise AssertionError("paused for ever")


def _by_hand(data: bytes, reset: bool) -> tuple[int, bytes | None, int]:
    """Read the final answer in the plain way: status, body (None: compressed), where it ends."""
    pos = 0
    while True:
        # NOTE: httptools skips line ends of any kind before a status line; they carry nothing.
        while data[pos : pos + 1] in (b"\r", b"\n"):
            pos += 1
        end = data.index(b"\r\n\r\n", pos)
        first, *lines = data[pos:end].split(b"\r\n")
        pos = end + 4
        found = _STATUS.fullmatch(first)
        assert found, first
        status = int(found[1])
        if not 100 <= status < 200:
            break
    fields: dict[bytes, bytes] = {}
    for text in lines:
        name, colon, value = text.partition(b":")
        assert colon, text
        fields[name.lower()] = value.strip(b" \t")
    if status in (204, 304):
        return status, b"", pos
    if b"transfer-encoding" in fields:
        chunks = read_chunks(data[pos:])
        assert chunks is not None, "complete, but a plain decoder cannot read it"
        body, end = chunks[0], pos + chunks[1]
    elif b"content-length" in fields:
        end = pos + int(fields[b"content-length"])
        body = data[pos:end]
        assert end <= len(data), "complete without its last bytes"
    else:
        assert not reset, "a reset is no end"
        body, end = data[pos:], len(data)
    return status, None if fields.get(b"content-encoding", b"").lower() in CODINGS else body, end


def upstream(data: bytes) -> None:
    """Ends once, with UpstreamError or with what stands there; cuts change nothing."""
    mode, data = split_mode(data, 8)
    with running_loop() as loop:
        line, whole, body = _run(loop, [data], mode)
        for salt in (0, 1, 2):
            _, cut, some = _run(loop, pieces(data, salt), mode)
            assert cut == whole, (whole, cut)
            assert body.startswith(some) or some.startswith(body), "not the same bytes before the fault"
        if line.conn.complete:
            status, plain, end = _by_hand(data, bool(mode & 4))
            assert line.conn.status == status
            assert plain is None or body == plain, (body, plain)
            assert end <= len(data)
            if end < len(data):
                assert line.transport.aborted and not line.reusable, "reused although more came"


TARGETS: dict[str, Target] = {"upstream": upstream}
