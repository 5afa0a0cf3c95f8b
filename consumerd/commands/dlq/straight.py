"""Letters straight through the handler, as it is now: its transform, its mapping, its sink, its table as it is.

The path of a write (`consumerd.writer`), with the letters in the checkpoint's place: one transaction that moves them,
holds the table, and writes the rows. What Postgres refuses is found in one that is rolled back. A letter that fails
again is said so in its row, which moves with those that are mended; no other letter is produced for it, for the message
stands in the topic already, and two that say different things of one message would only be told apart by their times.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from consumerd import postgres
from consumerd.catalog import fingerprint_query
from consumerd.commands.dlq.redrive import Taken, after_taken, check_claim, claim
from consumerd.errors import Cancelled, Halt, Outage, Rejected, TableChanged
from consumerd.isolate import isolate
from consumerd.letters import ensure_letters
from consumerd.live_table import LiveTables
from consumerd.sinks.copy import CopyData
from consumerd.transformer import Transformer
from consumerd.writer import FRUITLESS_ISOLATIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch
    from consumerd.commands.dlq.redrive import Report, Waits
    from consumerd.config import Config, HandlerConfig
    from consumerd.letters import Letters
    from consumerd.live_table import Mapping
    from consumerd.postgres import Statement


class Straight:
    """Letters through the handler; without `execute` every transaction is rolled back, and none moves."""

    def __init__(
        self,
        config: Config,
        handler: HandlerConfig,
        letters: Letters,
        waits: Waits,
        *,
        into: str | None,
        execute: bool,
    ) -> None:
        self._own, self._into = handler.table, into
        if into is not None:
            handler = handler.model_copy(update={"table": handler.table.model_copy(update={"name": into})})
        self._handler, self._letters, self._waits = handler, letters, waits
        self._execute, self._schema = execute, config.postgres.schema_name
        self._connect = partial(postgres.connect, config.postgres, f"consumerd/dlq-{handler.name}")
        self._conn: AsyncConnection[Any] | None = None
        self._prepared: dict[str, Mapping] = {}
        self._tables = LiveTables(handler, self._connect)
        self._transformer = None if handler.transform is None else Transformer(handler, handler.batch.max_bytes)
        self._made: tuple[int, Counter[Any]] = (0, Counter())
        """Rows, and what was skipped, of the last attempt."""

    async def start(self, topics: set[str]) -> None:
        """Look at what must be there, for letters of some topics; raises Outage, Halt."""
        await self._refuse_older_rows(topics)
        if self._transformer is not None:
            await self._transformer.start()
        if self._execute:
            await ensure_letters(await self._open(), self._schema)

    async def close(self) -> None:
        """Let go of connection and transform."""
        await self._abort()
        if self._transformer is not None:
            await self._transformer.close()

    async def _refuse_older_rows(self, topics: set[str]) -> None:
        """Refuse what could undo newer rows: an upsert of old messages into its own table, without a guard."""
        own = self._own
        if own.write != "upsert" or (own.version is not None and own.tombstones != "delete"):
            return
        same = self._into is None
        for topic in topics if self._into is not None else ():
            names = {"own": own.of(topic), "into": self._handler.table.of(topic)}
            found = await postgres.call(
                await self._open(), "SELECT to_regclass(%(own)s) = to_regclass(%(into)s)", names
            )
            same = same or found == [(True,)]
        if same:
            lacks = "has no `version`" if own.version is None else 'has tombstones = "delete"'
            raise Halt(
                "table",
                f"letters are older than what was written since, and the upsert into {own.name} {lacks}: one could "
                f"undo a newer row of its key; redrive --into another table and merge that, or set `table.version`, or "
                f"send them --to-topic, where they are the newest of their keys",
            )

    async def settle(self, batch: Batch, report: Report) -> None:
        """Try until each letter is redriven or has failed again; raises Stopped, Halt."""
        batches = [batch]
        while batches:
            try:
                batches[:1] = await self._step(batches[0], report)
            except Outage as outage:
                await self._abort()
                if isinstance(outage, Cancelled) and len(batches[0].messages) > 1:
                    batches[:1] = _halves(batches[0])
                else:
                    await self._waits.out(outage)
            else:
                self._waits.over()

    async def _step(self, batch: Batch, report: Report) -> list[Batch]:
        """Make one try of a batch; return what is to be tried next of it, in this order."""
        table, mapping = self._tables.of(batch.partition.topic), None
        try:
            await table.make_ready(await self._open())
            mapping = table.mapping
            return await self._attempt_or_isolate(batch, mapping, report)
        except TableChanged as changed:
            if mapping is None:
                raise Halt("database", str(changed)) from changed
            batch.refused.clear()
            await table.follow(mapping, changed)
            return [batch]
        except Taken as taken:
            left = await after_taken(await self._open(), self._letters, batch, taken, report)
            if left is not batch:
                return [] if left is None else [left]
            report.note(batch, *self._made)
            return []

    async def _attempt_or_isolate(self, batch: Batch, mapping: Mapping, report: Report) -> list[Batch]:
        try:
            return await self._attempt(batch, mapping, report)
        except Rejected as rejected:
            row = rejected.row
        return await self._isolate(batch, mapping, row)  # outside of the `except`, which holds what was encoded

    async def _attempt(self, batch: Batch, mapping: Mapping, report: Report) -> list[Batch]:
        """One write: transform, encode, then one transaction with the letters and the rows. Return what is left."""
        if self._transformer is not None:
            await self._transformer.complete(batch)
            if len(batch.outcomes) < len(batch.messages):
                return [batch, batch.cut(len(batch.outcomes))]
        rows = mapping.rows(batch.messages, batch.refused, batch.outcomes)
        halts = self._execute and self._handler.poison.action == "halt" and bool(batch.refused)
        if halts and min(batch.refused) + 1 < len(batch.messages):
            return [batch, batch.cut(min(batch.refused) + 1)]
        data = mapping.sink.pack(rows.rows, CopyData())
        conn = await self._ready(mapping)
        self._made = data.rows, Counter(rows.skipped)
        async with postgres.transaction(conn, *self._opening(batch, mapping), probe=not self._execute) as answers:
            self._check(answers, batch, mapping)
            existing = await mapping.sink.write(conn, data) if data.rows else 0
            self._made = data.rows - existing, Counter(rows.skipped) + Counter(exists=existing)
        report.note(batch, *self._made)
        if halts:
            raise _poisoned(batch)
        return []

    async def _isolate(self, batch: Batch, mapping: Mapping, row: int | None) -> list[Batch]:
        """Find the rows that Postgres refuses and add them to the batch's refusals; write nothing."""
        rows = mapping.rows(batch.messages, batch.refused, batch.outcomes)
        starts = [at for at, position in enumerate(rows.positions) if at == 0 or rows.positions[at - 1] != position]
        conn = await self._ready(mapping)
        async with postgres.transaction(conn, *self._opening(batch, mapping), probe=True) as answers:
            self._check(answers, batch, mapping)
            refused, _ = await isolate(conn, mapping.sink, rows.rows, row, starts=starts, at_least=len(starts))
        batch.refused |= {rows.positions[starts[message]]: refusal for message, refusal in refused.items()}
        if refused:
            return [batch]
        if len(batch.messages) > 1:  # rows that are valid one after the other, and not in the order of a merge
            return _halves(batch)
        batch.fruitless += 1
        if batch.fruitless >= FRUITLESS_ISOLATIONS:
            raise Halt("database", "Postgres refuses a message's row, and then it does not, again and again")
        raise Outage("postgres", "Postgres refused a row, and then it did not")

    def _opening(self, batch: Batch, mapping: Mapping) -> list[Statement]:
        """Return what moves the letters, first of all, and what tells whether the table is as it was read."""
        held: list[Statement] = [(mapping.table.lock, None), (fingerprint_query(mapping.table.name), None)]
        return [claim(self._letters, batch, mapping.table.identifier), *held] if self._execute else held

    def _check(self, answers: Sequence[Sequence[tuple[Any, ...]]], batch: Batch, mapping: Mapping) -> None:
        """Look at what the opening statements said; raises Taken, TableChanged."""
        if self._execute:
            check_claim(answers[0], batch)
        if answers[-1] != [(mapping.table.fingerprint,)]:
            raise TableChanged(f"table {mapping.table.name} is not as it was read from the catalog")

    async def _open(self) -> AsyncConnection[Any]:
        if self._conn is None or self._conn.closed:
            self._conn, self._prepared = await self._connect(), {}
        return self._conn

    async def _ready(self, mapping: Mapping) -> AsyncConnection[Any]:
        """Return the connection, made ready for the sink."""
        conn = await self._open()
        if self._prepared.get(mapping.table.name) is not mapping:
            async with postgres.transaction(conn):
                await mapping.sink.prepare(conn)
            self._prepared[mapping.table.name] = mapping
        return conn

    async def _abort(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await conn.close()


def _halves(batch: Batch) -> list[Batch]:
    return [batch, batch.cut(len(batch.messages) // 2)]


def _poisoned(batch: Batch) -> Halt:
    """Say which letter a handler that passes none over has met: the last of a batch."""
    last = len(batch.messages) - 1
    why, where = batch.refused[last], f"{batch.partition}@{batch.messages[last].offset()}"
    return Halt("poison", f"{where} failed again: {why.message} ({why.reason}), and [poison] action is halt")
