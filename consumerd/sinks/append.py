"""append: each message is a new row, by COPY straight into the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from consumerd.sinks.copy import Packer, copy, copy_statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Column, Table
    from consumerd.sinks.copy import CopyData


class Append:
    """Rows are never updated: what a unique index refuses is a dead letter."""

    def __init__(self, table: Table, columns: tuple[Column, ...]) -> None:
        self._packer = Packer(columns)
        self._statement = copy_statement(sql.SQL(table.identifier), columns)

    async def prepare(self, conn: AsyncConnection[Any]) -> None:
        """Need nothing."""

    async def forget(self, conn: AsyncConnection[Any]) -> None:
        """Have nothing to take back."""

    def pack(self, rows: Sequence[tuple[Any, ...]], data: CopyData) -> CopyData:
        """Add rows to the data of a COPY."""
        return self._packer.add(data, rows)

    async def write(self, conn: AsyncConnection[Any], data: CopyData) -> int:
        """Copy the rows into the table."""
        await copy(conn, self._statement, data)
        return 0
