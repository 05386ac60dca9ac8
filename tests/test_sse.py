"""Server-sent events: frame ends, fields, and the framer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgate.sse import Framer, fields, first_event, frames, last_end

LINES = st.sampled_from(
    [b"data: {}", b"data:x", b": note", b"event: a", b"id: 1", b"\xef\xbb\xbfdata: y", b"", b"\xff"]
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
STREAMS = st.lists(st.tuples(LINES, ENDS), max_size=30).map(lambda parts: b"".join(a + b for a, b in parts))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


def through(framer: Framer, chunks: list[bytes]) -> bytes:
    out = b""
    for chunk in chunks:
        piece, whole = framer.push(chunk)
        out += piece + whole
    return out + framer.finish()


@pytest.mark.parametrize(("data", "end"), [
    (b"", -1), (b"data: x", -1), (b"data: x\n", -1), (b"data: x\n\n", 9), (b"a\r\n\r\nb", 5), (b"a\r\rb", 3),
    (b"a\n\r\nb", 4), (b"\n\n", 2), (b"a\n\nb\n\nc", 6), (b"a\r\n\r", -1),
])  # fmt: skip
def test_last_end_finds_the_end_of_the_last_whole_frame(data: bytes, end: int) -> None:
    assert last_end(data) == end


def test_frames_lists_an_unfinished_one_too() -> None:
    data = b"a\n\nb\r\n\r\nc"
    assert [data[a:b] for a, b in frames(data)] == [b"a\n\n", b"b\r\n\r\n", b"c"]


@pytest.mark.parametrize(("frame", "event", "data"), [
    (b"data: x\n\n", b"", b"x"), (b"data:x\n\n", b"", b"x"), (b"data:  x\n\n", b"", b" x"), (b"data\n\n", b"", None),
    (b"event: e\r\ndata: 1\r\ndata: 2\r\n\r\n", b"e", b"1\n2"), (b": c\n\n", b"", None),
    (b"id: 1\nretry: 2\n\n", b"", None),
    (b"\xef\xbb\xbfdata: x\r\r", b"", b"x"), (b"event:e\n\n", b"e", None), (b"data:\n\n", b"", b""),
])  # fmt: skip
def test_fields_reads_event_and_data(frame: bytes, event: bytes, data: bytes | None) -> None:
    assert fields(frame) == (event, data)


@pytest.mark.parametrize(("buffered", "event"), [
    (b"", None), (b": ping\n\n", None), (b": ping\n\ndata: x", None),
    (b": ping\n\ndata: x\n\ndata: y\n\n", b"data: x\n\n"),
    (b"retry: 5\n\nevent: e\ndata: 1\r\n\r\n", b"event: e\ndata: 1\r\n\r\n"), (b"data: x\n", None),
])  # fmt: skip
def test_first_event_is_the_first_whole_one_that_is_no_comment(buffered: bytes, event: bytes | None) -> None:
    assert first_event(buffered) == event


def test_framer_gives_whole_frames_as_the_same_object() -> None:
    data = b"data: x\n\n"
    framer = Framer(100)
    assert framer.push(data)[1] is data
    assert framer.idle


def test_framer_holds_a_cut_frame_until_whole() -> None:
    framer = Framer(100)
    assert framer.push(b"data: a\n\ndata: b") == (b"", b"data: a\n\n")
    assert not framer.idle
    assert framer.push(b"b\n") == (b"", b"")
    assert framer.push(b"\n") == (b"", b"data: bb\n\n")
    assert framer.idle


def test_framer_passes_a_long_frame_on_as_it_comes() -> None:
    framer = Framer(10)
    assert framer.push(b"data: 0123") == (b"", b"")
    assert framer.push(b"4") == (b"data: 01234", b"")
    assert framer.open
    assert framer.push(b"5\n") == (b"5\n", b"")
    assert framer.push(b"\ndata: x\n\ndata") == (b"\n", b"data: x\n\n")
    assert not framer.open
    assert framer.finish() == b"data"


@settings(max_examples=300, deadline=None)
@given(data=STREAMS, cuts=st.lists(st.integers(0, 300), max_size=12), limit=st.sampled_from([0, 5, 20, 10_000]))
def test_framer_never_alters_bytes(data: bytes, cuts: list[int], limit: int) -> None:
    assert through(Framer(limit), pieces(data, cuts)) == data
    assert through(Framer(limit), [data[i : i + 1] for i in range(len(data))]) == data


@settings(max_examples=300, deadline=None)
@given(data=STREAMS, cuts=st.lists(st.integers(0, 300), max_size=12))
def test_framer_gives_only_whole_frames_below_its_limit(data: bytes, cuts: list[int]) -> None:
    framer = Framer(10_000)
    for chunk in pieces(data, cuts):
        piece, whole = framer.push(chunk)
        assert piece == b""
        assert not whole or last_end(whole) == len(whole)


def test_framer_stays_bounded_on_an_endless_line() -> None:
    framer = Framer(1_000)
    chunk = b"x" * 600
    held = 0
    for _ in range(2_000):
        piece, whole = framer.push(chunk)
        held += len(chunk) - len(piece) - len(whole)
        assert held <= 1_000 + len(chunk)
