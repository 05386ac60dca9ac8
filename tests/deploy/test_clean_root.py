"""`make run` on a Debian that has only what README.md asks for. Minutes long: it installs that Debian first."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from station import ROOT, clean_env, until

SCRIPT = Path(__file__).with_name("clean_root.sh")
FIRST_START_S = 240.0  # pip fetches a dozen packages
SECOND_START_S = 6.0
FIRST_TOKEN_S = 5.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("debootstrap"), reason="debootstrap is not installed (Debian: debootstrap)"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh Debian with this tree as its repository /src.git."""
    path = tmp_path_factory.mktemp("clean") / "root"
    done = subprocess.run([SCRIPT, "make", path, ROOT], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    yield path
    # The mounts went with their namespace; nothing outside is reached from here.
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def run(root: Path, log: Path) -> Iterator[tuple[float, str]]:
    """Run `make run`; give the seconds until it printed its curl line, and that line."""
    began = time.monotonic()
    with open(log, "wb") as out:
        # A free port, since the network is that of this machine.
        env = clean_env(NBGATE_SERVER__LISTEN="127.0.0.1:0")
        process = subprocess.Popen([SCRIPT, "run", root], stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        done = until(
            lambda: re.search(r"^curl .*\n", log.read_text(), re.MULTILINE) or process.poll() is not None, FIRST_START_S
        )
        assert isinstance(done, re.Match), log.read_text()
        yield time.monotonic() - began, done[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def first_token_s(line: str) -> float:
    """Run the printed line as it stands; give the seconds until the first streamed word."""
    began = time.monotonic()
    with subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as curl:
        assert curl.stdout is not None
        found = b""
        while not re.search(rb'"content":"[^"]+"', found):
            data = os.read(curl.stdout.fileno(), 65536)
            assert data, found
            found += data
        took = time.monotonic() - began
        assert b"[DONE]" not in found, "it came whole, not word by word"
        assert b"data: [DONE]" in curl.stdout.read() and curl.wait(20) == 0
    return took


def test_make_run_on_a_clean_debian_streams_a_first_answer(root: Path, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    with run(root, tmp_path / "first.log") as (first_s, line):
        token_s = first_token_s(line)
    with run(root, tmp_path / "second.log") as (second_s, again):
        first_token_s(again)
    print(f"\nmake run: first start {first_s:.1f} s, second start {second_s:.1f} s, first token {token_s:.2f} s")
    said = (tmp_path / "first.log").read_text().splitlines()
    assert len(said) <= 10, said
    assert second_s <= SECOND_START_S and token_s <= FIRST_TOKEN_S
