"""The checkpoint: where each partition goes on, kept in Postgres beside the rows and moved in their transaction.

One row for each partition of a group. An assignment claims it, which raises its epoch; a write moves `next_offset` by
compare-and-set on (epoch, next_offset). A member that lost its partition holds an old epoch, so whatever it still
writes is rolled back. Kafka's committed offset follows, with a stamp in its metadata: an offset without our stamp was
set by an operator, and wins (`decide`).

Over 400 lines, because all statements about the checkpoint stand beside each other: each relies on what the others do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple, cast

from psycopg import sql

from consumerd import postgres
from consumerd.decide import Mode, Stored
from consumerd.errors import Halt, TableChanged
from consumerd.postgres import call
from consumerd.types import NO_TALLY, Tally, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from psycopg import AsyncConnection

    from consumerd.postgres import Statement
    from consumerd.topics import Topic

SCHEMA = """\
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE IF NOT EXISTS {schema}.store (
    store uuid NOT NULL DEFAULT gen_random_uuid(),
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one)
);
INSERT INTO {schema}.store DEFAULT VALUES ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS {schema}.checkpoint (
    group_id text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    topic_id text,
    next_offset bigint,
    max_offset bigint,
    leader_epoch integer,
    epoch bigint NOT NULL DEFAULT 0,
    target text NOT NULL,
    mode text NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (group_id, topic, partition)
) WITH (fillfactor = 50);
ALTER TABLE {schema}.checkpoint ADD COLUMN IF NOT EXISTS judged_messages bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS judged_refused bigint NOT NULL DEFAULT 0, ADD COLUMN IF NOT EXISTS judged_at timestamptz;
CREATE TABLE IF NOT EXISTS {schema}.claims (
    group_id text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    epoch bigint NOT NULL,
    topic_id text,
    next_offset bigint NOT NULL,
    PRIMARY KEY (group_id, topic, partition, epoch)
);
"""
"""What `consumerd setup` makes. Half-filled pages keep the checkpoint's updates within their page (HOT). The last three
of its columns are what the breaker has counted of the partition, for whoever holds it next; a schema made before them
gets them. `claims` tells from where each epoch read: a letter that was written under an earlier one, of a message from
there on, tells nothing of what became of that message (`consumerd.letters`)."""

CLAIM_TIMEOUT = "SET lock_timeout = '10s'"
"""Longer than it takes to end the transaction of a member that was stopped in it (`consumerd.watch`)."""

_THERE = """\
SELECT 1 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = 'claims'"""
"""The table that came last."""

_TRY = """\
SELECT store, (SELECT count(*) FROM {schema}.checkpoint WHERE false), (SELECT count(*) FROM {schema}.claims WHERE false)
FROM {schema}.store"""

_APPEAR = """\
INSERT INTO {checkpoint} (group_id, topic, partition, next_offset, target, mode)
SELECT %(group)s, t.topic, p, CASE WHEN EXISTS (
           SELECT FROM {checkpoint} c
           WHERE c.group_id = %(group)s AND (t.matched OR c.topic = t.topic)) THEN -2 END,
       t.target, 'postgres'
FROM unnest(%(topics)s::text[], %(counts)s::int[], %(matched)s::bool[], %(targets)s::text[])
         AS t (topic, count, matched, target),
     generate_series(0, t.count - 1) AS p
