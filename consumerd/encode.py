"""From messages to rows: which column reads what, and what becomes of a message that does not fit. Pure.

Messages are decoded a slice at a time; only a slice of which one is refused is gone through message by message, so good
ones pay nothing for the refusals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from consumerd.catalog import SUPPORTED
from consumerd.errors import Halt, Poison, Refusal
from consumerd.formats import json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from consumerd.accumulator import Batch
    from consumerd.catalog import Column, Table
    from consumerd.config import HandlerConfig
    from consumerd.types import Message

Row = tuple[Any, ...]

SLICE = 1000
"""Messages decoded at a time: below a millisecond, after which others have a turn, and its rows fit the cache."""

TOMBSTONE = Refusal(
    reason="missing", stage="decode", error="consumerd.errors.Poison", message="the message has no value (a tombstone)"
)


EMPTY = Refusal(
    reason="malformed", stage="decode", error="consumerd.errors.Poison", message="the message's value is empty"
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a batch, in offset order; `positions` are their messages' positions in the batch."""

    rows: list[Row]
    positions: Sequence[int]


class Encoder:
    """What turns the messages of one handler into rows of its table."""

    def __init__(self, table: Table, handler: HandlerConfig) -> None:
        fields = _fields(table, handler)
        self.columns: tuple[Column, ...] = tuple(field.column for field in fields)
        self.table = table
        self._decode = json.decoder(fields)

    def encode(self, batch: Batch) -> Rows:
        """Decode what is not refused yet; what cannot be is added to `batch.refused`."""
        slices = list(self.slices(batch))
        positions = [position for one in slices for position in one.positions]
        return Rows([row for one in slices for row in one.rows], positions)

    def slices(self, batch: Batch) -> Iterator[Rows]:
        """Decode as `encode` does, a slice of the batch at a time."""
        for start in range(0, len(batch.messages), SLICE):
            yield self._slice(batch, range(start, min(start + SLICE, len(batch.messages))))

    def _slice(self, batch: Batch, positions: range) -> Rows:
        messages: Sequence[Message] = batch.messages[positions.start : positions.stop]
        if batch.refused.keys().isdisjoint(positions):
            try:
                return Rows(self._decode([m.value() for m in messages]), positions)  # type: ignore[misc]
            except Exception:  # noqa: BLE001, S110 - message by message it is found which raised what
                pass
        return self._one_by_one(batch, positions)

    def _one_by_one(self, batch: Batch, slice_: range) -> Rows:
        rows: list[Row] = []
        positions: list[int] = []
        for position in slice_:
            if position in batch.refused:
                continue
            value = batch.messages[position].value()
            if not value:
                batch.refused[position] = TOMBSTONE if value is None else EMPTY
                continue
            try:
                rows += self._decode((value,))
            except (ValueError, RecursionError, Poison) as error:
                batch.refused[position] = json.refusal(error)
            else:
                positions.append(position)
        return Rows(rows, positions)


def _fields(table: Table, handler: HandlerConfig) -> tuple[json.Field, ...]:
    """Resolve the mapping against the live table; every mistake at once."""
    if handler.columns is None:
        fields = tuple(json.Field(column=c, path=(c.name,)) for c in table.columns if not c.automatic)
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
            json.Field(
                column=known[name],
                path=tuple(source.source.split(".")),
                default=source.default if source.has_default else json.ABSENT,
            )
            for name, source in handler.columns.items()
            if name in known
        )
    problems += [
        f"column {field.column.name} of {table.name} is {field.column.type_name}, which is not supported yet; "
        f"supported: {', '.join(SUPPORTED.values())}. List the other columns under [columns] to leave it out"
        for field in fields
        if field.column.oid not in SUPPORTED
    ]
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
        key = ", ".join(f'"{name}"' for name in handler.table.key)
        problems.append(
            f"table {table.name} has no unique index on ({key}), which upsert needs; type: "
            f"CREATE UNIQUE INDEX CONCURRENTLY ON {table.identifier} ({key});"
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
