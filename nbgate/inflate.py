"""Undo gzip and deflate of an answer, a bounded piece at a time.

What lives here: `Inflater`, for upstreams that compress although they were
asked for identity. What must not: sockets, pausing, HTTP. Pure. Heat: C, but
only on such upstreams.

Law: one step makes at most `STEP_BYTES`, so that whoever takes the pieces can
stop in between; and no answer may grow beyond `MAX_RATIO` times its size.
"""

from __future__ import annotations

import zlib

STEP_BYTES = 64 * 1024
FREE_BYTES = 1024 * 1024  # below this the ratio is not looked at
MAX_RATIO = 100  # Envoy's threat model: no input may cost 100 times its size

CODINGS = frozenset((b"gzip", b"x-gzip", b"deflate"))


class Inflater:
    """Decode one body; push what arrives, then call `step` until empty."""

    __slots__ = ("_engine", "_gzip", "_more", "_tail", "finished", "given", "taken")

    def __init__(self, coding: bytes) -> None:
        self._gzip = coding != b"deflate"
        self._engine: zlib._Decompress | None = None
        self._tail = b""
        self._more = False
        self.finished = True  # an empty body is a whole one
        self.taken = 0
        self.given = 0

    @property
    def pending(self) -> bool:
        """Tell whether `step` may still give something."""
        return self._more or bool(self._tail)

    def push(self, data: bytes) -> None:
        """Take in compressed bytes."""
        self.taken += len(data)
        self._tail = self._tail + data if self._tail else data

    def step(self) -> bytes:
        """Return the next decoded bytes, or b"" when more input is needed.

        Raises:
            ValueError: not what the coding says.
            OverflowError: the answer grows beyond the bound.
        """
        while self._more or self._tail:
            data = self._tail
            engine = self._engine
            if engine is None:
                engine = self._engine = zlib.decompressobj(self._window_bits(data[0]))
                self.finished = False
            try:
                out = engine.decompress(data, STEP_BYTES)
            except zlib.error as exc:
                raise ValueError(str(exc)) from None
            if engine.eof:
                self._end_of_member(engine.unused_data)
            else:
                self._tail = engine.unconsumed_tail
                # NOTE: a full step may leave output inside zlib with no input left over.
                self._more = len(out) == STEP_BYTES
            if out:
                self.given += len(out)
                if self.given > FREE_BYTES and self.given > MAX_RATIO * self.taken:
                    raise OverflowError(f"more than {MAX_RATIO} times its compressed size")
                return out
        return b""

    def _window_bits(self, first: int) -> int:
        if self._gzip:
            return 31
        # RFC 9110 8.4.1.2: deflate means zlib's wrapping; some send it raw.
        return 15 if first & 0x0F == 8 else -15

    def _end_of_member(self, rest: bytes) -> None:
        self.finished = True
        self._engine = None
        self._more = False
        self._tail = rest
        if rest and not self._gzip:
            raise ValueError("bytes after the end of the deflate stream")