ORDER BY 2, 3
ON CONFLICT DO NOTHING"""

_CLAIM = """\
WITH locked AS (
    SELECT c.topic, c.partition, t.target
    FROM {checkpoint} c JOIN unnest(%(topics)s::text[], %(partitions)s::int[], %(targets)s::text[])
        AS t (topic, partition, target) USING (topic, partition)
    WHERE c.group_id = %(group)s
    ORDER BY topic, partition FOR UPDATE OF c
), claimed AS (
    UPDATE {checkpoint} c SET epoch = c.epoch + 1, seen_at = now(),
        target = CASE WHEN c.next_offset >= 0 THEN c.target ELSE l.target END
    FROM locked l WHERE c.group_id = %(group)s AND c.topic = l.topic AND c.partition = l.partition
    RETURNING c.*
), noted AS (
    INSERT INTO {schema}.claims (group_id, topic, partition, epoch, topic_id, next_offset)
    SELECT group_id, topic, partition, epoch, topic_id, next_offset FROM claimed WHERE next_offset >= 0
    ON CONFLICT (group_id, topic, partition, epoch) DO UPDATE SET next_offset = excluded.next_offset
), covered AS (
    DELETE FROM {schema}.claims k USING claimed c
    WHERE k.group_id = c.group_id AND k.topic = c.topic AND k.partition = c.partition AND k.epoch < c.epoch
      AND k.next_offset >= c.next_offset AND k.topic_id IS NOT DISTINCT FROM c.topic_id
)
SELECT topic, partition, topic_id, next_offset, max_offset, epoch, target, leader_epoch,
    judged_messages, judged_refused, coalesce(extract(epoch FROM now() - judged_at), 0)::float8 FROM claimed"""
"""An earlier claim from a later offset, or the same, says nothing more: a crash again and again leaves one row."""

_OTHER_GROUP = """\
SELECT c.group_id, c.topic, c.target, c.seen_at > now() - interval '10 minutes'
FROM {checkpoint} c JOIN unnest(%(topics)s::text[], %(ids)s::text[], %(targets)s::text[])
    AS t (topic, id, target) USING (topic)
WHERE c.target = t.target AND c.group_id <> %(group)s AND c.next_offset >= 0
  AND coalesce(c.topic_id = t.id, true)
  AND NOT EXISTS (SELECT FROM {checkpoint} m WHERE m.group_id = %(group)s)
LIMIT 1"""

_ADVANCE = """\
WITH expected AS (
    SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::int[], %(epochs)s::int8[], %(olds)s::int8[],
                         %(news)s::int8[], %(leaders)s::int[], %(judged)s::int8[], %(refused)s::int8[])
        AS e (topic, partition, epoch, old_offset, new_offset, leader_epoch, judged, refused)
), held AS (
    SELECT e.* FROM {checkpoint} c JOIN expected e USING (topic, partition)
    WHERE c.group_id = %(group)s AND c.epoch = e.epoch AND c.next_offset = e.old_offset
    ORDER BY topic, partition FOR UPDATE OF c
)
UPDATE {checkpoint} c
SET next_offset = h.new_offset, max_offset = greatest(c.max_offset, h.new_offset),
    leader_epoch = coalesce(h.leader_epoch, c.leader_epoch), seen_at = now(),
    judged_messages = h.judged, judged_refused = h.refused, judged_at = now()
FROM held h WHERE c.group_id = %(group)s AND c.topic = h.topic AND c.partition = h.partition
RETURNING c.topic, c.partition"""

_PLACE = """\
WITH placed AS (
    UPDATE {checkpoint} SET next_offset = %(offset)s,
        max_offset = CASE WHEN topic_id <> %(topic_id)s THEN %(offset)s ELSE coalesce(max_offset, %(offset)s) END,
        judged_messages = CASE WHEN %(forget)s THEN 0 ELSE judged_messages END,
        judged_refused = CASE WHEN %(forget)s THEN 0 ELSE judged_refused END,
        topic_id = %(topic_id)s, leader_epoch = NULL, seen_at = now()
    WHERE group_id = %(group)s AND topic = %(topic)s AND partition = %(partition)s AND epoch = %(epoch)s
    RETURNING group_id, topic, partition, epoch, topic_id, next_offset
), noted AS (
    INSERT INTO {schema}.claims AS k (group_id, topic, partition, epoch, topic_id, next_offset)
    SELECT group_id, topic, partition, epoch, topic_id, next_offset FROM placed
    ON CONFLICT (group_id, topic, partition, epoch) DO UPDATE SET topic_id = excluded.topic_id,
        next_offset = CASE WHEN k.topic_id <> excluded.topic_id THEN excluded.next_offset
                           ELSE least(k.next_offset, excluded.next_offset) END
)
SELECT 1 FROM placed"""

_LOOK = """\
SELECT topic, partition, topic_id, next_offset, max_offset, epoch, target FROM {checkpoint}
WHERE group_id = %(group)s
  AND (topic, partition) IN (SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::int[]))"""

_READ = """\
SELECT topic, partition, epoch, next_offset, judged_messages, judged_refused,
    coalesce(extract(epoch FROM now() - judged_at), 0)::float8
