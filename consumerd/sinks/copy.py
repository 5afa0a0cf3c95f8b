"""Rows as the data of a COPY: binary, or text where a column's type has no binary form of ours.

Binary COPY applies no cast: each value must be in its column's own form, and a number too large wraps silently. So the
dumpers are fixed by the columns' types, and ranges were checked in the decode. Text COPY hands words to the types' own
input functions. psycopg's compiled row formatters are used directly (`Copy.write_row` calls the same functions for each
row, but is a coroutine and needs an open COPY): a batch is packed before its transaction begins. The formatters are
private to psycopg, which is pinned for that reason.
"""

from __future__ import annotations

import ctypes
import datetime as dt
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg._copy_base import format_row_binary, format_row_text
from psycopg.adapt import AdaptersMap, Dumper, Transformer
from psycopg.pq import Format
from psycopg.types.array import ListBinaryDumper, ListDumper
from psycopg.types.string import BytesBinaryDumper

from consumerd.errors import Halt, Refusal, Rejected

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from decimal import Decimal

    from psycopg import AsyncConnection

    from consumerd.catalog import Column

SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

BYTEA_OID, TEXT_OID, JSON_OID, REAL_OID, CHAR_OID, VARCHAR_OID = 17, 25, 114, 700, 1042, 1043
TIMESTAMPTZ_OID, NUMERIC_OID, JSONB_OID = 1184, 1700, 3802

MAX_NUMERIC_SCALE = 16_383
"""Digits behind the point that a numeric has at most."""

BINARY_AS = {JSON_OID: BYTEA_OID, JSONB_OID: BYTEA_OID, CHAR_OID: TEXT_OID}
"""json and jsonb come as bytes in their binary form already, which bytea's dumper passes on; psycopg has no dumper for
char, whose binary form is text's."""
TEXT_AS = {CHAR_OID: TEXT_OID, VARCHAR_OID: TEXT_OID}

ELEMENT_OID_AT = 8
"""Where the elements' type stands in an array's binary form, in four bytes."""


class _Words(Dumper):
    """Text as it is. psycopg's own refuses NUL, which Postgres does by a code of its own, the same as in binary."""

    oid = TEXT_OID

    def dump(self, obj: str) -> bytes:
        return obj.encode()


class _Bytea(Dumper):
    """Bytes in hexadecimal; psycopg's own leaves the form to a connection, and there is none."""

    oid = BYTEA_OID

    def dump(self, obj: bytes) -> bytes:
        return b"\\x" + obj.hex().encode()


class _Json(Dumper):
    """JSON as it was sent."""

    oid = JSON_OID

    def dump(self, obj: bytes) -> bytes:
        return obj


class _Jsonb(Dumper):
    """JSON as it was sent: what stands before it in the binary form goes."""

    oid = JSONB_OID

    def dump(self, obj: bytes) -> bytes:
        return obj[1:]


class _Real(Dumper):
    """The real that binary COPY would round to: of a double's digits another may be the nearest."""

    oid = REAL_OID

    def dump(self, obj: float) -> bytes:
        return repr(ctypes.c_float(obj).value).encode()


class _Numeric(Dumper):
    """A number as the binary form has it: the text form rounds more digits, and reads no zero of a large exponent."""

    oid = NUMERIC_OID

    def dump(self, obj: Decimal) -> bytes:
        exponent = int(obj.as_tuple().exponent)  # a finite one has been made sure of
        if exponent < -MAX_NUMERIC_SCALE:
            raise psycopg.DataError(f"more than {MAX_NUMERIC_SCALE} digits behind the point")
        return b"0" if not obj and exponent > 0 else str(obj).encode()


class _Timestamptz(Dumper):
    """A time in UTC: Postgres reads no offset of 16 hours or more."""

    oid = TIMESTAMPTZ_OID

    def dump(self, obj: dt.datetime) -> bytes:
        with suppress(OverflowError):  # within a day of year 1 or 9999
            obj = obj.astimezone(dt.UTC)
        return str(obj).encode()


class _Array(ListBinaryDumper):
    """An array whose binary form names the elements' own type: an enum or a domain is dumped as what it is made of."""

    element_type: bytes

    def dump(self, obj: list[Any]) -> bytes:
        data = bytes(super().dump(obj) or b"")
        return data[:ELEMENT_OID_AT] + self.element_type + data[ELEMENT_OID_AT + 4 :]


