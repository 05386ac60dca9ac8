"""About a minute of fuzzing, shared by all targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"


@pytest.mark.long
def test_fuzzing_for_a_minute_finds_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, str(RUN), "--seconds", "60"], capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def test_runner_finds_a_fault_replays_it_and_needs_no_atheris(tmp_path: Path) -> None:
    # The oldest fault there is: a target that raises on a byte that its seed already has.
    script = tmp_path / "faulty.py"
    script.write_text(
        "import sys; sys.argv[0] = 'run.py'\n"
        f"sys.path.insert(0, {str(RUN.parent)!r})\n"
        "import run\n"
        "run.load = lambda: {'chunked': lambda data: 1 // (b'0' not in data)}\n"
        f"run.__file__ = {str(script)!r}\n"
        "sys.exit(run.main())\n"
    )
    command = [sys.executable, str(script), "--blind", "--seconds", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "ZeroDivisionError" in ran.stdout and "--target chunked --replay" in ran.stdout
