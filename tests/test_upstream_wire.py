"""Framing of upstream answers: what is taken, what is refused, what is reused."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_script import LIMITS, OK, STREAM_HEAD, TIMEOUTS, Offline, Taken

from nbgate.exchange import HOLD_BYTES
from nbgate.upstream import UpstreamError

HEAD = b"HTTP/1.1 200 OK\r\n"

WHOLE = {
    "length": (OK, b"ok"),
    "length zero": (HEAD + b"Content-Length: 0\r\n\r\n", b""),
    "chunked": (STREAM_HEAD + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", b"abcde"),
    "chunk extension": (STREAM_HEAD + b'2;a="b"\r\nab\r\n0\r\n\r\n', b"ab"),
    "trailers": (STREAM_HEAD + b"2\r\nab\r\n0\r\nX-Request-Id: t\r\nContent-Encoding: gzip\r\n\r\n", b"ab"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "not modified": (b"HTTP/1.1 304 x\r\ncontent-length: 9\r\n\r\n", b""),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + OK, b"ok"),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\na", b"a"),
}


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("name", WHOLE)
def test_wire_reads_each_framing_and_is_reused(name: str, step: int) -> None:
    raw, body = WHOLE[name]
    line = Offline()
    conn = line.read(raw, step)
    assert conn.complete and conn.error is None
    assert conn.buffered == body and conn.received == len(body)
    assert b"content-encoding" not in conn.headers and b"x-request-id" not in conn.headers
    assert line.reusable


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("head", [HEAD, b"HTTP/1.0 200 OK\r\n", HEAD + b"connection: close\r\n"])
def test_wire_takes_eof_as_the_end_of_an_unframed_body(head: bytes, step: int) -> None:
    line = Offline()
    assert not line.read(head + b"\r\nhello", step).complete
    conn = line.eof()
    assert conn.complete and conn.buffered == b"hello" and not line.reusable


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTTP/1.1 2", HEAD + b"content-length: 3\r\n\r\nab", STREAM_HEAD + b"2\r\na", STREAM_HEAD + b"2\r\nab\r\n"],
)
def test_wire_fails_as_lost_when_eof_cuts_a_framed_answer(raw: bytes) -> None:
    line = Offline()
    line.read(raw)
    line.eof()
    assert line.kind == "lost" and line.conn.error is not None
    assert bool(line.conn.error.bytes_read) == bool(raw)


def test_wire_fails_as_lost_when_an_unframed_body_is_reset() -> None:
    line = Offline()
    line.read(HEAD + b"\r\nhello")
    line.wire.connection_lost(ConnectionResetError("reset"))
    assert line.kind == "lost"


FRAMING = {
    "obs-fold": HEAD + b"a: b\r\n c\r\ncontent-length: 0\r\n\r\n",
    "nul": HEAD + b"a: b\0c\r\ncontent-length: 0\r\n\r\n",
    "bare cr": HEAD + b"a: b\rc\r\ncontent-length: 0\r\n\r\n",
    "bare lf": HEAD + b"a: b\ncontent-length: 0\r\n\r\n",
    "space before colon": HEAD + b"content-length : 0\r\n\r\n",
    "two lengths": HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "same length twice": HEAD + b"content-length: 1\r\ncontent-length: 1\r\n\r\na",
    "length list": HEAD + b"content-length: 1, 1\r\n\r\na",
    "signed length": HEAD + b"content-length: +1\r\n\r\na",
    "length overflow": HEAD + b"content-length: 99999999999999999999999\r\n\r\na",
    "chunked and length": HEAD + b"transfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n0\r\n\r\n",
    "length and chunked": HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "xchunked": HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size 0x": STREAM_HEAD + b"0x1\r\na\r\n0\r\n\r\n",
    "chunk size overflow": STREAM_HEAD + b"fffffffffffffffff\r\na\r\n",
    "chunk too long": STREAM_HEAD + b"1\r\nab\r\n0\r\n\r\n",
    "chunk bare lf": STREAM_HEAD + b"1\na\r\n0\r\n\r\n",
    "version 2": b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "version 0.9": b"HTTP/0.9 200 OK\r\ncontent-length: 0\r\n\r\n",
    "not http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "status 000": b"HTTP/1.1 000 OK\r\ncontent-length: 0\r\n\r\n",
    "status 99": b"HTTP/1.1 99 OK\r\ncontent-length: 0\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\ncontent-length: 0\r\n\r\n",
    "switching": b"HTTP/1.1 101 S\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nxx",
    "bare 101": b"HTTP/1.1 101 S\r\n\r\n",
    "unknown coding": HEAD + b"content-encoding: br\r\ncontent-length: 1\r\n\r\na",
    "two codings": HEAD + b"content-encoding: gzip\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\na",
    "not gzip": HEAD + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\nabcd",
    "interim flood": b"HTTP/1.1 100 Continue\r\n\r\n" * 17 + OK,
    "interim with a body": b"HTTP/1.1 199 X\r\ncontent-length: 5\r\n\r\nhello" + OK,
    "header flood": HEAD + b"a: b\r\n" * 201 + b"content-length: 0\r\n\r\n",
    "trailer flood": STREAM_HEAD + b"0\r\n" + b"a: bbbbbbbbbbbbbbbbbbbbbbbbb\r\n" * 5000,
}


@pytest.mark.parametrize("step", [0, 1, 1000])
@pytest.mark.parametrize("name", FRAMING)
def test_wire_refuses_doubtful_framing_and_closes(name: str, step: int) -> None:
    line = Offline()
    line.read(FRAMING[name], step)
    assert not line.conn.complete or name == "trailer flood"
    assert line.kind == "framing" and line.transport.aborted and not line.reusable


@pytest.mark.parametrize("step", [0, 1, 4096])
def test_wire_refuses_a_head_over_the_bound(step: int) -> None:
    line = Offline()
    line.read(HEAD + b"x-long: " + b"a" * (1 << 20), step)
    assert line.kind == "too_large" and line.transport.aborted
    assert line.conn.head_bytes <= LIMITS.max_head_bytes + max(step, 1) or step == 0


def test_wire_takes_a_head_within_the_bound_in_a_larger_read() -> None:
    conn = Offline().read(HEAD + b"content-length: 200000\r\n\r\n" + b"a" * 200_000)
    assert conn.complete and len(conn.buffered) == 200_000


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("after", [OK, b"HTTP/1.1 20", b"\r\n", b"\r\n\r\n", b"junk", b"\0"])
@pytest.mark.parametrize("name", ["length", "chunked", "length zero", "no content"])
def test_wire_never_delivers_or_reuses_what_follows_an_answer(name: str, after: bytes, step: int) -> None:
    raw, body = WHOLE[name]
    line = Offline()
    conn = line.read(raw + after, step)
    assert conn.complete and conn.buffered == body and conn.status in (200, 204)
    assert line.transport.aborted and not line.reusable


def test_wire_closes_on_unasked_bytes_while_idle() -> None:
    line = Offline()
    line.read(OK)
    line.wire.data_received(OK)
    assert line.transport.aborted and not line.reusable and line.conn.buffered == b"ok"


def test_wire_closes_on_bytes_between_lending_and_sending() -> None:
    line = Offline()
    line.read(OK)
    conn = line.pool.idle(line.endpoint)
    assert conn is not None
    line.wire.data_received(OK)
    conn.send([b"x"], TIMEOUTS)
    assert conn.error is not None and conn.error.kind == "lost" and conn.error.reused
    assert conn.error.bytes_read == 0


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n", HEAD + b"connection: a, close\r\n"])
def test_wire_is_not_reused_when_the_upstream_will_not(head: bytes) -> None:
    line = Offline()
    assert line.read(head + b"content-length: 2\r\n\r\nok").complete
    assert line.transport.aborted and not line.reusable


def test_wire_is_not_reused_when_the_answer_came_before_the_whole_request_went() -> None:
    line = Offline()
    line.transport.unsent = 1
    conn = line.read(b"HTTP/1.1 413 x\r\ncontent-length: 2\r\n\r\nno")
    assert conn.complete and conn.status == 413 and conn.buffered == b"no"
    assert line.transport.aborted and not line.reusable


def test_wire_keeps_only_wanted_headers_in_lower_case() -> None:
    raw = HEAD + b"Content-Type: a\r\nCONTENT-TYPE: b\r\nSet-Cookie: c\r\nX-Special: d\r\ncontent-length: 0\r\n\r\n"
    conn = Offline().read(raw)
    assert conn.headers == {b"content-type": b"a", b"x-special": b"d", b"content-length": b"0"}


def test_wire_forgets_the_headers_of_interim_answers() -> None:
    conn = Offline().read(b"HTTP/1.1 103 x\r\nContent-Type: evil\r\nretry-after: 9\r\n\r\n" + OK)
    assert conn.headers == {b"content-length": b"2"}


def test_wire_serves_a_second_exchange_with_nothing_left_of_the_first() -> None:
    line = Offline()
    line.read(STREAM_HEAD + b"1\r\na\r\n0\r\ncontent-type: t\r\n\r\n")
    second = line.pool.idle(line.endpoint)
    assert second is not None and second.reused
    second.send([b"x"], TIMEOUTS)
    line.read(b"HTTP/1.1 404 x\r\ncontent-length: 1\r\n\r\nb")
    assert (second.status, second.buffered, second.headers) == (404, b"b", {b"content-length": b"1"})
    assert (line.conn.status, line.conn.buffered) == (200, b"a")
    line.conn.abort()
    assert not line.transport.aborted, "an exchange that is over touches nothing"


def test_connection_joins_the_chunks_of_one_read_and_leaves_single_ones_alone() -> None:
    line, sink = Offline(), Taken()
    line.conn.attach(sink)
    line.read(STREAM_HEAD)
    line.read(b"2\r\nab\r\n1\r\nc\r\n")
    line.read(b"1\r\nd\r\n")
    line.read(b"0\r\n\r\n")
    assert sink.data == [b"abc", b"d"] and sink.ends == ["finish"]


def test_connection_gives_an_attached_sink_what_was_held() -> None:
    line, sink = Offline(), Taken()
    line.read(STREAM_HEAD + b"2\r\nab\r\n")
    line.read(b"1\r\nc\r\n")
    line.conn.attach(sink)
    assert sink.data == [b"abc"] and line.conn.buffered == b""
    line.read(b"1\r\nd\r\n0\r\n\r\n")
    assert sink.data == [b"abc", b"d"] and sink.ends == ["finish"] and line.reusable


@pytest.mark.parametrize("size", [2, HOLD_BYTES + 5])
def test_connection_finishes_a_sink_attached_after_the_end(size: int) -> None:
    line, sink = Offline(), Taken()
    line.read(HEAD + b"content-length: %d\r\n\r\n" % size + b"x" * size)
    assert line.reusable, "the wire does not wait for the sink"
    line.conn.attach(sink)
    assert sum(map(len, sink.data)) == size and sink.ends == ["finish"]
    assert line.transport.reading


def test_connection_fails_a_sink_after_the_sound_bytes() -> None:
    line, sink = Offline(), Taken()
    line.read(STREAM_HEAD)
    line.conn.attach(sink)
    line.read(b"2\r\nab\r\nzz\r\n")
    assert sink.data == [b"ab"] and isinstance(sink.ends[0], UpstreamError) and sink.ends[0].kind == "framing"
    assert len(sink.ends) == 1


def test_connection_tells_a_sink_nothing_after_it_aborted() -> None:
    line = Offline()

    class Leaving(Taken):
        def feed(self, data: bytes) -> None:
            super().feed(data)
            line.conn.abort()

    sink = Leaving()
    line.conn.attach(sink)
    line.read(STREAM_HEAD + b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n")
    assert sink.data == [b"ab"] and not sink.ends
    assert line.transport.aborted and not line.reusable


def test_connection_holds_a_bounded_body_and_reads_on_when_attached() -> None:
    line = Offline()
    line.read(STREAM_HEAD)
    sent = 0
    while line.transport.reading:
        line.read(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        sent += 10_000
    assert HOLD_BYTES <= sent < HOLD_BYTES + 10_000
    sink = Taken()
    line.conn.attach(sink)
    assert line.transport.reading and sum(map(len, sink.data)) == sent


def test_connection_asks_ready_often_but_not_quadratically() -> None:
    asked = 0

    def ready(conn: object) -> bool:
        nonlocal asked
        asked += 1
        return False

    line = Offline(ready=ready)
    line.read(STREAM_HEAD)
    for _ in range(100_000):
        line.wire.data_received(b"1\r\na\r\n")
    assert 16 * 1024 < asked < 17 * 1024


# compressed all the same

BODY = b"data: " + bytes(range(256)) * 40
RAW_DEFLATE = zlib.compressobj(wbits=-15)
CODED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY[:100]) + gzip.compress(BODY[100:]),
    "deflate": zlib.compress(BODY),
    "Deflate": RAW_DEFLATE.compress(BODY) + RAW_DEFLATE.flush(),
}


@pytest.mark.parametrize("step", [0, 1, 100])
@pytest.mark.parametrize("coding", CODED)
def test_connection_decodes_what_the_upstream_compressed(coding: str, step: int) -> None:
    raw = CODED[coding]
    line = Offline()
    conn = line.read(
        HEAD + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (coding.encode(), len(raw)) + raw, step
    )
    assert conn.complete and conn.buffered == BODY and line.reusable
    assert not conn.headers, "neither the coding nor the coded length is true any more"


def test_connection_refuses_a_compressed_body_cut_short() -> None:
    raw = CODED["gzip"][:-4]
    line = Offline()
    line.read(HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
    assert line.kind == "framing" and not line.conn.complete


def test_connection_stops_a_bomb_and_never_holds_it() -> None:
    bomb = gzip.compress(bytes(200 << 20), 9)
    line = Offline()
    line.read(HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb) + bomb, 256 * 1024)
    assert len(line.conn.buffered) <= HOLD_BYTES + 65_536
    sink = Taken()
    line.conn.attach(sink)
    line.read(bomb, 256 * 1024)
    assert line.kind == "too_large" and sum(map(len, sink.data)) < 32 << 20
    assert sink.ends == [line.conn.error]


def test_connection_stops_decoding_while_the_sink_pauses() -> None:
    body = b"".join(b"%d," % n for n in range(200_000))
    raw = gzip.compress(body)
    line = Offline()

    class Slow(Taken):
        def feed(self, data: bytes) -> None:
            super().feed(data)
            line.conn.pause()

    sink = Slow()
    line.conn.attach(sink)
    line.read(HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
    assert len(sink.data) == 1 and not sink.ends and line.reusable
    while not sink.ends:
        line.conn.resume()
    assert b"".join(sink.data) == body and sink.ends == ["finish"]
    assert max(map(len, sink.data)) <= 65_536


# anything at all


def settle(raw: bytes, cuts: list[int]) -> Offline:
    line = Offline()
    for cut in sorted({min(c, len(raw)) for c in cuts} | {len(raw)}):
        done = getattr(line, "done", 0)
        if cut > done and not line.transport.aborted:
            line.wire.data_received(raw[done:cut])
        line.done = cut  # type: ignore[attr-defined]
    line.eof()
    assert line.conn.complete != (line.conn.error is not None), "ended twice, or not at all"
    return line


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_wire_settles_whatever_bytes_come(raw: bytes, cuts: list[int]) -> None:
    settle(raw, cuts)


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from([raw for raw, _ in WHOLE.values()] + list(FRAMING.values())[:20] + [HEAD + b"\r\nabc"]),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.binary(max_size=4)), max_size=4),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_wire_settles_mutated_answers(raw: bytes, edits: list[tuple[int, int, bytes]], cuts: list[int]) -> None:
    for at, drop, put in edits:
        raw = raw[:at] + put + raw[at + drop :]
    settle(raw, cuts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.lists(st.integers(0, 500), max_size=8))
def test_wire_reads_chunked_bodies_however_cut(chunks: list[bytes], cuts: list[int]) -> None:
    raw = STREAM_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    line = settle(raw, cuts)
    assert line.conn.complete and line.conn.buffered == b"".join(chunks)
