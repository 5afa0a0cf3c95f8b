"""Every metric, declared once. Counters move once a batch, gauges are set when somebody looks.

Names are Prometheus's: base units, `_total` for counters. Every label's values are made at start, so a rate is 0
before the first event and not absent. The sentence in a declaration says what is measured, the docstring below it what
to do with that; docs/metrics.md is made of both.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, get_args

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

if TYPE_CHECKING:
    from consumerd.types import TopicPartition

# A series of its own for each counter's birth would bury the counters.
disable_created_metrics()  # type: ignore[no-untyped-call]
registry = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=registry)
PlatformCollector(registry=registry)

HANDLER = ("handler",)
PARTITION = ("handler", "topic", "partition")
REPLAYS = ("failed", "interrupted")
STATES = ("starting", "waiting", "running", "paused", "stopping", "stopped", "halted")


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"consumerd_{name}", text, labels, registry=registry)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"consumerd_{name}", text, labels, registry=registry)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"consumerd_{name}", text, HANDLER, buckets=buckets, registry=registry)


lag_messages = _gauge("lag_messages", "Messages between checkpoint and high watermark.", *PARTITION)
"""How much there is to do. A halted handler's stands as it was when it halted. Seconds tell better whether that is
much: alert on `lag_seconds`."""
lag_seconds = _gauge("lag_seconds", "Age of the oldest message not yet written; 0 when caught up.", *PARTITION)
"""How late rows are: the one to alert on. It is computed at each scrape, and grows on while the handler waits or is
halted. In a halted handler's last partitions it stays although another member may write them by then."""
checkpoint_offset = _gauge("checkpoint_offset", "The next offset to be written.", *PARTITION)
"""One that stands still while `lag_messages` is above 0 is not being written: look at the state, then at the log."""

messages_consumed = _counter("messages_consumed", "Messages received from Kafka.", *PARTITION)
"""Its rate is the input. It counts again what a rebalance or a restart has read again."""
rows_written = _counter("rows_written", "Rows committed to Postgres.", *PARTITION)
"""Its rate is the output; at 0 with lag, something is wrong. A transform may make several rows of a message."""
messages_dead_lettered = _counter(
    "messages_dead_lettered",
    "Messages whose letter was acknowledged and whose offset has moved.",
    "handler",
    "reason",
)
"""Any increase wants a look (`consumerd dlq list`). docs/values.md has what each reason means."""
messages_skipped = _counter(
    "messages_skipped", "Messages that are neither row nor letter, and whose offset has moved.", "handler", "reason"
)
"""The rest of the books: by `where`, as tombstones, because a row exists already, by the transform, by an operator's
`consumerd resume --skip`; any other reason is poison's where `[poison] action` is `skip`."""

