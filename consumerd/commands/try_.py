"""`consumerd try`: what a handler would make of real messages, row by row, with nothing written and no group joined.

Rows are made by the handler's own mapping and written by its own sink, in a transaction that is rolled back, so that
constraints and triggers have their say. The daemon's checkpoint tells which messages an append has written already:
those are decoded alone, for a unique index would refuse them now.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import msgspec

from consumerd import postgres
from consumerd.accumulator import Batch
from consumerd.checkpoint import Checkpoints, schema_is_there
from consumerd.commands.sample import sample
from consumerd.commands.tables import aligned
from consumerd.formats.values import FORMS
from consumerd.isolate import isolate
from consumerd.live_table import LiveTables
from consumerd.topics import Topics
from consumerd.transformer import Transformer
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Column
    from consumerd.config import Config, HandlerConfig
    from consumerd.errors import Refusal
    from consumerd.live_table import Mapping
    from consumerd.transform import Outcome

MAX_CELL = 40
"""Characters of a value in the table; JSON lines have all of it."""

NOTHING_CHANGED = (
    "The table is not changed: rows were tried in a transaction that was rolled back. Its triggers ran in there, and "
    "sequences of its defaults may have moved on."
)

_json = msgspec.json.Encoder(decimal_format="number")


@dataclass(slots=True, kw_only=True)
class Tried:
    """What became of one message."""

    partition: TopicPartition
    offset: int
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    refused: Refusal | None = None
    skipped: str | None = None
    before: bool = False
    """The handler has written it already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of all of them, and the columns of their rows."""

    table: str
    columns: tuple[Column, ...]
    tried: list[Tried]

    def text(self) -> str:
        """Return a table of the rows, and a line for each message that is none."""
        rows = [
            [_place(tried), *(_cell(value) for value in self._values(row).values())]
            for tried in self.tried
            for row in tried.rows
            if tried.refused is None and not self._deletes(row)
        ]
        lines = aligned([["message", *(column.name for column in self.columns)], *rows]) if rows else []
        deletions = [(tried, row) for tried in self.tried for row in tried.rows if self._deletes(row)]
        lines += [f"{_place(tried)} deletes {_cell(self._key(row))}" for tried, row in deletions if not tried.refused]
        lines += [f"{_place(tried)} would be skipped: {tried.skipped}" for tried in self.tried if tried.skipped]
        lines += [f"{_place(tried)} is refused: {_why(tried.refused)}" for tried in self.tried if tried.refused]
        count = sum(tried.refused is not None for tried in self.tried)
        skipped = sum(tried.skipped is not None for tried in self.tried)
        before = sum(tried.before for tried in self.tried)
        told = f"{len(self.tried)} messages: {len(rows)} rows of {self.table}, {count} refused, {skipped} skipped."
        if not self.tried:
            told = "The topics hold no message."
        elif before:
            told += f" {before} of them the handler has written already: Postgres was not asked about those again."
        return "\n".join([*lines, *([""] if lines else []), told, NOTHING_CHANGED])

    def lines(self) -> list[str]:
        """Return a JSON object for each row, and for each message that is none."""
        return [_json.encode(entry).decode() for tried in self.tried for entry in self._entries(tried)]

    def _entries(self, tried: Tried) -> list[dict[str, Any]]:
        place = {"topic": tried.partition.topic, "partition": tried.partition.partition, "offset": tried.offset}
        if tried.refused is not None:
            told = {name: value for name, value in asdict(tried.refused).items() if name != "words"}
            return [{**place, "refused": told}]
        if tried.skipped is not None:
            return [{**place, "skipped": tried.skipped}]
        return [
            {**place, "deletes": self._key(row)} if self._deletes(row) else {**place, "row": self._values(row)}
            for row in tried.rows
        ]

    def _deletes(self, row: tuple[Any, ...]) -> bool:
        """Whether a row is that of a tombstone, which ends with a column of its own for that."""
        return len(row) > len(self.columns) and bool(row[-1])

    def _key(self, row: tuple[Any, ...]) -> dict[str, Any]:
        return {name: value for name, value in self._values(row).items() if value is not None}

    def _values(self, row: tuple[Any, ...]) -> dict[str, Any]:
        """Return a row's values as JSON has them, by column."""
        return {column.name: _plain(column, value) for column, value in zip(self.columns, row, strict=False)}


