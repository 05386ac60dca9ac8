"""Metrics: right sums over all workers, bounded labels, totals that never fall."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbgate import metrics as room
from nbgate.exposition import COUNTS, METRICS, table
from nbgate.logs import USAGE_KINDS, AccessLog, CallRecord
from nbgate.metrics import Metrics

DOCS = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def call(**fields: Any) -> CallRecord:
    whole = {
        "operation": "chat.create", "status": 200, "model": "gpt-4o", "model_known": True, "channel": "main",
        "bytes_in": 10, "bytes_out": 20, "duration_s": 0.2, "first_byte_s": 0.1, "overhead_s": 60e-6, "attempts": 1,
    }  # fmt: skip
    return CallRecord(**{**whole, **fields})


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Give the samples of a scrape by (name, label values in order of names)."""
    out = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            key = (sample.name, *(sample.labels[name] for name in sorted(sample.labels)))
            assert key not in out, "a sample is shown twice"
            out[key] = sample.value
    return out


def leave(run_dir: Path, slot: int, calls: int, pid: int) -> Path:
    """Write the file that a process with this pid would have left."""
    gone = Metrics(slot, str(run_dir))
    gone._ident = f"{pid}-1"
    for _ in range(calls):
        gone.observe(call())
    gone.close()
    assert gone.path is not None
    return gone.path.rename(run_dir / f"metrics-{slot}-{pid}.json")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


REQUESTS = ("nbgate_requests_total", "main", "gpt-4o", "chat.create", "200")


