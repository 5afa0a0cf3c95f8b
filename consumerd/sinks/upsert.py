"""upsert: one row for each key, as if its messages had been written one by one.

The staged rows of a batch are merged by one INSERT ... ON CONFLICT, decided by the database's own idea of equal keys (a
collation may find `A` equal to `a`). Of a key the last row wins; with a version the last of the highest, where null is
the lowest, and none replaces a row of the table whose version is higher. Columns that are not updated are the key's
first row's, for that one inserts. A row that deletes takes the key out of the table and with it all that came before;
what follows is inserted anew.

Rows go in sorted by key, so that two writers never wait for each other in a circle there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from consumerd.sinks.copy import check_stored
from consumerd.sinks.staged import DELETES, ORDINAL, STAGING, Staged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.catalog import Column, Table

_STAGED = "{staging} WHERE {ordinal} >= {first}"
_NOT_DELETED = (
    "(SELECT *, max({ordinal}) FILTER (WHERE {deletes}) OVER (PARTITION BY {key}) AS consumerd_deletion "
    "FROM {staging} WHERE {ordinal} >= {first}) AS staged WHERE {ordinal} > coalesce(consumerd_deletion, -1)"
)
_DELETE = (
    "DELETE FROM {target} AS existing USING "
    "(SELECT DISTINCT {key} FROM {staging} WHERE {deletes} AND {ordinal} >= {first}) AS staged WHERE {same}"
)
_NEWEST = "SELECT DISTINCT ON ({key}) {picked} FROM {rows} ORDER BY {key}, {latest}"
_MERGE = (
    "INSERT INTO {target} AS existing ({columns}) SELECT {columns} FROM ({newest}) AS newest "
    "ON CONFLICT ({key}) DO {action}"
)
_COUNT = "SELECT count(*) FROM ({newest}) AS staged WHERE {counts}"
_FIRST = "first_value({name}) OVER (PARTITION BY {key} ORDER BY {ordinal}) AS {name}"
_NOT_LOWER = "(existing.{version} IS NULL OR {row}.{version} >= existing.{version})"
_NOT_PASSED_OVER = "NOT EXISTS (SELECT FROM {target} AS existing WHERE {same} AND {not_lower} IS NOT TRUE)"


class Upsert(Staged):
    """Insert, or update where the key is there already; `update` None: every column but the key's."""

    def __init__(
        self,
        table: Table,
        columns: tuple[Column, ...],
        key: tuple[str, ...],
        *,
        update: tuple[str, ...] | None = None,
        version: str | None = None,
        deletes: bool = False,
        staging: str = STAGING,
    ) -> None:
        names = [column.name for column in columns]
        changing = [name for name in names if name not in key and (update is None or name in update)]
        super().__init__(
            table, columns, straight=bool(changing) and not deletes, key=key, deletes=deletes, staging=staging
        )
        self._deletes = deletes
        self._names: dict[str, sql.Composable] = {
            "target": sql.SQL(table.identifier),
            "columns": _listed(names),
            "key": _listed(key),
            "staging": self._staging,
            "ordinal": sql.Identifier(ORDINAL),
            "deletes": sql.Identifier(DELETES),
            "same": sql.SQL(" AND ").join(
                sql.SQL("existing.{0} = staged.{0}").format(sql.Identifier(name)) for name in key
            ),
        }
        self._names |= {
            "picked": sql.SQL(", ").join(
                sql.Identifier(name)
                if name in key or name in changing
                else sql.SQL(_FIRST).format(**self._names, name=sql.Identifier(name))
                for name in names
            ),
            "latest": _latest(version),
            "action": _action(changing, version),
            "counts": self._counted(version),
        }
        self._counts = table.may_drop_rows and bool(changing)

    async def _merge(self, conn: AsyncConnection[Any], first: int, rows: int) -> int:  # noqa: ARG002 - none is left out
        """Delete, and write the newest row of each key; halts when a trigger dropped some."""
        names = {**self._names, "first": sql.Literal(first)}
        if self._deletes:
            await conn.execute(sql.SQL(_DELETE).format(**names))
        names["rows"] = sql.SQL(_NOT_DELETED if self._deletes else _STAGED).format(**names)
        names["newest"] = sql.SQL(_NEWEST).format(**names)
        merged = (await conn.execute(sql.SQL(_MERGE).format(**names))).rowcount
        if self._counts:
            ((keys,),) = await (await conn.execute(sql.SQL(_COUNT).format(**names))).fetchall()
            check_stored(merged, keys)
        return 0

    def _counted(self, version: str | None) -> sql.Composable:
        """Return what holds for rows that the merge must have stored; those that it passed over are locked by it."""
        if version is None:
            return sql.SQL("true")
        not_lower = sql.SQL(_NOT_LOWER).format(version=sql.Identifier(version), row=sql.SQL("staged"))
        return sql.SQL(_NOT_PASSED_OVER).format(**self._names, not_lower=not_lower)


def _listed(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _latest(version: str | None) -> sql.Composed:
    """Return the order in which the row that wins is a key's first."""
    ordinal = sql.SQL("{} DESC").format(sql.Identifier(ORDINAL))
    if version is None:
        return ordinal
    return sql.SQL("{} DESC NULLS LAST, {}").format(sql.Identifier(version), ordinal)


def _action(changing: Sequence[str], version: str | None) -> sql.Composable:
    """Return what ON CONFLICT does."""
    if not changing:
        return sql.SQL("NOTHING")
    sets = sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in changing)
    if version is None:
        return sql.SQL("UPDATE SET {}").format(sets)
    not_lower = sql.SQL(_NOT_LOWER).format(version=sql.Identifier(version), row=sql.SQL("excluded"))
    return sql.SQL("UPDATE SET {} WHERE {}").format(sets, not_lower)
