"""The end of a run that is to stop (`--until-end`): all that the topics held when it began is written.

A partition is there when its checkpoint is: the lease's while this member holds the partition, the stored one when
another member does. So several such runs share a group, and the last to end leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from consumerd.errors import Outage

if TYPE_CHECKING:
    from consumerd.member import Member
    from consumerd.types import TopicPartition

log = logging.getLogger(__name__)

UNTIL_END = "until end"
"""Who meets its outages."""
INTERVAL = 0.5
"""Seconds between two looks."""


class UntilEnd:
    """What one handler has to write."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._left: dict[TopicPartition, tuple[int, int]] | None = None
        """Partitions that are not there yet, and their logs' bounds when the run began; None: those are not known."""

    async def reached(self) -> bool:
        """Wait for the end; False when it cannot be reached: a halt or a stop came first, or topics have no table."""
        member = self._member
        while self._goes_on():
            await asyncio.sleep(INTERVAL)
            await member.retry(UNTIL_END, self._look)
            member.recovered(UNTIL_END)
            if self._left == {}:
                return True
            if self._left and all(map(member.held_up.waits_for_table, self._left)):
                topics = " ".join(sorted({partition.topic for partition in self._left}))
                log.error(
                    "topics have no table to be written to", extra={"handler": member.handler.name, "topics": topics}
                )
                return False
        return False

    def _goes_on(self) -> bool:
        return self._member.progress.state not in {"halted", "stopping", "stopped"}

    async def _look(self) -> None:
        """Find where the logs end, and then which partitions are not there yet."""
        member = self._member
        if self._left is None and member.partitions and self._goes_on():
            self._left = await self._bounds()
        if not self._left or not member.progress.ready or not self._goes_on():
            return
        leases, held_up = member.assignment.leases, member.assignment.held_up
        others = [p for p in self._left if p not in member.assignment.assigned or p in held_up]
        at = await self._stored(others) if others else {}
        at |= {partition: leases[partition].next_offset for partition in self._left if partition in leases}
        self._left = {
            partition: (low, high) for partition, (low, high) in self._left.items() if at.get(partition, low) < high
        }

    async def _bounds(self) -> dict[TopicPartition, tuple[int, int]]:
        found = await self._member.found(self._member.partitions)
        leaderless = [str(partition) for partition, it in found.items() if it.bounds is None]
        if leaderless:
            raise Outage("kafka", f"Kafka: no leader for {', '.join(leaderless)}")
        return {partition: it.bounds for partition, it in found.items() if it.bounds is not None}

    async def _stored(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the checkpoints of partitions that are not read here."""
        member = self._member
        if member.checkpoints.mode == "kafka":
            found = await member.found(partitions)
            return {partition: it.committed for partition, it in found.items() if it.committed is not None}
        conn = await member.connect()
        try:
            stands = await member.checkpoints.read(conn, partitions)
        finally:
            await conn.close()
        return {p: it.next_offset for p, it in stands.items() if it.next_offset is not None and it.next_offset >= 0}
