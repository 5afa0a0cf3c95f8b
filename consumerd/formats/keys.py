"""Which row a message without a value deletes: the key's columns, read from the message's key as any column may be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from consumerd import paths
from consumerd.errors import ConfigError
from consumerd.formats import messages
from consumerd.formats.values import Field

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from consumerd.catalog import Column
    from consumerd.config import HandlerConfig

Row = tuple[Any, ...]


def deletions(handler: HandlerConfig, columns: Sequence[Column]) -> Callable[[bytes | None], Row]:
    """Return the function that makes of a message's key the row which deletes: the key's columns, and at its end true.

    It raises what `values.refusal` understands. Raises ConfigError when a column cannot be filled from the key.
    """
    sources = handler.table.tombstone_key
    entries = [
        Field(column=replace(column, not_null=True), place="@key", path=paths.parse(sources[column.name]).path)
        if column.name in sources
        else None
        for column in columns
    ]
    problems = [
        f"column {entry.column.name} of {handler.table.name} {mistake} (`table.tombstone_key` in {handler.path})"
        for entry in entries
        if entry is not None and (mistake := messages.mistake(entry, handler.key_format))
    ]
    if problems:
        raise ConfigError(*problems)
    readers = [entry and messages.key_reader(entry, handler.key_format) for entry in entries]
    return lambda key: (*(read and read(key) for read in readers), True)
