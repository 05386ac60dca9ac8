"""The commands: what they print and how they exit."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbgate import __version__, cli

ROOT = Path(__file__).parent.parent


def run(*words: str, env: dict[str, str] | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.main, words, env=env)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A file with two problems, one of them with brackets that are no markup."""
    file = tmp_path / "bad.toml"
    file.write_text('[server]\nworkers = "x"\nlisten = ["no[bold]"]\n')
    return file


def test_check_of_a_good_file_says_fine_and_exits_0() -> None:
    done = run("check", "-c", str(ROOT / "config.example.toml"))
    assert (done.exit_code, done.stdout) == (0, f"{ROOT}/config.example.toml: fine\n")


def test_check_lists_every_problem_with_file_and_line_and_exits_2(bad: Path) -> None:
    done = run("check", "-c", str(bad))
    assert done.exit_code == 2
    assert done.stdout.splitlines() == [
        f'{bad}:2: server.workers: expected a whole number from 0 to 1024, got "x"',
        f"{bad}:3: server.listen[0]: expected host:port with a port from 0 to 65535, [v6]:port or unix:/path",
    ]
    assert done.stderr == "2 problems\n"


def test_check_prints_json_for_programs(bad: Path) -> None:
    done = run("check", "-c", str(bad), "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 2 and found["ok"] is False
    assert [(row["line"], row["path"]) for row in found["problems"]] == [(2, "server.workers"), (3, "server.listen[0]")]
    good = run("check", "-c", str(ROOT / "config.example.toml"), "--json")
    assert (good.exit_code, json.loads(good.stdout)) == (0, {"ok": True, "problems": []})


def test_check_looks_at_the_environment_too(bad: Path) -> None:
    done = run("check", "-c", str(bad), env={"NBGATE_ROUTER__TRYS": "1"})
    assert 'NBGATE_ROUTER__TRYS: no such setting; did you mean "NBGATE_ROUTER__TRIES"?' in done.stdout


def test_check_takes_the_file_from_the_environment(bad: Path) -> None:
    assert run("check", env={"NBGATE_CONFIG": str(bad)}).exit_code == 2


def test_check_of_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = run("check", "-c", str(tmp_path / "no.toml"))
    assert done.exit_code == 2
    assert done.stdout == f"{tmp_path}/no.toml: cannot read this file: No such file or directory\n"


def test_version_prints_nbgate_and_python() -> None:
    assert run("version").stdout == f"nbgate {__version__} (Python {platform.python_version()})\n"
    assert json.loads(run("version", "--json").stdout) == {"nbgate": __version__, "python": platform.python_version()}


def test_serve_becomes_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("os.execv", lambda path, argv: seen.append((path, argv)))
    run("serve", "-c", "x.toml")
    assert seen == [(sys.executable, [sys.executable, "-m", "nbgate.supervisor", "-c", "x.toml"])]


def test_commands_run_as_a_module_and_serve_refuses_a_bad_file(bad: Path) -> None:
    argv = [sys.executable, "-m", "nbgate", "serve", "-c", str(bad)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert done.stderr.splitlines()[0].startswith(f"{bad}:2: server.workers: expected")
    assert done.stdout == "" and len(done.stderr.splitlines()) == 2