async def attempt(config: Config, handler: HandlerConfig, count: int, *, first: bool) -> list[Trial]:
    """Try the first or the last messages of a handler's topics, for each table apart; raises Outage, Halt."""
    topics = Topics(config.kafka)
    found = await topics.find(handler.topics, [each.dead_letter.topic for each in config.handlers])
    partitions = [TopicPartition(topic.name, number) for topic in found.values() for number in range(topic.partitions)]
    connect = partial(postgres.connect, config.postgres, f"consumerd/try-{handler.name}")
    conn = await connect()
    try:
        tables = LiveTables(handler, connect)
        messages = await asyncio.to_thread(sample, config.kafka, partitions, count, first=first)
        trials = []
        for topic in sorted(found) if tables.by_topic else sorted(found)[:1]:
            its = [message for message in messages if message.topic() == topic] if tables.by_topic else messages
            if its or not tables.by_topic:
                await tables.of(topic).make_ready(conn)
                trials.append(await _trial(config, handler, conn, tables.of(topic).mapping, its))
    finally:
        await conn.close()
    return trials


async def _trial(
    config: Config, handler: HandlerConfig, conn: AsyncConnection[Any], mapping: Mapping, messages: Sequence[Any]
) -> Trial:
    """Try messages of one table."""
    tried = _decode(mapping, messages, await _transformed(handler, messages))
    await _note_what_was_written(config, handler, conn, mapping, tried)
    await _write(conn, mapping, [each for each in tried if each.rows and not each.before])
    return Trial(table=mapping.table.name, columns=mapping.encoder.columns, tried=tried)


async def _transformed(handler: HandlerConfig, messages: Sequence[Any]) -> dict[int, Outcome]:
    """Return what the handler's transform makes of messages, by their ids here; nothing without one."""
    if handler.transform is None:
        return {}
    outcomes: dict[int, Outcome] = {}
    transformer = Transformer(handler, handler.batch.max_bytes)
    try:
        await transformer.start()
        for message in messages:
            batch = _batch_of(message)
            await transformer.complete(batch)
            (outcomes[id(message)],) = batch.outcomes
    finally:
        await transformer.close()
    return outcomes


def _batch_of(message: Any) -> Batch:  # noqa: ANN401 - librdkafka's
    """Return one message as a batch."""
    return Batch(
        partition=TopicPartition(message.topic(), message.partition()),
        first_offset=message.offset(),
        next_offset=message.offset() + 1,
        messages=[message],
        size=len(message),
        reason="drain",
        gathered_since=0.0,
    )


def _decode(mapping: Mapping, messages: Sequence[Any], outcomes: dict[int, Outcome]) -> list[Tried]:
    tried = []
    for message in messages:
        refused: dict[int, Refusal] = {}
        rows = mapping.rows([message], refused, [outcomes[id(message)]] if outcomes else [])
        entry = Tried(partition=TopicPartition(message.topic(), message.partition()), offset=message.offset())
        entry.rows, entry.refused, entry.skipped = rows.rows, refused.get(0), next(iter(+rows.skipped), None)
        tried.append(entry)
    return tried


async def _note_what_was_written(
    config: Config, handler: HandlerConfig, conn: AsyncConnection[Any], mapping: Mapping, tried: Sequence[Tried]
) -> None:
    schema = config.postgres.schema_name
    if handler.table.write != "append" or handler.checkpoint != "postgres" or not await schema_is_there(conn, schema):
        return
    checkpoints = Checkpoints(schema, handler.group_id, lambda _: mapping.table.identifier)
    stands = await checkpoints.read(conn, sorted({each.partition for each in tried}))
    for each in tried:
        stand = stands.get(each.partition)
        each.before = stand is not None and each.offset < (stand.next_offset or 0)


async def _write(conn: AsyncConnection[Any], mapping: Mapping, tried: Sequence[Tried]) -> None:
    """Write rows and roll back; what Postgres refuses is noted."""
    async with postgres.transaction(conn):
        await mapping.sink.prepare(conn)
    async with postgres.transaction(conn, probe=True):
        rows = [row for each in tried for row in each.rows]
        starts = list(accumulate((len(each.rows) for each in tried[:-1]), initial=0)) if tried else []
        refused, _ = await isolate(conn, mapping.sink, rows, starts=starts, at_least=len(tried))
    for position, refusal in refused.items():
        tried[position].refused = refusal


def _plain(column: Column, value: Any) -> Any:  # noqa: ANN401 - of the column's type
    """Return a value as JSON has it: that of a JSON column without what stands before it in the binary form."""
    if column.element is not None and isinstance(value, list):
        return [_plain(column if isinstance(item, list) else column.element, item) for item in value]
    return msgspec.Raw(value[len(FORMS[column.oid]) :]) if column.oid in FORMS and value is not None else value


def _place(tried: Tried) -> str:
    return f"{tried.partition}@{tried.offset}"


def _why(refusal: Refusal) -> str:
    details = [f"column {refusal.column}"] if refusal.column else []
    details += [f"SQLSTATE {refusal.sqlstate}"] if refusal.sqlstate else []
    return f"{refusal.reason}: {refusal.message}" + (f" ({', '.join(details)})" if details else "")


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _json.encode(value).decode().strip('"')
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"
