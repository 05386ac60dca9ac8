"""One connection: reading, order, bounds, deadlines; no socket and no sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from serverkit import GET, Bench, answer, chunked, eager, post, read_body

from nbgate.server.waiter import Waiter

Make = Callable[..., Bench]


@eager
async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await answer(send, scope["raw_path"] + b"|" + await read_body(receive))


@eager
async def deaf(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer without a look at the body."""
    await answer(send, b"early")


class Gate:
    """An app that answers each request when it is let."""

    nbgate_eager = True

    def __init__(self, body: bytes = b"ok", read: bool = True) -> None:
        self.waiters: list[Waiter] = []
        self.seen: list[str] = []
        self.left: list[str] = []
        self.body = body
        self.read = read

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        waiter = Waiter()
        self.waiters.append(waiter)
        try:
            await waiter
            if self.read:
                await read_body(receive)
        except asyncio.CancelledError:
            self.left.append(scope["path"])
            raise
        await answer(send, self.body)


def get(path: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % path


def test_pipelined_requests_are_answered_in_order_by_an_eager_app_without_recursion(bench: Make) -> None:
    client = bench(echo).connect().send(b"".join(get(b"/%d" % n) for n in range(5000)))
    responses = client.read()
    assert [r.body for r in responses] == [b"/%d|" % n for n in range(5000)]


def test_pipelined_bodies_are_answered_in_order_by_an_eager_app_without_recursion(bench: Make) -> None:
    raw = b"".join(post(b"x" * (n % 7), b"/%d" % n) + chunked(b"y" * (n % 5 + 1)) for n in range(1500))
    responses = bench(echo).connect().send(raw).read()
    assert [r.body for r in responses[::2]] == [b"/%d|%b" % (n, b"x" * (n % 7)) for n in range(1500)]


def test_pipelined_requests_wait_unparsed_for_the_answer_before_them(bench: Make) -> None:
    gate = Gate()
    one = bench(gate)
    client = one.connect().send(get(b"/a") + get(b"/b"), get(b"/c"))
    assert gate.seen == ["/a"]
    for number, path in enumerate(["/a", "/b", "/c"]):
        assert gate.seen[-1] == path
        one.call(gate.waiters[number].wake)
    assert client.statuses() == [200, 200, 200]


def test_many_held_requests_are_answered_when_woken_without_recursion(bench: Make) -> None:
    first = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/first":
            await first
        await answer(send)

    one = bench(app)
    client = one.connect().send(get(b"/first"), *[get(b"/next") * 20] * 100)
    assert client.out == b""
    one.call(first.wake)
    assert client.statuses() == [200] * 2001


def test_pipelined_input_beyond_its_bound_closes_after_the_answer_and_lingers(bench: Make) -> None:
    gate = Gate()
    one = bench(gate)
    client = one.connect().send(get(b"/a"), *[b"x" * 1000] * 200)
    assert len(client.protocol._pending) <= one.settings.pipelined_bytes
    assert not client.done
    one.call(gate.waiters[0].wake)
    assert client.statuses() == [200]
    assert client.transport.eof_sent and not client.transport.closed
    one.advance(2.0)
    assert client.transport.closed


def test_unread_answers_stop_the_parsing_of_pipelined_requests(bench: Make) -> None:
    big = b"z" * 30_000

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, big)

    one = bench(app)
    client = one.connect()
    client.transport.stuck = True
    client.send(GET * 500)
    assert client.transport.held < 4 * len(big)
    assert len(client.protocol._pending) < len(GET) * 500
    while client.transport.held:
        client.take()
    assert len(client.read()) == 500


def test_unread_answers_stop_the_reading_of_further_requests(bench: Make) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, b"z" * 100_000)

    one = bench(app)
    client = one.connect()
    client.transport.stuck = True
    client.send(GET)
    sent = 1
    while client.transport.reading:
        client.send(GET * 100)
        sent += 100
    assert len(client.protocol._pending) < one.settings.pipelined_bytes + 100 * len(GET)
    for _ in range(sent):
        client.take()
    assert client.transport.reading
    assert not client.done or client.protocol.closing


