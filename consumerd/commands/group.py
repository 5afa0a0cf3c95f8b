"""A handler's group and the logs of its topics, looked at and moved from outside: no group is joined.

One request for all partitions, not one for each: a command over 600 of them must cost little.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import confluent_kafka as ck
from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from consumerd.brokers import CALL_TIMEOUT, client_config, positions
from consumerd.checkpoint import Checkpoints, schema_is_there
from consumerd.decide import Committed, Stored, decode_stamp, set_by_operator
from consumerd.errors import Halt
from consumerd.topics import Topics
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from psycopg import AsyncConnection

    from consumerd.config import Config, HandlerConfig, KafkaConfig
    from consumerd.decide import Mode
    from consumerd.topics import Topic

NO_LEADER = {KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.UNKNOWN_TOPIC_OR_PART}
"""What is said of a partition that nobody can tell of now."""
HAS_MEMBERS = {
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.NON_EMPTY_GROUP,
    KafkaError.STALE_MEMBER_EPOCH,
}
"""How a broker refuses an offset from outside while the group has members."""


class Bounds(NamedTuple):
    """Of a log: its first offset, and the one behind what may be read."""

    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where one partition of a group stands, in both stores and in its log."""

    partition: TopicPartition
    topic: Topic
    mode: Mode
    stored: Stored | None
    """The checkpoint; None: Postgres has no row of it."""
    committed: Committed
    bounds: Bounds | None
    """None: it has no leader."""
    late: bool
    """It appeared after the group had first seen its topic, so it begins at its log's start."""

    @property
    def checkpoint(self) -> int | None:
        """The offset in Postgres, if there is one."""
        offset = self.stored.next_offset if self.stored else None
        return offset if offset is not None and offset >= 0 else None

    @property
    def is_operators(self) -> bool:
        """Whether Kafka's offset was set by an operator and not taken up yet."""
        return set_by_operator(self.committed, self.mode)

    @property
    def position(self) -> int | None:
        """Where the group goes on: at its checkpoint, or an operator's offset. None: where it begins."""
        if self.mode == "kafka" or self.is_operators or self.checkpoint is None:
            return self.committed.offset
        return self.checkpoint

    @property
    def made_again(self) -> bool:
        """Whether the offset is of another topic, one that had the same name."""
        stamp = self.committed.stamp
        ours = self.stored.topic_id if self.stored else stamp.topic_id if stamp and self.mode == "kafka" else None
        return bool(ours and self.topic.topic_id and ours != self.topic.topic_id)