FROM {checkpoint}
WHERE group_id = %(group)s
  AND (topic, partition) IN (SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::int[]))"""


@dataclass(slots=True, kw_only=True)
class Lease:
    """A claimed partition: what its next compare-and-set expects."""

    epoch: int
    next_offset: int
    max_offset: int
    leader_epoch: int | None = None
    tally: Tally = NO_TALLY
    """What had been counted of it for the breaker when it was claimed."""


class Stand(NamedTuple):
    """What the checkpoint of a partition is, read and not claimed."""

    epoch: int
    next_offset: int | None
    tally: Tally = NO_TALLY
    """What had been counted of it for the breaker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One step of a checkpoint, from what its lease expects to `new`."""

    partition: TopicPartition
    lease: Lease
    new: int
    leader_epoch: int | None
    tally: Tally
    rows: int
    """What becomes of the messages in between: so many rows,"""
    refused: int
    skipped: int


GRANTS = """\
GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT ON {schema}.store TO {role};
GRANT SELECT, INSERT, UPDATE ON {schema}.checkpoint TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.claims TO {role};
"""
"""What a role needs that does not own the schema."""


async def schema_is_there(conn: AsyncConnection[Any], schema: str) -> bool:
    """Tell whether the daemon's own schema and tables are there; raises Halt when this role may not use them."""
    name = sql.Identifier(schema)
    try:
        # The catalog is asked, not to_regclass: that needs the privileges that may be missing.
        there = await call(conn, _THERE, {"schema": schema})
        if there:
            await call(conn, sql.SQL(_TRY).format(schema=name))
    except (Halt, TableChanged) as halt:
        ((role,),) = await call(conn, "SELECT current_user::text")
        grants = sql.SQL(GRANTS).format(schema=name, role=sql.Identifier(role)).as_string()
        raise Halt("database", f"{halt}; let the owner of schema {schema} type: {' '.join(grants.split())}") from halt
    return bool(there)


async def ensure_schema(conn: AsyncConnection[Any], schema: str) -> None:
    """Make the daemon's own schema and tables where they are missing; raises Halt with what to type."""
    if await schema_is_there(conn, schema):
        return
    name = sql.Identifier(schema)
    try:
        async with postgres.transaction(conn):
            await conn.execute("SELECT pg_advisory_xact_lock(hashtext('consumerd setup'))")
            await conn.execute(sql.SQL(SCHEMA).format(schema=name))
    except Halt as halt:
        raise Halt(
            "database", f"cannot make schema {schema}: {halt}; let an owner run what `consumerd setup --sql` prints"
        ) from halt


