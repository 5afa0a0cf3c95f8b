"""The table of a handler as it was last read from the catalog: how messages become its rows, and how these are written.

A write uses one `Mapping` from its first step to its last; another writer may meanwhile have read the table again.
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
from consumerd.sinks.append import Append
from consumerd.sinks.copy import CopyData
from consumerd.sinks.skip_existing import SkipExisting
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

    def __init__(self, handler: HandlerConfig, connect: Callable[[], Awaitable[AsyncConnection[Any]]]) -> None:
        self._handler = handler
        self._connect = connect
        self._reading = asyncio.Lock()

    async def read(self, conn: AsyncConnection[Any]) -> None:
        """Read the table from the catalog; raises Halt for what does not fit it."""
        config = self._handler.table
        async with postgres.errors_of(conn):
            privileges = PRIVILEGES[config.write] + PRIVILEGES.get(config.tombstones, ())
            table = await catalog.load(conn, config.name, privileges)
        try:
            encoder = Encoder(table, self._handler)
        except ConfigError as error:
            raise Halt("table", str(error)) from error
        sink = _sink(config, table, encoder.columns)
        self.mapping = Mapping(encoder, sink, self._handler.transform is not None)

    async def follow(self, used: Mapping, changed: TableChanged) -> None:
        """Read the table again, unless that was done since; raises Halt when what was written to is gone."""
        async with self._reading:
            if self.mapping is not used:
                return
            conn = await self._connect()
            try:
                await self.read(conn)
            finally:
                await conn.close()
        old = used.encoder
        if self.mapping.table == old.table:
            raise Halt("database", str(changed))
        gone = [column.name for column in old.columns if self.mapping.table.column(column.name) is None]
        if gone:
            raise Halt(
                "table",
                f"column {', '.join(gone)} of table {old.table.name} is gone: rename it back, or map the new name "
                f"under [columns], then restart; a restart alone goes on with the columns that are there",
            )
        log.info("the table has changed: read again from the catalog", extra={"handler": self._handler.name})


def _sink(config: TableConfig, table: Table, columns: tuple[Column, ...]) -> Sink:
    match config.write:
        case "append":
            return Append(table, columns)
        case "skip-existing":
            return SkipExisting(table, columns)
        case "upsert":
            deletes = config.tombstones == "delete"
            return Upsert(table, columns, config.key, update=config.update, version=config.version, deletes=deletes)