def test_client_that_never_reads_is_cut_and_its_app_released(bench: Make) -> None:
    ended: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10):
            await send({"type": "http.response.body", "body": b"z" * 50_000, "more_body": True})
        ended.append("end")

    for eager_app in (False, True):
        app.nbgate_eager = eager_app  # type: ignore[attr-defined]
        one = bench(app, write_timeout_s=60.0)
        client = one.connect()
        client.transport.stuck = True
        client.send(GET)
        assert client.protocol.paused
        one.advance(59.0)
        assert not client.transport.aborted
        one.advance(2.0)
        assert client.transport.aborted and one.server.stats.stalled == 1
        assert one.gauges() == (0,) * 8
    assert ended == ["end"]  # a Task goes on, and what it sends is dropped; an eager app is cancelled


def test_client_that_reads_slowly_but_steadily_is_not_cut(bench: Make) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, b"z" * 1_000_000)

    one = bench(app, write_timeout_s=60.0)
    client = one.connect()
    client.transport.stuck = True
    client.send(GET)
    for _ in range(18):
        one.advance(50.0)
        client.take(50_000)
    assert not client.transport.aborted


@pytest.mark.parametrize("extra", [b"", b"connection: close\r\n"])
def test_closed_connection_with_unread_answer_does_not_stay_for_ever(bench: Make, extra: bytes) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, b"z" * 40_000)

    one = bench(app, write_timeout_s=60.0, keepalive_s=75.0)
    client = one.connect()
    client.transport.stuck = True
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n%b\r\n" % extra)
    assert not client.protocol.paused  # less than the mark: nothing stalls, yet nobody reads
    one.advance(300.0)
    assert client.transport.aborted
    assert one.server.stats.connections == 0


def test_early_answer_to_a_slow_reader_is_not_cut_by_the_linger(bench: Make) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, b"z" * 300_000)

    one = bench(app)
    client = one.connect()
    client.transport.stuck = True
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n")
    assert client.transport.eof_sent
    for _ in range(10):
        one.advance(20.0)
        client.take(20_000)
        assert not client.transport.aborted
    client.take()
    one.advance(200.0)
    assert client.transport.closed


def test_head_that_does_not_come_is_answered_408(bench: Make) -> None:
    one = bench(echo, head_timeout_s=10.0)
    silent, partial = one.connect(), one.connect().send(b"GET / HT")
    for _ in range(9):
        one.advance(1.0)
        partial.send(b"T")
    assert (not silent.done and not partial.protocol.closing) or partial.statuses() == [400]
    one.advance(2.0)
    assert silent.statuses() == [408]
    assert one.server.stats.timeouts >= 1


def test_head_dripping_in_does_not_move_its_deadline(bench: Make) -> None:
    one = bench(echo, head_timeout_s=10.0)
    client = one.connect().send(b"GET / HTTP/1.1\r\nx-a: ")
    for _ in range(9):
        one.advance(1.0)
        client.send(b"b")
    assert not client.done
    one.advance(1.5)
    assert client.statuses() == [408]


def test_empty_lines_do_not_move_the_deadline(bench: Make) -> None:
    one = bench(echo, head_timeout_s=10.0, keepalive_s=20.0)
    client = one.connect()
    for _ in range(11):
        one.advance(1.0)
        client.send(b"\r\n")
    assert client.statuses() == [408]
    kept = one.connect().send(GET)
    for _ in range(21):
        one.advance(1.0)
        kept.send(b"\r", b"\n")
    assert kept.statuses() == [200] and kept.transport.closed


def test_idle_connection_is_closed_without_a_word_after_its_keepalive(bench: Make) -> None:
    one = bench(echo, keepalive_s=75.0)
    client = one.connect().send(GET)
    one.advance(74.0)
    assert not client.done
    one.advance(2.0)
    assert client.statuses() == [200] and client.transport.closed
    assert one.server.stats.timeouts == 0


@pytest.mark.parametrize(("held", "idle_s"), [(17, 75.0), (18, 38.5), (19, 2.0), (20, 2.0)])
def test_idle_connections_go_sooner_the_nearer_the_bound(bench: Make, held: int, idle_s: float) -> None:
    one = bench(echo, keepalive_s=75.0, crowded_keepalive_s=2.0, max_connections=20, head_timeout_s=99.0)
    clients = [one.connect().send(GET) for _ in range(held - 1)]
    reading = one.connect().send(b"GET / HT")
    one.advance(idle_s - 0.5)
    assert not any(c.done for c in clients)
    one.advance(1.0)
    assert all(c.done for c in clients) and not reading.done


