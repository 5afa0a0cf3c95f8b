"""`consumerd offsets`: where each partition of a group stands, and where a reset would set it.

A plan is made of what stands now, and carried out (`consumerd.commands.reset`) only where that still stands.
"""

from __future__ import annotations

import csv
import io
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from consumerd import postgres
from consumerd.checkpoint import Checkpoints, schema_is_there
from consumerd.commands.aim import RELATIVE
from consumerd.commands.group import Group, survey
from consumerd.commands.tables import aligned
from consumerd.decide import require_ours
from consumerd.errors import Halt, Outage
from consumerd.live_table import LiveTables
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from psycopg import AsyncConnection

    from consumerd.commands.aim import Aim, Scope
    from consumerd.commands.group import Standing
    from consumerd.config import Config, HandlerConfig


@asynccontextmanager
async def connection(config: Config, handler: HandlerConfig) -> AsyncIterator[AsyncConnection[Any] | None]:
    """Open a connection where the handler keeps its checkpoint in Postgres."""
    if handler.checkpoint == "kafka":
        yield None
        return
    conn = await postgres.connect(config.postgres, "consumerd/offsets")
    try:
        yield conn
    finally:
        await conn.close()


async def shown(config: Config, handler: HandlerConfig) -> list[dict[str, Any]]:
    """Return what there is to tell of each partition; raises Outage, Halt."""
    group = Group(config.kafka, handler.group_id)
    store = ""
    async with connection(config, handler) as conn:
        standings = await survey(config, handler, group, conn)
        if conn is not None and any(each.stored for each in standings):
            store = await Checkpoints(config.postgres.schema_name, handler.group_id, lambda _: "").store(conn)
    return [_shown(standing, store, handler.group_id) for standing in standings]


def _shown(standing: Standing, store: str, group: str) -> dict[str, Any]:
    stored, bounds = standing.stored, standing.bounds
    return {
        "topic": standing.partition.topic,
        "partition": standing.partition.partition,
        "checkpoint": standing.checkpoint,
        "committed": standing.committed.offset,
        "stamp": _stamp(standing, store, group),
        "log_start": bounds.low if bounds else None,
        "log_end": bounds.high if bounds else None,
        "highest": stored.max_offset if stored else None,
        "epoch": stored.epoch if stored else None,
        "topic_id": standing.topic.topic_id,
        "note": _note(standing),
    }


def _stamp(standing: Standing, store: str, group: str) -> str:
    """Say whose Kafka's offset is."""
    stamp = standing.committed.stamp
    if standing.committed.offset is None:
        return "none"
    if stamp is not None and stamp.mode == "postgres" == standing.mode and (stamp.store, stamp.group) != (store, group):
        return "another database's"
    if stamp is not None and stamp.mode != standing.mode:
        return f'checkpoint = "{stamp.mode}"'
    return "operator's" if standing.is_operators else "ok"


def _note(standing: Standing) -> str:
    if standing.made_again:
        return "the topic was deleted and made again: the offset is of the old one"
    if standing.bounds is None:
        return "it has no leader"
    if standing.position is None:
        return "begins at the log's start" if standing.late else "begins at `start`"
    if standing.mode == "postgres" and standing.is_operators:
        return f"the next start takes up {standing.committed.offset}"
    if standing.position < standing.bounds.low:
        return f"offsets {standing.position}..{standing.bounds.low - 1} are gone from the log"
    return "beyond the log's end" if standing.position > standing.bounds.high else ""


def table(stands: Sequence[Mapping[str, Any]]) -> str:
    """Return them as a table."""
    head = ["partition", "checkpoint", "kafka", "stamp", "log start", "log end", "highest", "epoch", "topic id", ""]
    names = ["checkpoint", "committed", "stamp", "log_start", "log_end", "highest", "epoch", "topic_id", "note"]
    rows = [
        [f"{each['topic']}:{each['partition']}", *("-" if each[n] is None else str(each[n]) for n in names)]
        for each in stands
    ]
    return "\n".join(aligned([head, *rows]))


