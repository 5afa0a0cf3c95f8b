"""Rows as the data of a binary COPY.

Binary COPY applies no cast: each value must be in its column's own form, and a number too large wraps silently. So the
dumpers are fixed by the columns' types, and ranges were checked in the decode. psycopg's compiled row formatter is
used directly (`Copy.write_row` calls the same function for each row, but is a coroutine and needs an open COPY): a
batch is packed before its transaction begins. The formatter is private to psycopg, which is pinned for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg._copy_base import format_row_binary
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.pq import Format
from psycopg.types.string import BytesBinaryDumper

from consumerd.errors import Halt, Refusal, Rejected

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from psycopg import AsyncConnection

SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

BYTEA_OID, TEXT_OID = 17, 25
DUMPED_AS = {114: BYTEA_OID, 3802: BYTEA_OID, 1042: TEXT_OID}
"""json and jsonb come as bytes in their binary form already, which bytea's dumper passes on; psycopg has no dumper for
char, whose binary form is text's."""


class _Context:
    """psycopg's adapters, with bytes dumped by its compiled class: by oid, bytea finds a slower one of DB-API's."""

    connection = None

    def __init__(self) -> None:
        self.adapters = AdaptersMap(psycopg.adapters)
        self.adapters.register_dumper(bytes, BytesBinaryDumper)


class Packer:
    """Packs rows whose columns have the given type oids."""

    def __init__(self, oids: Iterable[int]) -> None:
        self._transformer = Transformer(_Context())
        self._transformer.set_dumper_types([DUMPED_AS.get(oid, oid) for oid in oids], Format.BINARY)

    def add(self, data: CopyData, rows: Iterable[Sequence[Any]]) -> CopyData:
        """Add rows to the data of a COPY, and return it; raises Rejected naming the first that has no binary form."""
        transformer, packed = self._transformer, data.packed
        try:
            for row in rows:
                format_row_binary(row, transformer, packed)
                data.rows += 1
        except Exception as error:
            name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
            text = "a value has no binary form in Postgres"
            raise Rejected(Refusal(reason="range", stage="write", error=name, message=text), data.rows) from error
        return data


@dataclass(slots=True)
class CopyData:
    """The data of one binary COPY."""

    rows: int = 0
    packed: bytearray = field(default_factory=lambda: bytearray(SIGNATURE))
    first: int | None = None
    """The position of its first row, where other rows of its batch are written in the same transaction."""


async def copy(conn: AsyncConnection[Any], statement: sql.Composed, data: CopyData) -> None:
    """Send packed rows; halts when Postgres counted fewer (a trigger that drops rows would lose them silently)."""
    async with conn.cursor() as cursor:
        async with cursor.copy(statement) as copying:
            await copying.write(data.packed)
            await copying.write(TRAILER)
        check_stored(cursor.rowcount, data.rows)


def check_stored(stored: int, sent: int) -> None:
    """Halt when Postgres stored fewer rows than it was sent."""
    if stored < sent:
        raise Halt(
            "table", f"Postgres stored {stored} of {sent} rows: a trigger drops rows; disable it, or let it raise"
        )


def copy_statement(table: sql.Composable, columns: Iterable[str]) -> sql.Composed:
    """Return COPY ... FROM STDIN for the columns."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, names)
