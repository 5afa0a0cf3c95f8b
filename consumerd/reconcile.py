"""Where the checkpoint really is, when that is not where this member takes it to be.

A fenced write, a COMMIT without an answer, a Postgres that went back (a replica promoted, a backup restored): each is
settled by reading the checkpoint again; to claim it would fence whoever has claimed it since.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from consumerd import metrics
from consumerd.checkpoint import Lease
from consumerd.errors import Outage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumerd.checkpoint import Stand
    from consumerd.member import Member
    from consumerd.types import TopicPartition
    from consumerd.writer import Work

log = logging.getLogger(__name__)

RECONCILE = "reconcile"
"""Who meets its outages."""
INTERVAL = 60.0
"""Seconds between two comparisons of all checkpoints with the leases; one follows each lost connection."""


class Reconciler:
    """Reads the checkpoints of one member's leases again, and has the member go on from there."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        """Compare without waiting for the interval's end: a connection was lost."""
        self._wanted.set()

    async def run(self) -> None:
        """Compare now and then, until cancelled: Postgres may go back while nothing is written."""
        member = self._member
        while member.checkpoints.mode == "postgres":
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await self._wanted.wait()
            self._wanted.clear()
            await member.retry(RECONCILE, self._compare)
            member.recovered(RECONCILE)

    async def fenced(self, work: Work) -> None:
        """Learn why a write was fenced.

        Our own commit may have landed though its acknowledgement was lost; Postgres may have gone back; or another
        member has claimed one of the partitions.
        """
        member = self._member
        stands = await self._read([batch.partition for batch, _ in work])
        for batch, lease in work:
            stand = stands.get(batch.partition)
            if not member.holds(batch, lease) or _is_at(stand, lease, lease.next_offset):
                continue  # given up meanwhile; or it was another batch of the same write that was fenced
            if _is_at(stand, lease, batch.next_offset):
                member.written([(batch, lease)], 0.0)
                continue
            metrics.fenced_writes.labels(member.handler.name).inc()
            await self._return_to(batch.partition, lease, stand)

    async def _compare(self) -> None:
        leases = self._member.assignment.leases
        before = [(partition, lease, lease.next_offset) for partition, lease in leases.items()]
        if not before:
            return
        stands = await self._read([partition for partition, _, _ in before])
        for partition, lease, offset in before:
            still = leases.get(partition) is lease and lease.next_offset == offset
            stand = stands.get(partition)
            if still and not _is_at(stand, lease, offset) and not self._member.is_out(partition):
                await self._return_to(partition, lease, stand)

    async def _read(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Stand]:
        conn = await self._member.connect()
        try:
            return await self._member.checkpoints.read(conn, partitions)
        finally:
            await conn.close()

    async def _return_to(self, partition: TopicPartition, lease: Lease, stand: Stand | None) -> None:
        """Go on where the checkpoint is."""
        member, assignment = self._member, self._member.assignment
        member.release([partition])
        extra = {"handler": member.handler.name, "partition": str(partition)}
        if stand is not None and stand.epoch > lease.epoch:
            log.warning("fenced: another member claimed the partition", extra=extra)
            member.outrun(partition)
            return
        if stand is None or stand.epoch < lease.epoch or stand.next_offset is None or stand.next_offset < 0:
            log.warning("Postgres went back to before this member began: claiming again", extra=extra)
            assignment.claim_later(partition, 0.0)
            return
        offset = stand.next_offset
        if offset < lease.next_offset:
            sentence = "Postgres went back: the checkpoint is at %s, and had been at %s; what is between is repeated"
        else:
            sentence = "a write had landed though its answer was lost: the checkpoint is at %s, and had been at %s"
        log.warning(sentence, offset, lease.next_offset, extra=extra)
        # What was dropped, and what Postgres has lost, is judged again: the breaker counts what the checkpoint counts.
        member.breaker.recall(partition, stand.tally, time.monotonic())
        # What was written up to `max_offset` may be in the table still: only the checkpoints may have gone back.
        again = Lease(epoch=stand.epoch, next_offset=offset, max_offset=max(lease.max_offset, offset))
        try:
            await assignment.deliver({partition: again})
        except Outage:
            member.release([partition])
            assignment.claim_later(partition)


def _is_at(stand: Stand | None, lease: Lease, offset: int) -> bool:
    """Whether a checkpoint is under a lease's epoch and at an offset."""
    return stand is not None and (stand.epoch, stand.next_offset) == (lease.epoch, offset)
