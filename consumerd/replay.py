"""A replay: a member whose partitions are given by a range of offsets, and not by a group.

It is the handler's own path, from the Kafka thread to the checkpoint, with these differences: its consumer is assigned
(it joins no group, and commits nothing to Kafka), its checkpoints are its own (`replay_checkpoint.py`), each partition
is read up to an end, and the whole may be slowed down to a rate. It ends when every partition stands at its end.

On trial (a dry run) every write is rolled back and no letter is sent, and nothing else differs.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from consumerd import brokers, postgres
from consumerd.accumulator import size_of
from consumerd.assignment import Assignment
from consumerd.brokers import consumer_config
from consumerd.checkpoint import Checkpoints
from consumerd.decide import Decision
from consumerd.errors import Halt, Outage
from consumerd.kafka import Chunk, ConsumerThread
from consumerd.member import Member
from consumerd.packed import Packed
from consumerd.progress import Progress
from consumerd.reconcile import Reconciler
from consumerd.replay_checkpoint import ReplayCheckpoints, TrialCheckpoints
from consumerd.topics import TopicGone

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import confluent_kafka as ck
    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch
    from consumerd.checkpoint import KafkaCheckpoints, Lease, Stand
    from consumerd.commits import Commit
    from consumerd.config import Config, HandlerConfig
    from consumerd.decide import Committed, Stored
    from consumerd.errors import Refusal
    from consumerd.replay_checkpoint import Range
    from consumerd.types import TopicPartition
    from consumerd.writer import Work

MOST_TOLD = 1_000
"""Refused messages that are named; the others are counted."""
WRITES_PER_SECOND = 2
"""Writes of a replay with a rate, at least: it goes evenly, and not in bursts."""
OF_THE_GROUP = re.compile("; (?:Kafka's own tool|set `group_id`)")
"""Where a halt's sentence goes on with what would be done to the handler's group, which a replay must not touch."""
FINAL = {"checkpoint", "gap", "topic"}
"""Reasons of halts that name their own way on, or have none."""
OF_GROUPS = ("group.protocol", "group.remote.assignor", "group.instance.id")
"""Properties that go with a group alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is replayed: offsets of partitions, by the handler as it is to write them."""

    handler: HandlerConfig
    ranges: Mapping[TopicPartition, Range]
    group: str = ""
    """The replay's own; nothing on trial."""
    rate: int | None = None
    """Messages/s, at most."""

    @property
    def on_trial(self) -> bool:
        """Whether every write is rolled back."""
        return not self.group

    @property
    def offsets(self) -> int:
        """How many there are to go through; not each need hold a message."""
        return sum(of.end - of.start for of in self.ranges.values())


@dataclass(slots=True)
class Counts:
    """What became of messages in this run."""

    rows: int = 0
    existing: int = 0
    """Of these, those that the table had already."""
    refused: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    told: list[tuple[TopicPartition, int, Refusal]] = field(default_factory=list)
    """The first that were refused: where, and why."""

    def add(self, batch: Batch) -> None:
        """Count a batch that was written."""
        self.rows += batch.rows
        self.skipped.update(batch.skipped)
        for position, refusal in sorted(batch.refused.items()):
            self.refused[refusal.reason] += 1
            if len(self.told) < MOST_TOLD:
                self.told.append((batch.partition, batch.messages[position].offset(), refusal))


class RangeThread(ConsumerThread):
    """Reads given partitions, in no group."""

    partitions: Sequence[TopicPartition] = ()

    def _subscribe(self, consumer: ck.Consumer, topics: list[str]) -> None:  # noqa: ARG002 - as ConsumerThread
        self._on_assign(consumer, brokers.positions(self.partitions))


class RangeAssignment(Assignment):
    """Partitions that go on where the replay's own checkpoint is, whatever Kafka has."""

    def commit(self, commits: Sequence[Commit]) -> None:
        """Commit nothing: the group's offsets are the handler's."""

    def _counts(self, partitions: Sequence[TopicPartition]) -> dict[str, int]:  # noqa: ARG002 - as Assignment
        return {}  # no other checkpoints appear than were made when the replay began

    async def _claim(
        self, conn: AsyncConnection[Any], partitions: Sequence[TopicPartition]
    ) -> dict[TopicPartition, Stored]:
        stored = await super()._claim(conn, partitions)
        if gone := [str(partition) for partition in partitions if partition not in stored]:
            raise Halt(
                "checkpoint",
                f"the checkpoint of this replay for {gone[0]} is gone: it was forgotten, or Postgres went back to "
                f"before it began",
            )
        return stored

    def _decide(
        self,
        partition: TopicPartition,
        stored: Stored,
        committed: Committed,  # noqa: ARG002
    ) -> tuple[Stored, Decision]:
        topic_id = self._topic_id(partition)
        if stored.topic_id and topic_id and stored.topic_id != topic_id:
            raise made_again([partition.topic])
        return stored, Decision(kind="resume", offset=stored.next_offset)


