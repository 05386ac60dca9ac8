"""Times of nbgate's own Python on the way of a call, without the kernel.

Run `python -m pytest bench/micro --benchmark-only -o addopts=`; with
NBGATE_TEST_TREE=build/compiled on the rooms that `make compile` built.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, os.environ.get("NBGATE_TEST_TREE", str(Path(__file__).resolve().parents[2])))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from path import ANSWER, BODY, CHUNK, Path_, request

from nbgate import body as bodies
from nbgate.logs import CallRecord, line_of
from nbgate.meter import JsonPipe, SsePipe
from nbgate.server.head import RequestHead

Bench = Callable[..., Any]


@pytest.fixture
def path() -> Iterator[Path_]:
    made = Path_()
    asyncio._set_running_loop(made.loop)
    gc.collect()
    gc.freeze()
    yield made
    asyncio._set_running_loop(None)
    gc.unfreeze()
    made.close()


def test_json_call(benchmark: Bench, path: Path_) -> None:
    benchmark(path.json)
    assert b" 200 OK" in path.out.last


def test_sse_chunk(benchmark: Bench, path: Path_) -> None:
    path.begin_stream()
    benchmark(path.chunk)
    path.end_stream()


def test_stream_of_51_chunks(benchmark: Bench, path: Path_) -> None:
    def stream() -> None:
        path.begin_stream()
        for _ in range(50):
            path.chunk()
        path.end_stream()

    benchmark(stream)


def test_head_of_known_lines(benchmark: Bench) -> None:
    raw = request(BODY)
    head = raw[: raw.index(b"\r\n\r\n") + 4]
    first = RequestHead()
    first.feed(head)
    first.finish(100, head)
    first.remember(head[:-4])
    assert benchmark(lambda: RequestHead().recall(head[:-4], 100))


def test_head_parsed(benchmark: Bench) -> None:
    raw = request(BODY)
    head = raw[: raw.index(b"\r\n\r\n") + 4]

    def parse() -> int:
        made = RequestHead()
        made.feed(head)
        made.finish(100, head)
        return made.length

    assert benchmark(parse) == len(BODY)


@pytest.mark.parametrize("size", [70, 38_000, 400_000])
def test_body_read(benchmark: Bench, size: int) -> None:
    filler = b'{"role":"user","content":"%b"},' % (b"word " * 60)
    body = b'{"model":"m","messages":[' + filler * (size // len(filler)) + b'{"role":"user","content":"hi"}]}'
    assert benchmark(bodies.read, body, "chat").model == "m"


def test_sse_pipe(benchmark: Bench) -> None:
    pipe = SsePipe("chat", hide_usage=True)
    pipe.feed(CHUNK)
    assert benchmark(pipe.feed, CHUNK) is CHUNK


def test_json_pipe(benchmark: Bench) -> None:
    def whole() -> Any:
        pipe = JsonPipe("chat")
        pipe.feed(ANSWER)
        pipe.finish()
        return pipe.usage

    assert benchmark(whole).input == 9


def test_access_line(benchmark: Bench) -> None:
    record = CallRecord(request_id="req_1", method="POST", target=b"/v1/chat/completions", status=200)
    assert benchmark(line_of, record, "2026-01-01T00:00:00.000Z").endswith(b"}\n")