def lines(stands: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a JSON object for each."""
    return [msgspec.json.encode(each).decode() for each in stands]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """One partition, where it stands, and where it is to go on."""

    at: Standing
    new: int

    @property
    def change(self) -> str:
        """Say what that skips or repeats."""
        position = self.at.position
        if self.at.made_again:
            return f"the topic was made again: goes on in the new one at {self.new}"
        if position is None:
            return f"begins at {self.new}"
        if self.new == position:
            return "stays"
        return f"skips {position}..{self.new - 1}" if self.new > position else f"repeats {self.new}..{position - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a reset would do."""

    resets: list[Reset]
    warnings: list[str]

    def text(self) -> str:
        """Return a table."""
        rows = [
            [
                str(each.at.partition),
                "-" if each.at.position is None else str(each.at.position),
                str(each.new),
                each.change,
            ]
            for each in self.resets
        ]
        return "\n".join(aligned([["partition", "present", "new", ""], *rows]))

    def lines(self) -> list[str]:
        """Return a JSON object for each partition."""
        return [
            msgspec.json.encode(
                {
                    "topic": each.at.partition.topic,
                    "partition": each.at.partition.partition,
                    "present": each.at.position,
                    "new": each.new,
                    "change": each.change,
                }
            ).decode()
            for each in self.resets
        ]

    def csv(self) -> str:
        """Return the new offsets as kafka-consumer-groups has them: topic,partition,offset."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([*each.at.partition, each.new] for each in self.resets)
        return out.getvalue().rstrip("\n")


async def planned(config: Config, handler: HandlerConfig, aim: Aim, scope: Scope) -> Plan:
    """Return what a reset would do; raises Outage, and Halt for what no reset is the way on of."""
    if not config.kafka.admin:
        raise Halt("kafka", "kafka.admin = false: whether the group has members cannot be asked; set it to true")
    group = Group(config.kafka, handler.group_id)
    async with connection(config, handler) as conn:
        tables = LiveTables(handler, partial(postgres.connect, config.postgres, "consumerd/offsets"))
        if conn is not None:
            for topic in scope or await group.find(handler.topics, [h.dead_letter.topic for h in config.handlers]):
                await tables.of(topic).make_ready(conn)
        standings = _within(scope, await survey(config, handler, group, conn, tables.target))
        store = ""
        if conn is not None and await schema_is_there(conn, config.postgres.schema_name):
            store = await Checkpoints(config.postgres.schema_name, handler.group_id, tables.target).store(conn)
    for each in standings:
        _require_sense(each, aim, handler.group_id, store, tables.target(each.partition.topic))
    wanted = await _wanted(group, aim, standings)
    resets, warnings = [], []
    for each in standings:
        if each.partition in wanted:
            offset = wanted[each.partition]
            new = offset if aim.way == "to-current" else _clipped(each, offset)
            resets.append(Reset(at=each, new=new))
            if new != offset:
                end = "beyond the log's end" if offset > new else "before the log's start"
                warnings.append(f"Warning: {each.partition}: offset {offset} is {end}: {new} is taken instead")
        else:
            warnings.append(f"Warning: {each.partition} has no offset, and is left to begin as the handler says")
    warnings += _repeats(handler, resets, tables)
    if members := await group.members():
        warnings.append(f"Warning: {has_members(handler, members)}")
    return Plan(resets=resets, warnings=warnings)


def has_members(handler: HandlerConfig, members: Sequence[str]) -> str:
    """Say why nothing is set while somebody reads."""
    return (
        f"group {handler.group_id} has members ({', '.join(members)}), and no offset is set under them: stop consumerd "
        f"there (a handler that is halted has left its group); then type this again with --execute"
    )


def _within(scope: Scope, standings: Sequence[Standing]) -> list[Standing]:
    """Return those of a scope; raises Halt for what the handler does not read."""
    there = {each.partition for each in standings}
    topics = {partition.topic for partition in there}
    for topic, numbers in scope.items():
        if topic not in topics:
            raise Halt("topic", f"the handler does not read topic {topic}; it reads: {', '.join(sorted(topics))}")
        if absent := [n for n in sorted(numbers or ()) if TopicPartition(topic, n) not in there]:
            raise Halt("topic", f"topic {topic} has no partition {', '.join(map(str, absent))}")
    return [
        each
        for each in standings
        if not scope
        or (
            each.partition.topic in scope
            and ((numbers := scope[each.partition.topic]) is None or each.partition.partition in numbers)
        )
    ]


def _require_sense(each: Standing, aim: Aim, group: str, store: str, target: str) -> None:
    """Raise Halt for a partition of which no offset can be set, or none in this way."""
    if each.mode == "postgres":
        require_ours(each.partition, each.stored, each.committed.stamp, store=store, group=group, target=target)
    if each.made_again and aim.way in RELATIVE:
        raise Halt(
            "topic",
            f"topic {each.partition.topic} was deleted and made again: offset {each.position} of {each.partition} is "
            f"of the old one, and nothing can be counted from it; write --to-earliest, say",
        )
    if each.bounds is None:
        raise Outage("kafka", f"Kafka: {each.partition} has no leader")
    if each.position is None and aim.way == "shift-by":
        raise Halt("checkpoint", f"{each.partition} has no offset yet to shift: write --to-offset, say")


async def _wanted(group: Group, aim: Aim, standings: Sequence[Standing]) -> dict[TopicPartition, int]:
    """Return the offset that is asked for of each partition; a partition that has none to keep is left out."""
    bounds = {each.partition: each.bounds for each in standings if each.bounds}
    positions = {each.partition: each.position for each in standings if each.position is not None}
    match aim.way:
        case "to-earliest":
            return {partition: log.low for partition, log in bounds.items()}
        case "to-latest":
            return {partition: log.high for partition, log in bounds.items()}
        case "to-offset":
            return dict.fromkeys(bounds, aim.number)
        case "to-datetime":
            found = await group.offsets_at(list(bounds), aim.number)
            return {p: bounds[p].high if offset is None else offset for p, offset in found.items()}
        case "from-file":
            return dict(aim.offsets)
        case _:
            return {partition: position + aim.number for partition, position in positions.items()}


def _clipped(each: Standing, offset: int) -> int:
    """Return an offset that is in the log, or at its end."""
    return min(max(offset, each.bounds.low), each.bounds.high) if each.bounds else offset


def _repeats(handler: HandlerConfig, resets: Sequence[Reset], tables: LiveTables) -> list[str]:
    """Warn of what an append makes of messages that it has written before."""
    again: dict[str, list[str]] = {}
    for each in resets if handler.table.write == "append" else ():
        highest = each.at.stored.max_offset if each.at.stored else each.at.position
        if highest is None or each.new >= highest or each.at.made_again:
            continue
        if _refuses_repeats(handler, tables, each.at.partition.topic):
            becomes = "halts at the first that a unique index finds in the table"
        else:
            becomes = "writes them a second time: no unique index refuses them"
        again.setdefault(becomes, []).append(f"{each.at.partition} below {highest}")
    return [
        f"Warning: rows of {', '.join(places)} were written before, and append {becomes}; to write a range into "
        f"another table: consumerd replay {handler.name} --into TABLE"
        for becomes, places in again.items()
    ]


def _refuses_repeats(handler: HandlerConfig, tables: LiveTables, topic: str) -> bool:
    """Whether a unique index of the table is made of columns that are written alone."""
    if handler.checkpoint == "kafka":
        return False  # a table with such an index goes with another `write` then
    mapping = tables.of(topic).mapping
    written = {column.name for column in mapping.encoder.columns}
    return any(unique <= written for unique in mapping.table.unique)
