"""What a handler has done and what it is doing: the one source of its state, metrics, log lines and status.

One line is logged for each change of state, none for a message. Counters move once a batch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from consumerd import metrics, ways_on
from consumerd.recent import Errors, Writes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from consumerd.accumulator import Batch
    from consumerd.errors import Halt, Source
    from consumerd.types import Message, TopicPartition

log = logging.getLogger(__name__)

State = Literal["starting", "waiting", "running", "paused", "stopping", "stopped", "halted"]

LETTERS_INTERVAL = 10.0
"""Seconds between two lines about dead letters: a steady trickle is not a line for each batch."""


@dataclass(slots=True)
class PartitionProgress:
    """One leased partition. Timestamps are Kafka's, in ms; 0: not known."""

    checkpoint: int
    oldest: int = 0
    """Of the oldest message that was received and is not written yet."""
    last: int = 0
    """Of what was written last."""
    behind_since: float | None = None
    """Since when (Unix time) there has been more, if there was a moment before when there was not."""
    caught_up: bool = False


@dataclass(slots=True)
class _Outage:
    sentence: str
    since: float


@dataclass(slots=True)
class Totals:
    """Since the process began."""

    consumed: int = 0
    written: int = 0
    dead_lettered: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


class Progress:
    """State and counts of one handler."""

    def __init__(self, handler: str, options: str = "", *, error_text: bool = False) -> None:
        self.handler = handler
        self._options = options
        """What commands that are named lead to the daemon's file with."""
        self._error_text = error_text
        self.state: State = "starting"
        self.state_since = time.time()
        self.ready = False
        """Whether the handler has joined its group; an empty assignment is ready, and an outage changes nothing."""
        self.halted: Halt | None = None
        self.totals = Totals()
        self.partitions: dict[TopicPartition, PartitionProgress] = {}
        self.high: dict[TopicPartition, int] = {}
        self.errors = Errors()
        self.last_commit: float | None = None
        self._outages: dict[tuple[Source, str], _Outage] = {}
        """By what is out, and by who met it: another's success says nothing of it."""
        self._writes = Writes()
        self._untold: dict[str, Counter[str]] = {"dead-lettered": Counter(), "skipped": Counter()}
        """What became of poison since the last line about it, by reason."""
        self._told = dict.fromkeys(self._untold, -LETTERS_INTERVAL)
        metrics.declare(handler)
        self._show_state()

    # Changes of state.

    def to(self, state: State) -> None:
        """Go to a state; a line in the log."""
        if state != self.state:
            self._be(state)
            log.info(state, extra={"handler": self.handler})

    def halt(self, halt: Halt) -> None:
        """Note a halt: the one state that only a fresh member ends."""
        halt = self._with_the_way_on(halt)
        self.halted, self.ready = halt, False
        self.errors.add(str(halt), time.time())
        self._outages.clear()
        metrics.halts.labels(self.handler, halt.reason).inc()
        self._be("halted")
        log.error("halted: %s", halt, extra={"handler": self.handler, "reason": halt.reason})

    def _with_the_way_on(self, halt: Halt) -> Halt:
        return ways_on.told(halt, self.handler, self._options)

    def outage(self, source: Source, sentence: str, who: str) -> None:
        """Note an outage that somebody met; a line when it begins or says something new."""
        self.errors.add(sentence, time.time())
        new = sentence not in self.waiting_for().get(source, [])
        known = self._outages.get((source, who))
        self._outages[source, who] = _Outage(sentence, known.since if known else time.monotonic())
        if new:
            log.warning("waiting: %s", sentence, extra={"handler": self.handler, "source": source})
        if self.state in {"starting", "running"}:
            self.to("waiting")

    def recovered(self, who: str, *sources: Source) -> None:
        """Take back what somebody met, of all sources when none is named; a line when it was the last of a source."""
        for source, met_by in list(self._outages):
            if met_by == who and (not sources or source in sources):
                seconds = time.monotonic() - self._outages.pop((source, met_by)).since
                if source not in self.waiting_for():
                    extra = {"handler": self.handler, "source": source, "seconds": round(seconds, 1)}
                    log.info("recovered", extra=extra)
        if self.state == "waiting" and not self._outages:
            self.to("running" if self.ready else "starting")

    def waiting_for(self) -> dict[str, list[str]]:
        """Return the sentences of the outages that there are, by source."""
        sentences: dict[str, list[str]] = {}
        for (source, _), outage in self._outages.items():
            if outage.sentence not in sentences.setdefault(source, []):
                sentences[source].append(outage.sentence)
        return sentences

    def pause(self) -> None:
        """Note that an operator has paused the handler."""
        self.to("paused")

    def resume(self) -> None:
        """Note that an operator has resumed it."""
        self.to("waiting" if self._outages else "running" if self.ready else "starting")

    def joined(self) -> None:
        """Note that the group has let us in."""
        if not self.ready:
            self.ready = True
            if self.state == "starting":
                self.to("running")

    def left(self) -> None:
        """Note that the group has put us out of it."""
        self.ready = False

    def rebalanced(self, holds: int, **changes: Sequence[TopicPartition]) -> None:
        """Note an assignment, a revocation or a loss."""
        metrics.rebalances.labels(self.handler).inc()
        metrics.partitions_assigned.labels(self.handler).set(holds)
        for partition in changes.get("assigned", ()):
            metrics.declare_partition(self.handler, partition)
        what = {name: " ".join(map(str, partitions)) for name, partitions in changes.items()}
        log.info("partitions changed", extra={"handler": self.handler, **what, "holds": holds})
        if "assigned" in changes and not changes["assigned"]:
            self.joined()

    # What happens to messages.

    def leased(self, partition: TopicPartition, offset: int) -> None:
        """Note where a partition goes on."""
        self.partitions[partition] = PartitionProgress(offset)

    def waits(self, partition: TopicPartition, checkpoint: int, *, oldest: int = 0, end: int = 0) -> None:
        """Note where a partition stands that is not read for now.

        If it is known: `oldest`, when the first message from there on came (ms), and `end`, to where there are some.
        """
        self.high[partition] = max(self.high.get(partition, 0), end)
        progress = self.partitions.setdefault(partition, PartitionProgress(checkpoint, oldest=oldest, caught_up=True))
        progress.checkpoint = checkpoint
        self._look(partition, progress)

    def released(self, partition: TopicPartition) -> None:
        """Forget a partition, and its gauges: another member's are right from now on."""
        if self.partitions.pop(partition, None):
            metrics.forget_partition(self.handler, partition)

    def forget(self) -> None:
        """Forget all partitions: another member of this handler has them from now on."""
        for partition in list(self.partitions):
            self.released(partition)

    def consumed(self, partition: TopicPartition, messages: int) -> None:
        """Count messages received."""
        self.totals.consumed += messages
        metrics.messages_consumed.labels(self.handler, partition.topic, str(partition.partition)).inc(messages)

    def taken(self, batches: Sequence[Batch]) -> None:
        """Count batches taken to be written, each once."""
        for batch in batches:
            if batch.given_back:
                continue
            metrics.flushes.labels(self.handler, batch.reason).inc()
            if not batch.messages:
                continue
            metrics.batch_messages.labels(self.handler).observe(len(batch.messages))
            metrics.batch_bytes.labels(self.handler).observe(batch.size)
            metrics.connection_wait.labels(self.handler).observe(max(0.0, batch.waited))

    def written(self, batch: Batch, seconds: float, existing: int = 0) -> int:
        """Count a committed batch; return how many of its rows are taken for those that existed already."""
        now = time.time()
        existing = min(existing, batch.rows)
        rows = batch.rows - existing
        self.totals.written += rows
        self.last_commit = now
        partition, messages = batch.partition, len(batch.messages)
        self._writes.add(time.monotonic(), partition, rows=rows, messages=messages, seconds=seconds)
        metrics.rows_written.labels(self.handler, partition.topic, str(partition.partition)).inc(rows)
        self._count_poison(batch)
        for reason, count in {**batch.skipped, "exists": existing}.items():
            self._count_skipped(reason, count)
        metrics.batch_write_duration.labels(self.handler).observe(seconds)
        metrics.last_commit_timestamp.labels(self.handler).set(now)
        oldest = batch.messages[0].timestamp()[1] / 1000 if batch.messages else 0
        if oldest > 0:
            metrics.end_to_end_latency.labels(self.handler).observe(max(0.0, now - oldest))
        if progress := self.partitions.get(partition):
            self.high[partition] = max(self.high.get(partition, 0), batch.next_offset)
            progress.checkpoint = batch.next_offset
            if batch.messages:
                progress.last, progress.oldest = batch.messages[-1].timestamp()[1], 0
            self._look(partition, progress)
        self._tell_poison(batch)
        return existing

    def _count_poison(self, batch: Batch) -> None:
        """Count what was refused: what has no letter was passed over."""
        for position, refusal in batch.refused.items():
            if position in batch.lettered:
                self.totals.dead_lettered[refusal.reason] += 1
                metrics.messages_dead_lettered.labels(self.handler, refusal.reason).inc()
                self._untold["dead-lettered"][refusal.reason] += 1
            else:
                self._count_skipped(refusal.reason, 1)
                self._untold["skipped"][refusal.reason] += 1

    def passed_over(self, partition: TopicPartition, offset: int) -> None:
        """Count a message that an operator has passed over, now that the checkpoint has moved past it."""
        self._count_skipped("operator", 1)
        extra = {"handler": self.handler, "partition": str(partition), "offset": offset}
        log.warning("passed over a message, as an operator told", extra=extra)

    def _count_skipped(self, reason: str, count: int) -> None:
        if count:
            self.totals.skipped[reason] += count
            metrics.messages_skipped.labels(self.handler, reason).inc(count)

    def _tell_poison(self, batch: Batch) -> None:
        """Log what became of poison since the last such line, if that is a while ago."""
        now = time.monotonic()
        for what, reasons in self._untold.items():
            if reasons and now - self._told[what] >= LETTERS_INTERVAL:
                extra = {"handler": self.handler, "latest": _latest(batch), "reasons": dict(reasons)}
                if self._error_text and batch.refused:
                    extra["error"] = " ".join(batch.refused[max(batch.refused)].told(words=True).split())
                log.warning(what, extra=extra)
                reasons.clear()
                self._told[what] = now

    def watermarks(self, high: Mapping[TopicPartition, int]) -> None:
        """Note high watermarks."""
        self.high.update(high)
        for partition in high:
            if progress := self.partitions.get(partition):
                self._look(partition, progress)

    def _look(self, partition: TopicPartition, progress: PartitionProgress) -> None:
        """Note when a partition falls behind, and when it has caught up."""
        if self.high.get(partition, 0) <= progress.checkpoint:
            progress.caught_up, progress.behind_since = True, None
        elif progress.caught_up and progress.behind_since is None:
            progress.behind_since = time.time()

    # What others see.

    def rate(self) -> float:
        """Return rows/s over the last seconds."""
        return sum(self._writes.rates(time.monotonic()).values())

    @property
    def last_error(self) -> str | None:
        """The last outage or halt."""
        return self.errors.last

    def lag(self, oldest: Mapping[TopicPartition, Message | None]) -> dict[TopicPartition, tuple[int, float]]:
        """Return messages and seconds that each partition is behind; sets the gauges.

        Seconds are the age of the oldest message not yet written, as far as it was received (and a halted handler's
        grows on). Of one that was not, all that is known is that it came after the last that was written, and not
        before this partition fell behind.
        """
        now = time.time()
        lags = {}
        for partition, progress in self.partitions.items():
            messages = max(0, self.high.get(partition, 0) - progress.checkpoint)
            first = oldest.get(partition)
            if first is not None:  # one without a value is false
                progress.oldest = first.timestamp()[1]
            since = (progress.oldest or max(progress.last, (progress.behind_since or 0) * 1000)) / 1000
            seconds = max(0.0, now - since) if (messages or first is not None) and since > 0 else 0.0
            lags[partition] = messages, seconds
            labels = (self.handler, partition.topic, str(partition.partition))
            metrics.lag_messages.labels(*labels).set(messages)
            metrics.lag_seconds.labels(*labels).set(seconds)
            metrics.checkpoint_offset.labels(*labels).set(progress.checkpoint)
        return lags

    def status(self, oldest: Mapping[TopicPartition, Message | None]) -> dict[str, Any]:
        """Return the handler's part of /status."""
        lags = self.lag(oldest)
        rates = self._writes.rates(time.monotonic())
        messages, seconds = self._writes.means(time.monotonic()) or (None, None)
        return {
            "state": self.state,
            "state_since": self.state_since,
            "ready": self.ready,
            "halt": _told(self.halted) if self.halted else None,
            "waiting_for": {source: "; ".join(sentences) for source, sentences in self.waiting_for().items()},
            "last_error": self.last_error,
            "errors": self.errors.told(),
            "last_commit": self.last_commit,
            "rows_per_second": round(sum(rates.values()), 1),
            "batch_messages": messages and round(messages, 1),
            "batch_write_seconds": seconds and round(seconds, 6),
            "consumed": self.totals.consumed,
            "written": self.totals.written,
            "dead_lettered": dict(self.totals.dead_lettered),
            "skipped": dict(self.totals.skipped),
            "lag_messages": sum(messages for messages, _ in lags.values()),
            "lag_seconds": round(max((seconds for _, seconds in lags.values()), default=0.0), 3),
            "partitions": [
                {
                    "topic": partition.topic,
                    "partition": partition.partition,
                    "checkpoint": self.partitions[partition].checkpoint,
                    "high_watermark": self.high.get(partition),
                    "lag_messages": behind,
                    "lag_seconds": round(age, 3),
                    "rows_per_second": round(rates.get(partition, 0.0), 1),
                }
                for partition, (behind, age) in sorted(lags.items())
            ],
        }

    def _be(self, state: State) -> None:
        self.state, self.state_since = state, time.time()
        self._show_state()

    def _show_state(self) -> None:
        for state in metrics.STATES:
            metrics.handler_state.labels(self.handler, state).set(state == self.state)


def _told(halt: Halt) -> dict[str, Any]:
    """Return a halt as /status shows it."""
    return {"reason": halt.reason, "message": str(halt), "commands": halt.commands}


def _latest(batch: Batch) -> str:
    """Name the last message of a batch that was refused, or else its partition."""
    if not batch.refused:
        return str(batch.partition)
    return f"{batch.partition}@{batch.messages[max(batch.refused)].offset()}"


def total_lag(lags: Iterable[tuple[int, float]]) -> tuple[int, float]:
    """Return all messages and the largest age of partitions' lags."""
    lags = list(lags)
    return sum(messages for messages, _ in lags), max((seconds for _, seconds in lags), default=0.0)
