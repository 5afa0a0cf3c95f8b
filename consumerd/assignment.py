"""From an assigned partition to a leased one: who wins, and where it goes on.

The group assigns a partition, paused. It is claimed, which raises its checkpoint's epoch and fences whoever wrote it
before; placed, by the checkpoint or by what Kafka has (`checkpoint.decide`); and only then leased and delivered. All of
this happens outside the rebalance callbacks, and again from the start after an outage.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from consumerd.brokers import Found, gap
from consumerd.checkpoint import Lease
from consumerd.commits import Commit
from consumerd.decide import LOG_START, Committed, Decision, Stamp, Stored, decide, decide_by_kafka, decode_stamp
from consumerd.errors import Halt, Outage
from consumerd.types import NO_TALLY, Tally, TopicPartition
from consumerd.ways_on import Accepted, merged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from psycopg import AsyncConnection

    from consumerd.checkpoint import Checkpoints, KafkaCheckpoints
    from consumerd.config import HandlerConfig, KafkaConfig
    from consumerd.kafka import ConsumerThread
    from consumerd.topics import Topic
    from consumerd.ways_on import Way

log = logging.getLogger(__name__)

ADOPT_TIMEOUT = 10.0
"""Seconds to wait for the acknowledgement of a commit that adopts an operator's offset."""
BEYOND_LOOKS = 5
"""Times to look again when an offset is beyond the log's end: what was asked may be older than the checkpoint, or a new
leader not up to date."""
LOOK_AGAIN_AFTER = 2.0
"""Seconds after which a partition that brokers could not tell of is claimed again."""
RECLAIM_AFTER = 10.0
"""Seconds after which a partition that another member claimed, and that is assigned here still, is claimed again: that
member was a zombie that had not heard of its loss, and has by then."""