class Checkpoints:
    """The checkpoints of one group, in the schema of the daemon."""

    mode: Mode = "postgres"

    def __init__(self, schema: str, group: str, target: Callable[[str], str], *, table: str = "checkpoint") -> None:
        self.group = group
        self.target = target
        """The table of a topic; nothing for one that is not known yet, of which nothing is claimed then."""
        self._names = {"schema": sql.Identifier(schema), "checkpoint": sql.Identifier(schema, table)}
        self._advance = self._sql(_ADVANCE)

    async def store(self, conn: AsyncConnection[Any]) -> str:
        """Return the uuid of this database's checkpoints."""
        ((store,),) = await call(conn, self._sql("SELECT store::text FROM {schema}.store"))
        return cast("str", store)

    async def claim(
        self,
        conn: AsyncConnection[Any],
        partitions: Sequence[TopicPartition],
        counts: Mapping[str, int],
        topics: Mapping[str, Topic],
    ) -> dict[TopicPartition, Stored]:
        """Raise the epoch of partitions, and return their checkpoints.

        `counts` are the partitions of all topics in Kafka now, `topics` what was found of them at the start. For one
        that a pattern matched "the first time" is the group's: what comes to match later is read from its start.
        """
        await self._refuse_other_group(conn, partitions, topics)
        await call(conn, CLAIM_TIMEOUT)
        await self.appear(conn, counts, topics)
        rows = await call(conn, self._sql(_CLAIM), self._keys(partitions))
        return {
            TopicPartition(topic, number): Stored(
                epoch=epoch,
                next_offset=next_offset,
                max_offset=max_offset,
                topic_id=topic_id,
                target=target,
                leader_epoch=leader_epoch,
                tally=Tally(*tally),
            )
            for topic, number, topic_id, next_offset, max_offset, epoch, target, leader_epoch, *tally in rows
        }

    async def appear(self, conn: AsyncConnection[Any], counts: Mapping[str, int], topics: Mapping[str, Topic]) -> None:
        """Make the rows of partitions that have none: the group has seen them now."""
        values = {
            "topics": list(counts),
            "counts": list(counts.values()),
            "matched": [topics[topic].matched for topic in counts],
            "targets": [self.target(topic) for topic in counts],
            "group": self.group,
        }
        await call(conn, self._sql(_APPEAR), values)

    async def look(
        self, conn: AsyncConnection[Any], partitions: Sequence[TopicPartition], topics: Mapping[str, Topic]
    ) -> dict[TopicPartition, Stored]:
        """Return what a claim would, and change nothing; raises Halt as it does."""
        await self._refuse_other_group(conn, partitions, topics)
        rows = await call(conn, self._sql(_LOOK), self._keys(partitions))
        stored = _unseen(partitions, self.target)
        for topic, number, topic_id, next_offset, max_offset, epoch, target in rows:
            stored[TopicPartition(topic, number)] = Stored(
                epoch=epoch, next_offset=next_offset, max_offset=max_offset, topic_id=topic_id, target=target
            )
        return stored

    async def _refuse_other_group(
        self, conn: AsyncConnection[Any], partitions: Sequence[TopicPartition], topics: Mapping[str, Topic]
    ) -> None:
        ids = [topics[partition.topic].topic_id for partition in partitions]
        others = await call(conn, self._sql(_OTHER_GROUP), {**self._keys(partitions), "ids": ids})
        if others:
            ((other, topic, target, lately),) = others
            quoted = sql.Literal(other).as_string()
            forget = f"DELETE FROM {self._names['checkpoint'].as_string()} WHERE group_id = {quoted}"  # noqa: S608
            over = f"; or, if that group is over, forget it: {forget}"
            raise Halt(
                "checkpoint",
                f"group {other} writes {topic} to {target} already, and group {self.group} has no "
                f'checkpoint: a renamed handler? Set `group_id = "{other}"` to go on where it stopped'
                + (", once it is stopped: it has written in the last ten minutes" if lately else over),
            )

    async def place(
        self,
        conn: AsyncConnection[Any],
        partition: TopicPartition,
        epoch: int,
        offset: int,
        topic_id: str | None,
        *,
        forget: bool = False,
    ) -> bool:
        """Set a claimed checkpoint to an offset that was found or adopted; False if it was claimed by another since.

        The highest offset of another topic of the same name says nothing of this one. `forget` what was judged.
        """
        values = {
            "forget": forget,
            "group": self.group,
            "topic": partition.topic,
            "partition": partition.partition,
            "epoch": epoch,
            "offset": offset,
            "topic_id": topic_id,
        }
        return bool(await call(conn, self._sql(_PLACE), values))

    async def read(
        self, conn: AsyncConnection[Any], partitions: Sequence[TopicPartition]
    ) -> dict[TopicPartition, Stand]:
        """Return where partitions stand, without claiming them."""
        rows = await call(conn, self._sql(_READ), self._keys(partitions))
        return {
            TopicPartition(topic, number): Stand(epoch, next_offset, Tally(*tally))
            for topic, number, epoch, next_offset, *tally in rows
        }

    def advance(self, moves: Sequence[Move]) -> Statement:
        """Return what moves checkpoints, locked in key order; it answers with a row for each that stood as expected.

        The first statement of every write: no refusal of a row counts unless this held.
        """
        return self._advance, {
            "group": self.group,
            "topics": [move.partition.topic for move in moves],
            "partitions": [move.partition.partition for move in moves],
            "epochs": [move.lease.epoch for move in moves],
            "olds": [move.lease.next_offset for move in moves],
            "news": [move.new for move in moves],
            "leaders": [move.leader_epoch for move in moves],
            "judged": [move.tally.messages for move in moves],
            "refused": [move.tally.refused for move in moves],
        }

    def _keys(self, partitions: Sequence[TopicPartition]) -> dict[str, Any]:
        return {
            "group": self.group,
            "topics": [p.topic for p in partitions],
            "partitions": [p.partition for p in partitions],
            "targets": [self.target(p.topic) for p in partitions],
        }

    def _sql(self, text: LiteralString) -> sql.Composed:
        return sql.SQL(text).format(**self._names)


