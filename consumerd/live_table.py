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
from consumerd.sinks.upsert import Upsert

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Table
    from consumerd.config import HandlerConfig
    from consumerd.errors import Refusal
    from consumerd.sinks.base import Sink
    from consumerd.types import Message

log = logging.getLogger(__name__)

PRIVILEGES = {"append": ("INSERT",), "upsert": ("INSERT", "UPDATE", "SELECT")}


@dataclass(frozen=True, slots=True)
class Mapping:
    """One reading of the table, and what was made for it."""

    encoder: Encoder
    sink: Sink

    @property
    def table(self) -> Table:
        """The table that both were made for."""
        return self.encoder.table

    def pack(self, messages: Sequence[Message], refused: dict[int, Refusal] | None = None) -> Packed:
        """Return the rows of messages that are not refused yet; raises Rejected, naming a row, as the sink does."""
        refused = dict(refused or {})
        rows = self.encoder.encode(messages, refused)
        data = CopyData()
        self.sink.pack(rows.rows, data)
        return Packed(
            mapping=self,
            messages=len(messages),
            rows=data.rows,
            data=bytes(data.packed),
            refused=refused,
            skipped=rows.skipped,
        )


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
            table = await catalog.load(conn, config.name, PRIVILEGES[config.write])
        try:
            encoder = Encoder(table, self._handler)
        except ConfigError as error:
            raise Halt("table", str(error)) from error
        columns = encoder.columns
        sink = Append(table, columns) if config.write == "append" else Upsert(table, columns, config.key)
        self.mapping = Mapping(encoder, sink)

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