def test_body_that_stops_is_answered_408(bench: Make) -> None:
    one = bench(echo, body_timeout_s=30.0, body_min_bytes_per_s=0)
    client = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n1234")
    one.advance(29.0)
    assert not client.done
    one.advance(2.0)
    assert client.statuses() == [408] and client.done


def test_body_that_drips_below_the_least_rate_is_answered_408(bench: Make) -> None:
    one = bench(echo, body_timeout_s=30.0, body_min_bytes_per_s=500, body_grace_s=20.0)
    slow = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999\r\n\r\n")
    quick = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999\r\n\r\n")
    for _ in range(21):
        one.advance(1.0)
        slow.send(b"x" * 10)
        quick.send(b"x" * 600)
    assert slow.statuses() == [408]
    assert not quick.done


@pytest.mark.parametrize("framing", [b"content-length: 200000", b"transfer-encoding: chunked"])
def test_body_is_not_too_slow_while_the_app_does_not_read(bench: Make, framing: bytes) -> None:
    gate = Gate()
    one = bench(gate)
    client = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\n%b\r\n\r\n" % framing)
    client.send(b"x" * 70_000 if b"length" in framing else b"20000\r\n" + b"x" * 70_000, b"x" * 64)
    assert not client.transport.reading
    one.advance(1000.0)
    assert not client.done
    one.call(gate.waiters[0].wake)
    assert client.transport.reading
    one.advance(15.0)
    assert not client.done  # the clock began anew
    one.advance(20.0)
    assert client.statuses() == [408]


def test_expected_body_has_no_deadline_before_100_continue(bench: Make) -> None:
    gate = Gate()
    one = bench(gate)
    client = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
    one.advance(100.0)
    assert client.out == b""
    one.call(gate.waiters[0].wake)
    assert client.statuses() == [100]
    one.advance(15.0)
    client.send(b"abc")
    assert client.statuses() == [100, 200]


def test_expected_body_that_comes_unasked_gets_no_100(bench: Make) -> None:
    gate = Gate()
    one = bench(gate)
    client = one.connect().send(
        b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n", b"a"
    )
    one.call(gate.waiters[0].wake)
    client.send(b"bc")
    assert client.statuses() == [200]


@pytest.mark.parametrize("rest", [b"", b"abc", b"abcdefgh" + GET])
def test_early_answer_to_an_expected_body_ends_the_connection(bench: Make, rest: bytes) -> None:
    one = bench(deaf)
    head = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 90000\r\n\r\n"
    for pieces in ((head + rest,), (head, rest)):
        client = one.connect().send(*pieces)
        assert client.statuses() == [200] and client.transport.eof_sent
        assert client.read()[0].headers[b"connection"] == b"close"


def test_lingering_ends_at_its_bytes_and_at_its_time(bench: Make) -> None:
    one = bench(deaf, linger_bytes=1000, linger_s=1.0)
    flood = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n", b"x" * 900)
    assert flood.transport.eof_sent and not flood.transport.closed
    flood.send(b"x" * 200)
    assert flood.transport.closed
    silent = one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n")
    one.advance(1.5)
    assert silent.transport.closed


def test_connections_past_the_bound_get_503(bench: Make) -> None:
    one = bench(echo, max_connections=2)
    first, second, third = one.connect(), one.connect(), one.connect()
    assert third.statuses() == [503] and third.done
    assert first.send(GET).statuses() == second.send(GET).statuses() == [200]
    assert third.send(GET).statuses() == [503]
    first.lose()
    one.advance(2.0)
    assert one.connect().send(GET).statuses() == [200]


