"""One request head: httptools for the syntax, the rest by hand.

What lives here: `RequestHead`, fed until `\r\n\r\n`, and the checks that
httptools does not make (Host, counts, sizes, version, Upgrade). What must not:
bodies (`wire`), sockets. Heat: R.

httptools sees head bytes only, a new parser for each request (0.2 us): so it
never meets a body, a trailer (which it would report as a header) or the next
pipelined request.

Lines that it accepted are remembered, bounded; a head of such lines alone is
put together from them without it (`recall`). That is safe because a line that
stood in an accepted head holds no bare CR or LF, no fold and no bad name, and
because what lines mean together (lengths, hosts, codings) is judged anew.
"""

from __future__ import annotations

from typing import Any

import httptools

from .wire import WireError, bad, check_host, parse_length, split_target

_SPECIAL = frozenset((b"content-length", b"transfer-encoding", b"host", b"connection", b"expect"))
_METHODS = {
    m.encode(): m for m in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE")
}
# PERF: clients repeat their lines: 1.7 us for a head of known ones against 4.7 us (bench/micro/test_path.py).
_starts: dict[bytes, tuple[str, str, str, bytes]] = {}  # request line -> method, version, path, raw path
_fields: dict[bytes, tuple[tuple[bytes, bytes], bool]] = {}  # header line -> (name, value), whether special
_STARTS_MAX = 512
_FIELDS_MAX = 4096
_LINE_MAX = 256
# Fields whose value is new each time would only fill the table.
_UNIQUE = frozenset((b"x-request-id", b"traceparent", b"tracestate", b"idempotency-key", b"cookie", b"x-forwarded-for"))


class RequestHead:
    """Collect one request head.

    After `finish`: `method`, `path`, `raw_path`, `query`, `version`, `headers`
    (lower-case names, order kept), `length` (body bytes, -1 = chunked),
    `keep_alive`, `expects_continue`.
    """

    __slots__ = (
        "_connection",
        "_hosts",
        "_length",
        "_parser",
        "_target",
        "_te",
        "complete",
        "expects_continue",
        "headers",
        "keep_alive",
        "length",
        "method",
        "path",
        "query",
        "raw_path",
        "version",
    )

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.expects_continue = False
        self.length = 0
        self._target = b""
        self._length: bytes | None = None
        self._te: bytes | None = None
        self._hosts: bytes | None = None
        self._connection = b""
        self._parser: Any = None
        self.query = b""

    def recall(self, head: bytes, max_headers: int) -> bool:
        """Put a head together from known lines; False if one is not known.

        `head` without its empty line. Raises: WireError.
        """
        lines = head.split(b"\r\n")
        start = _starts.get(lines[0])
        if start is None or len(lines) > max_headers + 1:
            return False
        headers = self.headers
        for line in lines[1:]:
            known = _fields.get(line)
            if known is None:
                return False
            headers.append(known[0])
        self.method, self.version, self.path, self.raw_path = start
        for line in lines[1:]:
            pair, special = _fields[line]
            if special:
                self._special(pair[0], pair[1])
        self._settle(start[1])
        return True

    def remember(self, head: bytes) -> None:
        """Keep the lines of an accepted head, without its empty line."""
        lines = head.split(b"\r\n")
        if len(lines) != len(self.headers) + 1:
            return
        if not self.query and b"?" not in lines[0] and len(lines[0]) <= _LINE_MAX:
            if len(_starts) >= _STARTS_MAX:
                _starts.clear()
            _starts[lines[0]] = (self.method, self.version, self.path, self.raw_path)
        if len(_fields) >= _FIELDS_MAX:
            _fields.clear()
        for line, pair in zip(lines[1:], self.headers, strict=True):
            if len(line) <= _LINE_MAX and pair[0] not in _UNIQUE:
                _fields[line] = (pair, pair[0] in _SPECIAL)

    def feed(self, data: bytes) -> None:
        """Parse more of the head. Raises: WireError."""
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # NOTE: it stops at Upgrade + Connection and at CONNECT; the head is whole all the same.
            pass
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            raise cause if isinstance(cause, WireError) else bad("malformed request") from None
        except httptools.HttpParserInvalidMethodError:
            raise bad("malformed request line") from None
        except httptools.HttpParserInvalidURLError:
            raise bad("malformed request target") from None
        except httptools.HttpParserError as exc:
            raise bad(f"malformed request: {exc}") from None

    # httptools callbacks

    def on_url(self, url: bytes) -> None:
        self._target = self._target + url if self._target else url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if value[-1:] in b" \t":
            value = value.rstrip(b" \t")
        self.headers.append((name, value))
        if name in _SPECIAL:
            self._special(name, value)

    def on_headers_complete(self) -> None:
        self.complete = True

    def _special(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            if self._hosts is not None:
                raise bad("more than one Host field")
            self._hosts = value
        elif name == b"content-length":
            if self._length is not None:
                raise bad("more than one Content-Length field")
            self._length = value
        elif name == b"transfer-encoding":
            if self._te is not None:
                raise bad("more than one Transfer-Encoding field")
            self._te = value
        elif name == b"connection":
            self._connection = self._connection + b"," + value if self._connection else value
        elif value.lower() == b"100-continue":
            self.expects_continue = True

    def finish(self, max_headers: int, raw: bytes | bytearray) -> None:
        """Check and settle the whole head, `raw` from its first byte on. Raises: WireError."""
        if not self.complete:
            raise bad("malformed request head")
        parser = self._parser
        self.version = version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            status = 505 if version in ("2.0", "3.0") else 400
            raise WireError(status, "invalid_request_error", "HTTP version not supported")
        if len(self.headers) > max_headers:
            raise WireError(431, "headers_too_large", f"more than {max_headers} header fields")
        raw_method = parser.get_method()
        method = _METHODS.get(raw_method)
        if method is None or method == "CONNECT":
            raise WireError(405 if method else 400, "method_not_allowed", "method not supported")
        # NOTE: httptools takes several blanks around the target, and RTSP/1.0 for a version.
        end = len(raw_method) + 1 + len(self._target)
        if raw[end : end + 6] != b" HTTP/":
            raise bad("malformed request line")
        self.method = method
        if self._hosts is not None and not check_host(self._hosts):
            raise bad("malformed Host field")
        self.path, self.raw_path, self.query = split_target(self._target, raw_method)
        self._settle(version)

    def _settle(self, version: str) -> None:
        """Judge what the lines mean together."""
        if self._hosts is None and version == "1.1":
            raise bad("Host field missing")
        self._framing(version)
        self._persistence(version)

    def _framing(self, version: str) -> None:
        if self._te is not None:
            if self._length is not None or version == "1.0" or self._te.lower() != b"chunked":
                raise bad("unsupported Transfer-Encoding")
            self.length = -1
        elif self._length is not None:
            self.length = parse_length(self._length)

    def _persistence(self, version: str) -> None:
        if self._connection:
            options = [o.strip(b" \t") for o in self._connection.lower().split(b",")]
            if version == "1.0":
                self.keep_alive = b"keep-alive" in options and b"close" not in options
            else:
                self.keep_alive = b"close" not in options
        else:
            self.keep_alive = version == "1.1"
        if version == "1.0":
            self.expects_continue = False
