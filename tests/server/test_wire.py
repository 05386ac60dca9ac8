"""The grammar and the two body decoders."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgate.server import wire
from nbgate.server.wire import ChunkedBody, LengthBody, WireError


def feed_all(body: ChunkedBody | LengthBody, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """Return (payload, what is left); like the protocol, feed nothing after the end."""
    out, rest = b"", b""
    for piece in pieces:
        if body.done:
            rest += piece
        else:
            out += body.feed(piece)
            rest += body.rest if body.done else b""
    return out, rest


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(m % (len(data) + 1) for m in marks)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def encode(parts: list[bytes], ext: bytes = b"", trailer: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), ext, p) for p in parts if p) + b"0\r\n" + trailer + b"\r\n"


@given(st.lists(st.binary(max_size=40), max_size=6), st.binary(max_size=30), st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=200, deadline=None)
def test_chunked_body_gives_the_payload_and_the_rest_wherever_it_is_cut(
    parts: list[bytes], rest: bytes, marks: list[int]
) -> None:
    data = encode(parts, b";a=b", b"X-T: 1\r\n") + rest
    body = ChunkedBody(10_000)
    assert feed_all(body, cut(data, marks)) == (b"".join(parts), rest)
    assert body.done


@given(st.binary(min_size=1, max_size=60), st.binary(max_size=30), st.lists(st.integers(0, 100), max_size=8))
@settings(max_examples=100, deadline=None)
def test_length_body_takes_exactly_its_bytes_wherever_it_is_cut(data: bytes, rest: bytes, marks: list[int]) -> None:
    body = LengthBody(len(data))
    assert feed_all(body, cut(data + rest, marks)) == (data, rest)
    assert body.done


PIECES = [b"0", b"1", b"2", b"\r\n", b"\r", b"\n", b";", b"=", b'"', b"a", b"g", b" ", b"A: b", b":", b"xy"]


@given(st.lists(st.sampled_from(PIECES), max_size=16).map(b"".join), st.lists(st.integers(0, 40), max_size=8))
@settings(max_examples=500, deadline=None)
def test_chunked_body_decides_on_garbage_alike_wherever_it_is_cut(data: bytes, marks: list[int]) -> None:
    def run(pieces: list[bytes]) -> tuple[bytes, bytes] | int:
        body = ChunkedBody(100)
        try:
            out, rest = feed_all(body, pieces)
        except WireError as exc:
            return exc.status
        return (out, rest) if body.done else (out, b"")

    whole, pieces = run([data] if data else []), run(cut(data, marks))
    assert whole == pieces


def test_chunked_body_hands_untouched_payload_over_as_one_piece() -> None:
    body = ChunkedBody(1 << 20)
    assert body.feed(b"5\r\nhello\r\n") == b"hello"
    assert body.feed(b"2\r\n{") == b"{"
    assert body.feed(b"}") == b"}"
    assert not body.done
    assert body.feed(b"\r\n0\r\n\r\nGET") == b""
    assert body.done and body.rest == b"GET"


@pytest.mark.parametrize("size", [4096, 4097])
def test_chunked_body_bounds_a_size_line_to_the_same_byte_whole_and_cut(size: int) -> None:
    line = b"1;" + b"a" * (size - 2)
    data = line + b"\r\nx\r\n0\r\n\r\n"
    for pieces in (
        [data],
        [data[i : i + 1] for i in range(len(data))],
        [line, data[size:]],
        [line + b"\r", data[size + 1 :]],
    ):
        body = ChunkedBody(100)
        if size == 4096:
            assert feed_all(body, pieces) == (b"x", b"")
        else:
            with pytest.raises(WireError):
                feed_all(body, pieces)


@pytest.mark.parametrize("prefix", [b"+", b" ", b"\n", b"\x00", b"-1", b";", b"\r\r", b"1\rx", b"\rx", b"_"])
def test_chunked_body_refuses_a_hopeless_size_line_before_its_end(prefix: bytes) -> None:
    with pytest.raises(WireError):
        ChunkedBody(100).feed(prefix)


def test_chunked_body_refuses_a_sum_of_chunks_beyond_its_bound_before_reading_it() -> None:
    body = ChunkedBody(10)
    assert body.feed(b"6\r\nabcdef\r\n") == b"abcdef"
    with pytest.raises(WireError) as caught:
        body.feed(b"5\r\n")
    assert caught.value.status == 413


def test_chunked_body_takes_a_sum_of_chunks_at_its_bound() -> None:
    assert ChunkedBody(10).feed(encode([b"abcdef", b"abcd"])) == b"abcdefabcd"


def test_chunked_body_takes_trailers_at_their_bounds_and_no_more() -> None:
    assert ChunkedBody(10).feed(encode([b"a"], trailer=b"A: b\r\n" * 32)) == b"a"
    with pytest.raises(WireError) as caught:
        ChunkedBody(10).feed(encode([b"a"], trailer=b"A: b\r\n" * 33))
    assert caught.value.status == 431
    long = b"A: " + b"b" * 4000 + b"\r\n"
    assert ChunkedBody(10).feed(encode([b"a"], trailer=long * 2)) == b"a"
    with pytest.raises(WireError):
        ChunkedBody(10).feed(encode([b"a"], trailer=long * 3))


@pytest.mark.parametrize(
    "line",
    [b"a" * 4000, b"1" + b";a" * 2000, b'1;a="' + b"\\a" * 2000, b"1;" + b"a" * 4000 + b"=", b'1;a="' + b"b" * 4000],
)
def test_chunk_grammar_costs_no_more_than_linear_time(line: bytes) -> None:
    start = time.process_time()
    for _ in range(50):
        with pytest.raises(WireError):
            ChunkedBody(100).feed(line + b"\x01\r\n")
    assert time.process_time() - start < 0.5


def test_length_body_of_nothing_is_done_at_once() -> None:
    assert LengthBody(0).done


@pytest.mark.parametrize("value", [b"0", b"5", b"007", b"123456789012345678"])
def test_parse_length_takes_ascii_digits(value: bytes) -> None:
    assert wire.parse_length(value) == int(value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"+5",
        b"-5",
        b"1_0",
        b" 5",
        b"5 ",
        b"0x5",
        b"5\n",
        "٥".encode(),
        "²".encode(),
        b"1234567890123456789",
        b"5,5",
        b"5\x00",
    ],
)
def test_parse_length_refuses_whatever_int_would_take(value: bytes) -> None:
    with pytest.raises(WireError) as caught:
        wire.parse_length(value)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "value",
    [
        b"a",
        b"",
        b"a:80",
        b"a:",
        b"[::1]",
        b"[::1]:8080",
        b"10.0.0.1:65535",
        b"a-b.c_d~",
        b"%41",
        b"a" * 255,
        b"xn--bcher-kva.de",
    ],
)
def test_check_host_takes_a_uri_host_with_a_port(value: bytes) -> None:
    assert wire.check_host(value)


@pytest.mark.parametrize(
    "value",
    [b"a b", b"a/b", b"a?b", b"a#b", b"a@b", b"a,b", b"a:b", b"a:1:2", b"a:123456", b"[a]", b"[::1", b"::1",
     b"a\\b", b"%4",
     b"%zz", b"a\n", b"a\x00", b"\xff", b"a" * 256, b"<a>", b'"a"', b"[::1]a", b"a|b", b"a^b", b"a`b", b"{a}"],
)  # fmt: skip
def test_check_host_refuses_what_could_be_read_two_ways(value: bytes) -> None:
    assert not wire.check_host(value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/", ("/", b"/", b"")),
        (b"/a?b=c?d", ("/a", b"/a", b"b=c?d")),
        (b"/a%20b", ("/a b", b"/a%20b", b"")),
        (b"/%ff", ("/\ufffd", b"/%ff", b"")),
        (b"/?", ("/", b"/", b"")),
        (b"/a%2fb?%zz", ("/a/b", b"/a%2fb", b"%zz")),
        (b"//a/b", ("//a/b", b"//a/b", b"")),
        (b"/../x", ("/../x", b"/../x", b"")),
        (b"http://h/a?b", ("/a", b"/a", b"b")),
        (b"HTTPS://h:1", ("/", b"/", b"")),
        (b"http://h?b", ("/", b"/", b"b")),
    ],
)
def test_split_target_gives_path_raw_path_and_query(target: bytes, expected: tuple[str, bytes, bytes]) -> None:
    assert wire.split_target(target, b"GET") == expected


@pytest.mark.parametrize(
    "target",
    [b"", b"a", b"*", b"a:80", b"/a#b", b"/a b", b"/a\n", b"/\x7f", b"/\xff", b"/%", b"/%1", b"/%zz", b"ftp://h/a", b"http://",
     b"http:///a", b"http://u@h/a", b"http://h#a", b"http://h/a#b", b"http:/a", b"http://h h/", b"?a"],
)  # fmt: skip
def test_split_target_refuses_other_forms(target: bytes) -> None:
    with pytest.raises(WireError):
        wire.split_target(target, b"GET")


def test_split_target_takes_the_asterisk_for_options_alone() -> None:
    assert wire.split_target(b"*", b"OPTIONS") == ("*", b"*", b"")


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        (b"x-a", b"b\tc \xe4", True), (b"x-a", b"", True), (b"x-a", b"b\r\nx: y", False), (b"x-a", b"b\n", False),
        (b"x-a", b"b\x00", False), (b"x-a", b"\x7f", False), (b"", b"b", False), (b"x a", b"b", False),
        (b"x:a", b"b", False), (b"x\r\n", b"b", False), (b"x-\xe4", b"b", False), (b"x-a\n", b"b", False),
    ],
)  # fmt: skip
def test_check_response_field_lets_nothing_split_a_response(name: bytes, value: bytes, fine: bool) -> None:
    assert wire.check_response_field(name, value) is fine


@pytest.mark.parametrize("status", [200, 404, 429, 499, 529, 299, 799])
def test_status_line_is_whole_for_any_status(status: int) -> None:
    line = wire.status_line(status)
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert line.endswith(b"\r\n") and line.count(b"\n") == 1
