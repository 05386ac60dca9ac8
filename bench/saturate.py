"""Measure nbgate beside nginx in one run: CPU, memory, latency.

Run `python bench/saturate.py` (about six minutes) or with `--quick` (about 40
seconds, for a look). Load and fake upstream are pinned to core 1, the candidate
to core 0. CPU is that of *all* processes of the candidate, in nanoseconds from
/proc, divided by the requests that succeeded: throughput depends on the
neighbours, CPU per request hardly. Candidates take turns within each round; the
tables show medians with least and greatest, and the ratio to nginx within the
run. A run in which one request failed, or bytes or usage differ, is no run: it
ends with an error and writes nothing.

What lives here: the rows and the tables. What must not: processes
(`procs.py`), load (`load.py`), configurations (`candidates.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from candidates import CANDIDATES, KEY, ROOT, LogCheck, Running, versions, wait_until_answers
from procs import HERE, Proc, Procs, raise_fd_limit

CANDIDATE_CORE, LOAD_CORE = 0, 1
JSON_BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
STREAM_BODY = {**JSON_BODY, "model": "paced-51-20", "stream": True, "stream_options": {"include_usage": True}}
HOLD_BODY = {**STREAM_BODY, "model": "paced-600-1000"}
JSON_USAGE, STREAM_USAGE = (9, 7), (9, 51)
WRK_SCRIPT = """
wrk.method = "POST"
wrk.body = [[%s]]
wrk.headers["content-type"] = "application/json"
wrk.headers["authorization"] = "Bearer %s"
done = function(summary, latency, requests)
    local e = summary.errors
    io.write(string.format('\\n{"ok":%%d,"bytes":%%d,"us":%%d,"errors":%%d}\\n', summary.requests, summary.bytes,
        summary.duration, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class Lie(Exception):
    """A run whose figures must not be used."""


class Scale(NamedTuple):
    """How long and how much."""

    seconds: float
    rates: tuple[int, ...]
    streams: int
    stream_rounds: int
    held: int
    latency_requests: int


FULL = Scale(6.0, (2000, 8000), 300, 4, 4000, 5000)
QUICK = Scale(2.0, (2000,), 100, 1, 500, 1000)


class Bench:
    """One run: what is alive, and the files that load and upstream share."""

    def __init__(self, procs: Procs, folder: Path, scale: Scale) -> None:
        self.procs, self.folder, self.scale = procs, folder, scale
        self.upstream, self.upstream_port = procs.upstream("--log-max", "1000", core=LOAD_CORE)
        for name, body in (("json", JSON_BODY), ("stream", STREAM_BODY), ("hold", HOLD_BODY)):
            (folder / f"{name}.body").write_text(json.dumps(body))
        (folder / "wrk.lua").write_text(WRK_SCRIPT % (json.dumps(JSON_BODY), KEY))
        for name in ("json", "stream"):
            # The truth that every answer is compared with: what the upstream says when asked directly.
            data = (folder / f"{name}.body").read_bytes()
            (folder / f"{name}.expect").write_bytes(self.direct("/v1/chat/completions", data))

    def direct(self, path: str, body: bytes | None = None) -> bytes:
        """Ask the upstream itself."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.upstream_port}{path}", body)
        with urllib.request.urlopen(request, timeout=20) as reply:
            data: bytes = reply.read()
        return data

    def stats(self) -> dict[str, int]:
        """Take the upstream's counts."""
        counts: dict[str, int] = json.loads(self.direct("/_stats"))
        return counts

    def load(self, command: str, port: int, **options: Any) -> Proc:
        """Start `load.py`, pinned beside the upstream."""
        argv = [sys.executable, str(HERE / "load.py"), command, "--port", str(port), "--key", KEY]
        for name, value in options.items():
            argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return self.procs.start("load", argv, LOAD_CORE)

    def finish(self, proc: Proc, timeout_s: float) -> dict[str, Any]:
        """Wait for a load and take its report; Lie when anything failed."""
        out, _ = proc.popen.communicate(timeout=timeout_s)
        lines = [line for line in out.decode().splitlines() if line.startswith("{")]
        self.procs.stop(proc)
        if not lines:
            raise Lie(f"{proc.name} said nothing: {proc.tail()}")
        report: dict[str, Any] = json.loads(lines[-1])
        if report.get("failed") or report.get("errors"):
            raise Lie(f"{proc.name}: {report}")
        return report

    def file(self, name: str) -> str:
        """Name a file of the run."""
        return str(self.folder / name)


def cpu_us(before: dict[str, int], after: dict[str, int], requests: int) -> dict[str, float]:
    """Divide the CPU spent between two readings by requests: all, and by role."""
    spent = {role: after[role] - before.get(role, 0) for role in after}
    figures = {f"{role}_us": nanos / 1000 / requests for role, nanos in spent.items()}
    return {"cpu_us": sum(spent.values()) / 1000 / requests, **figures}


def measured(bench: Bench, running: Running, work: Callable[[], dict[str, Any]], usage: tuple[int, int],
             slack: int = 0) -> tuple[dict[str, Any], dict[str, float]]:  # fmt: skip
    """Run `work`, take the CPU, and check load, upstream and access log.

    `slack` is the number of calls that the load may cut off at its end.
    """
    check, before, stats = LogCheck(running), running.proc.cpu_ns(), bench.stats()
    report = work()
    after, end = running.proc.cpu_ns(), bench.stats()
    ok, came = report["ok"], end["requests"] - stats["requests"]
    if ok < 1 or not ok <= came <= ok + slack or end["closed_early"] - stats["closed_early"] > slack:
        raise Lie(f"{running.name}: the load counts {ok} answers, the upstream {came} requests, {end}")
    wrong = check.wrong(ok, ok + slack, usage)
    if wrong:
        raise Lie(f"{running.name}: {wrong}")
    return report, cpu_us(before, after, ok)


# --- rows -------------------------------------------------------------------------------------------------------------
Figures = dict[str, dict[str, float]]


def row_latency(bench: Bench, running: Running) -> Figures:
    """Time one connection, through the candidate and directly."""
    times = {}
    for name, port in (("direct", bench.upstream_port), ("through", running.port)):
        options = {"body": bench.file("json.body"), "expect": bench.file("json.expect")}
        proc = bench.load("latency", port, rounds=bench.scale.latency_requests, seconds=60, **options)
        times[name] = bench.finish(proc, 90)["time"]
    added = {
        f"{name}_added_us": times["through"][f"{name}_us"] - times["direct"][f"{name}_us"] for name in ("p50", "p99")
    }
    return {
        "latency, 1 connection": {**added, "p50_us": times["through"]["p50_us"], "p99_us": times["through"]["p99_us"]}
    }


def row_rss(bench: Bench, running: Running) -> Figures:
    """Hold many open streams and divide what they cost in memory."""
    idle = running.proc.rss_bytes()
    proc = bench.load("hold", running.port, body=bench.file("hold.body"), connections=bench.scale.held, seconds=60)
    line = proc.read_line(90)
    if line != f"open {bench.scale.held}":
        raise Lie(f"{running.name}: {line} of {bench.scale.held}; {proc.tail()}")
    time.sleep(2.5)  # two chunks on each stream
    held = running.proc.rss_bytes()
    report = bench.finish(proc, 60)
    if report["ok"] != bench.scale.held:
        raise Lie(f"{running.name}: {report['ok']} of {bench.scale.held} streams were still open")
    deadline = time.monotonic() + 10
    while bench.stats()["open_streams"] and time.monotonic() < deadline:
        time.sleep(0.1)
    if bench.stats()["open_streams"]:
        raise Lie(f"{running.name}: left upstream streams open 10 s after their clients went away")
    grown = sum(held.values()) - sum(idle.values())
    figures = {"kib_per_stream": grown / 1024 / bench.scale.held, "idle_mib": sum(idle.values()) / 2**20}
    return {f"{bench.scale.held} open streams": {**figures, "worker_idle_mib": idle.get("worker", 0) / 2**20}}


def row_json(bench: Bench, running: Running) -> Figures:
    """Saturate with wrk, then offer fixed rates."""
    seconds = bench.scale.seconds

    def wrk() -> dict[str, Any]:
        argv = ["wrk", "-t1", "-c64", f"-d{seconds:.0f}s", "--timeout", "10s", "-s", bench.file("wrk.lua")]
        proc = bench.procs.start("wrk", [*argv, f"http://127.0.0.1:{running.port}/v1/chat/completions"], LOAD_CORE)
        return bench.finish(proc, seconds + 30)

    def at(rate: int) -> dict[str, Any]:
        options = {"body": bench.file("json.body"), "expect": bench.file("json.expect")}
        return bench.finish(bench.load("rate", running.port, rate=rate, seconds=seconds, **options), seconds + 40)

    report, figures = measured(bench, running, wrk, JSON_USAGE, slack=64)
    figures["rps"] = report["ok"] / report["us"] * 1e6
    rows = {"JSON, 64 connections": figures}
    for rate in bench.scale.rates:
        report, figures = measured(bench, running, lambda rate=rate: at(rate), JSON_USAGE)  # type: ignore[misc]
        rows[f"JSON, {rate:,}/s"] = {**figures, "p50_us": report["time"]["p50_us"], "p99_us": report["time"]["p99_us"]}
    return rows


def row_stream(bench: Bench, running: Running) -> Figures:
    """Run paced streams, many at once, byte for byte."""
    scale = bench.scale

    def work() -> dict[str, Any]:
        options = {"body": bench.file("stream.body"), "expect": bench.file("stream.expect"), "exact": True}
        options.update(connections=scale.streams, rounds=scale.stream_rounds, seconds=60)
        return bench.finish(bench.load("streams", running.port, **options), 90)

    report, figures = measured(bench, running, work, STREAM_USAGE)
    figures["first_chunk_p50_us"] = report["first"]["p50_us"]
    return {f"streams, {scale.streams} at once": figures}


ROWS = {"latency": row_latency, "rss": row_rss, "json": row_json, "stream": row_stream}


# --- the run ----------------------------------------------------------------------------------------------------------
def one_turn(bench: Bench, name: str, wanted: list[str]) -> Figures:
    """Start a candidate afresh, warm it, run its rows, end it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=bench.folder))
    running = CANDIDATES[name](bench.procs, bench.upstream_port, folder, CANDIDATE_CORE)
    try:
        wait_until_answers(running, (bench.folder / "json.body").read_bytes())
        warm = {"connections": 20, "body": bench.file("stream.body"), "rounds": 1, "seconds": 20}
        bench.finish(bench.load("streams", running.port, **warm), 40)
        bench.finish(bench.load("rate", running.port, rate=1000, seconds=1, body=bench.file("json.body")), 40)
        figures: Figures = {}
        for row in wanted:
            figures.update(ROWS[row](bench, running))
        return figures
    finally:
        bench.procs.stop(running.proc)


def run(bench: Bench, names: list[str], rounds: int, wanted: list[str]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Let the candidates take turns; returns row -> candidate -> rounds."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        for name in order:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            for row, figures in one_turn(bench, name, wanted).items():
                rows.setdefault(row, {}).setdefault(name, []).append(figures)
    return rows


def spread(values: list[float]) -> str:
    """Show median (least-greatest)."""
    digits = 1 if statistics.median(values) < 1000 else 0
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(row: str, by_name: dict[str, list[dict[str, float]]]) -> str:
    """Draw one row as a Markdown table: a line per figure, a column per candidate."""
    names = list(by_name)
    others = [name for name in names if name != "nginx"] if "nginx" in names else []
    head = [f"**{row}**", *names, *(f"{name} ÷ nginx" for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    figures = list(dict.fromkeys(figure for rounds in by_name.values() for one in rounds for figure in one))
    for figure in figures:
        columns = {name: [one[figure] for one in by_name[name] if figure in one] for name in names}
        cells = [spread(values) if values else "-" for values in columns.values()]
        for name in others:
            pairs = [(a, b) for a, b in zip(columns[name], columns["nginx"], strict=False) if b > 0]
            cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}" if pairs else "-")
        lines.append("| " + " | ".join([figure, *cells]) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    text = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=False)
    return {
        "cpu": model, "cores": os.cpu_count(), "kernel": platform.release(), "versions": versions(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else "none", "changed": bool(dirty.stdout.strip()),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def stop_everything(number: int, _: FrameType | None) -> NoReturn:
    """Turn a signal into an exit that ends what was started."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(f"ended by signal {signal.Signals(number).name}")


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="saturate.py", description="Measure nbgate beside nginx.")
    parser.add_argument("--quick", action="store_true", help="one short round, about 40 seconds")
    parser.add_argument("--rounds", type=int, default=0, help="3, or 1 with --quick")
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows: {','.join(ROWS)}")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help=f"some of {','.join(CANDIDATES)}")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "saturate.json")
    parser.add_argument("--limit-s", type=int, default=1800, help="end the whole run after this")
    return parser.parse_args()


def main() -> None:
    """Run, print the tables, write the numbers."""
    args = read_arguments()
    wanted, names = args.only.split(","), args.candidates.split(",")
    if unknown := [one for one in wanted if one not in ROWS] + [one for one in names if one not in CANDIDATES]:
        raise SystemExit(f"unknown: {', '.join(unknown)}")
    if not shutil.which("wrk") or len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("saturate.py needs wrk and two cores")
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(one, stop_everything)
    signal.alarm(args.limit_s)
    raise_fd_limit()
    rounds = args.rounds or (1 if args.quick else 3)
    with tempfile.TemporaryDirectory(prefix="saturate-") as name, Procs(Path(name)) as procs:
        bench = Bench(procs, Path(name), QUICK if args.quick else FULL)
        try:
            rows = run(bench, names, rounds, wanted)
        except (Lie, RuntimeError, subprocess.TimeoutExpired) as exc:
            raise SystemExit(f"no result: {exc}") from exc
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, {where['versions']}, {where['commit']}\n")
    print("\n\n".join(table(row, by_name) for row, by_name in rows.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": where, "quick": args.quick, "rounds": rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
