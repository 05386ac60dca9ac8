"""Parts that many tests share: a gateway in a thread, upstreams that are scripted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Gateway, LoopThread, ScriptedUpstream

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    """One uvloop in a thread of its own, for gateways and scripted upstreams."""
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture
def scripted(loop_thread: LoopThread) -> Iterator[Callable[..., ScriptedUpstream]]:
    """Make upstreams that answer as a function says; closed after the test."""
    made: list[ScriptedUpstream] = []

    def make(handler: Callable[..., object]) -> ScriptedUpstream:
        upstream = loop_thread.call(ScriptedUpstream.start(handler))
        made.append(upstream)
        return upstream

    yield make
    for upstream in made:
        loop_thread.call(upstream.close())


@pytest.fixture
def gateway(loop_thread: LoopThread, tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Make gateways from TOML text; stopped after the test, and then checked for leaks."""
    made: list[Gateway] = []

    def make(text: str, **bounds: object) -> Gateway:
        folder = tmp_path / f"gateway-{len(made)}"
        folder.mkdir()
        started = loop_thread.call(Gateway.start(text, folder, bounds))
        started.loop_thread = loop_thread
        made.append(started)
        return started

    yield make
    for one in made:
        loop_thread.call(one.stop())


@pytest.fixture(scope="session")
def fake_upstream() -> Iterator[str]:
    """The bench's scriptable upstream as a process; gives `http://127.0.0.1:PORT`."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "bench" / "upstream.py"), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[0] == "listening", words
        yield f"http://127.0.0.1:{words[1]}"
        process.terminate()


@pytest.fixture(autouse=True)
def _no_running_loop() -> None:
    """Tests run outside of any loop; what needs one uses `loop_thread`."""
    asyncio._set_running_loop(None)