class Assignment:
    """The partitions that the group has assigned to one member; `leases` are those that may be written."""

    def __init__(
        self,
        kafka: KafkaConfig,
        handler: HandlerConfig,
        *,
        topics: Mapping[str, Topic],
        store: str,
        checkpoints: Checkpoints | KafkaCheckpoints,
        thread: ConsumerThread,
        on_commit: Callable[[], None],
        accepted: Accepted | None = None,
    ) -> None:
        self._kafka = kafka
        self._handler = handler
        self._topics = topics
        self._store = store
        self._checkpoints = checkpoints
        self._thread = thread
        self._on_commit = on_commit
        self._accepted = accepted or Accepted()
        """What an operator has accepted of a halt."""
        self._first_seen: dict[str, int] = {}
        self._promised: dict[TopicPartition, asyncio.Future[None]] = {}
        self._to_claim: asyncio.Queue[TopicPartition] = asyncio.Queue()
        self._claiming = asyncio.Lock()
        self.assigned: dict[TopicPartition, int] = {}
        """Each assigned partition, with the number of its assignment: it may go and come back meanwhile."""
        self._numbers = itertools.count()
        self._claimed: dict[TopicPartition, int] = {}
        """In which assignment each partition was claimed last."""
        self.held_up: dict[TopicPartition, Outage] = {}
        """Assigned partitions that brokers could not tell of, or whose table is not there."""
        self.leases: dict[TopicPartition, Lease] = {}
        self.found: dict[TopicPartition, tuple[Stored, Found]] = {}
        """What the last claim found of its partitions: all that is known of them when it halts."""
        self._delivered: set[TopicPartition] = set()
        self._beyond: Counter[TopicPartition] = Counter()

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Note an assignment; the claim follows."""
        for partition in partitions:
            self.assigned[partition] = next(self._numbers)
            self._to_claim.put_nowait(partition)

    def claim_all(self) -> None:
        """Have all that is assigned looked at again."""
        for partition in self.assigned:
            self._to_claim.put_nowait(partition)

    def unassign(self, partitions: Sequence[TopicPartition]) -> None:
        """Note a revocation or loss; leases stay until they are released."""
        for partition in partitions:
            self.assigned.pop(partition, None)
            self.held_up.pop(partition, None)

    def lose(self, partitions: Sequence[TopicPartition]) -> None:
        """Note a loss; what was left to commit is dropped."""
        self.unassign(partitions)
        self._thread.commits.drop(partitions)

    def release(self, partition: TopicPartition) -> None:
        """Give a lease up: what is in flight of it no longer counts."""
        self.leases.pop(partition, None)
        self._promised.pop(partition, None)
        self._delivered.discard(partition)

    async def next_to_claim(self) -> list[TopicPartition]:
        """Wait for assigned partitions that are not claimed yet."""
        partitions = {await self._to_claim.get()}
        while not self._to_claim.empty():
            partitions.add(self._to_claim.get_nowait())
        return sorted(partitions)

    async def claims_landed(self) -> None:
        """Wait for a claim under way: it must not land after the next member's, and fence that one."""
        async with self._claiming:
            pass

    async def claim(self, wanted: Sequence[TopicPartition], conn: AsyncConnection[Any]) -> dict[TopicPartition, Lease]:
        """Claim and place partitions; return leases for those that may be delivered now.

        One that brokers cannot tell of (it has no leader) is looked at again later, and holds up none of the others.
        """
        wanted = [partition for partition in wanted if partition in self.assigned and partition not in self._delivered]
        if not wanted:
            return {}
        self._claimed |= {partition: self.assigned[partition] for partition in wanted}
        self.found.clear()
        found = await self._thread.found(wanted)
        async with self._claiming:
            partitions = [partition for partition in wanted if self._is_still(partition)]
            stored = await self._claim(conn, partitions) if partitions else {}
        self.found = {partition: (it, found[partition]) for partition, it in stored.items()}
        leases = {}
        halts: dict[Way, Halt] = {}
        for partition, claimed in stored.items():
            self.held_up.pop(partition, None)
            try:
                lease = await self._place(conn, partition, claimed, found[partition])
            except Outage as outage:
                if outage.source != "kafka":
                    raise
                self.hold_up(partition, outage)
                continue
            except Halt as halt:
                if not halt.ways:
                    raise
                halts.setdefault(halt.ways[0], halt)
                extra = {"handler": self._handler.name, "partition": str(partition)}
                log.warning("%s", halt, extra=extra)  # of very many the halt itself names the first few
                continue
            if lease is None:  # a zombie claimed it in between, unless it was revoked
                self.claim_later(partition)
            elif self._is_still(partition):
                leases[partition] = lease
        if halts:  # all of them at once: retention overtakes many partitions in one night
            raise merged(list(halts.values()))
        return leases

    def hold_up(self, partition: TopicPartition, outage: Outage, after: float = LOOK_AGAIN_AFTER) -> None:
        """Look at an assigned partition again in some seconds, and keep until then why it waits."""
        if partition in self.assigned:
            self.held_up[partition] = outage
            self.claim_later(partition, after)

    def _is_still(self, partition: TopicPartition) -> bool:
        """Whether a partition has been assigned here without a break since its claim began."""
        return self.assigned.get(partition) == self._claimed[partition]

    async def deliver(self, leases: Mapping[TopicPartition, Lease]) -> None:
        """Lease partitions that are assigned still, and have them delivered from where they go on.

        What is revoked while the Kafka thread is waited for, and perhaps assigned again, is claimed anew.
        """
        leases = {partition: lease for partition, lease in leases.items() if self._is_still(partition)}
        self.leases.update(leases)
        await self._thread.start_at({partition: lease.next_offset for partition, lease in leases.items()})
        self._delivered.update(p for p, lease in leases.items() if self.leases.get(p) is lease)

    def claim_later(self, partition: TopicPartition, after: float = RECLAIM_AFTER) -> None:
        """Claim a partition again in some seconds, if it is assigned then."""

        def again() -> None:
            if partition in self.assigned:
                self._to_claim.put_nowait(partition)

        asyncio.get_running_loop().call_later(after, again)

    def commit(self, commits: Sequence[Commit]) -> None:
        """Have offsets committed to Kafka in a while; where they are the checkpoint, at once."""
        if self._checkpoints.mode == "postgres":
            self._thread.commits.leave(commits)
            return
        for commit, promise in zip(commits, self._thread.commits.promise(commits), strict=True):
            self._promised[commit.partition] = promise
            promise.add_done_callback(lambda _: self._on_commit())

    def committed(self, partition: TopicPartition) -> bool:
        """Whether Kafka has acknowledged all that it must before more may be written."""
        promise = self._promised.get(partition)
        return promise is None or promise.done()

    def commit_of(
        self, partition: TopicPartition, offset: int, leader_epoch: int | None, tally: Tally = NO_TALLY
    ) -> Commit:
        """Return the commit to Kafka of a checkpoint, stamped; its breaker's tally goes along if Postgres has none."""
        keeps_tally = self._checkpoints.mode == "kafka" and tally.messages > 0
        stamp = Stamp(
            store=self._store,
            group=self._handler.group_id,
            topic_id=self._topic_id(partition),
            offset=offset,
            mode=self._checkpoints.mode,
            partitions=self._first_seen.get(partition.topic, UNSET),
            judged=(tally.messages, tally.refused, time.time()) if keeps_tally else UNSET,
        )
        return Commit(partition=partition, offset=offset, leader_epoch=leader_epoch, metadata=stamp.encode())

    async def _place(
        self, conn: AsyncConnection[Any], partition: TopicPartition, stored: Stored, found: Found
    ) -> Lease | None:
        """Settle where a claimed partition goes on; None when it is no longer ours."""
        if found.bounds is None:
            raise Outage("kafka", f"Kafka: {partition} has no leader")
        low, high = found.bounds
        stamp = decode_stamp(found.metadata)
        tally = _tally(stamp) if self._checkpoints.mode == "kafka" else stored.tally
        stored, decision = self._decide(partition, stored, Committed(found.committed, stamp))
        if self._checkpoints.mode == "kafka" and found.committed is not None:
            seen = stamp.partitions if stamp else None
            self._first_seen.setdefault(partition.topic, seen or self._counts([partition])[partition.topic])
        offset = decision.offset
        if offset is None:
            offset = await self._beginning(partition, decision, low, high)
        if (gap := self._accepted.gap(partition, offset, low, high)) is not None:
            decision, offset = Decision(kind="adopt", note=f"accepted: {gap.skipped()}"), gap.target
        self._require(partition, offset, low, high)
        if not self._is_still(partition):
            return None
        forget = partition in self._accepted.forget
        if forget:
            decision, tally = replace(decision, kind="adopt"), NO_TALLY
        if decision.kind != "resume" and not await self._checkpoints.place(
            conn, partition, stored.epoch, offset, self._topic_id(partition), forget=forget
        ):
            return None
        if decision.kind == "adopt" or (decision.kind == "start" and self._checkpoints.mode == "kafka"):
            await self._acknowledge(partition, offset, tally)
        elif found.committed != offset:  # a crash came between COMMIT and the commit to Kafka: lag tools wait for it
            self.commit([self.commit_of(partition, offset, None, tally)])
        self._tell(partition, decision)
        return Lease(
            epoch=stored.epoch,
            next_offset=offset,
            max_offset=max(stored.max_offset or 0, offset),
            leader_epoch=stored.leader_epoch if decision.kind == "resume" else None,
            tally=tally,
        )

    def _tell(self, partition: TopicPartition, decision: Decision) -> None:
        """Say where a partition goes on that is placed now; what was accepted for this is used up."""
        extra = {"handler": self._handler.name, "partition": str(partition)}
        if decision.note:
            log.warning(decision.note, extra=extra)
        self._accepted.gaps.pop(partition, None)
        if partition in self._accepted.forget:
            self._accepted.forget.discard(partition)
            log.warning("accepted: what the breaker had counted is forgotten", extra=extra)

    def _require(self, partition: TopicPartition, offset: int, low: int, high: int) -> None:
        """Raise Halt for an offset outside of the log, Outage while what lies beyond its end may be seen yet."""
        if offset > high and self._seen_beyond(partition) <= BEYOND_LOOKS:
            raise Outage("kafka", f"{partition}: offset {offset} is beyond the log's end {high}: looking again")
        if not low <= offset <= high:
            raise gap(
                partition,
                offset,
                low=low,
                high=high,
                group=self._handler.group_id,
                bootstrap=self._kafka.bootstrap_servers,
            )
        self._beyond.pop(partition, None)

    def _decide(self, partition: TopicPartition, stored: Stored, committed: Committed) -> tuple[Stored, Decision]:
        """Return who wins, and the checkpoint that this was settled for."""
        group, topic_id = self._handler.group_id, self._topic_id(partition)
        stored, committed, renewed = self._of_new_topic(partition, stored, committed)
        if self._checkpoints.mode == "kafka":
            bootstrap = self._kafka.bootstrap_servers
            decision = decide_by_kafka(partition, committed, group=group, topic_id=topic_id, bootstrap=bootstrap)
        else:
            target = self._checkpoints.target(partition.topic)
            decision = decide(
                partition, stored, committed, store=self._store, group=group, topic_id=topic_id, target=target
            )
        if not renewed:
            return stored, decision
        note = decision.note or "accepted: another topic of this name; it is read from its start"
        return stored, replace(decision, late=True, note=note)

    def _of_new_topic(
        self, partition: TopicPartition, stored: Stored, committed: Committed
    ) -> tuple[Stored, Committed, bool]:
        """Return both offsets without what they say of a topic in whose place another was accepted; whether it was."""
        topic_id, stamp = self._topic_id(partition), committed.stamp
        old = stamp.topic_id if self._checkpoints.mode == "kafka" and stamp else stored.topic_id
        # Kafka forgets a topic's offsets with it: at least once, nothing else tells of the old one then.
        forgotten = self._checkpoints.mode == "kafka" and committed.offset is None
        if not self._accepted.is_new_topic(partition.topic, old, topic_id, forgotten=forgotten):
            return stored, committed, False
        if stamp is not None and stamp.topic_id == old:
            committed = Committed(None, None)
        stored = replace(stored, topic_id=topic_id, next_offset=LOG_START, max_offset=None, leader_epoch=None)
        return stored, committed, True

    async def _beginning(self, partition: TopicPartition, decision: Decision, low: int, high: int) -> int:
        """Return where a partition without a checkpoint begins."""
        start = self._handler.start
        if decision.late or start == "earliest" or await self._is_late(partition):
            return low
        if isinstance(start, datetime):
            return await self._thread.offset_at(partition, int(start.timestamp() * 1000))
        return high

    async def _is_late(self, partition: TopicPartition) -> bool:
        """Whether a partition appeared after the group had first seen its topic; checkpoints know it themselves."""
        if self._checkpoints.mode == "postgres":
            return False
        if self._topics[partition.topic].late:
            return True
        count = self._counts([partition])[partition.topic]
        others = await self._thread.found([TopicPartition(partition.topic, number) for number in range(count)])
        stamps = [decode_stamp(found.metadata) for found in others.values() if found.committed is not None]
        seen = min(((stamp.partitions or 0) if stamp else 0 for stamp in stamps), default=count)
        self._first_seen[partition.topic] = seen or count
        return partition.partition >= seen

    async def _acknowledge(self, partition: TopicPartition, offset: int, tally: Tally) -> None:
        """Stamp an adopted offset in Kafka, and wait for that: a crash must not adopt the same reset twice."""
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT):
                await asyncio.gather(*self._thread.commits.promise([self.commit_of(partition, offset, None, tally)]))
        except TimeoutError:
            raise Outage("kafka", f"no acknowledgement for the commit of {partition}") from None

    async def _claim(
        self, conn: AsyncConnection[Any], partitions: Sequence[TopicPartition]
    ) -> dict[TopicPartition, Stored]:
        return await self._checkpoints.claim(conn, partitions, self._counts(partitions), self._topics)

    def _seen_beyond(self, partition: TopicPartition) -> int:
        self._beyond[partition] += 1
        return self._beyond[partition]

    def _counts(self, partitions: Sequence[TopicPartition]) -> dict[str, int]:
        """Return how many partitions each topic has; one may have grown since the start."""
        counts = {name: topic.partitions for name, topic in self._topics.items()}
        for topic, number in partitions:
            counts[topic] = max(counts.get(topic, 0), number + 1)
        return counts

    def _topic_id(self, partition: TopicPartition) -> str | None:
        topic = self._topics.get(partition.topic)
        return topic.topic_id if topic else None


def _tally(stamp: Stamp | None) -> Tally:
    """Return what a stamp says that the breaker had counted."""
    if stamp is None or isinstance(stamp.judged, UnsetType):
        return NO_TALLY
    messages, refused, at = stamp.judged
    return Tally(messages, refused, max(0.0, time.time() - at))