class Group(Topics):
    """The calls about one group."""

    def __init__(self, kafka: KafkaConfig, group: str) -> None:
        super().__init__(kafka)
        self._group = group
        uncommitted = kafka.properties.get("isolation.level") == "read_uncommitted"
        self._isolation = IsolationLevel.READ_UNCOMMITTED if uncommitted else IsolationLevel.READ_COMMITTED

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Bounds | None]:
        """Return what the logs hold, as far as it may be read."""
        lows, highs = await asyncio.gather(
            self._call(self._offsets, partitions, OffsetSpec.earliest()),  # type: ignore[no-untyped-call]
            self._call(self._offsets, partitions, OffsetSpec.latest()),  # type: ignore[no-untyped-call]
        )
        return {
            partition: None
            if (low := lows[partition]) is None or (high := highs[partition]) is None
            else Bounds(low, high)
            for partition in partitions
        }

    async def offsets_at(
        self, partitions: Sequence[TopicPartition], timestamp_ms: int
    ) -> dict[TopicPartition, int | None]:
        """Return the first offsets at or after a time; None where there is none."""
        found = await self._call(self._offsets, partitions, OffsetSpec.for_timestamp(timestamp_ms))
        return {partition: None if offset is None or offset < 0 else offset for partition, offset in found.items()}

    async def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Committed]:
        """Return the offsets that Kafka has for the group."""
        return await self._call(self._committed, partitions)

    async def members(self) -> list[str]:
        """Return the group's members, by client and host."""
        return await self._call(self._members)

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Set offsets, each with its metadata, and wait for the answer; raises Halt when the group has members."""
        await self._call(self._commit, offsets)

    def _offsets(self, partitions: Sequence[TopicPartition], spec: OffsetSpec) -> dict[TopicPartition, int | None]:
        if not partitions:
            return {}
        asked = dict.fromkeys(positions(partitions), spec)
        futures = self._admin.list_offsets(asked, isolation_level=self._isolation, request_timeout=CALL_TIMEOUT)
        offsets: dict[TopicPartition, int | None] = {}
        for place, future in futures.items():
            partition = TopicPartition(place.topic, place.partition)
            try:
                offsets[partition] = future.result(CALL_TIMEOUT).offset
            except KafkaException as error:
                if error.args[0].code() not in NO_LEADER:
                    raise
                offsets[partition] = None
        return offsets

    def _committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Committed]:
        """Ask as a consumer that subscribes to nothing, and so is no member.

        The admin client's own call ends the process where nobody coordinates the group yet (librdkafka issue 5040).
        """
        consumer = ck.Consumer({**client_config(self._kafka), "group.id": self._group, "enable.auto.commit": False})
        try:
            answers = consumer.committed(positions(partitions), timeout=CALL_TIMEOUT)
        finally:
            consumer.close()
        found = {}
        for entry in answers:
            if entry.error:
                raise KafkaException(entry.error)
            offset = entry.offset if entry.offset >= 0 else None
            found[TopicPartition(entry.topic, entry.partition)] = Committed(offset, decode_stamp(entry.metadata))
        return found

    def _members(self) -> list[str]:
        (future,) = self._admin.describe_consumer_groups([self._group], request_timeout=CALL_TIMEOUT).values()
        try:
            members = future.result(CALL_TIMEOUT).members
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return []
            raise
        return sorted(
            f"{member.group_instance_id or member.client_id} at {member.host.strip('/')}" for member in members
        )

    def _commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        places = [ck.TopicPartition(*partition, *offset) for partition, offset in offsets.items()]
        asked = [ConsumerGroupTopicPartitions(self._group, places)]
        (future,) = self._admin.alter_consumer_group_offsets(asked, request_timeout=CALL_TIMEOUT).values()
        try:
            errors = [place.error for place in future.result(CALL_TIMEOUT).topic_partitions if place.error]
        except KafkaException as exception:
            errors = [exception.args[0]]
        for error in errors:
            if error.code() in HAS_MEMBERS:
                raise Halt("kafka", f"group {self._group} has members by now, and Kafka takes no offset from outside")
            raise KafkaException(error)


async def survey(
    config: Config,
    handler: HandlerConfig,
    group: Group,
    conn: AsyncConnection[Any] | None,
    target: Callable[[str], str] = lambda _: "",
) -> list[Standing]:
    """Return where each partition of a handler stands; `conn` None: it keeps no checkpoint in Postgres.

    With the tables of topics (`target`) it halts as a claim does where another group writes to one of them.
    """
    found = await group.find(handler.topics, [each.dead_letter.topic for each in config.handlers])
    partitions = [TopicPartition(topic.name, n) for topic in found.values() for n in range(topic.partitions)]
    bounds, committed = await asyncio.gather(group.bounds(partitions), group.committed(partitions))
    stored: dict[TopicPartition, Stored] = {}
    schema = config.postgres.schema_name
    if conn is not None and await schema_is_there(conn, schema):
        checkpoints = Checkpoints(schema, handler.group_id, target)
        rows = await checkpoints.read(conn, partitions)
        stored = {p: it for p, it in (await checkpoints.look(conn, partitions, found)).items() if p in rows}
    seen = _first_seen(committed) if conn is None else {}
    known = {partition.topic for partition in stored}
    return [
        Standing(
            partition=partition,
            topic=found[partition.topic],
            mode=handler.checkpoint,
            stored=stored.get(partition),
            committed=committed[partition],
            bounds=bounds[partition],
            late=partition.partition >= seen.get(partition.topic, partition.partition + 1)
            if conn is None
            else _is_late(partition, stored, known, matched=found[partition.topic].matched),
        )
        for partition in partitions
    ]


def _is_late(
    partition: TopicPartition, stored: Mapping[TopicPartition, Stored], known: set[str], *, matched: bool
) -> bool:
    """Whether a partition without a checkpoint begins at its log's start, as a claim would find."""
    if partition in stored:
        offset = stored[partition].next_offset
        return offset is not None and offset < 0
    return partition.topic in known or (matched and bool(known))


def _first_seen(committed: Mapping[TopicPartition, Committed]) -> dict[str, int]:
    """Return how many partitions each topic had when the group first saw it, by the stamps of its offsets."""
    seen: dict[str, int] = {}
    for partition, each in committed.items():
        if each.offset is not None:
            count = (each.stamp.partitions or 0) if each.stamp else 0
            seen[partition.topic] = min(seen.get(partition.topic, count), count)
    return seen
