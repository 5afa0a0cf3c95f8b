"""upsert: the newest row of each key, by COPY and at most one statement more.

While all keys have been new lately a COPY straight into the table is tried, under a savepoint: where it succeeds there
was nothing to update, and it costs half of what follows. A key that is there already, or twice in the batch, ends it;
then, and for a while after, rows go by a staging table and one INSERT ... ON CONFLICT.

Each session has one temporary staging table (a table for each transaction grew pg_attribute by megabytes); it is
emptied by COMMIT. It carries the target's NOT NULL and CHECK constraints, so that COPY's error context names the row
that breaks one. Its rows are numbered as they come, in the offsets' order: the last row of a key wins, decided by the
database's own idea of equal keys (a collation may find `A` equal to `a`), and rows go in sorted by key, so that two
writers never wait for each other in a circle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from consumerd.sinks.copy import Packer, check_stored, copy, copy_statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Column, Table
    from consumerd.sinks.copy import CopyData

STAGING = sql.Identifier("pg_temp", "consumerd_staging")
ORDINAL = "consumerd_ordinal"
LEAST_DETOUR, MOST_DETOUR = 16, 1024
"""Writes by the staging table until the straight way is tried again, twice as many after each that failed: what one
leaves behind in the table is for vacuum."""


class Upsert:
    """Insert, or update where the key is there already."""

    def __init__(self, table: Table, columns: tuple[Column, ...], key: tuple[str, ...]) -> None:
        names = [column.name for column in columns]
        target = sql.SQL(table.identifier)
        self._packer = Packer(column.oid for column in columns)
        self._stage = copy_statement(STAGING, names)
        self._straight = copy_statement(target, names)
        self._detour = 0
        """Writes until the straight way is tried again."""
        self._next_detour = LEAST_DETOUR
        columns_sql = sql.SQL(", ").join(map(sql.Identifier, names))
        key_sql = sql.SQL(", ").join(map(sql.Identifier, key))
        updates = [sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in names if name not in key]
        names_sql = {
            "target": target,
            "columns": columns_sql,
            "key": key_sql,
            "staging": STAGING,
            "ordinal": sql.Identifier(ORDINAL),
            "action": sql.SQL("UPDATE SET {}").format(sql.SQL(", ").join(updates)) if updates else sql.SQL("NOTHING"),
        }
        self._merge = sql.SQL(
            "INSERT INTO {target} ({columns}) SELECT {columns} FROM ("
            "SELECT DISTINCT ON ({key}) {columns} FROM {staging} "
            "ORDER BY {key}, {ordinal} DESC) AS newest ON CONFLICT ({key}) DO {action}"
        ).format(**names_sql)
        self._count = sql.SQL("SELECT count(*) FROM (SELECT DISTINCT {key} FROM {staging}) AS keys").format(**names_sql)
        self._counts = table.may_drop_rows and bool(updates)
        unmapped = [column.name for column in table.columns if column.name not in names]
        self._prepare = sql.SQL(
            "CREATE TEMPORARY TABLE {staging} (LIKE {target} INCLUDING CONSTRAINTS, "
            "{ordinal} bigint GENERATED ALWAYS AS IDENTITY (CACHE 1000)) ON COMMIT DELETE ROWS"
        ).format(staging=sql.Identifier("consumerd_staging"), target=target, ordinal=sql.Identifier(ORDINAL))
        self._drop = [
            sql.SQL("ALTER TABLE {} DROP COLUMN {} CASCADE").format(STAGING, sql.Identifier(name)) for name in unmapped
        ]

    async def prepare(self, conn: AsyncConnection[Any]) -> None:
        """Make the session's staging table, with the mapped columns alone; an older one of this session goes."""
        await conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(STAGING))
        for statement in (self._prepare, *self._drop):
            await conn.execute(statement)

    def pack(self, rows: Sequence[tuple[Any, ...]], data: CopyData) -> CopyData:
        """Add rows to the data of a COPY."""
        return self._packer.add(data, rows)

    async def write(self, conn: AsyncConnection[Any], data: CopyData) -> None:
        """Write the newest row of each key; halts when a trigger dropped some."""
        if data.alone and self._takes_straight_way():
            if await self._all_were_new(conn, data):
                self._next_detour = LEAST_DETOUR
                return
            self._detour, self._next_detour = self._next_detour, min(MOST_DETOUR, 2 * self._next_detour)
        if not data.alone:
            await conn.execute(sql.SQL("DELETE FROM {}").format(STAGING))
        await copy(conn, self._stage, data)
        merged = (await conn.execute(self._merge)).rowcount
        if self._counts:
            ((keys,),) = await (await conn.execute(self._count)).fetchall()
            check_stored(merged, keys)

    def _takes_straight_way(self) -> bool:
        self._detour -= 1
        return self._detour < 0

    async def _all_were_new(self, conn: AsyncConnection[Any], data: CopyData) -> bool:
        """Copy rows straight into the table; False, with nothing written, when that is not the way for them."""
        await conn.execute("SAVEPOINT consumerd_straight")
        try:
            await copy(conn, self._straight, data)
        except (psycopg.IntegrityError, psycopg.NotSupportedError):  # of the latter, row-level security
            await conn.execute("ROLLBACK TO SAVEPOINT consumerd_straight")
            return False
        except psycopg.errors.DeadlockDetected:  # rows were not sorted
            self._detour = self._next_detour
            raise
        return True
