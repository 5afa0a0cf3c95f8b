"""`consumerd tune`: which size of batches is best, measured on a sample of the topics against a copy of the table.

The sample is written into the copy again and again, each time with batches of another size, by the handler's own
mapping and sink, in transactions as the daemon has them (but for the one row that is its checkpoint), over as many
connections. All batches of a size are equally full, and each connection writes equally many. The real table is read
from the catalog alone; `consumerd.commands.table_copy` says what keeps the copy from reaching it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
from psycopg import sql

from consumerd import postgres
from consumerd.accumulator import MESSAGE_OVERHEAD, Batch, size_of
from consumerd.budget import divide
from consumerd.catalog import fingerprint_query
from consumerd.commands.sample import sample
from consumerd.commands.table_copy import copied
from consumerd.commands.tables import aligned
from consumerd.errors import Halt, Rejected
from consumerd.isolate import isolate
from consumerd.live_table import LiveTable, LiveTables
from consumerd.sinks.copy import CopyData
from consumerd.sinks.staged import STAGING
from consumerd.topics import Topics
from consumerd.transformer import Transformer
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.config import Config, HandlerConfig
    from consumerd.live_table import Mapping
    from consumerd.postgres import Statement
    from consumerd.transform import Outcome

log = logging.getLogger(__name__)

SIZES: Final = (1_000, 5_000, 10_000, 20_000, 50_000)
"""Messages of a batch that are tried."""
ROUNDS: Final = 2
"""Times that each size is tried, one after the other; the better time counts, for the others met something else."""
WITHIN: Final = 0.95
"""Share of the best rate from which on a smaller batch is preferred: rows come sooner, and less is in memory."""
PIECE: Final = 1_000
"""Messages that are packed at a time, as the daemon has it."""
MOST_BYTES: Final = 256 << 20
"""Bytes of messages that the sample may have."""
LEARN_FROM: Final = 1_000
"""Messages that tell how large the others are."""
MOST_TRIES: Final = 20
"""Times that rows which Postgres refuses are looked for among those of one piece."""
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What batches of one size made."""

    messages: int
    rate: float
    """Rows/s."""
    seconds: float
    """Of one batch's transaction, on average."""
    memory: int
    """Bytes of the largest batch, with its rows."""
    size: int
    """Bytes of the largest batch's messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What came of all sizes."""

    handler: HandlerConfig
    measured: list[Measured]
    said: list[str]
    """What there is to say beside the numbers."""

    @property
    def best(self) -> Measured:
        """The smallest size that is nearly as fast as the fastest."""
        least = WITHIN * max(each.rate for each in self.measured)
        return next(each for each in self.measured if each.rate >= least)

    def text(self) -> str:
        """Return a table, and what to write into the handler's file."""
        rows = [
            [f"{each.messages:,}", f"{each.rate:,.0f}", f"{each.seconds * 1000:.1f}", f"{each.memory / MIB:.1f}"]
            for each in self.measured
        ]
        table = aligned([["batch", "rows/s", "ms a batch", "MiB a batch"], *rows])
        return "\n".join([*table, "", *self.said, "", f"# {self.handler.path}", *self._toml()])

    def lines(self) -> list[str]:
        """Return a JSON object for each size."""
        return [
            msgspec.json.encode(
                {
                    "max_messages": each.messages,
                    "rows_per_second": round(each.rate),
                    "milliseconds": round(each.seconds * 1000, 3),
                    "bytes": each.memory,
                    "recommended": each is self.best,
                }
            ).decode()
            for each in self.measured
        ]

    def _toml(self) -> list[str]:
        batch, best = self.handler.batch, self.best
        lines = ["[batch]", f"max_messages = {best.messages:_}    # {batch.max_messages:_} now"]
        if best.size > batch.max_bytes:
            now = f"{batch.max_bytes / MIB:g}MiB now, which is {best.messages * batch.max_bytes // best.size:_} of them"
            lines.append(f'max_bytes = "{math.ceil(best.size / MIB)}MiB"    # {now}')
        return lines


@dataclass(slots=True)
class _Stage:
    """What batches are written with."""

    mapping: Mapping
    outcomes: dict[int, Outcome]
    """What the handler's transform made of messages, by their ids here."""
    differs: list[str]
    """What the copy has not of the real table."""
    conns: list[AsyncConnection[Any]] = field(default_factory=list)

    def opening(self) -> list[Statement]:
        """Return what a write of the daemon begins with, but for the checkpoint."""
        table = self.mapping.table
        return [(table.lock, None), (fingerprint_query(table.name), None)]

    def of(self, messages: Sequence[Any]) -> list[Outcome]:
        """Return what became of messages in the transform; nothing without one."""
        return [self.outcomes[id(message)] for message in messages] if self.outcomes else []


