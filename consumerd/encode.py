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
from consumerd.formats import json, keys, values

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


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in offset order; `positions` are their messages'. So many as `skipped` says are neither row nor refused.

    Where tombstones delete, each row ends with whether it deletes; one that does has nothing else but its key.
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
        self._ignores_tombstones = handler.table.tombstones == "ignore"
        self._deletion = None
        if handler.table.tombstones == "delete":
            decode, self._deletion = self._decode, keys.deletions(handler, self.columns)
            self._decode = lambda values: [(*row, False) for row in decode(values)]

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
        skipped: Counter[SkipReason] = Counter()
        for position, message in enumerate(messages):
            if position in refused:
                continue
            value = message.value()
            if value is None and self._ignores_tombstones:
                skipped["tombstone"] += 1
                continue
            try:
                rows += self._decode((value,)) if value else self._without_value(message)
            except (ValueError, RecursionError, Poison) as error:
                refused[position] = values.refusal(error)
            else:
                positions.append(position)
        return Rows(rows, positions, skipped)

    def _without_value(self, message: Message) -> list[Row]:
        """Return what a message without a value does; raises Poison when it is none that the table can take."""
        if message.value() is not None:
            raise Poison(EMPTY)
        if self._deletion is None:
            raise Poison(TOMBSTONE)
        return [self._deletion(message.key())]


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
    problems += _named_problems(table, handler, names)
    problems += [] if problems else _unique_problems(table, handler, names)
    problems += [
        f"column {column.name} of table {table.name} is NOT NULL, has no default, and is not mapped: map it under "
        f"[columns], or type: ALTER TABLE {table.identifier} ALTER {column.name} DROP NOT NULL;"
        for column in table.columns
        if column.not_null and not column.automatic and not column.has_default and column.name not in names
    ]
    if not problems and not fields:
        problems.append(f"table {table.name} has no column to write")
    if problems:
        raise Halt("table", "; ".join(problems))
    return fields


def _named_problems(table: Table, handler: HandlerConfig, names: set[str]) -> list[str]:
    """Say which columns that [table] names are not written, or are of no use for what they are named for."""
    config = handler.table
    named = [("key", name) for name in config.key] + [("update", name) for name in config.update or ()]
    named += [("version", config.version)] if config.version else []
    problems = [
        f"{key} column {name!r} of table {table.name} is not among the columns"
        for key, name in named
        if name not in names
    ]
    version = table.column(config.version) if config.version else None
    if version is not None and version.oid == values.JSON:
        problems.append(
            f"version column {version.name!r} of table {table.name} is {version.type_name}, of which none is lower "
            f"than another: name a column of numbers or times in `table.version`"
        )
    return problems


def _unique_problems(table: Table, handler: HandlerConfig, names: set[str]) -> list[str]:
    """Say which unique index is missing, or is one too many."""
    write, key = handler.table.write, ", ".join(f'"{name}"' for name in handler.table.key)
    index = f"CREATE UNIQUE INDEX CONCURRENTLY ON {table.identifier}"
    if write == "upsert" and frozenset(handler.table.key) not in table.unique:
        return [f"table {table.name} has no unique index on ({key}), which upsert needs; type: {index} ({key});"]
    if write == "skip-existing" and not table.has_unique:
        sentence = "has no unique index, by which skip-existing tells what exists"
        return [f'table {table.name} {sentence}; type: {index} (...); or write = "append"']
    own = frozenset(handler.table.key)
    if (
        handler.checkpoint == "kafka"
        and write != "skip-existing"
        and any(unique <= names and unique != own for unique in table.unique)
    ):
        sentence = "has a unique index, which would refuse what is written again after a crash"
        ways = 'write checkpoint = "postgres", or write = "skip-existing", or drop the index'
        return [f'table {table.name} {sentence} (checkpoint = "kafka" is at least once): {ways}']
    return []
