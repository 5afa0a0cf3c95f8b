"""From messages to rows: which column reads what, and what becomes of a message that does not fit. Pure.

Messages are decoded together; only where one of them is refused are they gone through one by one, so good ones pay
nothing for the refusals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from consumerd import where
from consumerd.errors import Halt, Poison, Refusal
from consumerd.formats import json, messages, selection, values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumerd.catalog import Column, Table
    from consumerd.config import HandlerConfig
    from consumerd.errors import SkipReason
    from consumerd.types import Message

Row = tuple[Any, ...]

TOMBSTONE = Refusal(
    reason="missing", stage="decode", error="consumerd.errors.Poison", message="the message has no value (a tombstone)"
)


EMPTY = Refusal(
    reason="malformed", stage="decode", error="consumerd.errors.Poison", message="the message's value is empty"
)


OWN_DEFAULT = "the table's own default is used where the column is left out under [columns]"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in offset order; `positions` are their messages'. So many as `skipped` says are neither row nor refused."""

    rows: list[Row]
    positions: Sequence[int]
    skipped: Counter[SkipReason] = field(default_factory=Counter)


class Encoder:
    """What turns the messages of one handler into rows of its table."""

    def __init__(self, table: Table, handler: HandlerConfig) -> None:
        fields = _fields(table, handler)
        self.columns: tuple[Column, ...] = tuple(field.column for field in fields)
        self.table = table
        self._own_defaults = {
            field.column.name for field in fields if handler.columns is None and field.column.has_default
        }
        test = where.parse(handler.where) if handler.where is not None else None
        read = () if test is None else where.fields(test)
        self._select = None if test is None else selection.selector(test, handler.key_format)
        self._selects_by_fields = bool(read)
        known = read if handler.decode.unknown_fields == "dead-letter" else None
        self._decode: messages.Decode
        if all(field.place == "field" for field in fields):
            decode = json.decoder(fields, known)
            self._decode = lambda some: decode([m.value() for m in some])  # type: ignore[misc]
        else:
            self._decode = messages.decoder(fields, handler.key_format, known)

    def encode(self, some: Sequence[Message], refused: dict[int, Refusal]) -> Rows:
        """Decode what is taken and not refused yet; what cannot be is added to `refused`, by its position."""
        if not refused:
            try:
                return self._together(some)
            except Exception:  # noqa: BLE001, S110 - one by one it is found which raised what
                pass
        return self._one_by_one(some, refused)

    def _together(self, some: Sequence[Message]) -> Rows:
        if self._select is None:
            return Rows(self._decode(some), range(len(some)))
        taken = self._select(some)
        return Rows(self._decode([some[position] for position in taken]), taken, _skipped(len(some) - len(taken)))

    def _one_by_one(self, some: Sequence[Message], refused: dict[int, Refusal]) -> Rows:
        rows: list[Row] = []
        positions: list[int] = []
        skipped = 0
        for position, message in enumerate(some):
            if position in refused:
                continue
            value = message.value()
            try:
                if self._select is not None and (value or not self._selects_by_fields) and not self._select((message,)):
                    skipped += 1
                elif not value:
                    refused[position] = TOMBSTONE if value is None else EMPTY
                else:
                    rows += self._decode((message,))
                    positions.append(position)
            except (ValueError, RecursionError, Poison) as error:
                refused[position] = self._refusal(error)
        return Rows(rows, positions, _skipped(skipped))

    def _refusal(self, error: Exception) -> Refusal:
        found = values.refusal(error)
        if found.reason == "missing" and found.column in self._own_defaults:
            return replace(found, message=f"{found.message}; {OWN_DEFAULT}")
        return found


def _skipped(count: int) -> Counter[SkipReason]:
    return Counter({"where": count}) if count else Counter()


