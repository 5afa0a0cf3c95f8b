"""The records of replays in the daemon's schema: begun, gone on with, ended, forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString

from psycopg import sql

from consumerd import postgres
from consumerd.checkpoint import ensure_schema
from consumerd.errors import Halt
from consumerd.postgres import call
from consumerd.replay_checkpoint import SCHEMA, Range
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Awaitable, Callable, Mapping

    from psycopg import AsyncConnection

    from consumerd.topics import Topic

_THERE = """\
SELECT count(*) = 2 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname IN ('replays', 'replay_checkpoint')"""

_LIST = """\
SELECT r.id, r.range, r.target, r.runs, r.started_at, r.seen_at, r.finished_at, r.failed,
    coalesce(c.rows, 0)::int8, coalesce(c.refused, 0)::int8, coalesce(c.skipped, 0)::int8,
    coalesce(c.passed, 0)::int8, coalesce(c.offsets, 0)::int8
FROM {schema}.replays r LEFT JOIN (
    SELECT group_id, sum(rows) AS rows, sum(refused) AS refused, sum(skipped) AS skipped,
        sum(next_offset - first_offset) AS passed, sum(end_offset - first_offset) AS offsets
    FROM {schema}.replay_checkpoint GROUP BY group_id
) c ON c.group_id = r.group_id || '/replay/' || r.id
WHERE r.group_id = %(group)s ORDER BY r.id"""

_BEGIN = """\
INSERT INTO {schema}.replays (handler, group_id, range, target)
VALUES (%(handler)s, %(group)s, %(range)s, %(target)s)
ON CONFLICT (group_id, range, target) WHERE finished_at IS NULL DO NOTHING RETURNING id"""

_BEGIN_PARTITIONS = """\
INSERT INTO {schema}.replay_checkpoint
    (group_id, topic, partition, topic_id, next_offset, first_offset, end_offset, live_epoch, target, mode)
SELECT %(group)s, r.topic, r.partition, r.topic_id, r.first_offset, r.first_offset, r.end_offset, r.live_epoch,
    r.target, 'replay'
FROM unnest(%(topics)s::text[], %(partitions)s::int[], %(ids)s::text[], %(starts)s::int8[], %(ends)s::int8[],
            %(epochs)s::int8[], %(targets)s::text[])
    AS r (topic, partition, topic_id, first_offset, end_offset, live_epoch, target)"""

_PARTITIONS = """\
SELECT topic, partition, topic_id, next_offset, end_offset FROM {schema}.replay_checkpoint
WHERE group_id = %(own)s ORDER BY topic, partition"""

_RUN = """\
UPDATE {schema}.replays SET runs = runs + 1, seen_at = now(), failed = NULL
WHERE id = %(id)s AND finished_at IS NULL RETURNING runs"""

_LEAVE_OUT = """\
UPDATE {schema}.replay_checkpoint SET next_offset = %(low)s
WHERE group_id = %(own)s AND topic = %(topic)s AND partition = %(partition)s AND next_offset < %(low)s"""

_SEEN = "UPDATE {schema}.replays SET seen_at = now() WHERE id = %(id)s AND runs = %(run)s"
_FAILED = "UPDATE {schema}.replays SET seen_at = now(), failed = %(failed)s WHERE id = %(id)s AND runs = %(run)s"
_FINISHED = """\
UPDATE {schema}.replays SET seen_at = now(), finished_at = now(), failed = NULL
WHERE id = %(id)s AND finished_at IS NULL"""
_FORGET_PARTITIONS = "DELETE FROM {schema}.replay_checkpoint WHERE group_id = %(own)s"
_FORGET = "DELETE FROM {schema}.replays WHERE id = %(id)s AND group_id = %(group)s RETURNING id"
_EARLIER = """\
SELECT c.group_id, c.topic, c.partition FROM {schema}.replay_checkpoint c
JOIN unnest(%(topics)s::text[], %(partitions)s::int[], %(ids)s::text[], %(starts)s::int8[], %(ends)s::int8[],
            %(targets)s::text[]) AS r (topic, partition, topic_id, first_offset, end_offset, target)
    USING (topic, partition, target)
WHERE c.group_id <> %(own)s AND coalesce(c.topic_id = r.topic_id, true)
  AND CASE WHEN %(only_later)s THEN c.end_offset > r.end_offset
           ELSE c.first_offset < r.end_offset AND r.first_offset < c.end_offset END
ORDER BY 1, 2, 3 LIMIT 1"""
_WRITES = """\
SELECT group_id FROM {schema}.checkpoint WHERE target = %(target)s AND group_id <> %(group)s AND next_offset >= 0
LIMIT 1"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One replay of a handler."""

    id: int
    range: str
    """As it was typed."""
    target: str
    runs: int
    started: dt.datetime
    seen: dt.datetime
    finished: dt.datetime | None
    failed: str | None
    rows: int
    refused: int
    skipped: int
    passed: int
    """Offsets that it has gone through, of `offsets`."""
    offsets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is left of one partition."""

    topic_id: str | None
    range: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a replay is begun with."""

    handler: str
    range: str
    target: str
    ranges: Mapping[TopicPartition, Range]
    topics: Mapping[str, Topic]
    targets: Mapping[str, str]
    """The table of each topic."""
    epochs: Mapping[TopicPartition, int]
    """Of the handler's checkpoints, where it must end at them."""


