"""The server against hostile bytes: our own table, and the corpus where it is."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_cases import CASES, Case
from serverkit import Bench, answer, dial, eager, live, read_all, read_body, under_uvloop

from nbgate.server.listener import Settings

CORPUS = Path(os.environ.get("NBGATE_HTTP_CORPUS") or Path(__file__).resolve().parents[3] / "shared" / "http")
served: list[str] = []


@eager
async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer POST /v1/x with the key `k`; refuse everything else early."""
    if scope["type"] != "http":
        return
    served.append(scope["path"])
    if scope["raw_path"] != b"/v1/x":
        await answer(send, b"no such route", 404)
    elif scope["method"] != "POST":
        await answer(send, b"no such method", 405)
    elif (b"authorization", b"Bearer k") not in scope["headers"]:
        await answer(send, b"no such key", 401)
    else:
        await answer(send, b"%d" % len(await read_body(receive)))


def finals(data: bytes, closed: bool) -> list[int]:
    return [r.status for r in read_all(data, (), closed) if r.status >= 200]


def on_bench(pieces: list[bytes]) -> tuple[list[int], bool]:
    bench = Bench(app, Settings(tick_s=3600.0))
    client = bench.connect().send(*pieces)
    result = finals(client.out, client.done), client.done
    bench.close()
    return result


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_hostile_request_gets_its_answer_when_sent_whole(case: Case) -> None:
    assert on_bench([case[1]]) == (case[2], case[3])


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_hostile_request_gets_the_same_answer_when_cut(case: Case) -> None:
    _name, raw, statuses, closed = case
    marks = [0, *(i for i in range(1, len(raw)) if i < 300 or raw[i] in b"\r\n" or raw[i - 1] in b"\r\n"), len(raw)]
    assert on_bench([raw[a:b] for a, b in itertools.pairwise(marks)]) == (statuses, closed)
    half = len(raw) // 2
    assert on_bench([raw[:half], raw[half:]]) == (statuses, closed)


def test_hostile_table_has_distinct_names_and_sixty_rows() -> None:
    assert len({c[0] for c in CASES}) == len(CASES) >= 60


def test_hostile_requests_never_reach_a_smuggled_route_unless_they_are_requests() -> None:
    for name, raw, statuses, _closed in CASES:
        served.clear()
        on_bench([raw])
        assert ("/smuggled" in served) == (name == "length short by one request"), name
        assert len(served) <= len(statuses) or statuses == [], name


async def exchange(port: int, raw: bytes) -> tuple[list[int], bool]:
    reader, writer = await dial(port, raw)
    data = bytearray()
    closed = False
    try:
        while True:
            piece = await asyncio.wait_for(reader.read(65536), 0.4)
            if not piece:
                closed = True
                break
            data += piece
    except TimeoutError:
        pass
    writer.close()
    return finals(bytes(data), closed), closed


def test_hostile_requests_get_their_answers_over_real_sockets() -> None:
    async def main() -> None:
        async with live(app) as (server, port):
            results = await asyncio.gather(*(exchange(port, raw) for _name, raw, _statuses, _closed in CASES))
            for (name, _raw, statuses, closed), result in zip(CASES, results, strict=True):
                assert result == (statuses, closed), name
            assert server.stats.accepted == len(CASES)

    under_uvloop(main())


def test_server_passes_the_smuggling_corpus_strictly() -> None:
    script = CORPUS / "run_smuggling.py"
    if not script.exists():
        pytest.skip(f"the corpus of hostile requests is not at {CORPUS}; NBGATE_HTTP_CORPUS names another folder")

    async def main() -> None:
        async with live(app) as (_server, port):
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(script), "127.0.0.1", str(port), "/v1/x", "k", "--strict", "-q", "--jobs", "24",
                stdout=subprocess.PIPE,
            )  # fmt: skip
            out, _ = await process.communicate()
            assert process.returncode == 0, out.decode()
            assert b"167 passed" in out

    under_uvloop(main(), timeout_s=50.0)