def _array(column: Column, element: Column, *, by_text: bool) -> type[Dumper]:
    """Make the dumper of an array's type."""
    names: dict[str, Any] = {"oid": column.oid, "element_oid": _dumped_as(element, by_text=by_text)}
    if by_text:
        return type("ArrayAsText", (ListDumper,), names | {"delimiter": column.delimiter.encode()})
    return type("Array", (_Array,), names | {"element_type": element.type_oid.to_bytes(4)})


def _dumped_as(column: Column, *, by_text: bool) -> int:
    """Return the oid of the type whose dumper dumps a column's values."""
    if not by_text:
        return BINARY_AS.get(column.oid, column.oid)
    if column.element is None and column.by_text:
        return TEXT_OID
    return TEXT_AS.get(column.oid, column.oid)


class _Context:
    """psycopg's adapters, with ours in their place.

    Bytes are dumped by its compiled class: by oid, bytea finds a slower one of DB-API's.
    """

    connection = None

    def __init__(self) -> None:
        self.adapters = AdaptersMap(psycopg.adapters)
        self.adapters.register_dumper(bytes, BytesBinaryDumper)
        for dumper in (_Words, _Bytea, _Json, _Jsonb, _Real, _Numeric, _Timestamptz):
            self.adapters.register_dumper(None, dumper)


class Packer:
    """Packs rows of the given columns."""

    def __init__(self, columns: Sequence[Column]) -> None:
        by_text = goes_by_text(columns)
        context = _Context()
        for column in columns:
            if column.element is not None:
                context.adapters.register_dumper(None, _array(column, column.element, by_text=by_text))
        self._transformer = Transformer(context)
        oids = [_dumped_as(column, by_text=by_text) for column in columns]
        self._transformer.set_dumper_types(oids, Format.TEXT if by_text else Format.BINARY)
        self._format_row = format_row_text if by_text else format_row_binary

    def add(self, data: CopyData, rows: Iterable[Sequence[Any]]) -> CopyData:
        """Add rows to the data of a COPY, and return it; raises Rejected naming the first that has no such form."""
        format_row, transformer, packed = self._format_row, self._transformer, data.packed
        try:
            for row in rows:
                format_row(row, transformer, packed)
                data.rows += 1
        except Exception as error:
            name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
            text = "a value has no form in Postgres"
            raise Rejected(Refusal(reason="range", stage="write", error=name, message=text), data.rows) from error
        return data


@dataclass(slots=True)
class CopyData:
    """The data of one COPY, but for what stands before and behind all rows."""

    rows: int = 0
    packed: bytearray = field(default_factory=bytearray)
    first: int | None = None
    """The position of its first row, where other rows of its batch are written in the same transaction."""


@dataclass(frozen=True, slots=True)
class CopyStatement:
    """A COPY ... FROM STDIN, and what its data begins and ends with."""

    query: sql.Composed
    head: bytes
    tail: bytes


def goes_by_text(columns: Iterable[Column]) -> bool:
    """Whether rows of these columns go by text COPY: COPY has one form for all of a row."""
    return any(column.by_text for column in columns)


async def copy(conn: AsyncConnection[Any], statement: CopyStatement, data: CopyData) -> None:
    """Send packed rows; halts when Postgres counted fewer (a trigger that drops rows would lose them silently)."""
    async with conn.cursor() as cursor:
        async with cursor.copy(statement.query) as copying:
            for part in (statement.head, data.packed, statement.tail):
                await copying.write(part)
        check_stored(cursor.rowcount, data.rows)


def check_stored(stored: int, sent: int) -> None:
    """Halt when Postgres stored fewer rows than it was sent."""
    if stored < sent:
        raise Halt(
            "table", f"Postgres stored {stored} of {sent} rows: a trigger drops rows; disable it, or let it raise"
        )


def copy_statement(table: sql.Composable, columns: Sequence[Column]) -> CopyStatement:
    """Return COPY ... FROM STDIN for the columns, in the form that a `Packer` of them gives."""
    by_text = goes_by_text(columns)
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
    query = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT {})").format(
        table, names, sql.SQL("text") if by_text else sql.SQL("binary")
    )
    return CopyStatement(query, b"" if by_text else SIGNATURE, b"" if by_text else TRAILER)
