"""Read a few members of a JSON text of any length as it passes.

What lives here: `JsonScan`, an incremental scanner that knows depth and
strings, keeps the usage object and a few short strings, and nothing else.
What must not: validation; what is no JSON gives no usage. Heat: C.

Law: memory is bounded (8 KiB) and every byte is looked at once, by C.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

CAPTURE_MAX: Final = 8_192
WORD_MAX: Final = 512

_WS: Final = b" \t\r\n"
_NOT_BRACKETS: Final = bytes(c for c in range(256) if c not in b"{}[]")
_BRACKET: Final = re.compile(rb"[{}\[\]]")
_OPEN: Final = b"{["
_WORDS: Final = frozenset((b"id", b"model", b"type"))
_BACKSLASH: Final = 92


class JsonScan:
    """Scan chunks of one JSON object; cuts may fall anywhere.

    `usage`: the last object named so at the top, or one below a top-level
    member of `nested`. `words`: `id`, `model`, `type` at the top, and `X.id`
    for a nested X. `error`: a top-level error that is an object or a string, and not empty.
    """

    __slots__ = (
        "_capture", "_colon", "_depth", "_from", "_in_string", "_key", "_nested", "_odd", "_outer", "_reads", "_start",
        "_word", "error", "usage", "words",
    )  # fmt: skip

    def __init__(self, nested: frozenset[bytes] = frozenset()) -> None:
        self._nested = nested
        self._depth = 0
        self._in_string = False
        self._odd = False  # the chunk before ended with an unpaired backslash
        self._word: bytearray | None = None  # the string just read, where it matters
        self._reads = False  # the string under way is kept in _word
        self._colon = False  # a colon is the last thing before the string
        self._key = b""  # the member we are in, at depth 1 or 2
        self._outer = b""  # the top-level member we are below
        self._capture: bytearray | None = None
        self._start = 0  # depth at which the captured object stands
        self._from = 0  # where in this chunk the capture goes on
        self.usage: dict[str, Any] | None = None
        self.words: dict[bytes, str] = {}
        self.error = False

    def feed(self, data: bytes) -> None:
        """Look at the next chunk."""
        at, end = 0, len(data)
        self._from = 0
        while at < end:
            at = self._string(data, at) if self._in_string else self._between(data, at)
        if self._capture is not None:
            self._keep(data[self._from :])

    def _string(self, data: bytes, at: int) -> int:
        """Go on inside a string; give where it ends, or the chunk's end."""
        quote = data.find(b'"', at)
        end = quote if quote >= 0 else len(data)
        first = end
        while first > at and data[first - 1] == _BACKSLASH:
            first -= 1
        odd = (end - first) & 1 == 1
        if first == at and self._odd:
            odd = not odd
        if self._reads:
            self._read(data[at:end])
        if quote < 0:
            self._odd = odd
            return end
        self._odd = False
        if odd:  # an escaped quote
            if self._reads:
                self._read(b'"')
            return quote + 1
        self._in_string = False
        if self._reads and self._colon:
            self._value()
        self._colon = False
        return quote + 1

    def _read(self, piece: bytes) -> None:
        word = self._word
        if word is not None:
            word += piece[: WORD_MAX + 1 - len(word)]

    def _value(self) -> None:
        """Keep a string value that is asked for."""
        word, key = self._word, self._key
        self._word = None
        if word and self._depth == 1 and key == b"error":
            self.error = True
        if word is None or len(word) > WORD_MAX:
            return
        if self._depth == 2:
            key = self._outer + b".id" if key == b"id" and self._outer in self._nested else b""
        elif key not in _WORDS:
            key = b""
        if key:
            try:
                self.words[key] = orjson.loads(b'"%b"' % bytes(word))
            except orjson.JSONDecodeError:
                self.words.pop(key, None)

    def _between(self, data: bytes, at: int) -> int:
        """Go on outside strings up to the next one, or the chunk's end."""
        quote = data.find(b'"', at)
        end = quote if quote >= 0 else len(data)
        if end > at:
            piece = data[at:end]
            if self._depth <= 2:
                self._members(piece)
            if self._capture is not None:
                self._captured(data, at, end)
            else:
                self._brackets(data, at, piece)
        if quote < 0:
            return end
        self._in_string = True
        depth = self._depth
        if depth == 2 and self._outer == b"error":  # an empty object is no error
            self.error = True
        # PERF: strings deeper than the members we read are skipped by one find.
        self._reads = depth == 1 or (depth == 2 and self._outer in self._nested)
        self._word = bytearray() if self._reads else None
        return quote + 1

    def _members(self, piece: bytes) -> None:
        """Note a key when its colon comes, and whether a value comes next."""
        bare = piece.strip(_WS)
        if not bare:
            return
        if bare.startswith(b":"):
            self._key = bytes(self._word) if self._word is not None else b""
        self._word = None
        self._colon = bare.endswith(b":")

    def _brackets(self, data: bytes, at: int, piece: bytes) -> None:
        """Count depth; begin to capture where a usage object opens."""
        kept = piece.translate(None, _NOT_BRACKETS)
        for i, mark in enumerate(kept):
            if mark not in _OPEN:
                self._close()
                continue
            key, depth = self._key, self._depth
            own = depth == 1 or (depth == 2 and self._outer in self._nested)
            if own and key == b"usage" and mark == 123:
                self._begin(data, at, i)
                return
            self._open()

    def _open(self) -> None:
        self._depth += 1
        if self._depth == 2:
            self._outer = self._key
        self._key = b""

    def _close(self) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._outer = b""

    def _begin(self, data: bytes, at: int, skip: int) -> None:
        """Begin to capture at the bracket number `skip` from `at`."""
        for _ in range(skip):
            found = _BRACKET.search(data, at)
            at = found.end() if found else at
        at = data.index(b"{", at)
        self._capture = bytearray()
        self._start = self._depth
        self._from = at
        quote = data.find(b'"', at)
        self._captured(data, at, quote if quote >= 0 else len(data))

    def _captured(self, data: bytes, at: int, end: int) -> None:
        """Count depth inside a captured object and close it at its bracket."""
        for found in _BRACKET.finditer(data, at, end):
            if data[found.start()] in _OPEN:
                self._open()
                continue
            self._close()
            if self._depth == self._start:
                self._keep(data[self._from : found.end()])
                self._finish_capture()
                self._key = b""
                self._brackets(data, found.end(), data[found.end() : end])
                return

    def _keep(self, piece: bytes) -> None:
        capture = self._capture
        if capture is not None and len(capture) <= CAPTURE_MAX:
            capture += piece[: CAPTURE_MAX + 1 - len(capture)]

    def _finish_capture(self) -> None:
        capture = self._capture
        self._capture = None
        if capture is None or len(capture) > CAPTURE_MAX:
            return
        try:
            found = orjson.loads(capture)
        except orjson.JSONDecodeError:
            return
        if isinstance(found, dict):
            self.usage = found
