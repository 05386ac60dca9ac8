"""Counters, histograms and gauges of all workers, for Prometheus.

Purpose: `observe` counts one finished call in plain integers; `render` shows
the sum over all workers, whichever of them is asked. Lives here: the
accumulators, the snapshot files by which workers know of each other. Must not:
names and text format (`exposition`, imported at the first scrape), decisions;
keys or accounts as labels. Heat: R for `observe`, cold else.

Rule 1: labels are bounded: operations come from `routes`, models only by names
that resolved, channels from the config; what exceeds a bound counts as "other".
Rule 2: totals never fall. Each process writes `metrics-<slot>-<pid>.json` into
run_dir once a second and when it ends. A starting worker folds what dead
processes of its slot left into its own counts; while old and new overlap in a
rolling restart, both files count.
Rule 3: gauges older than 5 s are nobody's.
"""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from nbgate.logs import NO_USAGE, USAGE_KINDS, AccessLog, CallRecord

log = logging.getLogger("nbgate.metrics")

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "other"
MAX_MODELS: Final = 500
MAX_SERIES: Final = 5000
MAX_ERRORS: Final = 200
FRESH_S: Final = 5.0
# A quiet worker writes all the same before its gauges are taken for stale.
REWRITE_S: Final = 2.0
_LIST_FDS_S: Final = 15.0

