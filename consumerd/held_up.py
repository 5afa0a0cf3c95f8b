"""Partitions that are assigned and not read: their table is not there, or brokers cannot tell of them.

Where each topic has a table of its own, a table that is missing, or does not fit, holds up its topic alone: its
partitions are not read, their lag is shown, and the table is looked at again every few seconds. (A handler of one table
halts.) Nothing is lost by it: what was gathered of a partition is dropped, and read again from its checkpoint.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, get_args

from consumerd.assignment import RECLAIM_AFTER
from consumerd.errors import Halt, Outage, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch
    from consumerd.member import Member
    from consumerd.types import TopicPartition
    from consumerd.writer import Work

HELD_UP = "claim"
"""Who meets these outages."""
MOST_PATIENCE = 600.0
"""Seconds until a write is tried again, at most: each that fails for its table waits twice as long as the one before,
for the letters of its batch are sent again with it."""
LAG_INTERVAL = 30.0
"""Seconds between two looks at the lag of a partition that waits for its table: each is a question to a broker."""
SENTENCES = 5
"""Topics of which it is said why they wait; the others are counted."""


class TableWait(Outage):
    """A partition waits for the table of its topic."""


class HeldUp:
    """What keeps partitions of one member from being read, and how they come to be read again."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._looked: dict[TopicPartition, float] = {}
        self._failed: dict[TopicPartition, tuple[int, float]] = {}
        """Partitions whose write failed for its table: at which offset, and how long they waited for the next."""

    async def look(self, conn: AsyncConnection[object], partitions: Sequence[TopicPartition]) -> list[TopicPartition]:
        """Return the partitions whose table is there, none while the handler is paused; the others wait on."""
        if self._member.pause.on:
            await self._show_lag(conn, partitions)
            for partition in partitions:
                self._member.assignment.claim_later(partition, LAG_INTERVAL)
            return []
        tables, ready, waiting = self._member.tables, [], []
        waits: dict[str, Outage] = {}
        for partition in partitions:
            topic = partition.topic
            if tables.by_topic and topic not in waits:
                try:
                    await tables.of(topic).make_ready(conn)
                except Halt as halt:
                    waits[topic] = _wait(topic, halt)
                except Outage as outage:
                    if conn.closed:
                        raise
                    waits[topic] = outage  # a lock on this table alone
            if topic in waits:
                waiting.append(partition)
                self._member.assignment.hold_up(partition, waits[topic])
            else:
                ready.append(partition)
        await self._show_lag(conn, waiting)
        return ready

    async def hold(self, work: Work, halt: Halt) -> bool:
        """Hold up what is left of a write that its topic's own table does not take; False when that is a halt."""
        member = self._member
        if halt.reason != "table" or not member.tables.by_topic:
            return False
        held = [(batch, lease) for batch, lease in work if member.holds(batch, lease)]
        if held:
            member.tables.of(held[0][0].partition.topic).ready = False
        for batch, lease in held:
            partition = batch.partition
            oldest = batch.messages[0].timestamp()[1] if batch.messages else 0
            member.release([partition])
            member.progress.waits(partition, lease.next_offset, oldest=oldest, end=batch.next_offset)
            self._looked.pop(partition, None)
            member.assignment.hold_up(partition, _wait(partition.topic, halt), self._patience(partition, batch))
        with suppress(Outage):
            await member.hold([batch.partition for batch, _ in held])
        self.tell()
        return True

    def _patience(self, partition: TopicPartition, batch: Batch) -> float:
        """Return for how long a partition waits whose write failed: longer when that one failed before."""
        offset, waited = self._failed.get(partition, (-1, 0.0))
        wait = min(MOST_PATIENCE, 2 * waited) if offset == batch.first_offset else RECLAIM_AFTER
        self._failed[partition] = batch.first_offset, wait
        return wait

    def waits_for_table(self, partition: TopicPartition) -> bool:
        """Whether a partition waits for its table."""
        return isinstance(self._member.assignment.held_up.get(partition), TableWait)

    def tell(self) -> None:
        """Show what keeps assigned partitions from being read."""
        for source in get_args(Source):
            sentences = sorted({str(it) for it in self._member.assignment.held_up.values() if it.source == source})
            if more := sentences[SENTENCES:]:
                sentences = [*sentences[:SENTENCES], f"and {len(more)} more"]
            if sentences:
                self._member.progress.outage(source, "; ".join(sentences), HELD_UP)
            else:
                self._member.recovered(HELD_UP, source)

    def keep(self) -> None:
        """Keep the partitions of a claim that halts to be seen: where they stand, and how far they are behind."""
        for partition, (stored, found) in self._member.assignment.found.items():
            at = stored.next_offset if self._member.checkpoints.mode == "postgres" else found.committed
            if at is not None and at >= 0 and partition not in self._member.progress.partitions:
                self._member.progress.waits(partition, at, end=found.bounds[1] if found.bounds else 0)

    async def _show_lag(self, conn: AsyncConnection[object], waiting: Sequence[TopicPartition]) -> None:
        """Show where partitions stand that wait, now and then."""
        member, now = self._member, time.monotonic()
        due = [
            partition
            for partition in waiting
            if partition not in member.progress.partitions
            or now >= self._looked.get(partition, -LAG_INTERVAL) + LAG_INTERVAL
        ]
        if not due:
            return
        found = await member.found(due)
        stands = await member.checkpoints.read(conn, due)
        for partition in due:
            bounds, committed = found[partition].bounds, found[partition].committed
            if bounds is not None and partition in member.assignment.assigned:
                stored = stands[partition].next_offset if partition in stands else None
                at = stored if stored is not None and stored >= 0 else committed
                member.progress.waits(partition, bounds[0] if at is None else at)
                self._looked[partition] = now


def _wait(topic: str, halt: Halt) -> TableWait:
    return TableWait("postgres", f"topic {topic} waits for its table, the others go on: {halt}")