def test_docs_table_is_the_codes_table() -> None:
    assert table() in DOCS.read_text()
    shown = {line.split("`")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")}
    assert shown == {metric.name for metric in METRICS}


def test_every_metric_of_the_table_is_exposed_with_its_type_and_labels(clock: Clock) -> None:
    metrics = Metrics(clock=clock)
    metrics.observe(call(error="x", error_source="gate", attempts=2, usage=(1,) * len(USAGE_KINDS)))
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    for metric in METRICS:
        family = families.pop(metric.name.removesuffix("_total"))
        assert family.type == metric.type
        assert family.documentation == metric.meaning
        assert family.samples
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    assert not families


def test_observe_counts_one_call_everywhere(clock: Clock) -> None:
    metrics = Metrics(clock=clock)
    usage = (100, 5, 0, 0, 50, 0, 0, 0, 0, 7)
    metrics.observe(call(usage=usage, attempts=3))
    metrics.observe(
        call(status=502, error="upstream_error", error_source="upstream", overhead_s=-1.0, first_byte_s=0.0)
    )
    samples = read(metrics)
    assert samples[REQUESTS] == 1
    assert samples["nbgate_requests_total", "main", "gpt-4o", "chat.create", "502"] == 1
    assert samples["nbgate_errors_total", "upstream_error", "upstream"] == 1
    tokens = {key[2]: value for key, value in samples.items() if key[0] == "nbgate_tokens_total"}
    assert tokens == {"input": 100, "cached_read": 5, "output": 50, "image_out": 7}
    assert samples["nbgate_received_bytes_total", "chat.create"] == 20
    assert samples["nbgate_sent_bytes_total", "chat.create"] == 40
    assert samples["nbgate_retries_total",] == 2
    assert samples["nbgate_overhead_seconds_count", "chat.create"] == 1
    assert samples["nbgate_first_byte_seconds_count", "chat.create"] == 1
    assert samples["nbgate_request_seconds_count", "chat.create"] == 2
    assert samples["nbgate_request_seconds_sum", "chat.create"] == pytest.approx(0.4)


@pytest.mark.parametrize(("value", "first"), [(25e-6, "2.5e-05"), (26e-6, "5e-05"), (0.1, "0.1"), (0.11, "+Inf")])
def test_buckets_include_their_bound(clock: Clock, value: float, first: str) -> None:
    metrics = Metrics(clock=clock)
    metrics.observe(call(overhead_s=value))
    samples = read(metrics)
    bounds = [f"{bound:g}" for bound in room.OVERHEAD_BOUNDS] + ["+Inf"]
    counts = [samples["nbgate_overhead_seconds_bucket", bound, "chat.create"] for bound in bounds]
    assert counts == [float(n >= bounds.index(first)) for n in range(len(bounds))]


def test_labels_stay_bounded_whatever_clients_send(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_MODELS", 20)
    monkeypatch.setattr(room, "MAX_SERIES", 40)
    monkeypatch.setattr(room, "MAX_ERRORS", 10)
    metrics = Metrics(clock=clock)
    for n in range(1000):
        metrics.observe(call(model=f"made-up-{n}", model_known=False))
        metrics.observe(call(model=f"served-{n}", error=f"code-{n}", error_source="upstream"))
        metrics.observe(call(model="", model_known=False, channel=f"c{n}"))
    samples = read(metrics)
    requests = {key: value for key, value in samples.items() if key[0] == "nbgate_requests_total"}
    assert sum(requests.values()) == 3000
    assert len(requests) <= 42
    assert not any("made-up" in label for key in requests for label in key)
    errors = {key: value for key, value in samples.items() if key[0] == "nbgate_errors_total"}
    assert sum(errors.values()) == 1000
    assert len(errors) <= 11


def test_any_worker_shows_the_sum_over_all(tmp_path: Path, clock: Clock) -> None:
    leave(tmp_path, 1, 3, os.getppid())
    metrics = Metrics(0, str(tmp_path), clock=clock)
    for _ in range(2):
        metrics.observe(call())
    metrics.write()
    assert read(metrics)[REQUESTS] == 5


def test_successor_goes_on_from_what_a_dead_worker_left(tmp_path: Path, clock: Clock) -> None:
    left = leave(tmp_path, 0, 3, dead_pid())
    metrics = Metrics(0, str(tmp_path), clock=clock)
    assert not left.exists()
    metrics.observe(call())
    assert read(metrics)[REQUESTS] == 4


def test_successor_with_the_same_pid_goes_on_too(tmp_path: Path, clock: Clock) -> None:
    first = Metrics(0, str(tmp_path), clock=clock)
    first.observe(call())
    first.close()
    second = Metrics(0, str(tmp_path), clock=clock)
    second.observe(call())
    second.write()
    assert read(second)[REQUESTS] == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_draining_predecessor_counts_beside_its_successor(tmp_path: Path, clock: Clock) -> None:
    """In a rolling restart both live; the old one goes on counting."""
    left = leave(tmp_path, 0, 3, os.getppid())
    metrics = Metrics(0, str(tmp_path), clock=clock)
    assert left.exists()
    metrics.observe(call())
    assert read(metrics)[REQUESTS] == 4
    leave(tmp_path, 0, 5, os.getppid())
    assert read(metrics)[REQUESTS] == 6


def test_crash_between_folding_and_removing_counts_nothing_twice(tmp_path: Path, clock: Clock) -> None:
    left = leave(tmp_path, 0, 3, dead_pid())
    kept = left.read_bytes()
    pid = dead_pid()
    snapshot = orjson.loads(kept)
    folded = {**snapshot, "ident": f"{pid}-1", "folded": [snapshot["ident"]]}
    (tmp_path / f"metrics-0-{pid}.json").write_bytes(orjson.dumps(folded))
    assert read(Metrics(1, str(tmp_path), clock=clock))[REQUESTS] == 3, "a scrape of another slot"
    assert read(Metrics(0, str(tmp_path), clock=clock))[REQUESTS] == 3, "the next of this slot"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"shape":"0"}', b"\xff"])
def test_files_that_are_no_snapshot_are_passed_over(tmp_path: Path, clock: Clock, text: bytes) -> None:
    (tmp_path / "metrics-3-1.json").write_bytes(text)
    metrics = Metrics(3, str(tmp_path), clock=clock)
    metrics.observe(call())
    assert read(metrics)[REQUESTS] == 1


def test_malformed_snapshot_warns_and_harms_nothing(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(tmp_path, 1, 1, os.getppid())
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "series": [[1]]}))
    read(Metrics(0, str(tmp_path), clock=clock))
    assert len(caplog.records) == 1