OVERHEAD_BOUNDS: Final[tuple[float, ...]] = (
    25e-6, 50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6,
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
)  # fmt: skip
REQUEST_BOUNDS: Final[tuple[float, ...]] = (
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
FIRST_BYTE_BOUNDS: Final[tuple[float, ...]] = (
    0.005, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0,
)  # fmt: skip


_GAUGES: Final = (
    "connections", "loop_lag_seconds", "open_fds", "overload_lag", "overload_memory", "requests_active",
    "resident_bytes", "streams_open", "upstream_idle", "upstream_in_use", "upstream_waiting",
)  # fmt: skip
# Of two processes of one slot, these show the worse one; the rest adds up.
_WORST: Final = ("loop_lag_seconds", "overload_lag", "overload_memory")
_COUNTS: Final = ("shed_memory", "shed_lag", "refused", "timeouts", "stalled", "rejected")


class Gauges:
    """What is so just now; the worker's ticker sets these."""

    __slots__ = _GAUGES

    def __init__(self) -> None:
        self.connections = self.requests_active = self.streams_open = 0
        self.upstream_in_use = self.upstream_idle = self.upstream_waiting = 0
        self.loop_lag_seconds = 0.0
        self.resident_bytes = self.open_fds = 0
        self.overload_lag = self.overload_memory = 0

    def as_dict(self) -> dict[str, float]:
        """Give the values by name."""
        return {name: getattr(self, name) for name in _GAUGES}


class Histogram:
    """Counts by bucket, not cumulative."""

    __slots__ = ("counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0


BOUNDS: Final = (OVERHEAD_BOUNDS, REQUEST_BOUNDS, FIRST_BYTE_BOUNDS)
# Snapshots of another shape are not read.
_SHAPE: Final = f"1:{len(USAGE_KINDS)}:" + ":".join(str(len(bounds)) for bounds in BOUNDS)
_OUTPUT: Final = USAGE_KINDS.index("output")
_Labels = tuple[str, int, str, str]  # operation, status, channel, model


class _Series:
    """The counts of one combination of labels; times are shared by operation."""

    __slots__ = ("bytes_in", "bytes_out", "first_byte", "overhead", "request", "requests", "tokens")

    def __init__(self, times: tuple[Histogram, Histogram, Histogram]) -> None:
        self.requests = self.bytes_in = self.bytes_out = 0
        self.tokens = [0] * len(USAGE_KINDS)
        self.overhead, self.request, self.first_byte = times


class Totals:
    """Everything that only grows: of one process, or summed over several."""

    def __init__(self) -> None:
        self.series: dict[_Labels, _Series] = {}
        self.times: dict[str, tuple[Histogram, Histogram, Histogram]] = {}
        self.errors: dict[tuple[str, str], int] = {}
        self.retries = 0
        self.log_dropped = 0
        self.counts = dict.fromkeys(_COUNTS, 0)  # `exposition.COUNTS` says what each is
        self._models = {"", OTHER}

    def observe(self, record: CallRecord) -> None:
        """Count one finished call."""
        model = record.model if record.model_known else OTHER if record.model else ""
        series = self.series.get((record.operation, record.status, record.channel, model))
        if series is None:
            series = self._open((record.operation, record.status, record.channel, model))
        series.requests += 1
        series.bytes_in += record.bytes_in
        series.bytes_out += record.bytes_out
        usage = record.usage
        if usage is not NO_USAGE:
            tokens = series.tokens
            tokens[0] += usage[0]
            tokens[_OUTPUT] += usage[_OUTPUT]
            if sum(usage) != usage[0] + usage[_OUTPUT]:
                for at, n in enumerate(usage):
                    if at != 0 and at != _OUTPUT:
                        tokens[at] += n
        if record.error:
            self._count_error((record.error, record.error_source), 1)
        if record.attempts > 1:
            self.retries += record.attempts - 1
        value = record.overhead_s
        if value >= 0.0:
            series.overhead.counts[bisect_left(OVERHEAD_BOUNDS, value)] += 1
            series.overhead.sum += value
        value = record.duration_s
        series.request.counts[bisect_left(REQUEST_BOUNDS, value)] += 1
        series.request.sum += value
        value = record.first_byte_s
        if value > 0.0:
            series.first_byte.counts[bisect_left(FIRST_BYTE_BOUNDS, value)] += 1
            series.first_byte.sum += value

    def _open(self, labels: _Labels) -> _Series:
        """Find or make a series within the bounds of the labels."""
        operation, status, channel, model = labels
        if model not in self._models:
            if len(self._models) >= MAX_MODELS:
                model = OTHER
            self._models.add(model)
        labels = (operation, status, channel, model)
        if labels not in self.series and len(self.series) >= MAX_SERIES:
            labels = (operation, status, OTHER, OTHER)
        found = self.series.get(labels)
        if found is None:
            found = self.series[labels] = _Series(self._times(operation))
        return found

    def _times(self, operation: str) -> tuple[Histogram, Histogram, Histogram]:
        found = self.times.get(operation)
        if found is None:
            found = self.times[operation] = (
                Histogram(OVERHEAD_BOUNDS),
                Histogram(REQUEST_BOUNDS),
                Histogram(FIRST_BYTE_BOUNDS),
            )
        return found

    def _count_error(self, labels: tuple[str, str], n: int) -> None:
        if labels not in self.errors and len(self.errors) >= MAX_ERRORS:
            labels = (OTHER, labels[1])
        self.errors[labels] = self.errors.get(labels, 0) + n

    def dump(self) -> dict[str, Any]:
        """Give all counts as plain JSON values."""
        return {
            "series": [[*k, s.requests, s.bytes_in, s.bytes_out, s.tokens] for k, s in self.series.items()],
            "times": [[op, [[h.counts, h.sum] for h in three]] for op, three in self.times.items()],
            "errors": [[*k, n] for k, n in self.errors.items()],
            "retries": self.retries,
            "log_dropped": self.log_dropped,
            "counts": self.counts,
        }

    def add(self, dumped: dict[str, Any]) -> None:
        """Add what another process dumped.

        Raises: ValueError, KeyError, TypeError, IndexError where it is none.
        """
        for operation, status, channel, model, requests, bytes_in, bytes_out, tokens in dumped["series"]:
            series = self._open((operation, status, channel, model))
            series.requests += requests
            series.bytes_in += bytes_in
            series.bytes_out += bytes_out
            series.tokens = [a + b for a, b in zip(series.tokens, tokens, strict=True)]
        for operation, three in dumped["times"]:
            for mine, (counts, total) in zip(self._times(operation), three, strict=True):
                mine.counts[:] = [a + b for a, b in zip(mine.counts, counts, strict=True)]
                mine.sum += total
        for code, source, n in dumped["errors"]:
            self._count_error((code, source), n)
        self.retries += dumped["retries"]
        self.log_dropped += dumped["log_dropped"]
        counts = dumped.get("counts", {})
        for name in _COUNTS:
            self.counts[name] += counts.get(name, 0)


class Metrics:
    """The metrics of one worker, and its door to those of the others.

    `run_dir` "" keeps them to this process. `before` is called ahead of each
    snapshot and scrape, to set `gauges`.
    """

    def __init__(self, slot: int = 0, run_dir: str = "", *, clock: Callable[[], float] = time.monotonic) -> None:
        # process
        self.slot = slot
        self.totals = Totals()
        self.gauges = Gauges()
        self.before: Callable[[], None] | None = None
        self.access_log: AccessLog | None = None
        self._dropped_seen = 0
        self._seen: dict[str, int] = {}
        self.observe = self.totals.observe  # PERF: one call less per request
        # files
        self._clock = clock
        self._dir = Path(run_dir) if run_dir else None
        self._ident = f"{os.getpid()}-{time.time_ns()}"
        self._folded: list[str] = []
        self._written_at = -REWRITE_S
        self._written = b""
        self._failing = False
        self._fds_at = -_LIST_FDS_S
        if self._dir is not None:
            self._fold()

    @property
    def path(self) -> Path | None:
        """Give the file of this process, None without run_dir."""
        return None if self._dir is None else self._dir / f"metrics-{self.slot}-{os.getpid()}.json"

    def write(self, *, force: bool = False) -> None:
        """Write the snapshot, if anything changed; once a second and at the end."""
        path = self.path
        if path is None:
            return
        self._refresh()
        now = self._clock()
        body = orjson.dumps({**self.totals.dump(), "gauges": self.gauges.as_dict()})
        if body == self._written and not force and now - self._written_at < REWRITE_S:
            return
        head = {"shape": _SHAPE, "ident": self._ident, "slot": self.slot, "at": now, "folded": self._folded}
        try:
            part = path.with_suffix(".part")
            part.write_bytes(orjson.dumps(head)[:-1] + b"," + body[1:])
            part.replace(path)
        except OSError as exc:
            if not self._failing:
                log.warning("metrics: cannot write %s: %s", path, exc)
            self._failing = True
            return
        self._failing = False
        self._written = body
        self._written_at = now

    def close(self) -> None:
        """Leave the last counts to whoever comes after."""
        self.write(force=True)

    def render(self) -> bytes:
        """Write the exposition of all workers together; see `CONTENT_TYPE`."""
        return self.prepare()()

    def prepare(self) -> Callable[[], bytes]:
        """Read the live numbers now; what is returned may run in a thread."""
        self._refresh()
        totals = Totals()
        totals.add(self.totals.dump())
        gauges = {self.slot: self.gauges.as_dict()}
        return lambda: self._merge(totals, gauges)

    def _merge(self, totals: Totals, gauges: dict[int, dict[str, float]]) -> bytes:
        found = list(self._others("metrics-*.json"))
        folded = {ident for snapshot in found for ident in snapshot["folded"]}.union(self._folded)
        now = self._clock()
        for snapshot in found:
            if snapshot["ident"] in folded:
                continue
            _try_add(totals, snapshot)
            # NOTE: monotonic time is one for all processes since boot; a file from before it is stale either way.
            if 0.0 <= now - snapshot["at"] <= FRESH_S:
                _join(gauges.setdefault(snapshot["slot"], {}), snapshot["gauges"])
        from nbgate.exposition import exposition

        return exposition(totals, gauges)

    def follow(self, name: str, value: int) -> None:
        """Take over a count that another room keeps since this process began."""
        self.totals.counts[name] += value - self._seen.get(name, 0)
        self._seen[name] = value

    def _refresh(self) -> None:
        if self.before is not None:
            self.before()
        if self.access_log is not None:
            dropped = self.access_log.dropped
            # A count that fell is another log's, after a change of its path.
            self.totals.log_dropped += dropped - self._dropped_seen if dropped >= self._dropped_seen else dropped
            self._dropped_seen = dropped
        gauges = self.gauges
        try:
            pages = Path("/proc/self/statm").read_bytes().split()[1]
            gauges.resident_bytes = int(pages) * os.sysconf("SC_PAGE_SIZE")
            # Since Linux 6.2 this size is the number of descriptors; listing them costs by their number.
            count = Path("/proc/self/fd").stat().st_size
            if count:
                gauges.open_fds = count
            elif self._clock() - self._fds_at >= _LIST_FDS_S:
                self._fds_at = self._clock()
                gauges.open_fds = len(os.listdir("/proc/self/fd")) - 1
        except OSError:
            return  # no /proc: these two stay 0

    def _others(self, pattern: str) -> Iterator[dict[str, Any]]:
        """Read the snapshots of other processes; what is none is passed over."""
        if self._dir is None:
            return
        for path in sorted(self._dir.glob(pattern)):
            try:
                found = orjson.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(found, dict) and found.get("shape") == _SHAPE and found["ident"] != self._ident:
                yield found

    def _fold(self) -> None:
        """Take over the counts of dead processes of this slot.

        A crash in between counts nothing twice: our file says whom it holds.
        """
        assert self._dir is not None
        gone = []
        for snapshot in list(self._others(f"metrics-{self.slot}-*.json")):
            pid = int(snapshot["ident"].partition("-")[0])
            if pid != os.getpid() and _is_alive(pid):
                continue
            self._folded += [*snapshot["folded"], snapshot["ident"]]
            gone.append((snapshot, self._dir / f"metrics-{self.slot}-{pid}.json"))
        inner = {ident for snapshot, _ in gone for ident in snapshot["folded"]}
        for snapshot, _ in gone:
            if snapshot["ident"] not in inner:
                _try_add(self.totals, snapshot)
        if gone:
            self.write(force=True)
        if self._failing:
            return
        try:
            for _, path in gone:
                if path != self.path:
                    path.unlink(missing_ok=True)
            self._folded.clear()
        except OSError as exc:
            log.warning("metrics: cannot remove what dead workers left: %s", exc)


def _try_add(totals: Totals, snapshot: dict[str, Any]) -> None:
    try:
        totals.add(snapshot)
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        log.warning("metrics: a snapshot of slot %s is malformed: %r", snapshot.get("slot"), exc)


def _join(mine: dict[str, float], theirs: dict[str, float]) -> None:
    """Add the gauges of two processes of one slot."""
    for name, value in theirs.items():
        old = mine.get(name, 0)
        mine[name] = max(old, value) if name in _WORST else old + value


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