batch_messages = _histogram(
    "batch_messages", "Messages of a batch.", (1, 10, 100, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)
)
"""Small batches under lag are slow ones: look at `flushes_total`, then at `[batch]`."""
batch_bytes = _histogram("batch_bytes", "Bytes of a batch's values.", tuple(4.0**n for n in range(5, 14)))
"""Where it is at `max_bytes`, that bound ends batches, not `max_messages`."""
batch_write_duration = _histogram(
    "batch_write_duration_seconds",
    "From the start of a write's transaction to its COMMIT.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
"""What Postgres takes. When it grows, look there: locks, checkpoints, an index too many, the disk."""
end_to_end_latency = _histogram(
    "end_to_end_latency_seconds",
    "From the timestamp of a batch's oldest message to its commit.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
"""What a reader of the table sees of what is written; what is not written yet is in `lag_seconds` alone."""
connection_wait = _histogram(
    "connection_wait_seconds",
    "From when a batch was due to when a connection was free to write it.",
    (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
"""Near 0 there are connections to spare. When it grows while writes are quick, raise `max_connections`; while they are
slow, Postgres is what to look at."""
flushes = _counter("flushes", "Batches taken to be written, by what made them due.", "handler", "reason")
"""Mostly `age`: it keeps up. Mostly `messages` or `bytes`: a backlog. `pressure`: memory is
short, Postgres too slow."""

retries = _counter("retries", "Attempts that failed by an outage and were tried again.", "handler", "cause")
"""What is away, and how often it was asked; the sentence is in `/status`."""
isolations = _counter("isolations", "Batches that Postgres refused and that were searched for the bad rows.", "handler")
"""Each costs some statements and leaves dead rows behind. A steady rate wants a stricter mapping, or a mended
producer."""
fenced_writes = _counter("fenced_writes", "Writes rolled back because the checkpoint had moved.", "handler")
"""Fencing at work, with a rebalance or a failover. Without either, two members believe they own a partition: look for a
process that was suspended, or for a second one with the same `group_instance_id`."""
rebalances = _counter("rebalances", "Assignments and revocations of partitions.", "handler")
"""Some at each start and stop. A steady rate is a member that comes and goes, or that polls too late."""
halts = _counter("halts", "Halts of the handler.", "handler", "reason")
"""Which kind of mistake it was (docs/failures.md); whether it is halted now is in `handler_state`."""

handler_state = _gauge("handler_state", "1 for the state that the handler is in, 0 for the others.", "handler", "state")
"""Alert on `halted` at once, on `waiting` after some minutes."""
partitions_assigned = _gauge("partitions_assigned", "Partitions that this member holds.", "handler")
"""Summed over all members, the topics' partitions; 0 in one is a spare."""
partitions_paused = _gauge("partitions_paused", "Partitions held that are not read just now.", "handler")
"""Memory is at its bound (all of them, see `buffered_bytes`), a topic waits for its table, the claim is under way, or
the handler was paused."""
buffered_bytes = _gauge("buffered_bytes", "Memory of messages received and not yet written.", "handler")
"""Near `buffer_limit_bytes` Postgres is slower than the topic; nothing is lost by it, Kafka keeps the rest."""
buffer_limit_bytes = _gauge("buffer_limit_bytes", "The bound of buffered_bytes.", "handler")
"""The handler's share of `daemon.max_buffered`."""
last_commit_timestamp = _gauge(
    "last_commit_timestamp_seconds", "When the last batch was committed; 0 before the first.", "handler"
)
"""With lag, `time()` less this is for how long nothing has been written."""

replays = _gauge("replays", "Replays of the handler that have not ended, by why.", "handler", "state")
"""`failed`: it halted, `consumerd replay HANDLER --list` says why. `interrupted`: stopped or killed a minute ago or
more; the same command goes on, `--forget` gives it up."""
letters_failed_again = _gauge(
    "letters_failed_again", "Letters that failed once more when they were redriven.", "handler"
)
"""What was mended did not mend these: `consumerd dlq list HANDLER`."""

config_last_reload_successful = _gauge(
    "config_last_reload_successful", "Whether the last configuration that was read was taken, 1 or 0."
)
"""At 0 the daemon runs on with the configuration of before, and the next restart will refuse this one: the log has its
mistakes."""
config_last_reload_success_timestamp = _gauge(
    "config_last_reload_success_timestamp_seconds", "When the configuration in use was read."
)
"""Older than your last deployment: that one was not reloaded."""
build_info = Info("consumerd_build", "The version, as a label.", registry=registry)
"""Whether all members run the same one."""
build_info.info({"version": __version__})

VALUES: dict[MetricWrapperBase, tuple[str, ...]] = {
    messages_dead_lettered: get_args(PoisonReason),
    messages_skipped: get_args(SkipReason),
    flushes: get_args(FlushReason),
    retries: get_args(Source),
    halts: get_args(HaltReason),
    handler_state: STATES,
    replays: REPLAYS,
}
"""The values of the label beside `handler`."""
OF_HANDLERS: tuple[MetricWrapperBase, ...] = (
    *(batch_messages, batch_bytes, batch_write_duration, end_to_end_latency, connection_wait),
    *(isolations, fenced_writes, rebalances, partitions_assigned, partitions_paused),
    *(buffered_bytes, buffer_limit_bytes, last_commit_timestamp, letters_failed_again),
)
"""Those whose only label is `handler`."""


def forget(handler: str) -> None:
    """Drop every series of a handler that is no more: one that stays would go on to say that it is halted, say."""
    for metric in registry._names_to_collectors.values():  # noqa: SLF001 - there is no other list
        if isinstance(metric, MetricWrapperBase) and "handler" in metric._labelnames:  # noqa: SLF001
            metric.remove_by_labels({"handler": handler})


def declare(handler: str) -> None:
    """Make every label value of a handler, at 0."""
    for metric, values in VALUES.items():
        for value in values:
            metric.labels(handler, value)
    for metric in OF_HANDLERS:
        metric.labels(handler)


def declare_partition(handler: str, partition: TopicPartition) -> None:
    """Make the counters of a partition, at 0 unless it was here before."""
    for counter in (messages_consumed, rows_written):
        counter.labels(handler, partition.topic, str(partition.partition))


def forget_partition(handler: str, partition: TopicPartition) -> None:
    """Remove the gauges of a partition that is another member's now; its counters stay as they are."""
    for gauge in (lag_messages, lag_seconds, checkpoint_offset):
        with suppress(KeyError):
            gauge.remove(handler, partition.topic, str(partition.partition))
