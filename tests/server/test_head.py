"""One request head: what httptools leaves open is closed here."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgate.server.head import RequestHead
from nbgate.server.wire import WireError


def parse(raw: bytes, max_headers: int = 100, step: int = 0) -> RequestHead:
    head = RequestHead()
    for at in range(0, len(raw), step or len(raw)):
        head.feed(raw[at : at + (step or len(raw))])
    head.finish(max_headers, raw)
    return head


def get(*lines: bytes, first: bytes = b"GET /a?b HTTP/1.1") -> bytes:
    return b"\r\n".join((first, *lines, b"", b""))


def status_of(raw: bytes) -> int:
    with pytest.raises(WireError) as caught:
        parse(raw)
    return caught.value.status


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_head_is_the_same_whole_and_in_pieces(step: int) -> None:
    head = parse(get(b"Host: a", b"X-A:  b \t", b"X-a: c", b"Empty:", b"Content-Length: 7"), step=step)
    assert (head.method, head.path, head.raw_path, head.query, head.version) == ("GET", "/a", b"/a", b"b", "1.1")
    assert head.headers == [
        (b"host", b"a"), (b"x-a", b"b"), (b"x-a", b"c"), (b"empty", b""), (b"content-length", b"7"),
    ]  # fmt: skip
    assert (head.length, head.keep_alive, head.expects_continue) == (7, True, False)


@pytest.mark.parametrize(
    ("connection", "version", "keeps"),
    [
        (b"", b"1.1", True), (b"close", b"1.1", False), (b"x, CLOSE ,y", b"1.1", False), (b"closed", b"1.1", True),
        (b"keep-alive", b"1.1", True), (b"upgrade", b"1.1", True), (b"", b"1.0", False), (b"Keep-Alive", b"1.0", True),
        (b"keep-alive, close", b"1.0", False), (b"x\r\nConnection: close", b"1.1", False),
        (b"\tclose\t", b"1.1", False),
    ],
)  # fmt: skip
def test_head_keeps_the_connection_as_rfc_9112_says(connection: bytes, version: bytes, keeps: bool) -> None:
    lines = [b"Host: a"] + ([b"Connection: " + connection] if connection else [])
    assert parse(get(*lines, first=b"GET / HTTP/" + version)).keep_alive is keeps


@pytest.mark.parametrize(
    ("value", "version", "expects"),
    [
        (b"100-continue", b"1.1", True),
        (b"100-Continue", b"1.1", True),
        (b"200-ok", b"1.1", False),
        (b"100-continue", b"1.0", False),
    ],
)
def test_head_expects_continue_only_in_1_1(value: bytes, version: bytes, expects: bool) -> None:
    assert parse(get(b"Host: a", b"Expect: " + value, first=b"PUT / HTTP/" + version)).expects_continue is expects


@pytest.mark.parametrize(
    "first", [b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET / RTSP/1.0", b"SOURCE / ICE/1.0", b"GET / HTTP/1.1 "]
)
def test_head_refuses_request_lines_that_httptools_repairs(first: bytes) -> None:
    assert status_of(get(b"Host: a", first=first)) == 400


@pytest.mark.parametrize(
    ("version", "status"), [(b"0.9", 400), (b"2.0", 505), (b"1.2", 400), (b"3.0", 400), (b"1.10", 400), (b"9.9", 400)]
)
def test_head_refuses_other_versions(version: bytes, status: int) -> None:
    assert status_of(get(b"Host: a", first=b"GET / HTTP/" + version)) == status


@pytest.mark.parametrize("method", [b"get", b"BREW", b"PURGE", b"MKCOL", b"PROPFIND", b"M-SEARCH", b"PRI", b"QUERY"])
def test_head_refuses_methods_out_of_its_table(method: bytes) -> None:
    assert status_of(get(b"Host: a", first=method + b" / HTTP/1.1")) == 400


def test_head_answers_connect_with_405() -> None:
    assert status_of(get(b"Host: a", first=b"CONNECT a:443 HTTP/1.1")) == 405


def test_head_takes_no_more_fields_than_its_bound() -> None:
    lines = [b"Host: a"] + [b"X: y"] * 9
    assert len(parse(get(*lines), max_headers=10).headers) == 10
    with pytest.raises(WireError) as caught:
        parse(get(*lines, b"X: y"), max_headers=10)
    assert caught.value.status == 431


def test_head_needs_a_host_in_1_1_only() -> None:
    assert parse(get(first=b"GET / HTTP/1.0")).path == "/"
    assert status_of(get()) == 400


def test_head_is_not_whole_before_its_last_byte() -> None:
    head = RequestHead()
    head.feed(get(b"Host: a")[:-1])
    assert not head.complete
    with pytest.raises(WireError):
        head.finish(100, get(b"Host: a"))


@pytest.mark.parametrize(
    "lines", [(b"Content-Length: 5", b"Content-Length: 5"), (b"Transfer-Encoding: chunked", b"Content-Length: 5")]
)
def test_head_takes_one_framing_field_only(lines: tuple[bytes, bytes]) -> None:
    assert status_of(get(b"Host: a", *lines)) == 400
    assert status_of(get(b"Host: a", *reversed(lines))) == 400


def through(*lines: bytes, first: bytes = b"GET /p HTTP/1.1") -> RequestHead:
    """Read a head as the protocol does: recalled if it can be, else parsed and remembered."""
    raw = get(*lines, first=first)
    head = RequestHead()
    if not head.recall(raw[:-4], 100):
        head = RequestHead()
        head.feed(raw)
        head.finish(100, raw)
        head.remember(raw[:-4])
    return head


def test_head_lines_are_remembered_to_a_bound_and_never_a_query() -> None:
    from nbgate.server import head

    for number in range(2 * head._STARTS_MAX):
        assert through(b"Host: a", first=b"GET /t%d HTTP/1.1" % number).raw_path == b"/t%d" % number
        assert through(b"Host: a", b"X: %d" % number, first=b"GET /t?%d HTTP/1.1" % number).query == b"%d" % number
    for number in range(2 * head._FIELDS_MAX):
        through(b"Host: a", b"X-%d: a" % number)
    assert len(head._starts) <= head._STARTS_MAX
    assert len(head._fields) <= head._FIELDS_MAX + 100
    assert not any(b"?" in line for line in head._starts)


def test_head_recalled_is_the_head_parsed() -> None:
    lines = (
        b"Host: a:80",
        b"Content-Length: 5",
        b"Connection: Keep-Alive, CLOSE",
        b"X-Pad:  v \t",
        b"EXPECT: 100-continue",
    )
    first, second = through(*lines), through(*lines)
    assert first._parser is not None
    assert second._parser is None
    for name in (
        "method",
        "version",
        "path",
        "raw_path",
        "query",
        "headers",
        "length",
        "keep_alive",
        "expects_continue",
    ):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.parametrize(
    "lines",
    [
        (b"Host: a", b"Host: b"),
        (b"Host: a", b"Content-Length: 5", b"Content-Length: 6"),
        (b"Host: a", b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        (b"Content-Length: 5",),
    ],
)
def test_head_of_known_lines_is_still_judged_as_a_whole(lines: tuple[bytes, ...]) -> None:
    for line in lines:
        through(*((line,) if line.startswith(b"Host") else (b"Host: a", line)))
    with pytest.raises(WireError) as caught:
        through(*lines)
    assert caught.value.status == 400


def test_head_of_many_tiny_fields_costs_no_more_than_a_hundred_times_its_size() -> None:
    import tracemalloc

    raw = get(b"Host: a", *[b"a:"] * 7000)
    tracemalloc.start()
    head = RequestHead()
    head.feed(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(raw)
    with pytest.raises(WireError):
        head.finish(100, raw)


def test_head_in_single_bytes_costs_linear_time() -> None:
    raw = get(b"Host: a", b"X: " + b"y" * 8000)
    start = time.process_time()
    parse(raw, step=1)
    assert time.process_time() - start < 1.0


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST /"])
)
@settings(max_examples=400, deadline=None)
def test_head_raises_nothing_but_wire_errors_on_garbage(data: bytes, prefix: bytes) -> None:
    raw = prefix + data + b"\r\n\r\n"
    try:
        head = parse(raw)
    except WireError as exc:
        assert exc.status in (400, 405, 431, 505)
    else:
        assert raw.lstrip(b"\r\n").startswith((head.method.encode() + b" ", prefix))
        assert all(n == n.lower() and n and b"\n" not in v for n, v in head.headers)
