"""What a replay is to do, settled before anything is written: its offsets, and whether they may be written there again.

Old messages must not undo newer rows. A table that only ever takes what is new (skip-existing), or that compares
versions, may be replayed into at any time. Another upsert is right again only once the newest of the messages that were
written to it are written again: such a replay must end where the handler stands, and the handler must not go on
meanwhile (`replay_checkpoint.py` holds it to that). An append would write each row a second time.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from consumerd import postgres
from consumerd.brokers import CALL_TIMEOUT, client_config
from consumerd.checkpoint import Checkpoints, schema_is_there
from consumerd.commands import ranges
from consumerd.commands.ranges import Asked
from consumerd.commands.replays import Replays
from consumerd.errors import Halt, UsageError
from consumerd.live_table import LiveTables
from consumerd.replay import made_again
from consumerd.replay_checkpoint import Range
from consumerd.scalars import is_table
from consumerd.topics import Topics, meaning
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from psycopg import AsyncConnection

    from consumerd.commands.ranges import Resolved
    from consumerd.commands.replays import Record
    from consumerd.config import Config, HandlerConfig, KafkaConfig
    from consumerd.topics import Topic

NOTHING = Asked(start=None, end=None, topics={}, text="")
"""A range that says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was typed."""

    asked: Asked
    into: str | None = None
    rate: int | None = None
    accept_gap: bool = False
    dead_letter: bool = False

    @property
    def text(self) -> str:
        """The range as its record has it."""
        return self.asked.text or "everything"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A replay that may be."""

    handler: HandlerConfig
    """As it writes here: into which table, and what it does with poison."""
    found: Mapping[str, Topic]
    targets: Mapping[str, str]
    """The table of each topic."""
    ranges: Mapping[TopicPartition, Range]
    """What is left of it, where it is gone on with."""
    epochs: Mapping[TopicPartition, int]
    """Of the handler's checkpoints, where it must end at them."""
    gaps: tuple[str, ...]
    """What was accepted as gone."""
    goes_on: Record | None
    """The replay that is gone on with; None: a new one."""
    others: tuple[Record, ...]
    """Replays of this handler that have not ended."""


async def prepare(config: Config, configured: HandlerConfig, wish: Wish, conn: AsyncConnection[Any]) -> Prepared:
    """Settle what is replayed, and change nothing; raises UsageError, Halt, Outage."""
    handler = as_it_writes(configured, wish)
    topics = Topics(config.kafka)
    found = await topics.find(configured.topics, [each.dead_letter.topic for each in config.handlers])
    there = [TopicPartition(topic.name, number) for topic in found.values() for number in range(topic.partitions)]
    partitions = ranges.chosen(wish.asked, there)
    found = {name: found[name] for name in sorted({partition.topic for partition in partitions})}
    targets = await _targets(config, handler, conn, found)
    replays = Replays(conn, config.postgres.schema_name, configured.group_id)
    unfinished = [record for record in await replays.listed() if record.finished is None]
    same = next((r for r in unfinished if (r.range, r.target) == (wish.text, handler.table.name)), None)
    at_checkpoint = await _may_write(config, configured, wish, conn, targets)
    epochs: Mapping[TopicPartition, int] = {}
    if same is not None:
        settled = await _left(config, configured, replays, same, found)
    else:
        settled, epochs = await _asked(config, configured, wish, conn, partitions, at_checkpoint=at_checkpoint)
    if settled.gaps and not wish.accept_gap:
        raise Halt("gap", f"{'; '.join(settled.gaps)}; nothing was skipped; to replay what is there: --accept-gap")
    prepared = Prepared(
        handler=handler,
        found=found,
        targets=targets,
        ranges=settled.ranges,
        epochs=epochs,
        gaps=tuple(settled.gaps),
        goes_on=same,
        others=tuple(record for record in unfinished if record is not same),
    )
    await refuse_repeats(replays, prepared)
    return prepared


def as_it_writes(handler: HandlerConfig, wish: Wish) -> HandlerConfig:
    """Return the handler as it writes in a replay.

    Its letters were sent when it read these messages first: poison is counted and named here, unless letters are asked
    for once more.
    """
    changes: dict[str, Any] = {}
    if wish.into is not None:
        if not is_table(wish.into):
            raise UsageError(f'--into {wish.into}: write "table" or "schema.table"')
        if wish.dead_letter:
            raise UsageError(
                f"--dead-letter does not go with --into: whoever redrives the letters writes to {handler.table.name}"
            )
        changes["table"] = handler.table.model_copy(update={"name": wish.into})
    if handler.poison.action == "dead-letter" and not wish.dead_letter:
        changes["poison"] = handler.poison.model_copy(update={"action": "skip"})
    return handler.model_copy(update=changes)


async def _targets(
    config: Config, handler: HandlerConfig, conn: AsyncConnection[Any], topics: Iterable[str]
) -> dict[str, str]:
    """Look at the tables as the handler does at its start, and return the identifier of each topic's."""
    tables = LiveTables(handler, partial(postgres.connect, config.postgres, "consumerd/replay"))
    for topic in topics:
        await tables.of(topic).make_ready(conn)
    return {topic: tables.target(topic) for topic in topics}


