"""The path of a batch: one loop for each connection, read from top to bottom.

`Writer.run` takes batches that are due, `_write` tries until each is settled, and `_attempt` is one try: decode, judge,
dead-letter, then one transaction with checkpoint and rows. Whatever goes wrong leaves it as one of our errors, whose
class says what happens next (`consumerd.errors`).
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from consumerd import postgres
from consumerd.catalog import fingerprint_query
from consumerd.checkpoint import Lease, Move
from consumerd.errors import Fenced, Halt, Outage, Rejected, TableChanged
from consumerd.isolate import isolate

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch
    from consumerd.encode import Mapping
    from consumerd.member import Member

Work = list[tuple["Batch", Lease]]
"""Batches of one write, each with the lease that its partition had when it was taken."""

FRUITLESS_ISOLATIONS = 5
"""Times that a batch may be refused as a whole with none of its rows refused alone, before that is a halt."""


class Writer:
    """One connection to Postgres, and what is written through it."""

    def __init__(self, member: Member, name: str) -> None:
        self._member = member
        self._name = name
        self._conn: AsyncConnection[Any] | None = None
        self._prepared: Mapping | None = None
        self.work: Work = []
        """What is being written now."""

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        try:
            while True:
                self.work = []
                self.work = await self._member.next_work()
                await self._write(self.work)
        finally:
            self.work = []
            await self.abort()

    async def abort(self) -> None:
        """Close this writer's connection; the server rolls back."""
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await conn.close()

    def cut(self) -> None:
        """Break the connection under whatever waits for it, which gets an error and closes it.

        To close it from here would free its number for another socket, whose events the one that waits would get.
        """
        if self._conn is not None and not self._conn.closed:
            with suppress(OSError), socket.socket(fileno=os.dup(self._conn.fileno())) as own:
                own.shutdown(socket.SHUT_RDWR)

    async def _write(self, work: Work) -> None:
        """Try until each batch is written or its partition is no longer held."""
        try:
            await self._member.retry(self._name, self._until_settled, work)
        except Halt as halt:
            where = ", ".join(f"{b.partition} offsets {b.first_offset}..{b.next_offset - 1}" for b, _ in work)
            raise Halt(halt.reason, f"{halt} (at {where}; nothing of it was skipped)") from halt
        self._member.recovered(self._name)

    async def _until_settled(self, work: Work) -> None:
        while work := [(batch, lease) for batch, lease in work if self._member.holds(batch, lease)]:
            mapping = self._member.mapping
            try:
                await self._step(work, mapping)
            except TableChanged as changed:
                await self._member.load_table(mapping, changed)
            except Fenced:
                for batch, lease in work:
                    await self._member.read_back(batch, lease)
            except Outage:
                await self.abort()
                if any(self._member.holds(batch, lease) for batch, lease in work):
                    raise

    async def _step(self, work: Work, mapping: Mapping) -> None:
        """Write, or learn which of it is refused: a write of several batches goes again one by one."""
        try:
            await self._attempt(work, mapping)
        except Rejected as rejected:
            if len(work) == 1:
                await self._isolate(*work[0], mapping, rejected.row)
            else:
                for one in work:
                    await self._until_settled([one])

    async def _attempt(self, work: Work, mapping: Mapping) -> None:
        """One write, from raw messages to the checkpoint. Letters are acknowledged before any offset moves."""
        member = self._member
        encoded = [mapping.encoder.encode(batch) for batch, _ in work]
        for batch, _ in work:
            await self._dead_letter(batch)
        packed = []
        first = 0
        for rows in encoded:
            if rows.rows:
                packed.append((mapping.sink.pack(rows.rows, first), len(rows.rows), first))
                first += len(rows.rows)
        started = time.monotonic()
        conn = await self._connection(mapping)
        async with postgres.transaction(conn):
            await self._advance(conn, work, mapping)
            for data, count, first in packed:
                await mapping.sink.write(conn, data, count, first)
        member.written(work, time.monotonic() - started)
        member.recovered(self._name, "postgres", "dead_letter")

    async def _advance(self, conn: AsyncConnection[Any], work: Work, mapping: Mapping) -> None:
        """Move the checkpoints, first of all; then make sure that the table is the one that was encoded for."""
        moves = [
            Move(partition=batch.partition, lease=lease, new=batch.next_offset, leader_epoch=batch.leader_epoch)
            for batch, lease in work
        ]
        if len(await self._member.checkpoints.advance(conn, moves)) < len(moves):
            raise Fenced
        table = mapping.table
        await conn.execute(f"LOCK TABLE {table.identifier} IN ROW EXCLUSIVE MODE")
        row = await (await conn.execute(fingerprint_query(table.name))).fetchone()
        if row != (table.fingerprint,):
            raise TableChanged(f"table {table.name} is not as it was read from the catalog")

    async def _isolate(self, batch: Batch, lease: Lease, mapping: Mapping, named: int | None) -> None:
        """Find the rows that Postgres refuses and add them to the batch's refusals; write nothing."""
        member = self._member
        rows = mapping.encoder.encode(batch)
        conn = await self._connection(mapping)
        async with postgres.transaction(conn, probe=True):
            await self._advance(conn, [(batch, lease)], mapping)
            refused = await isolate(conn, mapping.sink, rows.rows, named)
        batch.refused |= {rows.positions[row]: refusal for row, refusal in refused.items()}
        member.isolated(batch, refused)
        if not refused:
            batch.fruitless += 1
            if batch.fruitless >= FRUITLESS_ISOLATIONS:
                raise Halt("database", "Postgres refuses the batch as a whole, and none of its rows alone")
            raise Outage("postgres", "Postgres refused a batch, then none of its rows")
        if member.handler.table.write == "append":
            _refuse_repeats(batch, lease)

    async def _dead_letter(self, batch: Batch) -> None:
        """Judge a batch, good ones too, and send the letters it has."""
        self._member.breaker.judge(batch, time.monotonic())
        await self._member.letters.send(batch)

    async def _connection(self, mapping: Mapping) -> AsyncConnection[Any]:
        """Return the open connection, made ready for the sink."""
        if self._conn is None or self._conn.closed:
            self._conn = await self._member.connect()
            self._prepared = None
        if self._prepared is not mapping:
            async with postgres.transaction(self._conn):
                await mapping.sink.prepare(self._conn)
            self._prepared = mapping
        return self._conn


def _refuse_repeats(batch: Batch, lease: Lease) -> None:
    """Halt when an append's duplicate is a message below the highest offset ever written: it is no poison."""
    for position, refusal in batch.refused.items():
        offset = batch.messages[position].offset()
        if refusal.sqlstate == "23505" and offset < lease.max_offset:
            raise Halt(
                "checkpoint",
                f"{batch.partition} was set back to before {lease.max_offset}, and its rows are in the table already "
                f"(a unique index refuses offset {offset}); delete those rows, or set the offset forward again with "
                f"kafka-consumer-groups --reset-offsets, then restart",
            )
