"""Properties: whatever is sent, however it is cut, answers come in order."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from serverkit import Bench, Client, answer, eager, read_all, read_body

from nbgate.server.listener import Settings
from nbgate.server.waiter import Waiter

QUIET = Settings(tick_s=3600.0)


async def work(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Echo; the path says how: whole, streamed, deaf, or after a turn of the loop."""
    how = scope["path"][1:2]
    if how == "d":
        await answer(send, scope["raw_path"])
        return
    if how == "s":
        await asyncio.sleep(0)
    body = await read_body(receive)
    if how == "p":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (scope["raw_path"], b"|", body):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})
    else:
        await answer(send, scope["raw_path"] + b"|" + body)


@eager
async def eager_work(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await work(scope, receive, send)


requests = st.tuples(
    st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT"]),
    st.sampled_from(b"wpsd"),
    st.binary(max_size=30),
    st.sampled_from(["length", "chunks", "expect"]),
    st.booleans(),
)
Request = tuple[bytes, int, bytes, str, bool]


def encode(number: int, request: Request) -> bytes:
    method, how, body, framing, blank = request
    head = (b"\r\n" if blank else b"") + b"%b /%c%d HTTP/1.1\r\nHost: a\r\nX-N: %d\r\n" % (method, how, number, number)
    if framing == "chunks":
        half = len(body) // 2
        parts = b"".join(b"%x;e=1\r\n%b\r\n" % (len(p), p) for p in (body[:half], body[half:]) if p)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\nX-T: t\r\n\r\n"
    if framing == "expect" and body:
        head += b"Expect: 100-continue\r\n"
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(m % (len(data) + 1) for m in marks)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def run(app: Any, pieces: list[bytes]) -> tuple[Client, bytes, bool]:
    bench = Bench(app, QUIET)
    client = bench.connect().send(*pieces)
    bench.spin(400)
    out, done = client.out, client.done
    bench.close()
    return client, out, done


@given(st.lists(requests, min_size=1, max_size=6), st.lists(st.integers(0, 2000), max_size=25), st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_valid_requests_get_their_answers_in_order_wherever_they_are_cut(
    sent: list[Request], marks: list[int], use_task: bool
) -> None:
    # An answer before the end of a body rightly closes, and a cut decides if there is one: such come last.
    sent = [r for r in sent if not (chr(r[1]) == "d" and r[3] == "expect")]
    raw = b"".join(encode(n, r) for n, r in enumerate(sent))
    _client, out, done = run(work if use_task else eager_work, cut(raw, marks))
    heads = tuple(n for n, r in enumerate(sent) if r[0] == b"HEAD")
    finals = [r for r in read_all(out, heads, done) if r.status != 100]
    assert [r.status for r in finals] == [200] * len(sent)
    for number, (got, request) in enumerate(zip(finals, sent, strict=True)):
        method, how, body, _framing, _blank = request
        path = b"/%c%d" % (how, number)
        wanted = b"" if method == b"HEAD" else path if chr(how) == "d" else path + b"|" + body
        assert got.body == wanted and got.whole
    assert not done


@given(
    st.lists(requests, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
    st.lists(st.integers(0, 2000), max_size=10),
    st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_requests_raise_nothing_and_yield_no_more_answers_than_requests(
    sent: list[Request], mutations: list[tuple[int, bytes, int]], marks: list[int], use_task: bool
) -> None:
    seen = 0

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        nonlocal seen
        seen += 1
        try:
            await work(scope | {"method": "GET"}, receive, send)
        except ConnectionResetError:
            pass

    app.nbgate_eager = not use_task  # type: ignore[attr-defined]
    raw = b"".join(encode(n, (b"POST", *r[1:])) for n, r in enumerate(sent))
    for at, new, gone in mutations:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + gone :]
    _client, out, done = run(app, cut(raw, marks) if raw else [])
    if b"HEAD" in raw:
        return
    finals = [r.status for r in read_all(out, (), done) if r.status != 100]
    refusals = [s for s in finals if s >= 400]
    assert len(refusals) <= 1 and (not refusals or (refusals == finals[-1:] and done))
    assert len(finals) <= seen + 1


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_and_yield_at_most_one_answer(data: bytes, marks: list[int]) -> None:
    _client, out, done = run(eager_work, cut(data, marks) if data else [])
    assert len(read_all(out, (), done)) <= 1


class Connections(RuleBasedStateMachine):
    """Clients come, send, stall, leave; apps wait, answer, fail: gauges stay true."""

    @initialize(use_task=st.booleans())
    def begin(self, use_task: bool) -> None:
        self.waiting: list[Waiter] = []

        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            waiter = Waiter()
            self.waiting.append(waiter)
            if scope["path"] == "/wait":
                await asyncio.wait([asyncio.ensure_future(_hold(waiter))]) if use_task else await waiter
            if scope["path"] == "/fail":
                raise ValueError("on purpose")
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"x" * 30_000, "more_body": True})
            await send({"type": "http.response.body"})

        async def _hold(waiter: Waiter) -> None:
            await waiter

        app.nbgate_eager = not use_task  # type: ignore[attr-defined]
        self.bench = Bench(app, QUIET)
        self.clients: list[Client] = []

    @rule(stuck=st.booleans())
    def connect(self, stuck: bool) -> None:
        client = self.bench.connect()
        client.transport.stuck = stuck
        self.clients.append(client)

    @precondition(lambda self: self.clients)
    @rule(
        data=st.data(),
        path=st.sampled_from([b"wait", b"fail", b"go"]),
        body=st.sampled_from([b"", b"x", b"y" * 70_000]),
    )
    def request(self, data: Any, path: bytes, body: bytes) -> None:
        client = data.draw(st.sampled_from(self.clients))
        raw = b"POST /%b HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (path, len(body), body)
        end = data.draw(st.sampled_from([len(raw), len(raw) - 1, 20]))
        client.send(raw[:10], raw[10:end])

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        client = self.clients.pop(data.draw(st.integers(0, len(self.clients) - 1)))
        if not client.transport.lost:
            data.draw(st.sampled_from([client.eof, client.lose]))()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), size=st.sampled_from([None, 1, 50_000]))
    def take(self, data: Any, size: int | None) -> None:
        data.draw(st.sampled_from(self.clients)).take(size)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def wake(self, data: Any) -> None:
        self.bench.call(self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))).wake)

    @rule(seconds=st.sampled_from([1.0, 11.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.bench.advance(seconds, step=seconds / 2)

    @invariant()
    def gauges_are_true(self) -> None:
        if hasattr(self, "bench"):
            server, stats = self.bench.server, self.bench.server.stats
            assert stats.connections == len(server.connections) <= len(self.bench.clients)
            assert stats.active_requests >= sum(p.cycle is not None for p in server.connections)
            assert stats.body_bytes >= 0
            for client in self.clients:
                read_all(client.out, (), client.done)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self._wake_all()
            for client in self.clients:
                if not client.transport.lost:
                    client.lose()
            self._wake_all()  # the end of one request may have begun the next
            self.bench.spin(20)
            self.bench.close()

    def _wake_all(self) -> None:
        for _ in range(3):
            for waiter in self.waiting:
                self.bench.call(waiter.wake)
            self.bench.spin(5)


TestConnections = Connections.TestCase
TestConnections.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
