"""Server-sent events: where one ends, and what it says.

What lives here: frame ends, the fields of a frame, and `Framer`, which lets
only whole frames through. What must not: JSON, dialects, billing. Heat: C.

Law: the bytes that come out are the bytes that went in, in order; a frame that
was cut is held until whole, up to a bound, and passed on as it comes beyond.
Source: WHATWG HTML, "Server-sent events", 9.2.5 (lines end with LF, CRLF or CR).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

BOM: Final = b"\xef\xbb\xbf"
SEAM: Final = 3  # bytes of a frame end that may lie before a cut

_ENDS: Final = (b"\n\n", b"\n\r\n", b"\r\r")
_END: Final = re.compile(rb"\r\n\r\n|\n\r\n|\n\n|\r\r")


def last_end(data: bytes | bytearray, start: int = 0) -> int:
    """Give the offset behind the last whole frame, -1 if there is none."""
    end = -1
    for mark in _ENDS:
        at = data.rfind(mark, start)
        if at >= 0:
            end = max(end, at + len(mark))
    return end


def frames(data: bytes) -> Iterator[tuple[int, int]]:
    """List the (start, end) of each frame; an unfinished last one too."""
    start = 0
    for found in _END.finditer(data):
        yield start, found.end()
        start = found.end()
    if start < len(data):
        yield start, len(data)


def fields(frame: bytes) -> tuple[bytes, bytes | None]:
    """Read a frame's event name ("" by default) and data, None if no data.

    Several data lines are joined with LF; comments, ids and retries are left
    out. A byte order mark is skipped; it is legal only at a stream's start.
    """
    event = b""
    data: bytes | None = None
    for line in frame.removeprefix(BOM).splitlines():
        if line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            data = value if data is None else data + b"\n" + value
        elif line.startswith(b"event:"):
            event = line[7:] if line[6:7] == b" " else line[6:]
    return event, data


def first_event(buffered: bytes) -> bytes | None:
    """Give the first whole event that is no comment, None if none is whole."""
    for start, end in frames(buffered[: max(last_end(buffered), 0)]):
        frame = buffered[start:end]
        event, data = fields(frame)
        if data is not None or event:
            return frame
    return None


class Framer:
    """Let whole frames through; hold a cut one, at most `limit` + one chunk.

    `idle`: nothing is held and no long frame is under way.
    """

    __slots__ = ("_held", "_limit", "_seam", "idle", "open")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = bytearray()
        self._seam = b""
        self.open = False  # a long frame is under way, its beginning is out
        self.idle = True

    def push(self, data: bytes) -> tuple[bytes, bytes]:
        """Take a chunk; give (a piece of a long frame, whole frames behind it)."""
        piece = b""
        if self.open:
            joined = self._seam + data
            found = _END.search(joined)
            if found is None or found.end() <= len(self._seam):
                self._seam = joined[-SEAM:]
                return data, b""
            cut = found.end() - len(self._seam)
            piece, data = data[:cut], data[cut:]
            self.open = False
        whole = self._hold(data)
        held = self._held
        if not whole and not piece and len(held) > self._limit:
            piece = bytes(held)
            self.open = True
            self._seam = piece[-SEAM:]
            self._held = bytearray()
        self.idle = not self._held and not self.open
        return piece, whole

    def _hold(self, data: bytes) -> bytes:
        """Add to what is held and give the whole frames."""
        held = self._held
        if not held:
            end = last_end(data)
            if end == len(data):
                return data
            if end < 0:
                held += data
                return b""
            held += data[end:]
            return data[:end]
        start = max(0, len(held) - SEAM)
        held += data
        end = last_end(held, start)
        if end < 0:
            return b""
        whole = bytes(held[:end])
        self._held = held[end:]
        return whole

    def finish(self) -> bytes:
        """Give what is held; the stream is over."""
        rest = bytes(self._held)
        self._held = bytearray()
        self.open = self.open or bool(rest)
        self.idle = not self.open
        return rest

    def drop(self) -> bool:
        """Forget what is held; say whether a frame is left half sent."""
        self._held = bytearray()
        cut = self.open
        self.open = False
        self.idle = True
        return cut
