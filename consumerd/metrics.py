"""Every metric, declared once. Counters move once a batch, gauges are set when somebody looks.

Names are Prometheus's: base units, `_total` for counters. Every label's values are made at start, so a rate is 0
before the first event and not absent.
"""

from __future__ import annotations

from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics import MetricWrapperBase

from consumerd import __version__
from consumerd.accumulator import FlushReason
from consumerd.errors import HaltReason, PoisonReason, SkipReason, Source

# A series of its own for each counter's birth would bury the counters.
disable_created_metrics()  # type: ignore[no-untyped-call]
registry = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=registry)
PlatformCollector(registry=registry)

PARTITION = ("handler", "topic", "partition")
STATES = ("starting", "waiting", "running", "paused", "stopping", "stopped", "halted")


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"consumerd_{name}", text, labels, registry=registry)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"consumerd_{name}", text, labels, registry=registry)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"consumerd_{name}", text, ("handler",), buckets=buckets, registry=registry)


messages_consumed = _counter("messages_consumed", "Messages received from Kafka.", *PARTITION)
rows_written = _counter("rows_written", "Rows committed to Postgres.", *PARTITION)
messages_dead_lettered = _counter(
    "messages_dead_lettered", "Messages whose letter was acknowledged and whose offset has moved.", "handler", "reason"
)
messages_skipped = _counter(
    "messages_skipped", "Messages that are neither row nor letter, and whose offset has moved.", "handler", "reason"
)
flushes = _counter("flushes", "Batches taken to be written, by what made them due.", "handler", "reason")
retries = _counter("retries", "Attempts that failed by an outage and were tried again.", "handler", "cause")
isolations = _counter("isolations", "Batches that Postgres refused and that were searched for the bad rows.", "handler")
fenced_writes = _counter("fenced_writes", "Writes rolled back because the checkpoint had moved.", "handler")
rebalances = _counter("rebalances", "Assignments and revocations of partitions.", "handler")
halts = _counter("halts", "Halts of the handler.", "handler", "reason")

config_last_reload_successful = _gauge(
    "config_last_reload_successful", "Whether the config that was read last is the one in use."
)
config_last_reload_success_timestamp = _gauge(
    "config_last_reload_success_timestamp_seconds", "When the config in use was read."
)
lag_messages = _gauge("lag_messages", "Messages between checkpoint and high watermark.", *PARTITION)
lag_seconds = _gauge("lag_seconds", "Age of the oldest message not yet written; 0 when caught up.", *PARTITION)
checkpoint_offset = _gauge("checkpoint_offset", "The next offset to be written.", *PARTITION)
handler_state = _gauge("handler_state", "1 for the state that the handler is in.", "handler", "state")
partitions_assigned = _gauge("partitions_assigned", "Partitions that this member holds.", "handler")
buffered_bytes = _gauge("buffered_bytes", "Memory of messages received and not yet written.", "handler")
buffer_limit_bytes = _gauge("buffer_limit_bytes", "The bound of buffered_bytes.", "handler")
last_commit_timestamp = _gauge("last_commit_timestamp_seconds", "When the last batch was committed.", "handler")

batch_messages = _histogram(
    "batch_messages", "Messages of a batch.", (1, 10, 100, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)
)
batch_bytes = _histogram("batch_bytes", "Bytes of a batch's values.", tuple(4.0**n for n in range(5, 14)))
batch_write_duration = _histogram(
    "batch_write_duration_seconds",
    "From the start of a write's transaction to its COMMIT.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
end_to_end_latency = _histogram(
    "end_to_end_latency_seconds",
    "From the timestamp of a batch's oldest message to its commit.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
Info("consumerd_build", "The version.", registry=registry).info({"version": __version__})


def forget(handler: str) -> None:
    """Drop every series of a handler that is no more: one that stays would go on to say that it is halted, say."""
    for metric in registry._names_to_collectors.values():  # noqa: SLF001 - there is no other list
        if isinstance(metric, MetricWrapperBase) and "handler" in metric._labelnames:  # noqa: SLF001
            metric.remove_by_labels({"handler": handler})


def declare(handler: str) -> None:
    """Make every label value of a handler, at 0."""
    for reason in get_args(PoisonReason):
        messages_dead_lettered.labels(handler, reason)
    for reason in get_args(SkipReason):
        messages_skipped.labels(handler, reason)
    for reason in get_args(FlushReason):
        flushes.labels(handler, reason)
    for source in get_args(Source):
        retries.labels(handler, source)
    for reason in get_args(HaltReason):
        halts.labels(handler, reason)
    for state in STATES:
        handler_state.labels(handler, state)
    for metric in (isolations, fenced_writes, rebalances, partitions_assigned, buffered_bytes, last_commit_timestamp):
        metric.labels(handler)
    for histogram in (batch_messages, batch_bytes, batch_write_duration, end_to_end_latency):
        histogram.labels(handler)