class ReplayProgress(Progress):
    """Progress whose halts are those of a command."""

    def _with_the_way_on(self, halt: Halt) -> Halt:
        if halt.reason in FINAL:
            return halt
        return Halt(halt.reason, f"{str(halt).rstrip('.;')}; once that is mended, the same command goes on")


class ReplayReconciler(Reconciler):
    """Looks first whether it was the handler that fenced a write."""

    async def fenced(self, work: Work) -> None:
        """Learn why a write was fenced; raises Halt when the handler runs that must not."""
        await cast("Replay", self._member).stay_behind_the_handler()
        await super().fenced(work)


class Replay(Member):
    """One run of a replay."""

    _progress_type = ReplayProgress
    _assignment_type = RangeAssignment
    _reconciler_type = ReplayReconciler

    def __init__(self, config: Config, plan: Plan, memory: int) -> None:
        topics = tuple(sorted({partition.topic for partition in plan.ranges}))
        batch = plan.handler.batch
        if plan.rate is not None:
            most = min(batch.max_messages, max(2, plan.rate // WRITES_PER_SECOND))
            batch = batch.model_copy(update={"max_messages": most})
        poison = plan.handler.poison
        if plan.on_trial and poison.action == "dead-letter":  # letters do not roll back
            poison = poison.model_copy(update={"action": "skip"})
        changes = {"topics": topics, "batch": batch, "checkpoint": "postgres", "poison": poison}
        handler = plan.handler.model_copy(update=changes)
        super().__init__(config, handler, memory)
        self.plan = plan
        self.on_trial = plan.on_trial
        self.ended = asyncio.Event()
        """Set when every partition stands at its end."""
        self.counts = Counts()
        self._at = {partition: of.start for partition, of in plan.ranges.items()}
        self._through: set[TopicPartition] = set()
        """Partitions of which everything up to the end was received."""
        self._live: Mapping[TopicPartition, Stand] = {}
        """Where the handler stood when this run began."""
        self._holding: set[asyncio.Task[None]] = set()
        self._free_at = -math.inf
        """When the rate allows the next message."""

    @property
    def passed(self) -> int:
        """Offsets that were gone through since this run began."""
        return sum(self._at[partition] - of.start for partition, of in self.plan.ranges.items())

    async def stay_behind_the_handler(self) -> None:
        """Raise Halt when the handler has gone on whose checkpoint this replay must end at."""
        if not isinstance(self.checkpoints, ReplayCheckpoints):
            return
        conn = await self.connect()
        try:
            partition = await self.checkpoints.moved_on(conn)
        finally:
            await conn.close()
        if partition is not None:
            raise Halt(
                "checkpoint",
                f"handler {self.handler.name} has begun to write {partition} again, whose older rows this replay would "
                f"put over newer ones: stop the handler, forget this replay, and replay up to where the handler then "
                f"stands",
            )

    # What a replay has others of.

    async def _connect(self) -> AsyncConnection[Any]:
        return await postgres.connect(self.config.postgres, f"consumerd/replay-{self.handler.name}")

    async def _open_checkpoints(self, conn: AsyncConnection[Any]) -> Checkpoints | KafkaCheckpoints:
        if self.on_trial:
            return TrialCheckpoints("", self.tables.target, self.plan.ranges, lambda: self.assignment.leases)
        schema, group = self.config.postgres.schema_name, self.plan.group
        live = Checkpoints(schema, self.handler.group_id, self.tables.target)
        self._live = await live.read(conn, sorted(self.plan.ranges))
        return ReplayCheckpoints(schema, group, self.tables.target, live=self.handler.group_id)

    def _new_thread(self, topics: Sequence[str]) -> ConsumerThread:
        settings = consumer_config(self.config.kafka, self.handler.group_id, self.budget.queue)
        settings = {name: value for name, value in settings.items() if name not in OF_GROUPS}
        settings["partition.assignment.strategy"] = "range"  # what is assigned is replaced, not added to
        thread = RangeThread(settings, topics, self, self.handler.name, self.budget.batch)
        thread.partitions = sorted(self.plan.ranges)
        return thread

    def epoch_of_letters(self, partition: TopicPartition, lease: Lease) -> int:  # noqa: ARG002 - as Member
        """Return the handler's: the epochs of a replay count its own runs, and say nothing of the handler's letters."""
        return self._live[partition].epoch if partition in self._live else 0

    def outrun(self, partition: TopicPartition) -> None:
        """Halt: whoever goes on with a replay takes all of it."""
        self.failed(Halt("checkpoint", f"another process goes on with this replay: it has claimed {partition}"))

    async def _follow_partitions(self) -> None:
        """Look for none: the range is what is read."""

    async def confirm_topics(self, arrived: float) -> None:
        """Make sure that what arrived at a time came of the topics that the range is of; raises Halt, Outage."""
        try:
            await super().confirm_topics(arrived)
        except TopicGone as gone:
            raise made_again(gone.topics) from gone

    async def _halt(self, halt: Halt) -> None:
        if halt.reason == "gap":
            what = str(halt).partition("; nothing was skipped")[0]
            halt = Halt("gap", f"{what}; nothing was skipped; to leave these out: --accept-gap")
        elif isinstance(halt, TopicGone):
            halt = made_again(halt.topics)
        await super()._halt(Halt(halt.reason, OF_THE_GROUP.split(str(halt))[0]))

    # Where the range ends.

    def fill(self, in_transit: int) -> float:
        """Return the share of the buffer that is used; all of it while the rate allows no more."""
        if self.plan.rate is not None and (in_transit > 0 or time.monotonic() < self._free_at):
            return 1.0
        return super().fill(in_transit)

    def started(self, partition: TopicPartition, offset: int) -> None:
        """Open a leased partition."""
        super().started(partition, offset)
        self._at[partition] = offset
        self._look_for_the_end()  # it may stand there already: by another run, or a write whose answer was lost

    def release(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget partitions with all that is gathered of them."""
        partitions = list(partitions)
        self._through.difference_update(partitions)
        super().release(partitions)

    def received(self, chunks: list[Chunk]) -> None:
        """Gather messages of started partitions, up to their ends."""
        within = [kept for chunk in chunks if (kept := self._within(chunk)) is not None]
        if self.plan.rate is not None:
            messages = sum(len(chunk.messages) for chunk in within)
            self._free_at = max(time.monotonic(), self._free_at) + messages / self.plan.rate
        super().received(within)
        for chunk in chunks:
            self._skip_to_the_end(chunk.partition)

    def _within(self, chunk: Chunk) -> Chunk | None:
        """Return what of a chunk lies before its partition's end."""
        end = self.plan.ranges[chunk.partition].end
        if chunk.partition not in self._positions or chunk.messages[-1].offset() < end - 1:
            return chunk
        self._is_through(chunk.partition)
        messages = [message for message in chunk.messages if message.offset() < end]
        if len(messages) == len(chunk.messages):
            return chunk
        return Chunk(chunk.partition, messages, size_of(messages), Packed(messages=len(messages))) if messages else None

    def positions(self, positions: dict[TopicPartition, int]) -> None:
        """Have the checkpoints follow where offsets hold no message, up to their ends."""
        within = {}
        for partition, position in positions.items():
            end = self.plan.ranges[partition].end
            within[partition] = min(position, end)
            if position >= end and partition in self._positions:
                self._is_through(partition)
                self._skip_to_the_end(partition)
        super().positions(within)

    def written(self, work: Work, seconds: float, existing: int = 0) -> None:
        """Take note of a committed write; the last one ends the replay."""
        self.counts.existing += existing
        for batch, _ in work:
            self.counts.add(batch)
            self._at[batch.partition] = batch.next_offset
        super().written(work, seconds, existing)
        for batch, _ in work:
            self._skip_to_the_end(batch.partition)
        self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        if all(self._at[partition] >= of.end for partition, of in self.plan.ranges.items()):
            self.ended.set()

    def _is_through(self, partition: TopicPartition) -> None:
        """Have nothing more of a partition delivered: all of its range has come."""
        if partition in self._through:
            return
        self._through.add(partition)

        async def hold() -> None:
            if partition in self._through:  # else it begins anew, from an earlier offset
                with suppress(Outage):
                    await self.hold([partition])

        task = asyncio.create_task(hold(), name=f"{self.handler.name}: end of {partition}")
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)

    def _skip_to_the_end(self, partition: TopicPartition) -> None:
        """Move the checkpoint over offsets without a message that are the range's last, once all before is written."""
        lease, position = self.assignment.leases.get(partition), self._positions.get(partition)
        end = self.plan.ranges[partition].end
        if partition in self._through and lease is not None and lease.next_offset == position and position < end:
            self._batches.tail(partition, position, end)
            self._wake.set()


def made_again(topics: Sequence[str]) -> TopicGone:
    """Return the halt for topics of which the range's offsets are not any more."""
    return TopicGone(
        list(topics),
        f"topic {', '.join(topics)} was deleted, and perhaps made again, since this replay began: the messages that it "
        f"was to repeat are gone; nothing of another topic was written; forget this replay",
    )
