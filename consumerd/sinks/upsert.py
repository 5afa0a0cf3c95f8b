"""upsert: the newest row of each key, by COPY into a staging table and one statement.

Each session has one temporary staging table (a table for each transaction grew pg_attribute by megabytes); it is
emptied by COMMIT. It carries the target's NOT NULL and CHECK constraints, so that COPY's error context names the row
that breaks one. An ordinal keeps the offsets' order: the last row of a key wins, decided by the database's own idea of
equal keys (a collation may find `A` equal to `a`), and rows go in sorted by key, so that two writers never wait for
each other in a circle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from consumerd.sinks.copy import Packer, check_stored, copy, copy_statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Column, Table

STAGING = sql.Identifier("pg_temp", "consumerd_staging")
ORDINAL = "consumerd_ordinal"
INTEGER_OID = 23


class Upsert:
    """Insert, or update where the key is there already."""

    def __init__(self, table: Table, columns: tuple[Column, ...], key: tuple[str, ...]) -> None:
        names = [column.name for column in columns]
        self._packer = Packer([*(column.oid for column in columns), INTEGER_OID])
        self._copy = copy_statement(STAGING, [*names, ORDINAL])
        target = sql.SQL(table.identifier)
        columns_sql = sql.SQL(", ").join(map(sql.Identifier, names))
        key_sql = sql.SQL(", ").join(map(sql.Identifier, key))
        updates = [sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in names if name not in key]
        self._merge = (
            "INSERT INTO {target} ({columns}) SELECT {columns} FROM ("
            "SELECT DISTINCT ON ({key}) {columns} FROM {staging} WHERE {ordinal} >= {first} "
            "ORDER BY {key}, {ordinal} DESC) AS newest ON CONFLICT ({key}) DO {action}"
        )
        self._count = "SELECT count(*) FROM (SELECT DISTINCT {key} FROM {staging} WHERE {ordinal} >= {first}) AS keys"
        self._counts = table.may_drop_rows and bool(updates)
        self._names = {
            "target": target,
            "columns": columns_sql,
            "key": key_sql,
            "staging": STAGING,
            "ordinal": sql.Identifier(ORDINAL),
            "action": sql.SQL("UPDATE SET {}").format(sql.SQL(", ").join(updates)) if updates else sql.SQL("NOTHING"),
        }
        unmapped = [column.name for column in table.columns if column.name not in names]
        self._prepare = sql.SQL(
            "CREATE TEMPORARY TABLE {staging} (LIKE {target} INCLUDING CONSTRAINTS, {ordinal} integer) "
            "ON COMMIT DELETE ROWS"
        ).format(staging=sql.Identifier("consumerd_staging"), target=target, ordinal=sql.Identifier(ORDINAL))
        self._drop = [
            sql.SQL("ALTER TABLE {} DROP COLUMN {} CASCADE").format(STAGING, sql.Identifier(name)) for name in unmapped
        ]

    async def prepare(self, conn: AsyncConnection[Any]) -> None:
        """Make the session's staging table, with the mapped columns alone; an older one of this session goes."""
        await conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(STAGING))
        for statement in (self._prepare, *self._drop):
            await conn.execute(statement)

    def pack(self, rows: Sequence[tuple[Any, ...]], first: int = 0) -> bytearray:
        """Return rows as COPY data, each with its ordinal."""
        return self._packer.pack((*row, ordinal) for ordinal, row in enumerate(rows, first))

    async def write(self, conn: AsyncConnection[Any], data: bytearray, rows: int, first: int = 0) -> None:
        """Copy the rows into the staging table and merge them; halts when a trigger dropped some."""
        await copy(conn, self._copy, data, rows)
        names = {**self._names, "first": sql.Literal(first)}
        merged = (await conn.execute(sql.SQL(self._merge).format(**names))).rowcount
        if self._counts:
            ((keys,),) = await (await conn.execute(sql.SQL(self._count).format(**names))).fetchall()
            check_stored(merged, keys)
