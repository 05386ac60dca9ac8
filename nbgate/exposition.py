"""The table of metrics, and how Prometheus is shown it.

Lives here: names, labels and meanings; the text format of merged numbers. Must
not: count anything (`metrics`). Heat: cold; imported at the first scrape, as
prometheus_client is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from nbgate.logs import USAGE_KINDS
from nbgate.metrics import BOUNDS

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

    from nbgate.metrics import Histogram, Totals


class Metric(NamedTuple):
    """One row of the table of metrics; `docs/metrics.md` is held equal to it."""

    name: str
    type: Literal["counter", "histogram", "gauge"]
    labels: tuple[str, ...]
    meaning: str


METRICS: Final = (
    Metric("nbgate_requests_total", "counter", ("operation", "status", "channel", "model"), "Calls answered."),
    Metric("nbgate_errors_total", "counter", ("code", "source"), "Errors answered, by who is to blame."),
    Metric("nbgate_tokens_total", "counter", ("channel", "model", "kind"), "Tokens that upstreams reported."),
    Metric("nbgate_received_bytes_total", "counter", ("operation",), "Body bytes received from clients."),
    Metric("nbgate_sent_bytes_total", "counter", ("operation",), "Body bytes sent to clients."),
    Metric("nbgate_retries_total", "counter", (), "Tries after the first, of all calls."),
    Metric("nbgate_shed_total", "counter", ("reason",), "Calls refused because the worker was overloaded."),
    Metric("nbgate_connections_refused_total", "counter", (), "Connections past a bound, answered 503."),
    Metric("nbgate_timeouts_total", "counter", ("kind",), "Connections ended by a deadline."),
    Metric("nbgate_requests_rejected_total", "counter", (), "Requests that broke the grammar, a bound or a deadline."),
    Metric("nbgate_log_lines_dropped_total", "counter", (), "Access log lines that could not be written."),
    Metric(
        "nbgate_overhead_seconds", "histogram", ("operation",), "Time in the gateway without waiting for the upstream."
    ),
    Metric("nbgate_request_seconds", "histogram", ("operation",), "Time from the request to the end of its answer."),
    Metric("nbgate_first_byte_seconds", "histogram", ("operation",), "Time from the request to its first answer byte."),
    Metric("nbgate_connections", "gauge", ("worker",), "Open client connections."),
    Metric("nbgate_requests_active", "gauge", ("worker",), "Calls under way."),
    Metric("nbgate_streams_open", "gauge", ("worker",), "Answers being relayed."),
    Metric("nbgate_upstream_in_use", "gauge", ("worker",), "Upstream connections in use."),
    Metric("nbgate_upstream_idle", "gauge", ("worker",), "Upstream connections kept for reuse."),
    Metric("nbgate_upstream_waiting", "gauge", ("worker",), "Calls that wait for an upstream connection."),
    Metric("nbgate_loop_lag_seconds", "gauge", ("worker",), "How late the event loop last ran a timer."),
    Metric(
        "nbgate_overload_state", "gauge", ("worker", "reason"), "0: none, 1: no keep-alive, 2: new calls are refused."
    ),
    Metric("nbgate_resident_bytes", "gauge", ("worker",), "Resident memory."),
    Metric("nbgate_open_fds", "gauge", ("worker",), "Open file descriptors."),
)
# The plain counts of `Totals.counts`: metric and labels.
COUNTS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "shed_memory": ("nbgate_shed_total", ("memory",)),
    "shed_lag": ("nbgate_shed_total", ("lag",)),
    "refused": ("nbgate_connections_refused_total", ()),
    "timeouts": ("nbgate_timeouts_total", ("request",)),
    "stalled": ("nbgate_timeouts_total", ("stalled",)),
    "rejected": ("nbgate_requests_rejected_total", ()),
}
# Gauges with more labels than the worker: the fields of `Gauges` by label values.
_FIELDS: Final[dict[str, dict[tuple[str, ...], str]]] = {
    "overload_state": {("memory",): "overload_memory", ("lag",): "overload_lag"},
}


def _samples(totals: Totals) -> dict[str, dict[tuple[str, ...], float]]:
    """Sum the series up for each counter of the table."""
    out: dict[str, dict[tuple[str, ...], float]] = {m.name: {} for m in METRICS if m.type == "counter"}

    def count(name: str, labels: tuple[str, ...], n: float) -> None:
        out[name][labels] = out[name].get(labels, 0) + n

    for (operation, status, channel, model), series in totals.series.items():
        count("nbgate_requests_total", (operation, str(status), channel, model), series.requests)
        count("nbgate_received_bytes_total", (operation,), series.bytes_in)
        count("nbgate_sent_bytes_total", (operation,), series.bytes_out)
        for kind, n in zip(USAGE_KINDS, series.tokens, strict=True):
            if n:
                count("nbgate_tokens_total", (channel, model, kind), n)
    for labels, n in totals.errors.items():
        count("nbgate_errors_total", labels, n)
    for key, n in totals.counts.items():
        count(*COUNTS[key], n)
    count("nbgate_retries_total", (), totals.retries)
    count("nbgate_log_lines_dropped_total", (), totals.log_dropped)
    return out


class _Collector:
    """Hand the merged numbers to prometheus_client."""

    def __init__(self, totals: Totals, gauges: dict[int, dict[str, float]]) -> None:
        self._totals = totals
        self._gauges = gauges

    def collect(self) -> Iterable[Family]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        samples = _samples(self._totals)
        histograms = iter(range(len(BOUNDS)))
        for metric in METRICS:
            if metric.type == "counter":
                counter = CounterMetricFamily(metric.name, metric.meaning, labels=metric.labels)
                for labels, n in samples[metric.name].items():
                    counter.add_metric(labels, n)
                yield counter
            elif metric.type == "gauge":
                gauge = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
                name = metric.name.removeprefix("nbgate_")
                for slot, values in self._gauges.items():
                    for more, field in _FIELDS.get(name, {(): name}).items():
                        gauge.add_metric((str(slot), *more), values.get(field, 0))
                yield gauge
            else:
                family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
                which = next(histograms)
                for operation, three in self._totals.times.items():
                    family.add_metric((operation,), _buckets(three[which], BOUNDS[which]), three[which].sum)
                yield family


def _buckets(histogram: Histogram, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """Give the cumulative buckets, as Prometheus wants them."""
    out: list[tuple[str, float]] = []
    reached = 0
    for bound, n in zip((*bounds, float("inf")), histogram.counts, strict=True):
        reached += n
        out.append(("+Inf" if bound == float("inf") else f"{bound:g}", reached))
    return out


def exposition(totals: Totals, gauges: dict[int, dict[str, float]]) -> bytes:
    """Write the text format: counters of all, gauges by slot."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(totals, gauges))
    return generate_latest(registry)


def table() -> str:
    """Draw the table of `docs/metrics.md`."""
    rows = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    rows += [f"| `{m.name}` | {m.type} | {', '.join(m.labels) or '–'} | {m.meaning} |" for m in METRICS]
    return "\n".join(rows)
