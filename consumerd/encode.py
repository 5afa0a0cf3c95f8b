"""From messages to rows: which column reads what, and what becomes of a message that does not fit. Pure.

Messages are decoded together; only where one of them is refused are they gone through one by one, so good ones pay
nothing for the refusals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from consumerd.catalog import SUPPORTED
from consumerd.errors import Halt, Poison, Refusal
from consumerd.formats import json, values
from consumerd.transform import expanded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumerd.catalog import Column, Table
    from consumerd.config import HandlerConfig
    from consumerd.errors import SkipReason
    from consumerd.transform import Outcome
    from consumerd.types import Message

Row = tuple[Any, ...]

TOMBSTONE = Refusal(
    reason="missing", stage="decode", error="consumerd.errors.Poison", message="the message has no value (a tombstone)"
)


EMPTY = Refusal(
    reason="malformed", stage="decode", error="consumerd.errors.Poison", message="the message's value is empty"
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in offset order; `positions` are their messages', of which a transform may make several rows each.

    So many as `skipped` says are neither row nor refused.
    """

    rows: list[Row]
    positions: Sequence[int]
    skipped: Counter[SkipReason] = field(default_factory=Counter)


class Encoder:
    """What turns the messages of one handler into rows of its table."""

    def __init__(self, table: Table, handler: HandlerConfig) -> None:
        fields = _fields(table, handler)
        self.columns: tuple[Column, ...] = tuple(field.column for field in fields)
        self.table = table
        self._decode = json.decoder(fields)

    def encode_outcomes(
        self, messages: Sequence[Message], refused: dict[int, Refusal], outcomes: Sequence[Outcome]
    ) -> Rows:
        """Decode what a transform made of messages, as `encode` does; all rows of a message, or none."""
        made, owners = expanded(messages, outcomes, refused)
        found: dict[int, Refusal] = {}
        rows = self.encode(made, found)
        for index, why in found.items():
            refused.setdefault(owners[index], why)
        kept = [at for at, index in enumerate(rows.positions) if owners[index] not in refused]
        skipped: Counter[SkipReason] = Counter({"transform": outcomes.count(())})
        return Rows([rows.rows[at] for at in kept], [owners[rows.positions[at]] for at in kept], rows.skipped + skipped)

    def encode(self, messages: Sequence[Message], refused: dict[int, Refusal]) -> Rows:
        """Decode what is not refused yet; what cannot be is added to `refused`, by its position."""
        if not refused:
            try:
                return Rows(self._decode([m.value() for m in messages]), range(len(messages)))  # type: ignore[misc]
            except Exception:  # noqa: BLE001, S110 - one by one it is found which raised what
                pass
        return self._one_by_one(messages, refused)

    def _one_by_one(self, messages: Sequence[Message], refused: dict[int, Refusal]) -> Rows:
        rows: list[Row] = []
        positions: list[int] = []
        for position, message in enumerate(messages):
            if position in refused:
                continue
            value = message.value()
            if not value:
                refused[position] = TOMBSTONE if value is None else EMPTY
                continue
            try:
                rows += self._decode((value,))
            except (ValueError, RecursionError, Poison) as error:
                refused[position] = values.refusal(error)
            else:
                positions.append(position)
        return Rows(rows, positions)


def _fields(table: Table, handler: HandlerConfig) -> tuple[values.Field, ...]:
    """Resolve the mapping against the live table; every mistake at once."""
    if handler.columns is None:
        fields = tuple(values.Field(column=c, path=(c.name,)) for c in table.columns if not c.automatic)
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
                path=tuple(source.source.split(".")),
                default=source.default if source.has_default else values.ABSENT,
            )
            for name, source in handler.columns.items()
            if name in known
        )
    problems += [
        f"column {field.column.name} of {table.name} is {field.column.type_name}, which is not supported yet; "
        f"supported: {', '.join(SUPPORTED.values())}, enums, domains. List the others under [columns] to leave it out"
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