def _fields(table: Table, handler: HandlerConfig) -> tuple[values.Field, ...]:
    """Resolve the mapping against the live table; every mistake at once."""
    if handler.columns is None:
        key = handler.table.key
        fields = tuple(
            values.Field(
                column=column,
                path=(column.name,),
                default=values.ABSENT if column.name in key else values.own_default(column),
            )
            for column in table.columns
            if not column.automatic or column.name in key
        )
        problems = []
    else:
        known = {column.name: column for column in table.columns}
        problems = [
            f"table {table.name} has no column {name!r}: correct `columns.{name}` in {handler.path}, or type: "
            f'ALTER TABLE {table.identifier} ADD COLUMN "{name}" ...;'
            for name in handler.columns
            if name not in known
        ]
        fields = tuple(
            values.Field(
                column=known[name],
                place=source.reads.place,
                path=source.reads.path,
                unit=source.unit,
                default=source.default if source.has_default else values.ABSENT,
            )
            for name, source in handler.columns.items()
            if name in known
        )
    problems += [
        f"column {field.column.name} of {table.name} {mistake} (`columns.{field.column.name}` in {handler.path})"
        for field in fields
        if (mistake := messages.mistake(field, handler.key_format))
    ]
    problems += _not_writable([field.column for field in fields], table, handler)
    # A unique index holds any number of NULLs, and DISTINCT ON keeps one: a key must have a value.
    fields = tuple(
        replace(field, column=replace(field.column, not_null=True)) if field.column.name in handler.table.key else field
        for field in fields
    )
    names = {field.column.name for field in fields}
    problems += [
        f"key column {name!r} of table {table.name} is not among the columns"
        for name in handler.table.key
        if name not in names
    ]
    if handler.table.write == "upsert" and not problems and frozenset(handler.table.key) not in table.unique:
        quoted = ", ".join(f'"{name}"' for name in handler.table.key)
        problems.append(
            f"table {table.name} has no unique index on ({quoted}), which upsert needs (a deferrable constraint, a "
            "partial index, one on expressions will not do); type: "
            f"CREATE UNIQUE INDEX CONCURRENTLY ON {table.identifier} ({quoted});"
        )
    problems += [
        f"column {column.name} of table {table.name} is NOT NULL, has no default, and is not mapped: map it under "
        f"[columns], or type: ALTER TABLE {table.identifier} ALTER {column.name} DROP NOT NULL;"
        for column in table.columns
        if column.not_null and not column.automatic and not column.has_default and column.name not in names
    ]
    if handler.checkpoint == "kafka" and any(unique <= names for unique in table.unique):
        problems.append(
            f"table {table.name} has a unique index, which would refuse what is written again after a crash "
            f'(checkpoint = "kafka" is at least once): write checkpoint = "postgres", or drop the index'
        )
    if not problems and not fields:
        problems.append(f"table {table.name} has no column to write")
    if problems:
        raise Halt("table", "; ".join(problems))
    return fields


def _not_writable(columns: list[Column], table: Table, handler: HandlerConfig) -> list[str]:
    """Say which columns take no value of ours: Postgres makes them itself, or the role may not write them."""
    problems = [
        f"column {column.name} of table {table.name} is GENERATED ALWAYS AS IDENTITY, numbered by Postgres alone: "
        f'leave it out, or type: ALTER TABLE {table.identifier} ALTER "{column.name}" SET GENERATED BY DEFAULT;'
        for column in columns
        if column.always == "identity"
    ]
    problems += [
        f"column {column.name} of table {table.name} is GENERATED ALWAYS AS an expression: leave it out of [columns]"
        for column in columns
        if column.always == "expression"
    ]
    update = handler.table.write == "upsert"
    wanted = {"INSERT": columns, "UPDATE": [c for c in columns if update and c.name not in handler.table.key]}
    for privilege, of in wanted.items():
        names = ", ".join(f'"{column.name}"' for column in of if privilege in column.lacking)
        if names:
            problems.append(
                f"role {table.role} lacks {privilege} on columns of table {table.name}; type: "
                f"GRANT {privilege} ({names}) ON {table.identifier} TO {table.role};"
            )
    if table.row_security and handler.table.write == "append":
        problems.append(
            f"table {table.name} has row-level security, under which Postgres allows role {table.role} no COPY: type: "
            f'ALTER ROLE {table.role} BYPASSRLS; or write = "upsert", which inserts'
        )
    return problems