def test_connections_past_the_bound_of_an_address_get_503(bench: Make) -> None:
    one = bench(echo, max_connections_per_address=1)
    first, other = one.connect(("192.0.2.1", 1)), one.connect(("192.0.2.2", 1))
    refused, local = one.connect(("192.0.2.1", 2)), one.connect(None)
    assert refused.statuses() == [503]
    assert first.send(GET).statuses() == other.send(GET).statuses() == local.send(GET).statuses() == [200]
    refused.lose()
    assert one.connect(("192.0.2.1", 3)).statuses() == [503]
    first.lose()
    one.advance(2.0)
    assert one.connect(("192.0.2.1", 4)).send(GET).statuses() == [200]
    assert one.server.stats.refused == 2


def test_last_allowed_request_says_close(bench: Make) -> None:
    client = bench(echo, max_requests_per_connection=2).connect().send(GET * 3)
    first, second = client.read()
    assert b"connection" not in first.headers and second.headers[b"connection"] == b"close"
    assert client.done


@pytest.mark.parametrize("flag", ["overloaded", "draining"])
def test_no_connection_is_kept_when_the_server_is_in_need(bench: Make, flag: str) -> None:
    one = bench(echo)
    setattr(one.server, flag, True)
    client = one.connect().send(GET)
    assert client.read()[0].headers[b"connection"] == b"close" and client.transport.closed


def test_body_memory_bound_refuses_the_body_that_passes_it(bench: Make) -> None:
    gate = Gate()
    one = bench(gate, body_memory_bytes=1000)
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n"
    first = one.connect().send(head, b"x" * 899)
    second = one.connect().send(head, b"x" * 101)
    assert not first.done and not second.done
    assert second.send(b"x").statuses() == [503] and second.done
    assert one.server.stats.body_bytes == 899
    first.send(b"x")
    one.call(gate.waiters[0].wake)
    assert first.statuses() == [200] and one.server.stats.body_bytes == 0


def test_fin_while_an_answer_is_under_way_means_the_client_is_gone(bench: Make) -> None:
    gate = Gate()
    one = bench(gate)
    client = one.connect().send(get(b"/a") + get(b"/b"))
    client.eof()
    assert gate.left == ["/a"] == gate.seen
    assert client.out == b""
    one.call(gate.waiters[0].wake)  # a late wake is without effect
    assert one.gauges() == (0,) * 8


def test_client_that_leaves_in_mid_body_ends_the_app_before_it_starts(bench: Make) -> None:
    gate = Gate()
    one = bench(gate)
    one.connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n1234").lose()
    assert gate.seen == [] and one.gauges() == (0,) * 8


def test_bad_chunk_after_an_early_answer_does_not_take_the_answer_back(bench: Make) -> None:
    done = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, b"early")
        await done

    one = bench(app)
    client = one.connect().send(
        b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n", b"zz\r\n"
    )
    assert client.statuses() == [200]
    assert client.transport.eof_sent and not client.transport.aborted


@pytest.mark.parametrize("framing", [b"content-length", b"transfer-encoding", b"x-none"])
def test_bad_chunk_in_mid_answer_cuts_and_says_nothing_into_it(bench: Make, framing: bytes) -> None:
    headers = [(b"content-length", b"100")] if framing == b"content-length" else []
    done = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await done

    version = b"1.1" if framing != b"x-none" else b"1.0"
    raw = b"POST / HTTP/%b\r\nhost: a\r\ncontent-length: 90000\r\n\r\n" % version
    one = bench(app, body_timeout_s=5.0)
    client = one.connect().send(raw)
    before = client.out
    assert before.endswith((b"part", b"part\r\n"))
    one.advance(6.0)
    assert client.transport.aborted and client.out == before


def test_reject_words_are_the_apps_own_and_know_the_target(bench: Make) -> None:
    asked: list[tuple[int, str, bytes]] = []

    class App(Gate):
        def nbgate_reject(self, status: int, code: str, message: str, target: bytes) -> tuple[bytes, bytes]:
            asked.append((status, code, target))
            return b"content-type: application/json\r\n", b"{}"

    one = bench(App())
    client = one.connect().send(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n")
    assert client.read()[0].headers[b"content-type"] == b"application/json"
    assert asked == [(413, "request_too_large", b"/v1/x")]


def test_reject_of_a_head_request_has_no_body(bench: Make) -> None:
    client = bench(echo).connect().send(b"HEAD / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n")
    assert client.out.endswith(b"\r\n\r\n") and client.statuses(0) == [413]
