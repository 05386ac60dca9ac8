"""HTTP/1.1 grammar and body framing, pure.

Rule 1: what is not in the grammar of RFC 9110/9112 is refused, never repaired:
a repaired message is one that a proxy before us may read differently.

What lives here: status lines, checks of targets, hosts and response fields,
and the two body decoders. What must not: sockets, clocks, httptools. Heat: R
(bodies of several reads: C).
"""

from __future__ import annotations

import re
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

# RFC 9112 section 4: status line; the reason phrase is optional but old clients want one.
STATUS_LINES: dict[int, bytes] = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"
STATUS_LINES[529] = b"HTTP/1.1 529 Overloaded\r\n"

# RFC 9110 section 5.6.2 token; 5.5 field value without controls.
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_NAME = re.compile(TOKEN)
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
# RFC 3986 3.2.2 host: IPv6 literal or reg-name, and a numeric port. Empty is legal (RFC 9110 7.2).
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2}){0,255})(?::[0-9]{0,5})?"
)
# Origin form: RFC 9112 3.2.1. Visible ASCII without '#'; httptools has refused the rest.
_ORIGIN = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]+)(/[\x21\x22\x24-\x7e]*|\?[\x21\x22\x24-\x7e]*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
# RFC 9112 section 7.1: chunk-size and extensions, strictly.
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e])*"'
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;" + TOKEN + rb"(?:=(?:" + TOKEN + rb"|" + _QUOTED + rb"))?)*")
_TRAILER = re.compile(TOKEN + rb":[\t\x20-\x7e\x80-\xff]*")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")

CHUNK_LINE_BYTES = 4096
TRAILER_BYTES = 8192
TRAILER_COUNT = 32


class WireError(Exception):
    """A message breaks the grammar or a bound.

    `status` and `code` are what the peer is told; the connection is not usable
    afterwards.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def bad(message: str) -> WireError:
    """Make the 400 of a malformed message."""
    return WireError(400, "invalid_request_error", message)


def status_line(status: int) -> bytes:
    """Return the status line with CRLF; an unknown status gets no phrase."""
    line = STATUS_LINES.get(status)
    return line if line is not None else b"HTTP/1.1 %d \r\n" % status


def check_host(value: bytes) -> bool:
    """Tell whether a Host field is one uri-host with an optional port."""
    return _HOST.fullmatch(value) is not None


def check_response_field(name: bytes, value: bytes) -> bool:
    """Tell whether a response field can be written without splitting."""
    return _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None


def parse_length(value: bytes) -> int:
    """Read a Content-Length; at most 18 ASCII digits.

    Raises: WireError.
    """
    if _LENGTH.fullmatch(value) is None:
        raise bad("malformed Content-Length")
    return int(value)


def split_target(target: bytes, method: bytes) -> tuple[str, bytes, bytes]:
    """Split a request target into (path, raw path, query).

    Absolute form of http and https is reduced to its path; the authority in it
    decides nothing. Raises: WireError.
    """
    if _ORIGIN.fullmatch(target) is None:
        if target == b"*" and method == b"OPTIONS":
            return "*", b"*", b""
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or not check_host(absolute[1]):
            raise bad("malformed request target")
        target = absolute[2] or b"/"
        if target[:1] == b"?":
            target = b"/" + target
    raw, _, query = target.partition(b"?")
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw) is not None:
            raise bad("malformed percent-encoding in the path")
        return unquote_to_bytes(raw).decode("utf-8", "replace"), raw, query
    return raw.decode("ascii"), raw, query


class LengthBody:
    """Take exactly `left` bytes; what follows belongs to the next message."""

    __slots__ = ("done", "left", "rest")

    def __init__(self, length: int) -> None:
        self.left = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes in `data`; sets `done` and `rest` at the end."""
        size = len(data)
        if size < self.left:
            self.left -= size
            return data
        if size > self.left:
            self.rest = data[self.left :]
            data = data[: self.left]
        self.left = 0
        self.done = True
        return data


class ChunkedBody:
    """Decode chunked transfer coding, incrementally and strictly.

    Trailers are checked, bounded and dropped (RFC 9110 6.5.1). Raises:
    WireError from `feed`; the decoder is dead afterwards.
    """

    __slots__ = ("_held", "_left", "_max_bytes", "_need", "_total", "_trailer_bytes", "_trailers", "done", "rest")

    def __init__(self, max_bytes: int) -> None:
        self.done = False
        self.rest = b""
        self._held = b""
        self._left = 0  # of the chunk under way
        self._need = "size"  # size | data | crlf | trailer
        self._max_bytes = max_bytes
        self._total = 0
        self._trailer_bytes = 0
        self._trailers = 0

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; sets `done` and `rest` at the end."""
        if self._held:
            data = self._held + data
            self._held = b""
        parts: list[bytes] = []
        pos = 0
        while not self.done:
            if self._need == "data":
                part = data[pos : pos + self._left]
                if not part:
                    break
                parts.append(part)
                pos += len(part)
                self._left -= len(part)
                if self._left:
                    break
                self._need = "crlf"
            else:
                after = self._line(data, pos)
                if after < 0:
                    self._held = data[pos:]
                    break
                pos = after
        if self.done:
            self.rest = data[pos:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _line(self, data: bytes, pos: int) -> int:
        """Eat one framing line at `pos`; -1 when it is not all there."""
        if self._need == "crlf":
            if data[pos : pos + 2] == b"\r\n":
                self._need = "size"
                return pos + 2
            if len(data) - pos >= 2 or data[pos : pos + 1] not in (b"", b"\r"):
                raise bad("chunk data does not end where its size says")
            return -1
        end = data.find(b"\n", pos, pos + CHUNK_LINE_BYTES + 2)
        if end < 0:
            if len(data) - pos > CHUNK_LINE_BYTES + 1:
                raise bad("chunk size line or trailer too long")
            self._check_prefix(data[pos:])
            return -1
        if end == pos or data[end - 1] != 13:
            raise bad("bare LF in chunked framing")
        line = data[pos : end - 1]
        if self._need == "size":
            self._size(line)
        else:
            self._trailer(line)
        return end + 1

    def _check_prefix(self, prefix: bytes) -> None:
        # NOTE: an unfinished size line that can no longer become valid is refused at once, else a
        # sender of garbage without CRLF would hold the connection until the body timeout.
        if self._need == "size" and prefix not in (b"", b"\r") and not prefix[:1].isalnum():
            raise bad("malformed chunk size")
        if b"\r" in prefix[:-1]:
            raise bad("bare CR in chunked framing")

    def _size(self, line: bytes) -> None:
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise bad("malformed chunk size")
        size = int(match[1], 16)
        self._total += size
        if self._total > self._max_bytes:
            raise WireError(413, "request_too_large", f"request body exceeds {self._max_bytes} bytes")
        if size:
            self._left = size
            self._need = "data"
        else:
            self._need = "trailer"

    def _trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
            return
        self._trailers += 1
        self._trailer_bytes += len(line)
        if self._trailers > TRAILER_COUNT or self._trailer_bytes > TRAILER_BYTES:
            raise WireError(431, "headers_too_large", "too many trailer fields")
        if _TRAILER.fullmatch(line) is None:
            raise bad("malformed trailer field")
