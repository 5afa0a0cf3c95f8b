"""`consumerd offsets reset --execute`: the checkpoint and Kafka's offset, both set, in an order that bears a crash.

1. A transaction sets the checkpoints, all or none, by compare-and-set on what was shown, and raises their epochs: a
   zombie's write is rolled back.
2. Before its COMMIT, where Kafka has an operator's offset that no start has taken up yet, that is set to the new one,
   as an operator's: a start takes it up whether or not COMMIT came.
3. COMMIT. From here on each start goes on at the new offset: Kafka's is a stamped one, over which the checkpoint wins,
   or the new one.
4. Kafka's offsets are set, with our stamp.

Where Kafka's offset is the checkpoint, step 4 is all there is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import UNSET
from psycopg import sql

from consumerd import postgres
from consumerd.checkpoint import Checkpoints, ensure_schema
from consumerd.commands.group import Group
from consumerd.commands.offsets import connection, has_members
from consumerd.decide import Stamp
from consumerd.errors import ConsumerdError, Halt
from consumerd.live_table import LiveTables
from consumerd.postgres import call
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.commands.offsets import Plan, Reset
    from consumerd.config import Config, HandlerConfig

_RESET = """\
WITH wanted AS (
    SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::int[], %(epochs)s::int8[], %(olds)s::int8[],
                         %(news)s::int8[], %(ids)s::text[], %(again)s::bool[], %(targets)s::text[])
        AS w (topic, partition, epoch, old_offset, new_offset, topic_id, made_again, target)
), held AS (
    SELECT w.* FROM {schema}.checkpoint c JOIN wanted w USING (topic, partition)
    WHERE c.group_id = %(group)s AND c.epoch = w.epoch AND coalesce(c.next_offset, -2) = w.old_offset
    ORDER BY topic, partition FOR UPDATE OF c
)
UPDATE {schema}.checkpoint c
SET next_offset = h.new_offset, epoch = c.epoch + 1, leader_epoch = NULL, seen_at = now(), target = h.target,
    topic_id = coalesce(h.topic_id, c.topic_id),
    max_offset = CASE WHEN h.made_again THEN h.new_offset ELSE coalesce(c.max_offset, h.new_offset) END
FROM held h WHERE c.group_id = %(group)s AND c.topic = h.topic AND c.partition = h.partition
RETURNING c.topic, c.partition"""
"""A partition without an offset is as one that begins at its log's start (-2): to have been seen late is no change."""


async def execute(config: Config, handler: HandlerConfig, plan: Plan) -> list[str]:
    """Set what was planned; return what there is to say. Raises Halt, with nothing set, when it stands no more."""
    group = Group(config.kafka, handler.group_id)
    if members := await group.members():
        raise Halt("checkpoint", has_members(handler, members))
    count = len(plan.resets)
    done = (
        f"Set: {count} partition{'s' * (count > 1)}. The next start goes on there; after a halt: consumerd restart "
        f"{handler.name}"
    )
    async with connection(config, handler) as conn:
        if conn is None:
            await group.commit({each.at.partition: (each.new, _kafka_stamp(handler, each)) for each in plan.resets})
            return [done]
        schema = config.postgres.schema_name
        await ensure_schema(conn, schema)
        tables = LiveTables(handler, partial(postgres.connect, config.postgres, "consumerd/offsets"))
        checkpoints = Checkpoints(schema, handler.group_id, tables.target)
        store = await checkpoints.store(conn)
        for topic in {each.at.partition.topic for each in plan.resets}:
            await tables.of(topic).make_ready(conn)
        async with postgres.transaction(conn):
            await _set(conn, checkpoints, plan.resets, schema)
            if operators := [each for each in plan.resets if each.at.is_operators]:
                await group.commit({each.at.partition: (each.new, "") for each in operators})
    stamps = {each.at.partition: (each.new, _stamp(handler, each, store)) for each in plan.resets}
    try:
        await group.commit(stamps)
    except ConsumerdError as error:
        return [done, f"Kafka's own offsets follow with the handler's next commit ({error})."]
    return [done]


async def _set(conn: AsyncConnection[Any], checkpoints: Checkpoints, resets: Sequence[Reset], schema: str) -> None:
    """Set checkpoints, in the open transaction; raises Halt when one of them is not as it was shown."""
    topics = {each.at.partition.topic: each.at.topic for each in resets}
    await checkpoints.appear(conn, {name: topic.partitions for name, topic in topics.items()}, topics)
    values = {
        "group": checkpoints.group,
        "topics": [each.at.partition.topic for each in resets],
        "partitions": [each.at.partition.partition for each in resets],
        "epochs": [each.at.stored.epoch if each.at.stored else 0 for each in resets],
        "olds": [-2 if each.at.checkpoint is None else each.at.checkpoint for each in resets],
        "news": [each.new for each in resets],
        "ids": [each.at.topic.topic_id for each in resets],
        "again": [each.at.made_again for each in resets],
        "targets": [checkpoints.target(each.at.partition.topic) for each in resets],
    }
    done = await call(conn, sql.SQL(_RESET).format(schema=sql.Identifier(schema)), values)
    if moved := {each.at.partition for each in resets} - {TopicPartition(*row) for row in done}:
        names = ", ".join(map(str, sorted(moved)))
        raise Halt(
            "checkpoint",
            f"the checkpoint of {names} is not as it was shown any more: a member writes, or somebody else set it; "
            f"nothing was set; look again",
        )


def _stamp(handler: HandlerConfig, reset: Reset, store: str) -> str:
    """Return the stamp of a commit that follows its checkpoint in Postgres."""
    topic_id = reset.at.topic.topic_id
    return Stamp(store=store, group=handler.group_id, topic_id=topic_id, offset=reset.new).encode()


def _kafka_stamp(handler: HandlerConfig, reset: Reset) -> str:
    """Return the stamp of a commit that is the checkpoint: what the one before it knew goes along."""
    topic, before = reset.at.topic, reset.at.committed.stamp
    before = before if before is not None and before.mode == "kafka" and not reset.at.made_again else None
    return Stamp(
        mode="kafka",
        store="",
        group=handler.group_id,
        topic_id=topic.topic_id,
        offset=reset.new,
        partitions=(before.partitions if before else UNSET) or topic.partitions,
        judged=before.judged if before else UNSET,
    ).encode()
