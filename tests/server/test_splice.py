"""An upstream's answer joined to a client: framing, ends, backpressure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from serverkit import GET, Bench, Client, answer, chunked

Make = Callable[..., Bench]
HTTP10 = b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n"


class Source:
    """An upstream answer that the test plays; `first` runs inside attach."""

    def __init__(
        self, first: Callable[[Any], None] | None = None, on_abort: Callable[[Any], None] | None = None
    ) -> None:
        self.first, self.on_abort = first, on_abort
        self.log: list[str] = []
        self.sink: Any = None

    def attach(self, sink: Any) -> None:
        self.sink = sink
        if self.first is not None:
            self.first(sink)

    def pause(self) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")

    def abort(self) -> None:
        self.log.append("abort")
        if self.on_abort is not None:
            self.on_abort(self.sink)


class Pipe:
    """Pass; with a tail, an error event, and errors on demand."""

    def __init__(self, tail: bytes = b"", event: bytes = b"", fails: str = "") -> None:
        self.tail, self.event, self.fails = tail, event, fails
        self.told: list[str] = []
        self.mid_frame = False

    def feed(self, data: bytes) -> bytes:
        if "feed" in self.fails:
            raise ValueError("pipe.feed")
        return b"" if data == b"hold" else data

    def finish(self) -> bytes:
        if "finish" in self.fails:
            raise ValueError("pipe.finish")
        return self.tail

    def fail(self, exc: Exception) -> bytes:
        self.told.append(type(exc).__name__)
        if "fail" in self.fails:
            raise ValueError("pipe.fail")
        return self.event


class App:
    """Splice the source of the test to each request."""

    def __init__(self, source: Source, pipe: Any = None, length: int | None = None, **more: Any) -> None:
        self.nbgate_eager = True
        self.source, self.pipe, self.length, self.more = source, pipe or Pipe(), length, more
        self.outcomes: list[str] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/plain":
            await answer(send)
            return
        message = {
            "type": "nbgate.splice", "status": 200, "head": b"x-up: 1\r\n", "source": self.source, "pipe": self.pipe,
            "length": self.length, "keepalive": b": ping\n\n", **self.more,
        }  # fmt: skip
        await send(message)
        self.outcomes.append(message["outcome"])


def fed(*parts: bytes, then: str = "") -> Callable[[Any], None]:
    def play(sink: Any) -> None:
        for part in parts:
            sink.feed(part)
        if then == "finish":
            sink.finish()
        elif then == "fail":
            sink.fail(ConnectionError("upstream broke"))

    return play


def begin(bench: Make, app: App, raw: bytes = GET, **settings: Any) -> tuple[Bench, Client]:
    one = bench(app, **settings)
    return one, one.connect().send(raw)


@pytest.mark.parametrize("is_eager", [True, False])
def test_splice_sends_each_piece_as_a_chunk_and_ends_whole(bench: Make, is_eager: bool) -> None:
    app = App(Source(fed(b"a", b"b")), Pipe(tail=b"tail"))
    app.nbgate_eager = is_eager
    one, client = begin(bench, app)
    one.call(app.source.sink.feed, b"c" * 20)
    one.call(app.source.sink.feed, b"hold")
    one.call(app.source.sink.feed, b"d" * 20_000)
    assert one.server.stats.streams == 1
    one.call(app.source.sink.finish)
    (response,) = client.read()
    assert response.whole and response.body == b"ab" + b"c" * 20 + b"d" * 20_000 + b"tail"
    assert b"\r\n2\r\nab\r\n14\r\n" in client.out and response.headers[b"x-up"] == b"1"
    assert app.outcomes == ["complete"] and app.source.log == []
    assert client.send(b"GET /plain HTTP/1.1\r\nhost: a\r\n\r\n").statuses() == [200, 200]


@pytest.mark.parametrize("length", [None, 3])
def test_splice_that_ends_inside_attach_is_one_answer_with_a_length(bench: Make, length: int | None) -> None:
    app = App(Source(fed(b"ab", b"c", then="finish")), length=length)
    _one, client = begin(bench, app, GET * 3)
    assert [(r.body, r.headers[b"content-length"]) for r in client.read()] == [(b"abc", b"3")] * 3
    assert app.outcomes == ["complete"] * 3


def test_splice_with_a_length_is_not_chunked(bench: Make) -> None:
    app = App(Source(fed(b"ab")), length=5)
    one, client = begin(bench, app)
    one.call(app.source.sink.feed, b"cde")
    one.call(app.source.sink.finish)
    assert client.read()[0].body == b"abcde" and b"chunked" not in client.out
    assert not client.done and app.outcomes == ["complete"]


def test_splice_to_http_1_0_ends_with_the_close(bench: Make) -> None:
    app = App(Source(fed(b"ab")))
    one, client = begin(bench, app, HTTP10)
    one.call(app.source.sink.finish)
    assert client.read()[0].body == b"ab" and client.transport.closed and not client.transport.aborted


@pytest.mark.parametrize("raw", [GET, HTTP10])
@pytest.mark.parametrize("length", [None, 50])
@pytest.mark.parametrize("event", [b"", b"data: error\n\n"])
@pytest.mark.parametrize("inside", [True, False])
def test_splice_that_fails_never_looks_whole_without_its_error_event(
    bench: Make, raw: bytes, length: int | None, event: bytes, inside: bool
) -> None:
    app = App(Source(fed(b"ab", then="fail" if inside else "")), Pipe(event=event), length=length)
    one, client = begin(bench, app, raw + GET)
    if not inside:
        one.call(app.source.sink.fail, ConnectionError("upstream broke"))
    (response,) = client.read()
    assert app.outcomes == ["upstream_failed"] and client.done
    if length is None and event:
        assert response.body == b"ab" + event and response.whole
    elif length is None and raw is HTTP10:
        assert client.transport.aborted or inside
    else:
        assert response.body == b"ab" and not response.whole
    assert app.pipe.told == ["ConnectionError"]


@pytest.mark.parametrize("inside", [True, False])
def test_splice_shorter_than_its_length_is_cut_and_failed(bench: Make, inside: bool) -> None:
    app = App(Source(fed(b"ab", then="finish" if inside else "")), length=5)
    one, client = begin(bench, app, GET + GET)
    if not inside:
        one.call(app.source.sink.finish)
    (response,) = client.read()
    assert response.headers[b"content-length"] == b"5" and response.body == b"ab"
    assert app.outcomes == ["upstream_failed"] and client.done


@pytest.mark.parametrize("inside", [True, False])
def test_splice_longer_than_its_length_writes_nothing_beyond_it(bench: Make, inside: bool) -> None:
    app = App(
        Source(fed(b"ab", b"cdefgh", b"evil", then="finish") if inside else fed(b"ab")), Pipe(event=b"EV"), length=5
    )
    one, client = begin(bench, app, GET + GET)
    if not inside:
        one.call(app.source.sink.feed, b"cdefgh")
        one.call(app.source.sink.feed, b"evil")
        one.call(app.source.sink.finish)
    (response,) = client.read()
    assert response.body == b"ab" and not response.whole and client.out.endswith(b"\r\n\r\nab")
    assert app.outcomes == ["upstream_failed"] and app.source.log == ["abort"]


@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize("then", ["", "finish", "fail"])
def test_splice_to_a_head_request_has_no_body(bench: Make, length: int | None, then: str) -> None:
    app = App(Source(fed(then=then)), Pipe(event=b"EV"), length=length)
    _one, client = begin(bench, app, HEAD)
    assert client.statuses(0) == [200] and client.out.endswith(b"\r\n\r\n")
    assert client.read(0)[0].headers.get(b"content-length") == (None if length is None else b"3")
    assert app.outcomes == ["upstream_failed" if then == "fail" else "complete"]
    assert client.done is (then == "fail") and app.source.log == ([] if then else ["abort"])


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("then", ["", "finish"])
def test_splice_of_an_answer_without_body_has_none(bench: Make, status: int, then: str) -> None:
    app = App(Source(fed(b"xyz", then=then)), length=3, status=status)
    _one, client = begin(bench, app, GET + GET)
    assert client.statuses() == [status, status] and b"xyz" not in client.out
    assert app.outcomes == ["complete"] * 2


def test_splice_source_that_goes_on_after_any_end_writes_nothing(bench: Make) -> None:
    app = App(Source(fed(b"ab")))
    one, client = begin(bench, app)
    one.call(app.source.sink.finish)
    before = client.out
    for act in (lambda s: s.feed(b"late"), lambda s: s.finish(), lambda s: s.fail(ValueError()), lambda s: s.drain()):
        one.call(act, app.source.sink)
    assert client.out == before and app.outcomes == ["complete"] and app.pipe.told == []


@pytest.mark.parametrize("inside", ["fail", "finish"])
def test_splice_source_that_goes_on_after_an_end_inside_attach_adds_nothing(bench: Make, inside: str) -> None:
    def play(sink: Any) -> None:
        fed(b"ab", then=inside)(sink)
        fed(b"late", then="finish")(sink)
        sink.fail(ValueError())

    app = App(Source(play))
    _one, client = begin(bench, app)
    assert b"late" not in client.out and app.outcomes == ["complete" if inside == "finish" else "upstream_failed"]


@pytest.mark.parametrize("is_eager", [True, False])
@pytest.mark.parametrize("how", ["eof", "lose"])
def test_splice_ends_when_its_client_leaves(bench: Make, is_eager: bool, how: str) -> None:
    app = App(Source(fed(b"ab"), on_abort=lambda sink: sink.fail(ConnectionError("aborted"))))
    app.nbgate_eager = is_eager
    one, client = begin(bench, app)
    getattr(client, how)()
    one.spin()
    assert app.outcomes == ["client_gone"] and app.source.log == ["abort"] and app.pipe.told == []
    one.call(app.source.sink.feed, b"late")
    assert one.gauges() == (0,) * 8


def test_splice_after_its_client_left_aborts_the_source_unread(bench: Make) -> None:
    app = App(Source(fed(b"ab")))
    inner = app.__call__

    class Late(App):
        async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                await inner(scope, receive, send)

    _one, client = begin(bench, Late(app.source))
    client.lose()
    assert app.outcomes == ["client_gone"] and app.source.log == ["abort"] and client.out == b""


@pytest.mark.parametrize("fails", ["feed", "finish", "feed fail", "finish fail"])
@pytest.mark.parametrize("inside", [True, False])
def test_splice_survives_a_pipe_that_raises(bench: Make, fails: str, inside: bool) -> None:
    play = fed(b"ab", then="finish")
    app = App(Source(play if inside else None), Pipe(event=b"EV", fails=fails))
    one, client = begin(bench, app)
    if not inside:
        one.call(play, app.source.sink)
    assert app.outcomes == ["upstream_failed"] and app.source.log == ["abort"] and client.done
    assert client.read()[0].body.endswith(b"" if "fail" in fails.split() else b"EV")


def test_splice_whose_source_cannot_be_attached_is_a_500(bench: Make) -> None:
    def play(sink: Any) -> None:
        raise ConnectionError("gone already")

    _one, client = begin(bench, App(Source(play)))
    assert client.statuses() == [500]


def test_splice_pauses_its_source_when_the_client_stops_and_resumes_it(bench: Make) -> None:
    app = App(Source())
    one, client = begin(bench, app)
    client.transport.stuck = True
    one.call(app.source.sink.feed, b"x" * 70_000)
    assert app.source.log == ["pause"]
    client.take(10_000)
    assert app.source.log == ["pause"]
    client.take()
    assert app.source.log == ["pause", "resume"]
    one.call(app.source.sink.finish)
    assert client.read()[0].whole


def test_splice_begun_on_a_full_connection_starts_paused(bench: Make) -> None:
    app = App(Source(fed(b"x" * 200_000)))
    one = bench(app)
    client = one.connect()
    client.transport.stuck = True
    client.send(GET)
    assert app.source.log == ["pause"]
    client.take()
    assert app.source.log == ["pause", "resume"]


def test_splice_source_that_feeds_and_ends_inside_resume_is_safe(bench: Make) -> None:
    app = App(Source())
    source = app.source

    def resume() -> None:
        source.log.append("resume")
        source.sink.feed(b"y" * 70_000)
        source.sink.finish()

    source.resume = resume  # type: ignore[method-assign]
    one, client = begin(bench, app)
    client.transport.stuck = True
    one.call(source.sink.feed, b"x" * 70_000)
    client.take()
    client.take()
    assert client.read()[0].body == b"x" * 70_000 + b"y" * 70_000 and app.outcomes == ["complete"]


def test_splice_of_the_next_request_is_not_resumed_while_the_client_is_stuck(bench: Make) -> None:
    app = App(Source(fed(b"x" * 200_000)))
    one = bench(app)
    client = one.connect()
    client.transport.stuck = True
    client.send(GET + GET)
    first, app.source = app.source, Source(fed(b"y" * 200_000))
    one.call(first.sink.finish)
    assert app.source.sink is None  # not begun: the client has not read the first answer
    client.take()
    assert app.source.log == ["pause"] and client.protocol.paused
    client.take()
    assert app.source.log == ["pause", "resume"]


def test_splice_to_a_client_that_never_reads_is_cut_in_spite_of_keepalives(bench: Make) -> None:
    app = App(Source())
    one, client = begin(bench, app, write_timeout_s=60.0, stream_keepalive_s=15.0, tick_s=1.0)
    client.transport.stuck = True
    one.call(app.source.sink.feed, b"x" * 70_000)
    one.advance(65.0, step=1.0)
    assert client.transport.aborted and app.outcomes == ["client_gone"] and one.server.stats.stalled == 1


def test_splice_sends_keepalives_in_silence_only(bench: Make) -> None:
    app = App(Source())
    one, client = begin(bench, app, stream_keepalive_s=15.0, tick_s=1.0)
    one.advance(14.0, step=1.0)
    assert b"ping" not in client.out
    one.advance(2.0, step=1.0)
    assert client.out.count(b": ping") == 1
    one.call(app.source.sink.feed, b"data")
    one.advance(14.0, step=1.0)
    assert client.out.count(b": ping") == 1
    one.advance(10.0, step=1.0)
    assert client.out.count(b": ping") == 2
    app.pipe.mid_frame = True
    one.advance(50.0, step=1.0)
    assert client.out.count(b": ping") == 2
    one.call(app.source.sink.finish)
    assert client.read()[0].body == b": ping\n\ndata: ping\n\n"


def test_splice_with_a_length_gets_no_keepalive(bench: Make) -> None:
    app = App(Source(), length=5)
    one, client = begin(bench, app, stream_keepalive_s=5.0, tick_s=1.0)
    one.advance(20.0, step=1.0)
    assert b"ping" not in client.out


def test_splice_that_is_drained_ends_with_the_error_event(bench: Make) -> None:
    app = App(Source(fed(b"ab"), on_abort=lambda sink: sink.fail(ConnectionError("aborted"))), Pipe(event=b"bye"))
    one, client = begin(bench, app)
    for splice in tuple(one.server.splices):
        one.call(splice.drain)
    assert client.read()[0].body == b"abbye" and client.read()[0].whole and client.done
    assert app.outcomes == ["drained"] and app.pipe.told == ["Drained"] and app.source.log == ["abort"]


@pytest.mark.parametrize("first", ["whole", "splice", "start"])
def test_splice_is_refused_when_an_answer_has_begun(bench: Make, first: str) -> None:
    app = App(Source(fed(b"ab", then="finish")))
    refused: list[str] = []

    class Twice(App):
        async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            if first == "whole":
                await answer(send)
            elif first == "splice":
                await app(scope, receive, send)
            else:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            try:
                await app(scope, receive, send)
            except RuntimeError:
                refused.append(first)

    _one, client = begin(bench, Twice(app.source), GET + GET)
    assert client.statuses() == ([500] if first == "start" else [200, 200])
    assert refused == [first] * (1 if first == "start" else 2)


def test_splice_whose_task_is_cancelled_aborts_its_source_and_cuts(bench: Make) -> None:
    app = App(Source(fed(b"ab")))

    class Impatient(App):
        async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            task = asyncio.ensure_future(app(scope, receive, send))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    plain = Impatient(app.source)
    plain.nbgate_eager = False
    one, client = begin(bench, plain)
    one.spin(20)
    assert app.source.log == ["abort"] and client.transport.aborted
    assert not client.read()[0].whole and one.gauges() == (0,) * 8


def test_splice_answers_without_the_request_body_and_closes(bench: Make) -> None:
    app = App(Source(fed(b"ab")))
    one, client = begin(bench, app, b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n" + b"x" * 70_000)
    one.call(app.source.sink.finish)
    assert client.read()[0].headers[b"connection"] == b"close" and client.transport.eof_sent


def test_splices_in_a_pipeline_answer_in_order(bench: Make) -> None:
    app = App(Source())
    one, client = begin(bench, app, b"".join(chunked(b"%d" % n) for n in range(20)))
    for n in range(20):
        source, app.source = app.source, Source()
        one.call(source.sink.feed, b"answer %d" % n)
        one.call(source.sink.finish)
    assert [r.body for r in client.read()] == [b"answer %d" % n for n in range(20)]
