"""One request and its answer: receive, send, framing, the eager driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
from serverkit import GET, Bench, answer, chunked, eager, post

from nbgate.server.waiter import Waiter

Make = Callable[..., Bench]
HTTP10 = b"GET / HTTP/1.0\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n"


def sender(*messages: dict[str, Any]) -> Any:
    """Make an eager app that sends these messages."""

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


def start(status: int = 200, **headers: str) -> dict[str, Any]:
    fields = [(n.replace("_", "-").encode(), v.encode("latin-1")) for n, v in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": fields}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.mark.parametrize("is_eager", [False, True])
def test_scope_holds_what_asgi_asks_for(bench: Make, is_eager: bool) -> None:
    scopes: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scopes.append(scope)
        await answer(send)

    app.nbgate_eager = is_eager  # type: ignore[attr-defined]
    client = bench(app).connect().send(b"PUT /%C3%A4/b%2f?x=%zz HTTP/1.1\r\nHost: a\r\nX-A: 1\r\nx-a: 2\r\n\r\n")
    assert client.statuses() == [200]
    scope = scopes[0]
    assert scope["type"] == "http" and scope["method"] == "PUT" and scope["http_version"] == "1.1"
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/\u00e4/b/", b"/%C3%A4/b%2f", b"x=%zz")
    assert scope["headers"] == [(b"host", b"a"), (b"x-a", b"1"), (b"x-a", b"2")]
    assert scope["client"] == ("192.0.2.1", 5000) and scope["server"] == ("127.0.0.1", 8080)
    assert scope["root_path"] == "" and scope["scheme"] == "http" and "nbgate.splice" in scope["extensions"]


@pytest.mark.parametrize(
    ("raw", "closes", "fields"),
    [
        (GET, False, {b"content-length": b"2"}),
        (HTTP10, True, {b"content-length": b"2", b"connection": b"close"}),
        (b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", False, {b"connection": b"keep-alive"}),
        (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", True, {b"connection": b"close"}),
    ],
)
def test_whole_answer_is_framed_by_its_length(
    bench: Make, raw: bytes, closes: bool, fields: dict[bytes, bytes]
) -> None:
    client = bench(sender(start(), body(b"ok"))).connect().send(raw)
    (response,) = client.read()
    assert response.body == b"ok" and fields.items() <= response.headers.items() and b"date" in response.headers
    assert client.done is closes


def test_streamed_answer_is_chunked_and_skips_empty_parts(bench: Make) -> None:
    app = sender(start(), body(b"", True), body(b"a" * 20, True), body(b"", True), body(b"b", True), body())
    client = bench(app).connect().send(GET)
    assert client.out.endswith(b"\r\n\r\n14\r\n" + b"a" * 20 + b"\r\n1\r\nb\r\n0\r\n\r\n")
    assert not client.done


def test_streamed_answer_to_http_1_0_ends_with_the_close(bench: Make) -> None:
    raw = b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
    client = bench(sender(start(), body(b"a", True), body(b"b"))).connect().send(raw)
    (response,) = client.read()
    assert response.body == b"ab" and b"transfer-encoding" not in response.headers and client.transport.closed


def test_streamed_answer_with_a_length_is_not_chunked(bench: Make) -> None:
    client = bench(sender(start(content_length="2"), body(b"a", True), body(b"b"))).connect().send(GET + GET)
    assert [r.body for r in client.read()] == [b"ab", b"ab"]


@pytest.mark.parametrize(
    "messages",
    [
        (start(), body(b"xyz")),
        (start(content_length="100"), body()),
        (start(content_length="3"), body(b"x", True), body(b"yz")),
        (start(content_length="100"), body(b"", True), body()),
        (start(), body(b"x", True), body(b"yz")),
    ],
)
def test_head_gets_the_head_alone(bench: Make, messages: tuple[dict[str, Any], ...]) -> None:
    client = bench(sender(*messages)).connect().send(HEAD + HEAD)
    assert client.statuses(0, 1) == [200, 200] and client.out.count(b"HTTP/1.1") == 2
    assert b"xyz" not in client.out and not client.done
    wanted = b"100" if b"100" in client.out else b"3"
    assert client.read(0, 1)[0].headers.get(b"content-length", wanted) == wanted


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("messages", [(body(b"xyz"),), (body(b"xyz", True), body(b"z")), (body(),)])
def test_answers_that_may_have_no_body_have_none(
    bench: Make, status: int, messages: tuple[dict[str, Any], ...]
) -> None:
    client = bench(sender(start(status, content_length="3"), *messages)).connect().send(GET + GET)
    assert client.statuses() == [status, status]
    assert client.out.count(b"\r\n\r\n") == 2 and client.out.endswith(b"\r\n\r\n")
    assert b"content-length" not in client.out and b"chunked" not in client.out


def test_start_message_may_be_shared_by_all_requests(bench: Make) -> None:
    client = bench(sender(start(), body(b"a"))).connect().send(GET * 3)
    assert client.statuses() == [200] * 3


def test_whole_big_answer_is_written_in_one_piece_each(bench: Make) -> None:
    client = bench(sender(start(), body(b"a" * 100_000))).connect().send(GET)
    assert client.read()[0].body == b"a" * 100_000


def test_framing_fields_of_the_app_decide_nothing(bench: Make) -> None:
    app = sender(
        start(transfer_encoding="gzip", connection="upgrade", date="never", keep_alive="timeout=1"), body(b"a")
    )
    (response,) = bench(app).connect().send(GET).read()
    assert b"transfer-encoding" not in response.headers and b"connection" not in response.headers
    assert response.headers[b"date"] != b"never" and b"keep-alive" not in response.headers


def test_app_may_ask_for_the_close(bench: Make) -> None:
    client = bench(sender(start(connection="Close"), body(b"a"))).connect().send(GET * 2)
    assert client.statuses() == [200] and client.read()[0].headers[b"connection"] == b"close"


@pytest.mark.parametrize(
    "messages",
    [
        (),
        (start(),),
        (body(b"x"),),
        (start(), start()),
        (start(101), body()),
        (start(99), body()),
        (start(1000), body()),
        ({"type": "http.response.nonsense"},),
        (start(x_a="b\r\nx-evil: 1"), body()),
        (start(x_a="b\nset-cookie: 1"), body()),
        (start(x_a="b\x00"), body()),
        ({"type": "http.response.start", "status": 200, "headers": [(b"x\r\nevil", b"1")]}, body()),
        ({"type": "http.response.start", "status": 200, "headers": [("x-a", "1")]}, body()),
        (start(content_length="+2"), body(b"ab")),
        (start(content_length="3"), body(b"ab")),
        (start(content_length="1"), body(b"ab")),
        (start(x_a="b\r\n\r\nHTTP/1.1 200 OK"), body(b"x", True), body()),
    ],
)
@pytest.mark.parametrize("is_eager", [False, True])
def test_app_that_breaks_the_rules_before_its_head_gets_a_500_in_its_place(
    bench: Make, messages: tuple[dict[str, Any], ...], is_eager: bool
) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    app.nbgate_eager = is_eager  # type: ignore[attr-defined]
    client = bench(app).connect().send(GET + GET)
    assert client.statuses() == [500] and client.done and b"evil" not in client.out


@pytest.mark.parametrize(
    "messages",
    [
        (start(content_length="3"), body(b"ab", True), body(b"cd")),
        (start(content_length="3"), body(b"ab", True), body()),
        (start(content_length="3"), body(b"ab", True)),
        (start(), body(b"ab", True)),
        (start(), body(b"ab", True), {"type": "http.response.nonsense"}),
        (start(), body(b"ab", True), start()),
    ],
)
def test_app_that_breaks_the_rules_in_mid_body_has_its_answer_cut(bench: Make, messages: tuple[Any, ...]) -> None:
    client = bench(sender(*messages)).connect().send(GET + GET)
    (response,) = client.read()
    assert response.body == b"ab" and not response.whole and client.transport.aborted


def test_app_that_swallows_its_length_error_writes_nothing_beyond_and_is_cut(bench: Make) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send(start(content_length="5"))
        for message in (body(b"ab", True), body(b"x" * 10, True), body(b"y" * 10, True), body()):
            with contextlib.suppress(RuntimeError):
                await send(message)

    client = bench(app).connect().send(GET + GET)
    (response,) = client.read()
    assert response.body == b"ab" and client.transport.aborted


def test_what_an_app_sends_after_its_end_is_dropped(bench: Make) -> None:
    client = bench(sender(start(), body(b"a"), body(b"b"), body(b"c", True))).connect().send(GET + GET)
    assert [r.body for r in client.read()] == [b"a", b"a"]


@pytest.mark.parametrize("exc", [ValueError("no"), asyncio.CancelledError(), StopAsyncIteration(), TimeoutError()])
@pytest.mark.parametrize("is_eager", [False, True])
def test_app_that_raises_at_once_is_a_500(bench: Make, exc: BaseException, is_eager: bool) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise exc

    app.nbgate_eager = is_eager  # type: ignore[attr-defined]
    assert bench(app).connect().send(GET + GET).statuses() == [500]


@pytest.mark.parametrize("is_eager", [False, True])
def test_app_that_raises_before_it_is_a_coroutine_is_a_500(bench: Make, is_eager: bool) -> None:
    def app(scope: dict[str, Any], receive: Any, send: Any) -> Any:
        raise TypeError("not even a coroutine")

    app.nbgate_eager = is_eager  # type: ignore[attr-defined]
    assert bench(app).connect().send(GET).statuses() == [500]


def test_app_that_raises_after_its_answer_harms_no_one(bench: Make) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send)
        raise ValueError("late")

    assert bench(app).connect().send(GET + GET).statuses() == [200, 200]


def test_log_line_of_a_failed_app_cannot_be_forged_by_the_path(bench: Make, caplog: pytest.LogCaptureFixture) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise ValueError("no")

    with caplog.at_level(logging.ERROR):
        bench(app).connect().send(b"GET /%0d%0aFORGED%1b[31m HTTP/1.1\r\nhost: a\r\n\r\n")
    (record,) = caplog.records
    assert "\n" not in record.getMessage() and "\x1b" not in record.getMessage()


def test_body_comes_whole_to_an_app_that_starts_when_it_is_small(bench: Make) -> None:
    messages: list[dict[str, Any]] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        messages.append(await receive())
        await answer(send)

    one = bench(app)
    one.connect().send(post(b"abc"))
    one.connect().send(*[bytes([b]) for b in post(b"abc")])
    one.connect().send(chunked(b"a", b"bc"))
    one.connect().send(GET)
    wanted = {"type": "http.request", "body": b"abc", "more_body": False}
    assert messages == [wanted, wanted, wanted, wanted | {"body": b""}]


def test_big_body_comes_in_parts_and_is_held_to_a_bound(bench: Make) -> None:
    parts: list[int] = []
    go = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await go
        while True:
            message = await receive()
            parts.append(len(message["body"]))
            if not message["more_body"]:
                break
        await answer(send)

    one = bench(app)
    client = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
    sent = 0
    while client.transport.reading:
        client.send(b"x" * 10_000)
        sent += 10_000
    assert sent <= one.settings.eager_body_bytes + 10_000
    one.call(go.wake)
    while sent < 1_000_000:
        assert client.transport.reading
        client.send(b"x" * 10_000)
        sent += 10_000
    assert sum(parts) == 1_000_000 and client.statuses() == [200]


def test_receive_tells_of_the_disconnect_after_the_answer_too(bench: Make) -> None:
    kinds: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await answer(send)
        kinds.append((await receive())["type"])

    client = bench(app).connect().send(GET + GET)
    assert kinds == ["http.disconnect"] * 2 and client.statuses() == [200, 200]


def test_receive_that_a_task_of_the_app_waits_in_ends_with_the_answer(bench: Make) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        listener = asyncio.ensure_future(listen())
        await asyncio.sleep(0)
        await answer(send)
        await listener

    one = bench(app)
    client = one.connect().send(GET + GET)
    one.spin(20)
    assert client.statuses() == [200, 200]


def test_receive_tells_an_eager_app_that_its_client_left(bench: Make) -> None:
    kinds: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        kinds.append((await receive())["type"])
        await answer(send)

    client = bench(app).connect().send(GET)
    client.lose()
    assert kinds == ["http.disconnect"] and client.out == b""
