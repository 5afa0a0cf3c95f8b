"""A message's key as values of columns: which row a message without a value deletes.

The key becomes the JSON of an object's one field, `@key`, and is decoded, checked and refused by the rules of values.
"""

from __future__ import annotations

import binascii
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from consumerd.errors import ConfigError, Poison
from consumerd.formats import json
from consumerd.formats.values import Field, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from consumerd.catalog import Column
    from consumerd.config import HandlerConfig

Row = tuple[Any, ...]

BYTEA: Final = 17
NO_TEXT: Final = frozenset({16, 20, 21, 23, 114, 700, 701, 3802})
"""Types that a JSON string is no value of: boolean, integers, floats; and json."""

_AS_JSON: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    # A key such as `1}, {"a": 2` would otherwise be read as what it is not.
    "json": lambda key: bytes(msgspec.json.decode(key, type=msgspec.Raw)),
    "text": lambda key: msgspec.json.encode(key.decode()),
    "bytes": lambda key: b'"' + binascii.b2a_base64(key, newline=False) + b'"',
}
"""How a key becomes JSON, by `key_format`. Raises what `values.refusal` understands."""


def deletions(handler: HandlerConfig, columns: Sequence[Column]) -> Callable[[bytes | None], Row]:
    """Return the function that makes of a message's key the row which deletes: the key's columns, and at its end true.

    It raises what `values.refusal` understands. Raises ConfigError when a column cannot be filled from the key.
    """
    sources = handler.table.tombstone_key
    places = {place: column for place, column in enumerate(columns) if column.name in sources}
    problems = [problem for column in places.values() for problem in _problems(handler, column)]
    if problems:
        raise ConfigError(*problems)
    decode = json.decoder(
        tuple(
            Field(column=replace(column, not_null=True), path=tuple(sources[column.name].split(".")))
            for column in places.values()
        )
    )
    as_json = _AS_JSON[handler.key_format]
    nothing = [*(None for _ in columns), True]

    def deletion(key: bytes | None) -> Row:
        if key is None:
            raise Poison(refuse("missing", "the message has neither a value nor a key", "@key"))
        (found,) = decode([b'{"@key":%s}' % as_json(key)])
        row: list[Any] = list(nothing)
        for place, value in zip(places, found, strict=True):
            row[place] = value
        return tuple(row)

    return deletion


def _problems(handler: HandlerConfig, column: Column) -> list[str]:
    """Say why a column cannot hold the key as it is read."""
    what = f"table.tombstone_key: column {column.name} is {column.type_name}"
    if handler.key_format == "bytes" and column.oid != BYTEA:
        return [f'{what}, and the key is read as bytes: write key_format = "json" or "text" in {handler.path}']
    if handler.key_format == "text" and column.oid in NO_TEXT:
        return [f'{what}, which text is not: write key_format = "json" in {handler.path}']
    return []