async def tune(config: Config, handler: HandlerConfig, count: int) -> Tuned:
    """Measure; raises Outage, Halt. What is made is dropped again, however this ends."""
    connect = partial(postgres.connect, config.postgres, f"consumerd/tune-{handler.name}")
    conn = await connect()
    try:
        topic, messages = await _sampled(config, handler, count)
        tables = LiveTables(handler, connect)
        await tables.of(topic).make_ready(conn)
        outcomes = await _transformed(handler, messages)
        schema, table = config.postgres.schema_name, tables.of(topic).target
        async with copied(conn, schema, table, handler.name) as copy:
            live = LiveTable(handler, connect, copy.name, STAGING)
            reader = await connect()
            try:
                await live.make_ready(reader)
            finally:
                await reader.close()
            stage = _Stage(live.mapping, outcomes, copy.differs)
            partitions = {message.partition() for message in messages}
            try:
                for _ in range(min(handler.max_connections, len(partitions))):
                    stage.conns.append(await connect())
                    async with postgres.transaction(stage.conns[-1]):
                        await stage.mapping.sink.prepare(stage.conns[-1])
                good = await _sift(stage, messages)
                measured = await _measure(stage, good, table)
            finally:
                for each in stage.conns:
                    await each.close()
        done = (
            f"{len(good):,} of the last {len(messages):,} messages, written over {len(stage.conns)} connections into "
            f"{copy.name}, an empty copy of {table} that is dropped again; {table} was not touched."
        )
        return Tuned(handler=handler, measured=measured, said=[done, *_said(config, handler, stage, measured)])
    finally:
        await conn.close()


