"""nginx and nbgate count requests alike: hostile requests, once directly and once through nginx.

Each case gets a key and a query of its own, so that the access log tells which requests nbgate saw for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from frontkit import Nginx, needs_nginx
from station import ROOT, Station, until

pytestmark = needs_nginx

CORPUS = Path(os.environ.get("NBGATE_HTTP_CORPUS") or ROOT.parent / "shared" / "http")
JOBS = 24  # they mostly wait
PLAIN = (
    "POST {{PATH}} HTTP/1.1\r\nHost: {{HOST}}\r\nAuthorization: Bearer {{KEY}}\r\nContent-Type: application/json\r\n"
)
GET = "GET {{PATH}} HTTP/1.1\r\nHost: {{HOST}}\r\n\r\n"
LENGTH = "Content-Length: {{LEN}}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
BODY = "\r\n{{BODY}}"
CHUNKS = "\r\n{{HEX}}\r\n{{BODY}}\r\n0\r\n\r\n"
# Beside the corpus; `least`: how many must be accepted, `n`: how many may be.
OWN = [
    {"id": "own-plain", "raw": PLAIN + LENGTH + BODY, "least": 1},
    {"id": "own-two", "raw": (PLAIN + LENGTH + BODY) * 2, "n": 2, "least": 2},
    {"id": "own-chunked", "raw": PLAIN + CHUNKED + CHUNKS, "least": 1},
    {"id": "own-length-and-chunked", "raw": f"{PLAIN}{LENGTH}{CHUNKED}\r\n0\r\n\r\n{GET}"},
    {"id": "own-two-lengths", "raw": f"{PLAIN}Content-Length: 0\r\n{LENGTH}{BODY}{GET}"},
    {"id": "own-underscore", "raw": PLAIN + LENGTH.replace("-", "_") + BODY + GET},
    {"id": "own-space-before-colon", "raw": f"{PLAIN}Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n{GET}"},
    {"id": "own-short-body", "raw": f"{PLAIN}Content-Length: 99\r\n{BODY}"},
    {"id": "own-get-with-body", "raw": GET.replace("\r\n\r\n", f"\r\n{LENGTH}{BODY}") + GET},
    {"id": "own-expect", "raw": f"{PLAIN}Expect: 100-continue\r\n{LENGTH}{BODY}", "least": 1},
]
# A tab before a length: allowed, nbgate takes it, nginx says 400.
NGINX_IS_STRICTER = {"ok-ows-tab"}


class Outcome(NamedTuple):
    """What the client got, and what nbgate saw, for one case on one way."""

    statuses: list[int]
    seen: list[dict[str, Any]]

    @property
    def answered(self) -> int:
        """Count answers that say yes."""
        return sum(200 <= status < 300 for status in self.statuses)

    @property
    def accepted(self) -> int:
        """Count requests to which nbgate said yes."""
        return sum(200 <= row["status"] < 300 for row in self.seen)


def _key(index: int, way: str) -> str:
    return f"sk-{index:03d}{'0' * 34}{way}"


def _tool() -> ModuleType | None:
    spec = importlib.util.spec_from_file_location("run_smuggling", CORPUS / "run_smuggling.py")
    if spec is None or spec.loader is None or not (CORPUS / "run_smuggling.py").exists():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _send(tool: ModuleType, port: int, case: dict[str, Any], key: str, mark: str) -> list[int]:
    """Send a case as it stands; list the final statuses."""
    filled = Namespace(
        host="127.0.0.1", port=port, path=f"/v1/chat/completions?{mark}", key=key, badkey="sk-bad", body=tool.BODY
    )
    connection = tool.Conn(filled)
    connection.send(tool.fill(case["raw"], filled), case.get("send", "whole"))
    connection.collect(4.0, 0.6)
    connection.s.close()
    return [status for status in connection.statuses if status]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[dict[str, Any], Outcome, Outcome]]]:
    """Send every case both ways: id -> (case, directly, through nginx)."""
    tool = _tool()
    if tool is None:
        pytest.skip(f"the corpus of hostile requests is not at {CORPUS}; NBGATE_HTTP_CORPUS names another folder")
    cases = [json.loads(line) for line in (CORPUS / "smuggling.jsonl").read_text().splitlines() if line.strip()] + OWN
    keys = [f'[[keys]]\nkey = "{_key(i, way)}"\naccount = "a"\n' for i in range(len(cases)) for way in ("-dir", "-ngx")]
    text = '[channels.demo]\ntype = "demo"\n' + "".join(keys)
    folder = tmp_path_factory.mktemp("agreement")
    with (
        Station(folder, text, 'trusted_proxies = ["127.0.0.1/32"]') as station,
        Nginx(folder, f"127.0.0.1:{station.port}") as front,
        ThreadPoolExecutor(JOBS) as pool,
    ):
        ports = {"-dir": station.port, "-ngx": front.port}
        jobs = {
            (i, way): pool.submit(_send, tool, port, case, _key(i, way), f"case={i}{way}")
            for i, case in enumerate(cases)
            for way, port in ports.items()
        }
        statuses = {place: job.result() for place, job in jobs.items()}
        station.stop()  # drained: every line is written
        until(station.access.exists)
        rows = [json.loads(line) for line in station.access.read_text().splitlines()]

    def outcome(i: int, way: str) -> Outcome:
        key, mark = f"sk-{i:03d}...{way}", f"case={i}{way}"
        return Outcome(statuses[i, way], [row for row in rows if row["key"] == key or mark in row["path"]])

    smuggled = [row["path"] for row in rows if row["path"].startswith(("/smug", "smug"))]
    assert not smuggled, "nbgate took a body for a request"
    yield {case["id"]: (case, outcome(i, "-dir"), outcome(i, "-ngx")) for i, case in enumerate(cases)}


Outcomes = dict[str, tuple[dict[str, Any], Outcome, Outcome]]


def test_front_gives_no_answer_that_nbgate_did_not_give(outcomes: Outcomes) -> None:
    wrong = {
        name: (directly.statuses, through.statuses, [row["status"] for row in through.seen])
        for name, (_, directly, through) in outcomes.items()
        if through.answered > through.accepted or directly.answered > directly.accepted
    }
    assert not wrong


def test_front_lets_no_request_through_that_the_client_gets_no_answer_for(outcomes: Outcomes) -> None:
    wrong = {
        name: (through.statuses, [(row["status"], row["method"], row["path"]) for row in through.seen])
        for name, (_, _, through) in outcomes.items()
        if len(through.seen) > len(through.statuses)
    }
    assert not wrong


def test_neither_accepts_more_requests_than_a_case_may_hold(outcomes: Outcomes) -> None:
    wrong = {
        name: (directly.statuses, through.statuses)
        for name, (case, directly, through) in outcomes.items()
        for one in (directly, through)
        if not case.get("least", 0) <= one.accepted <= case.get("n", 1)
    }
    assert not wrong


def test_front_and_nbgate_accept_the_same_plain_requests(outcomes: Outcomes) -> None:
    differ = {
        name
        for name, (case, directly, through) in outcomes.items()
        if case.get("rfc") == "accept" and directly.accepted != through.accepted
    }
    assert differ <= NGINX_IS_STRICTER
    assert all(outcomes[name][2].accepted == 0 for name in differ)