class KafkaCheckpoints:
    """No checkpoints in Postgres (`checkpoint = "kafka"`): Kafka's committed offset is the checkpoint, at least once.

    Nothing fences a zombie. A partition's next batch is not written before the commit of the last one is acknowledged,
    so that a crash repeats one batch of it at most.
    """

    mode: Mode = "kafka"

    def __init__(self, group: str, target: Callable[[str], str]) -> None:
        self.group = group
        self.target = target

    async def store(self, conn: AsyncConnection[Any]) -> str:  # noqa: ARG002 - as Checkpoints
        """Return nothing: no database is bound to the offsets."""
        return ""

    async def claim(
        self,
        conn: AsyncConnection[Any],
        partitions: Sequence[TopicPartition],
        counts: Mapping[str, int],  # noqa: ARG002
        topics: Mapping[str, Topic],
    ) -> dict[TopicPartition, Stored]:
        """Return partitions as never seen before: the offset in Kafka decides."""
        return await self.look(conn, partitions, topics)

    async def look(
        self,
        conn: AsyncConnection[Any],  # noqa: ARG002
        partitions: Sequence[TopicPartition],
        topics: Mapping[str, Topic],  # noqa: ARG002
    ) -> dict[TopicPartition, Stored]:
        """Return the same as a claim."""
        return _unseen(partitions, self.target)

    async def place(
        self,
        conn: AsyncConnection[Any],  # noqa: ARG002
        partition: TopicPartition,  # noqa: ARG002
        epoch: int,  # noqa: ARG002
        offset: int,  # noqa: ARG002
        topic_id: str | None,  # noqa: ARG002
        *,
        forget: bool = False,  # noqa: ARG002
    ) -> bool:
        """Store nothing."""
        return True

    async def read(
        self,
        conn: AsyncConnection[Any],  # noqa: ARG002
        partitions: Sequence[TopicPartition],  # noqa: ARG002
    ) -> dict[TopicPartition, Stand]:
        """Return nothing: there is nothing to compare with."""
        return {}

    def advance(self, moves: Sequence[Move]) -> Statement:
        """Return what moves nothing, and finds everything where it was expected."""
        return "SELECT generate_series(1, %(moves)s)", {"moves": len(moves)}


def _unseen(partitions: Sequence[TopicPartition], target: Callable[[str], str]) -> dict[TopicPartition, Stored]:
    """Return partitions as never written before."""
    return {
        partition: Stored(epoch=0, next_offset=None, max_offset=None, topic_id=None, target=target(partition.topic))
        for partition in partitions
    }
