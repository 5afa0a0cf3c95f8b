"""skip-existing: a row that any unique index of the table finds there already is left out; none is ever updated.

Rows go in by their offsets: of those that are equal the first is the row. Two writers that meet the same new rows in
different orders may deadlock; Postgres ends one, which tries again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from consumerd.sinks.staged import ORDINAL, STAGING, Staged

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from consumerd.catalog import Column, Table


class SkipExisting(Staged):
    """Insert what is not there yet."""

    def __init__(self, table: Table, columns: tuple[Column, ...], *, staging: str = STAGING) -> None:
        super().__init__(table, columns, straight=True, deletes=False, staging=staging)
        self._names = {
            "target": sql.SQL(table.identifier),
            "columns": sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
            "staging": self._staging,
            "ordinal": sql.Identifier(ORDINAL),
        }
        self._insert = (
            "INSERT INTO {target} ({columns}) SELECT {columns} FROM {staging} WHERE {ordinal} >= {first} "
            "ORDER BY {ordinal} ON CONFLICT DO NOTHING"
        )

    async def _merge(self, conn: AsyncConnection[Any], first: int, rows: int) -> int:
        """Insert; what is left out exists (a trigger that drops rows is not told from that)."""
        statement = sql.SQL(self._insert).format(**self._names, first=sql.Literal(first))
        return rows - (await conn.execute(statement)).rowcount