async def _sampled(config: Config, handler: HandlerConfig, count: int) -> tuple[str, list[Any]]:
    """Return the last messages of the topics, of the one that has most where each has a table of its own."""
    found = await Topics(config.kafka).find(handler.topics, [each.dead_letter.topic for each in config.handlers])
    partitions = [TopicPartition(topic.name, number) for topic in found.values() for number in range(topic.partitions)]
    some = await asyncio.to_thread(sample, config.kafka, partitions, min(count, LEARN_FROM), first=False)
    if not some:
        raise Halt("topic", "the topics hold no message to measure with")
    mean = max(1, size_of(some) // len(some))  # type: ignore[arg-type]
    most = min(count, MOST_BYTES // mean)
    messages = await asyncio.to_thread(sample, config.kafka, partitions, most, first=False)
    topics = [message.topic() or "" for message in messages]
    if not handler.table.by_topic:
        return topics[0], messages
    topic = max(set(topics), key=topics.count)
    return topic, [message for message in messages if message.topic() == topic]


async def _transformed(handler: HandlerConfig, messages: Sequence[Any]) -> dict[int, Outcome]:
    """Have messages transformed, once: what that costs has nothing to do with batches."""
    if handler.transform is None:
        return {}
    transformer = Transformer(handler, MOST_BYTES)
    outcomes: dict[int, Outcome] = {}
    try:
        await transformer.start()
        for first in range(0, len(messages), PIECE):
            some = messages[first : first + PIECE]
            batch = Batch(
                partition=TopicPartition(some[0].topic(), some[0].partition()),
                first_offset=some[0].offset(),
                next_offset=some[-1].offset() + 1,
                messages=list(some),
                size=0,
                reason="drain",
                gathered_since=0.0,
            )
            while len(batch.outcomes) < len(some):
                await transformer.complete(batch)
            outcomes |= {id(message): outcome for message, outcome in zip(some, batch.outcomes, strict=True)}
    finally:
        await transformer.close()
    return outcomes


async def _sift(stage: _Stage, messages: Sequence[Any]) -> list[Any]:
    """Write all messages once, and return those that nothing refuses: what is refused costs no batch size more."""
    good: list[Any] = []
    for first in range(0, len(messages), PIECE):
        piece = list(messages[first : first + PIECE])
        for _ in range(MOST_TRIES):
            piece, whole = await _sift_piece(stage, piece)
            if whole:
                break
        else:
            raise Halt("database", "Postgres refuses a message's row, and then it does not, again and again")
        good += piece
    return good


async def _sift_piece(stage: _Stage, messages: list[Any]) -> tuple[list[Any], bool]:
    """Write messages, and return those that are not refused; whether they are written now."""
    mapping, conn = stage.mapping, stage.conns[0]
    refused: dict[int, Any] = {}
    rows = mapping.rows(messages, refused, stage.of(messages))
    good = [message for at, message in enumerate(messages) if at not in refused]
    try:
        data = mapping.sink.pack(rows.rows, CopyData())
        async with postgres.transaction(conn, *stage.opening()):
            if data.rows:
                await mapping.sink.write(conn, data)
    except Rejected:
        pass
    else:
        return good, True
    starts = [at for at, position in enumerate(rows.positions) if at == 0 or rows.positions[at - 1] != position]
    positions = [rows.positions[start] for start in starts]
    async with postgres.transaction(conn, probe=True):
        found, _ = await isolate(conn, mapping.sink, rows.rows, starts=starts, at_least=len(starts))
    gone = {positions[at] for at in found}
    return [message for at, message in enumerate(messages) if at not in refused and at not in gone], False


async def _measure(stage: _Stage, messages: Sequence[Any], table: str) -> list[Measured]:
    """Write all of it with batches of each size that fills every connection equally."""
    connections = len(stage.conns)
    sizes = [size for size in SIZES if size * connections <= len(messages)]
    if not sizes:
        raise Halt(
            "topic",
            f"{len(messages)} messages can be written, too few to measure: {connections} connections want "
            f"{SIZES[0] * connections} at least",
        )
    found: dict[int, list[Measured]] = {size: [] for size in sizes}
    for number in range(ROUNDS):
        for size in sizes:
            async with postgres.transaction(stage.conns[0]):
                await postgres.call(
                    stage.conns[0], sql.SQL("TRUNCATE {}").format(sql.SQL(stage.mapping.table.identifier))
                )
            measured = await _pass(stage, messages, size)
            found[size].append(measured)
            extra = {"round": number + 1, "batch": size, "rows_per_second": round(measured.rate), "table": table}
            log.info("measured", extra=extra)
    return [max(each, key=lambda measured: measured.rate) for each in found.values()]


async def _pass(stage: _Stage, messages: Sequence[Any], size: int) -> Measured:
    """Write the sample once, in as many whole batches of one size as give each connection the same number."""
    connections = len(stage.conns)
    each = len(messages) // (size * connections)
    batches = [messages[at * size : (at + 1) * size] for at in range(each * connections)]
    written: list[tuple[int, float, int, int]] = []
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, conn in enumerate(stage.conns):
            tasks.create_task(_write(stage, conn, batches[number::connections], written), name=f"tune {number}")
    elapsed = time.perf_counter() - started
    return Measured(
        messages=size,
        rate=sum(rows for rows, *_ in written) / elapsed,
        seconds=sum(seconds for _, seconds, *_ in written) / len(written),
        memory=max(memory for *_, memory, _ in written),
        size=max(taken for *_, taken in written),
    )


async def _write(
    stage: _Stage,
    conn: AsyncConnection[Any],
    batches: Sequence[Sequence[Any]],
    written: list[tuple[int, float, int, int]],
) -> None:
    """Write batches one after another; note the rows, seconds and bytes of each."""
    for messages in batches:
        data = CopyData()
        for first in range(0, len(messages), PIECE):
            piece = messages[first : first + PIECE]
            packed = stage.mapping.pack(piece, outcomes=stage.of(piece))
            data.packed += packed.data
            data.rows += packed.rows
            await asyncio.sleep(0)  # who waits for an answer of Postgres has a turn between two pieces
        started = time.perf_counter()
        async with postgres.transaction(conn, *stage.opening()):
            if data.rows:
                await stage.mapping.sink.write(conn, data)
        size = size_of(messages)
        memory = size + MESSAGE_OVERHEAD * len(messages) + len(data.packed)
        written.append((data.rows, time.perf_counter() - started, memory, size))


def _said(config: Config, handler: HandlerConfig, stage: _Stage, measured: Sequence[Measured]) -> list[str]:
    """Say what the numbers leave out."""
    lines = [f"The copy is {'; '.join(stage.differs)}."] if stage.differs else []
    if left := [size for size in SIZES if size > measured[-1].messages]:
        wanted = left[-1] * len(stage.conns)
        lines.append(f"Not tried: {', '.join(f'{size:,}' for size in left)}; -n {wanted} would be enough messages.")
    bound = divide(config.daemon.max_buffered // len(config.handlers), handler).batch.max_messages
    if bound < handler.batch.max_messages:
        lines.append(f"daemon.max_buffered bounds this handler's batches at {bound:,} messages: for more, raise it.")
    return lines
