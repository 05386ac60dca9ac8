"""The short ways: heads put together from known lines, whole bodies, direct answers.

Each must be told from the long way by its cost alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serverkit import GET, Bench, answer, chunked, eager, post, read_body

from nbgate.server.head import RequestHead
from nbgate.server.wire import WireError

Make = Callable[..., Bench]

FIRSTS = [
    b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"POST /a?b HTTP/1.1", b"HEAD /%41 HTTP/1.1", b"GET  / HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"GET / HTTP/2.0", b"POST http://h/a HTTP/1.1",
]  # fmt: skip
LINES = [
    b"Host: a", b"host: b", b"Content-Length: 5", b"Content-Length: 6", b"Transfer-Encoding: chunked", b"X-A: b",
    b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b"X-A:  b", b"x-a: b ", b"Cookie: a",
    b"Connection: Upgrade", b"Upgrade: websocket", b"X-A : b", b" X-A: b", b"X-A: b\rX: y", b"X-A: b\nX: y", b"X-A",
    b"Transfer-Encoding: gzip, chunked", b"Content-Length: +5", b"Host: a b", b"Connection: x, Close",
]  # fmt: skip


def parse(raw: bytes) -> RequestHead:
    head = RequestHead()
    head.feed(raw)
    head.finish(100, raw)
    return head


def recall(raw: bytes) -> RequestHead | None:
    head = RequestHead()
    return head if head.recall(raw[:-4], 100) else None


def outcome(act: Callable[[], RequestHead | None]) -> Any:
    try:
        head = act()
    except WireError as exc:
        return exc.status
    if head is None:
        return None
    return (
        head.method, head.path, head.raw_path, head.query, head.version, head.headers, head.length,
        head.keep_alive, head.expects_continue,
    )  # fmt: skip


heads = st.tuples(st.sampled_from(FIRSTS), st.lists(st.sampled_from(LINES), max_size=5))


@given(st.lists(heads, min_size=1, max_size=6))
@settings(max_examples=500, deadline=None)
def test_head_from_known_lines_is_judged_like_a_parsed_one_whatever_was_seen_before(
    seen: list[tuple[bytes, list[bytes]]],
) -> None:
    for first, lines in seen:
        raw = b"\r\n".join((first, *lines, b"", b""))
        parsed, recalled = outcome(lambda raw=raw: parse(raw)), outcome(lambda raw=raw: recall(raw))  # type: ignore[misc]
        assert recalled in (None, parsed)
        if not isinstance(parsed, int):
            parse(raw).remember(raw[:-4])
            assert outcome(lambda raw=raw: recall(raw)) in (None, parsed)  # type: ignore[misc]


def test_head_from_known_lines_obeys_the_bound_of_fields() -> None:
    raw = b"\r\n".join((b"GET / HTTP/1.1", b"Host: a", *[b"X-A: b"] * 20, b"", b""))
    parse(raw).remember(raw[:-4])
    assert RequestHead().recall(raw[:-4], 21)
    assert not RequestHead().recall(raw[:-4], 20)


@pytest.mark.parametrize(("raw", "body"), [(GET, b""), (post(b"abc"), b"abc"), (chunked(b"a", b"b"), b"ab")])
def test_whole_body_stands_in_the_scope_of_an_eager_app_and_in_receive_too(
    bench: Make, raw: bytes, body: bytes
) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["nbgate.body"] == body
        assert await read_body(receive) == body
        assert scope["nbgate.answer"](200, b"x-a: 1\r\n", body) == "complete"

    responses = bench(app).connect().send(raw + raw).read()
    assert [(r.status, r.body, r.headers[b"x-a"]) for r in responses] == [(200, body, b"1")] * 2


def test_body_under_way_and_apps_in_tasks_have_no_shortcut(bench: Make) -> None:
    seen: list[bool] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append("nbgate.body" in scope)
        await read_body(receive)
        await answer(send)

    assert bench(app).connect().send(post(b"abc")).statuses() == [200]
    app.nbgate_eager = True  # type: ignore[attr-defined]
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n"
    assert bench(app).connect().send(head, b"x" * 90_000).statuses() == [200]
    assert seen == [False, False]


@pytest.mark.parametrize("first", ["answer", "start", "parts"])
def test_direct_answer_is_refused_when_one_has_begun(bench: Make, first: str) -> None:
    refused: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if first == "answer":
            scope["nbgate.answer"](200, b"", b"a")
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if first == "parts":
                await send({"type": "http.response.body", "body": b"a", "more_body": True})
        try:
            scope["nbgate.answer"](200, b"", b"b")
        except RuntimeError:
            refused.append(first)
        if first != "answer":
            await send({"type": "http.response.body", "body": b"" if first == "parts" else b"a"})

    client = bench(app).connect().send(GET + GET)
    assert [r.body for r in client.read()] == [b"a", b"a"]
    assert refused == [first] * 2


def test_direct_answer_to_a_client_that_left_says_so(bench: Make) -> None:
    outcomes: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        outcomes.append(scope["nbgate.answer"](200, b"", b"a"))

    client = bench(app).connect().send(GET)
    client.lose()
    assert outcomes == ["client_gone"]
    assert client.out == b""


def test_direct_answer_to_head_has_no_body(bench: Make) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope["nbgate.answer"](200, b"", b"abc")

    client = bench(app).connect().send(b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n" * 2)
    assert client.statuses(0, 1) == [200, 200]
    assert b"abc" not in client.out