async def _may_write(
    config: Config, handler: HandlerConfig, wish: Wish, conn: AsyncConnection[Any], targets: Mapping[str, str]
) -> bool:
    """Refuse what would double rows or undo newer ones; tell whether it must end at the handler's checkpoints."""
    schema, table = config.postgres.schema_name, handler.table
    if wish.into is not None and not await _is_own(config, handler, conn, targets):
        for target in sorted(set(targets.values())) if await schema_is_there(conn, schema) else ():
            if group := await Replays(conn, schema, handler.group_id).who_writes(target):
                raise Halt(
                    "table",
                    f"group {group} writes to {target}: --into a table that nobody writes, or replay that group",
                )
        return False
    if table.write == "append":
        raise Halt(
            "table",
            f"handler {handler.name} appends to {table.name}, where a replay would write each row a second time: name "
            f"another table with --into",
        )
    if table.write == "skip-existing" or (table.version is not None and table.tombstones != "delete"):
        return False
    why = "has no `version`" if table.version is None else 'has tombstones = "delete"'
    if wish.asked.end is not None:
        raise Halt(
            "table",
            f"the upsert of handler {handler.name} {why}, so older messages would undo newer rows: leave --to out, and "
            f"the replay ends where the handler stands; or name another table with --into",
        )
    if members := await asyncio.to_thread(_members, config.kafka, handler.group_id):
        raise Halt(
            "table",
            f"the upsert of handler {handler.name} {why}, so older messages would undo what it writes meanwhile, and "
            f"its group {handler.group_id} has members ({members}): stop it first; or name another table with --into",
        )
    return True


async def refuse_repeats(replays: Replays, prepared: Prepared) -> None:
    """Refuse to append what another replay has appended to the same table, or to undo what one has written there."""
    table, targets = prepared.handler.table, prepared.targets
    if table.write == "skip-existing" or (table.version is not None and table.tombstones != "delete"):
        return
    only_later = table.write == "upsert"
    number = prepared.goes_on.id if prepared.goes_on is not None else None
    other = await replays.earlier(number, prepared.ranges, prepared.found, targets, only_later=only_later)
    if other is None:
        return
    group, partition = other
    what = f"later messages of {partition}" if only_later else f"messages of {partition} in this range"
    raise Halt(
        "table",
        f"replay {group.rpartition('/')[2]} of group {group.partition('/replay/')[0]} writes {what} to "
        f"{targets[partition.topic]} already: name another table with --into; or, once its rows are gone, forget it "
        f"with --forget and --execute",
    )


async def _is_own(
    config: Config, handler: HandlerConfig, conn: AsyncConnection[Any], targets: Mapping[str, str]
) -> bool:
    """Whether rows go where the handler itself writes them, by whatever name."""
    try:
        own = await _targets(config, handler, conn, targets)
    except Halt:  # it cannot be written to: it is not the one that was looked at already
        return False
    return not set(own.values()).isdisjoint(targets.values())


def _members(kafka: KafkaConfig, group: str) -> int:
    admin = AdminClient(client_config(kafka))
    (future,) = admin.describe_consumer_groups([group], request_timeout=CALL_TIMEOUT).values()
    try:
        return len(future.result(CALL_TIMEOUT).members)
    except KafkaException as exception:
        if exception.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
            return 0
        raise meaning(exception.args[0], kafka.bootstrap_servers) from exception


async def _asked(
    config: Config,
    handler: HandlerConfig,
    wish: Wish,
    conn: AsyncConnection[Any],
    partitions: Sequence[TopicPartition],
    *,
    at_checkpoint: bool,
) -> tuple[Resolved, dict[TopicPartition, int]]:
    """Return the offsets that are asked for, and the epochs of the checkpoints where they must end."""
    found, wanted = await asyncio.to_thread(ranges.look, config.kafka, handler, partitions, wish.asked)
    epochs = {}
    if at_checkpoint:
        ends = await _checkpoints(config, handler, conn, partitions)
        epochs = {partition: epoch for partition, (epoch, _) in ends.items()}
        wanted = {partition: Range(wanted[partition].start, end) for partition, (_, end) in ends.items()}
    if not isinstance(wish.asked.start, dict):  # nothing is that new
        wanted = {partition: Range(min(of), of.end) for partition, of in wanted.items()}
    by_time = isinstance(wish.asked.start, dt.datetime)
    return ranges.within(wanted, found, by_time=by_time), epochs


async def _checkpoints(
    config: Config, handler: HandlerConfig, conn: AsyncConnection[Any], partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, tuple[int, int]]:
    """Return where the handler stands, and under which epochs; nothing of partitions that it never read."""
    if not await schema_is_there(conn, config.postgres.schema_name):
        return {}
    checkpoints = Checkpoints(config.postgres.schema_name, handler.group_id, lambda _: "")
    stands = await checkpoints.read(conn, partitions)
    return {p: (epoch, at) for p, (epoch, at, _) in stands.items() if at is not None and at >= 0}


async def _left(
    config: Config, handler: HandlerConfig, replays: Replays, record: Record, topics: Mapping[str, Topic]
) -> Resolved:
    """Return what is left of a replay that is gone on with."""
    left = await replays.left(record.id)
    for partition, of in left.items():
        topic_id = topics[partition.topic].topic_id if partition.topic in topics else None
        if partition.topic not in topics or (of.topic_id and topic_id and of.topic_id != topic_id):
            raise made_again([partition.topic])
    unread = {partition: of.range for partition, of in left.items() if of.range.start < of.range.end}
    found, _ = await asyncio.to_thread(ranges.look, config.kafka, handler, sorted(unread), NOTHING)
    return ranges.within(unread, found, by_time=False)
