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
from consumerd.formats import json, keys, messages, selection, values
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


UNUSABLE = (
    "has no unique index on ({}), which upsert needs (a deferrable constraint, a partial index, one on expressions "
    "will not do)"
)
OWN_DEFAULT = "the table's own default is used where the column is left out under [columns]"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in offset order; `positions` are their messages', of which a transform may make several rows each.

    So many messages as `skipped` says are neither row nor refused. Where tombstones delete, each row ends with whether
    it deletes; one that does has nothing else but its key.
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
        self._own_defaults = {
            field.column.name for field in fields if handler.columns is None and field.column.has_default
        }
        before = handler.transform is not None  # what it is given is selected already
        test = where.parse(handler.where) if handler.where is not None and not before else None
        read = () if test is None else where.fields(test)
        self._select = None if test is None else selection.selector(test, handler.key_format)
        self._selects_by_fields = bool(read)
        known = read if handler.decode.unknown_fields == "dead-letter" else None
        self._decode: messages.Decode
        if all(field.place == "field" for field in fields):
            values_of = json.decoder(fields, known)
            self._decode = lambda some: values_of([m.value() for m in some])  # type: ignore[misc]
        else:
            self._decode = messages.decoder(fields, handler.key_format, known)
        self._ignores_tombstones = handler.table.tombstones == "ignore"
        self._deletion = None
        if handler.table.tombstones == "delete":
            decode, self._deletion = self._decode, keys.deletions(handler, self.columns)
            self._decode = lambda some: [(*row, False) for row in decode(some)]

    def encode_outcomes(
        self, some: Sequence[Message], refused: dict[int, Refusal], outcomes: Sequence[Outcome]
    ) -> Rows:
        """Decode what a transform made of messages, as `encode` does; all rows of a message, or none."""
        made, owners, skipped = expanded(some, outcomes, refused)
        found: dict[int, Refusal] = {}
        rows = self.encode(made, found)
        for index, why in found.items():
            refused.setdefault(owners[index], why)
        kept = [at for at, index in enumerate(rows.positions) if owners[index] not in refused]
        return Rows([rows.rows[at] for at in kept], [owners[rows.positions[at]] for at in kept], rows.skipped + skipped)

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
        skipped: Counter[SkipReason] = Counter()
        for position, message in enumerate(some):
            if position in refused:
                continue
            value = message.value()
            try:
                if not self._takes(message):
                    skipped["where"] += 1
                elif value is None and self._ignores_tombstones:
                    skipped["tombstone"] += 1
                else:
                    rows += self._decode((message,)) if value else self._without_value(message)
                    positions.append(position)
            except (ValueError, RecursionError, Poison) as error:
                refused[position] = self._refusal(error)
        return Rows(rows, positions, skipped)

    def _takes(self, message: Message) -> bool:
        """Whether `where` selects a message; where it reads fields, one without a value is told by what follows."""
        if self._select is None or (self._selects_by_fields and not message.value()):
            return True
        return bool(self._select((message,)))

    def _without_value(self, message: Message) -> list[Row]:
        """Return what a message without a value does; raises Poison when it is none that the table can take."""
        if message.value() is not None:
            raise Poison(EMPTY)
        if self._deletion is None:
            raise Poison(TOMBSTONE)
        return [self._deletion(message.key())]

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
    problems += _named_problems(table, handler, names)
    problems += [] if problems else _unique_problems(table, handler, names)
    problems += [
        f"column {column.name} of table {table.name} is NOT NULL, has no default, and is not mapped: map it under "
        f'[columns], or type: ALTER TABLE {table.identifier} ALTER "{column.name}" DROP NOT NULL;'
        for column in table.columns
        if column.not_null and not column.automatic and not column.has_default and column.name not in names
    ]
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
    config = handler.table
    changing = config.update or {column.name for column in columns} - set(config.key)
    updated = [column for column in columns if column.name in changing] if config.write == "upsert" else []
    wanted = {"INSERT": columns, "UPDATE": updated}
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
        return [f"table {table.name} {UNUSABLE.format(key)}; type: {index} ({key});"]
    if write == "skip-existing" and table.deferrable:
        actions = ", ".join(f"DROP CONSTRAINT {name}, ADD CONSTRAINT {name} {it}" for name, it in table.deferrable)
        sentence = "has a deferrable constraint, by which Postgres cannot tell what exists (skip-existing)"
        return [f"table {table.name} {sentence}; type: ALTER TABLE {table.identifier} {actions};"]
    if write == "skip-existing" and not table.has_unique:
        sentence = "has no unique index, by which skip-existing tells what exists"
        return [f'table {table.name} {sentence}; type: {index} (...); or write = "append"']
    own = frozenset(handler.table.key)
    if (
        handler.checkpoint == "kafka"
        and write != "skip-existing"
        and any(unique <= names and (not own or unique != own) for unique in table.refusing)
    ):
        sentence = "has a unique index, which would refuse what is written again after a crash"
        ways = 'write checkpoint = "postgres", or write = "skip-existing", or drop the index'
        return [f'table {table.name} {sentence} (checkpoint = "kafka" is at least once): {ways}']
    return []