def test_gauges_of_stale_files_are_ignored(tmp_path: Path, clock: Clock) -> None:
    other = Metrics(1, str(tmp_path), clock=clock)
    other.gauges.connections = 7
    other._ident = f"{os.getppid()}-1"
    other.write()
    metrics = Metrics(0, str(tmp_path), clock=clock)
    clock.now += 5.0
    assert read(metrics)["nbgate_connections", "1"] == 7
    clock.now += 0.1
    samples = read(metrics)
    assert ("nbgate_connections", "1") not in samples
    assert samples["nbgate_connections", "0"] == 0
    clock.now -= 100.0
    assert ("nbgate_connections", "1") not in read(metrics), "a file from before the boot"


def test_quiet_worker_rewrites_before_its_gauges_go_stale(tmp_path: Path, clock: Clock) -> None:
    metrics = Metrics(0, str(tmp_path), clock=clock)
    path = metrics.path
    assert path is not None
    for _ in range(4):
        metrics.write()
        clock.now += 1.0
    assert clock.now - orjson.loads(path.read_bytes())["at"] <= 3.0


def test_gauges_are_set_before_each_scrape_and_measured(clock: Clock) -> None:
    metrics = Metrics(clock=clock)

    def before() -> None:
        metrics.gauges.streams_open = 3

    metrics.before = before
    samples = read(metrics)
    assert samples["nbgate_streams_open", "0"] == 3
    assert samples["nbgate_resident_bytes", "0"] > 1e6
    assert samples["nbgate_open_fds", "0"] >= 3


def test_counts_of_other_rooms_are_followed_and_go_on_after_a_death(tmp_path: Path, clock: Clock) -> None:
    first = Metrics(0, str(tmp_path), clock=clock)
    assert set(COUNTS) == set(first.totals.counts)
    for value in (2, 2, 5):
        first.follow("refused", value)
    first.follow("stalled", 1)
    first.totals.counts["shed_lag"] += 3
    first.close()
    second = Metrics(0, str(tmp_path), clock=clock)
    second.follow("refused", 4)
    samples = read(second)
    assert samples["nbgate_connections_refused_total",] == 9
    assert samples["nbgate_timeouts_total", "stalled"] == 1 and samples["nbgate_timeouts_total", "request"] == 0
    assert samples["nbgate_shed_total", "lag"] == 3 and samples["nbgate_shed_total", "memory"] == 0


def test_overload_of_two_processes_of_a_slot_is_the_worse_one(tmp_path: Path, clock: Clock) -> None:
    draining, fresh = Metrics(0, str(tmp_path), clock=clock), Metrics(0, str(tmp_path), clock=clock)
    draining.gauges.overload_memory, fresh.gauges.overload_memory, fresh.gauges.overload_lag = 2, 1, 2
    draining._ident = f"{os.getppid()}-1"
    draining.write()
    assert draining.path is not None
    draining.path.rename(tmp_path / f"metrics-0-{os.getppid()}.json")
    samples = read(fresh)
    assert samples["nbgate_overload_state", "memory", "0"] == 2
    assert samples["nbgate_overload_state", "lag", "0"] == 2


def test_dropped_log_lines_are_counted_also_over_a_new_log(clock: Clock) -> None:
    metrics = Metrics(clock=clock)
    metrics.access_log = AccessLog("")
    metrics.access_log.dropped = 5
    assert read(metrics)["nbgate_log_lines_dropped_total",] == 5
    assert read(metrics)["nbgate_log_lines_dropped_total",] == 5
    metrics.access_log = AccessLog("")
    metrics.access_log.dropped = 2
    assert read(metrics)["nbgate_log_lines_dropped_total",] == 7


def test_write_that_fails_warns_once_and_heals(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(0, str(folder), clock=clock)
    folder.rmdir()
    for _ in range(3):
        metrics.write(force=True)
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    folder.mkdir()
    metrics.write(force=True)
    assert metrics.path is not None
    assert metrics.path.exists()
    assert not list(folder.glob("*.part"))


def test_rendering_may_run_apart_from_counting(clock: Clock) -> None:
    metrics = Metrics(clock=clock)
    metrics.observe(call())
    later = metrics.prepare()
    metrics.observe(call())
    assert b'operation="chat.create",status="200"} 1.0\n' in later()


def test_prometheus_client_is_not_loaded_before_the_first_scrape() -> None:
    code = "import sys, nbgate.metrics; nbgate.metrics.Metrics(); sys.exit('prometheus_client' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
