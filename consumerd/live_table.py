"""The tables of a handler as they were last read from the catalog: how messages become rows, how these are written.

A handler has one table, or one for each topic (`${topic}` in `table.name`). A write is of one table, and uses one
`Mapping` from its first step to its last; another writer may meanwhile have read the table again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consumerd import catalog, postgres
from consumerd.encode import Encoder
from consumerd.errors import ConfigError, Halt, TableChanged
from consumerd.packed import Packed
from consumerd.scalars import folded, is_identifier, table_parts
from consumerd.sinks.append import Append
from consumerd.sinks.copy import CopyData
from consumerd.sinks.skip_existing import SkipExisting
from consumerd.sinks.staged import STAGING
from consumerd.sinks.upsert import Upsert

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Column, Table
    from consumerd.config import HandlerConfig, TableConfig
    from consumerd.encode import Rows
    from consumerd.errors import Refusal
    from consumerd.sinks.base import Sink
    from consumerd.transform import Outcome
    from consumerd.types import Message

log = logging.getLogger(__name__)

PRIVILEGES = {
    "append": ("INSERT",),
    "skip-existing": ("INSERT", "SELECT"),
    "upsert": ("INSERT", "UPDATE", "SELECT"),
    "delete": ("DELETE",),
}
"""What the role must be allowed to, by `write` and `tombstones` of [table]. A staging table is made like the table,
which needs SELECT."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One reading of the table, and what was made for it."""

    encoder: Encoder
    sink: Sink
    transforms: bool = False
    """Whether messages are transformed before they are rows."""

    @property
    def table(self) -> Table:
        """The table that both were made for."""
        return self.encoder.table

    def pack(
        self,
        messages: Sequence[Message],
        refused: dict[int, Refusal] | None = None,
        outcomes: Sequence[Outcome] = (),
    ) -> Packed:
        """Return the rows of messages that are not refused yet; raises Rejected, naming a row, as the sink does.

        For a handler with a transform: of what it made of them, or nothing before it was called.
        """
        if self.transforms and not outcomes:
            return Packed(messages=len(messages))
        refused = dict(refused or {})
        rows = self.rows(messages, refused, outcomes)
        data = CopyData()
        self.sink.pack(rows.rows, data)
        return Packed(
            mapping=self,
            messages=len(messages),
            rows=data.rows,
            data=bytes(data.packed),
            refused=refused,
            skipped=rows.skipped,
            extra=data.rows - len(set(rows.positions)) if outcomes else 0,
        )

    def rows(self, messages: Sequence[Message], refused: dict[int, Refusal], outcomes: Sequence[Outcome]) -> Rows:
        """Return the rows themselves; what is refused is added to `refused`, by position."""
        if self.transforms:
            return self.encoder.encode_outcomes(messages, refused, outcomes)
        return self.encoder.encode(messages, refused)


class LiveTable:
    """The mapping in use, and how it follows a table that is altered while the daemon runs."""

    mapping: Mapping

    def __init__(
        self, handler: HandlerConfig, connect: Callable[[], Awaitable[AsyncConnection[Any]]], name: str, staging: str
    ) -> None:
        self._handler = handler
        self._connect = connect
        self._name = name
        self._staging = staging
        self._reading = asyncio.Lock()
        self.target = ""
        """The table's identifier, once it was read."""
        self.ready = False
        """Whether it can be written to, as far as is known."""

    async def make_ready(self, conn: AsyncConnection[Any]) -> None:
        """Read the table from the catalog if it is not ready; raises Halt for what does not fit it."""
        async with self._reading:
            if not self.ready:
                await self._read(conn)

    async def follow(self, used: Mapping, changed: TableChanged) -> None:
        """Read the table again, unless that was done since; raises Halt when what was written to is gone."""
        async with self._reading:
            if self.mapping is not used:
                return
            conn = await self._connect()
            try:
                await self._read(conn)
            finally:
                await conn.close()
        if self.mapping.table == used.table:
            raise Halt("database", str(changed))
        log.info(
            "the table has changed: read again from the catalog",
            extra={"handler": self._handler.name, "table": self._name},
        )

    async def _read(self, conn: AsyncConnection[Any]) -> None:
        config = self._handler.table
        if not all(is_identifier(folded(part)) for part in table_parts(self._name)):
            raise Halt("table", f"{self._name} is a longer name than Postgres takes: give this topic its own handler")
        async with postgres.errors_of(conn):
            privileges = PRIVILEGES[config.write] + PRIVILEGES.get(config.tombstones, ())
            table = await catalog.load(conn, self._name, privileges)
        try:
            encoder = Encoder(table, self._handler)
        except ConfigError as error:
            raise Halt("table", str(error)) from error
        sink = _sink(config, table, encoder.columns, self._staging)
        if self.target:
            _refuse_lost_columns(self.mapping, table)
        self.mapping = Mapping(encoder, sink, self._handler.transform is not None)
        self.target, self.ready = table.identifier, True


class LiveTables:
    """The tables of a handler."""

    def __init__(self, handler: HandlerConfig, connect: Callable[[], Awaitable[AsyncConnection[Any]]]) -> None:
        self._handler = handler
        self._connect = connect
        self.by_topic = handler.table.by_topic
        """Whether each topic has a table of its own: then one may be missing, and the others go on."""
        self._tables: dict[str, LiveTable] = {}
        self._one = None if self.by_topic else LiveTable(handler, connect, handler.table.name, STAGING)

    def of(self, topic: str) -> LiveTable:
        """Return the table of a topic."""
        if self._one is not None:
            return self._one
        table = self._tables.get(topic)
        if table is None:
            staging = f"{STAGING}_{len(self._tables)}"  # made once in a session for each table, not at each turn
            table = LiveTable(self._handler, self._connect, self._handler.table.of(topic), staging)
            self._tables[topic] = table
        return table

    def target(self, topic: str) -> str:
        """Return the identifier of a topic's table; nothing before that was read."""
        return self.of(topic).target

    async def start(self, conn: AsyncConnection[Any]) -> None:
        """Read the one table; those of topics are read with the claims of their partitions."""
        if self._one is not None:
            await self._one.make_ready(conn)


def _refuse_lost_columns(used: Mapping, table: Table) -> None:
    """Halt when what was written to is gone: without `[columns]` it would be left out from now on without a word."""
    gone = [column.name for column in used.encoder.columns if table.column(column.name) is None]
    if gone:
        raise Halt(
            "table",
            f"column {', '.join(gone)} of table {used.table.name} is gone: rename it back, or map the new name "
            f"under [columns]; a restart alone goes on with the columns that are there",
        )


def _sink(config: TableConfig, table: Table, columns: tuple[Column, ...], staging: str) -> Sink:
    match config.write:
        case "append":
            return Append(table, columns)
        case "skip-existing":
            return SkipExisting(table, columns, staging=staging)
        case "upsert":
            deletes = config.tombstones == "delete"
            return Upsert(
                table,
                columns,
                config.key,
                update=config.update,
                version=config.version,
                deletes=deletes,
                staging=staging,
            )