class Replays:
    """The replays of one handler's group."""

    def __init__(self, conn: AsyncConnection[Any], schema: str, group: str) -> None:
        self._conn = conn
        self._schema = schema
        self._group = group

    def own(self, number: int) -> str:
        """Return the group of a replay's checkpoints."""
        return f"{self._group}/replay/{number}"

    async def are_kept(self) -> bool:
        """Whether the tables are there."""
        ((there,),) = await call(self._conn, _THERE, {"schema": self._schema})
        return bool(there)

    async def make(self) -> None:
        """Make the tables where they are missing; raises Halt with what to type."""
        await ensure_schema(self._conn, self._schema)
        if await self.are_kept():
            return
        try:
            async with postgres.transaction(self._conn):
                await self._conn.execute("SELECT pg_advisory_xact_lock(hashtext('consumerd setup'))")
                await self._conn.execute(sql.SQL(SCHEMA).format(schema=sql.Identifier(self._schema)))
        except Halt as halt:
            raise Halt(
                "database",
                f"cannot make the tables of replays in schema {self._schema}: {halt}; let an owner run what "
                f"`consumerd setup --sql` prints",
            ) from halt

    async def listed(self) -> list[Record]:
        """Return all of this handler, the oldest first."""
        rows = await self._call(_LIST, group=self._group) if await self.are_kept() else []
        names = Record.__slots__
        return [Record(**dict(zip(names, row, strict=True))) for row in rows]

    async def begin(self, begun: Begun, look: Callable[[], Awaitable[None]]) -> int:
        """Make the record and the checkpoints of a replay, while no other begins; `look` raises Halt if it may not."""
        partitions = sorted(begun.ranges)
        async with postgres.transaction(self._conn):
            await self._conn.execute("SELECT pg_advisory_xact_lock(hashtext('consumerd replay'))")
            await look()
            rows = await self._call(
                _BEGIN, handler=begun.handler, group=self._group, range=begun.range, target=begun.target
            )
            if not rows:
                raise Halt(
                    "checkpoint", "another process has just begun this replay; the same command would take it over"
                )
            ((number,),) = rows
            await self._call(
                _BEGIN_PARTITIONS,
                group=self.own(number),
                topics=[p.topic for p in partitions],
                partitions=[p.partition for p in partitions],
                ids=[begun.topics[p.topic].topic_id for p in partitions],
                starts=[begun.ranges[p].start for p in partitions],
                ends=[begun.ranges[p].end for p in partitions],
                epochs=[begun.epochs.get(p) for p in partitions],
                targets=[begun.targets[p.topic] for p in partitions],
            )
        return int(number)

    async def left(self, number: int) -> dict[TopicPartition, Left]:
        """Return what is left of each partition, those that are through included."""
        rows = await self._call(_PARTITIONS, own=self.own(number))
        return {
            TopicPartition(topic, partition): Left(topic_id=topic_id, range=Range(at, end))
            for topic, partition, topic_id, at, end in rows
        }

    async def leave_out(self, number: int, partition: TopicPartition, low: int) -> None:
        """Leave out what retention has deleted."""
        values = {"topic": partition.topic, "partition": partition.partition, "low": low}
        await self._call(_LEAVE_OUT, own=self.own(number), **values)

    async def run(self, number: int) -> int:
        """Note that a run begins; return which it is."""
        rows = await self._call(_RUN, id=number)
        if not rows:
            raise Halt("checkpoint", f"replay {number} has ended, or was forgotten")
        return int(rows[0][0])

    async def seen(self, number: int, run: int) -> None:
        """Note that a run goes on."""
        await self._call(_SEEN, id=number, run=run)

    async def fail(self, number: int, run: int, sentence: str) -> None:
        """Note why a run has ended before its end, unless another has begun since."""
        await self._call(_FAILED, id=number, run=run, failed=sentence)

    async def finish(self, number: int) -> Record:
        """Note that a replay has ended; return its record."""
        await self._call(_FINISHED, id=number)
        return next(record for record in await self.listed() if record.id == number)

    async def forget(self, number: int) -> bool:
        """Forget a replay; whoever runs it is fenced. False if there is none."""
        async with postgres.transaction(self._conn):
            await self._call(_FORGET_PARTITIONS, own=self.own(number))
            return bool(await self._call(_FORGET, id=number, group=self._group))

    async def earlier(
        self,
        number: int | None,
        ranges: Mapping[TopicPartition, Range],
        topics: Mapping[str, Topic],
        targets: Mapping[str, str],
        *,
        only_later: bool,
    ) -> tuple[str, TopicPartition] | None:
        """Return a replay that has written, or is to write, some of these messages to the same table, and of which.

        With `only_later` it is one that has written later ones. Its name is that of its checkpoints' group.
        """
        if not await self.are_kept():
            return None
        partitions = sorted(ranges)
        rows = await self._call(
            _EARLIER,
            own="" if number is None else self.own(number),
            topics=[p.topic for p in partitions],
            partitions=[p.partition for p in partitions],
            ids=[topics[p.topic].topic_id for p in partitions],
            starts=[ranges[p].start for p in partitions],
            ends=[ranges[p].end for p in partitions],
            targets=[targets[p.topic] for p in partitions],
            only_later=only_later,
        )
        return (rows[0][0], TopicPartition(*rows[0][1:])) if rows else None

    async def who_writes(self, target: str) -> str | None:
        """Return another group that writes to a table."""
        rows = await self._call(_WRITES, target=target, group=self._group)
        return str(rows[0][0]) if rows else None

    async def _call(self, query: LiteralString, **values: object) -> list[tuple[Any, ...]]:
        return await call(self._conn, sql.SQL(query).format(schema=sql.Identifier(self._schema)), values)
