"""The systemd units: valid, closed to intruders, and in step with the code."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from frontkit import ask, swap
from station import ROOT, Station, until

from nbgate import children, plan, supervisor
from nbgate.config import parse
from nbgate.sockets import UNIX_MODE

DEPLOY = ROOT / "deploy"
PROGRAM = "/opt/nbgate/.venv/bin/nbgate"
EXPOSURE_AT_MOST = 2.0
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(not ANALYZE, reason="systemd-analyze is not installed (Debian: systemd)")


def values(unit: str, name: str) -> list[str]:
    """List what a unit gives to a setting."""
    return re.findall(rf"^{name}=(.*)$", (DEPLOY / unit).read_text(), re.MULTILINE)


def analyze(*words: str) -> str:
    assert ANALYZE
    done = subprocess.run([ANALYZE, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_units_are_valid(tmp_path: Path) -> None:
    # `verify` wants a program that exists.
    service = swap((DEPLOY / "nbgate.service").read_text(), f"ExecStart={PROGRAM} ", "ExecStart=/bin/true ")
    (tmp_path / "nbgate.service").write_text(service)
    shutil.copy(DEPLOY / "nbgate.socket", tmp_path)
    said = analyze("verify", "--man=no", str(tmp_path / "nbgate.service"), str(tmp_path / "nbgate.socket"))
    assert "nbgate" not in said


@needs_systemd
def test_service_leaves_an_intruder_little() -> None:
    said = analyze("security", "--offline=yes", "--no-pager", str(DEPLOY / "nbgate.service"))
    found = re.search(r"Overall exposure level for nbgate.service: ([0-9.]+)", said)
    assert found and float(found[1]) <= EXPOSURE_AT_MOST, said


def test_service_waits_as_long_as_the_supervisor_drains() -> None:
    drain_s = parse("", {}).server.drain_streams_s
    # The workers' drain and its grace, then the demo's grace.
    assert int(values("nbgate.service", "TimeoutStopSec")[0]) > drain_s + 2 * supervisor.GRACE_S
    # While the supervisor has a file checked it sends no sign of life.
    assert int(values("nbgate.service", "WatchdogSec")[0]) > plan.DESCRIBE_LIMIT_S + supervisor.TICK_S


def test_service_never_restarts_what_cannot_start() -> None:
    assert values("nbgate.service", "RestartPreventExitStatus") == [" ".join(map(str, children.FINAL_CODES))]
    assert values("nbgate.service", "Restart") == ["on-failure"]


def test_service_speaks_as_the_supervisor_does() -> None:
    assert values("nbgate.service", "Type") == ["notify"] and values("nbgate.service", "KillMode") == ["mixed"]
    assert values("nbgate.service", "ExecReload") == ["/bin/kill -HUP $MAINPID"]


def test_service_sets_settings_that_exist() -> None:
    pairs = dict(pair.split("=") for pair in values("nbgate.service", "Environment")[0].split())
    config = parse("", pairs)
    assert (config.server.data_dir, config.logging.access) == ("/var/lib/nbgate", "/var/log/nbgate/access.jsonl")


def test_socket_has_the_mode_of_nbgates_own() -> None:
    assert int(values("nbgate.socket", "SocketMode")[0], 8) == UNIX_MODE


def test_reload_goes_on_in_a_new_log_after_a_rotation(tmp_path: Path) -> None:
    with Station(tmp_path, '[channels.demo]\ntype = "demo"\n') as station:
        ask(station.port, "GET", "/healthz?before")
        until(lambda: station.access.exists() and "before" in station.access.read_text())
        old = station.access.rename(tmp_path / "access.jsonl.1")
        station.process.send_signal(signal.SIGHUP)
        until(station.access.exists, what="the new log")
        ask(station.port, "GET", "/healthz?after")
        until(lambda: "after" in station.access.read_text())
        assert [json.loads(line)["path"] for line in old.read_text().splitlines()] == ["/healthz?before"]
