"""Messages into rows where a column reads more than the value's fields: topic, offset, key, headers, the whole value.

The value's fields are decoded as in `formats/json.py`; what is read beside them stands in the same comprehension.

A header, a text key and the topic are text, and go into a column as a JSON string would; where a column takes no string
(numbers, booleans, json, arrays), or has a unit, the text is read as JSON. Bytes go into bytea as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from consumerd.catalog import SUPPORTED
from consumerd.errors import Poison
from consumerd.formats import epoch, json
from consumerd.formats.values import ABSENT, FORMS, JSONB, Field, pick, refusal, refuse
from consumerd.paths import Source
from consumerd.types import Message

if TYPE_CHECKING:
    from consumerd.catalog import Column
    from consumerd.paths import KeyFormat, Path

BOOLEAN, BYTEA, BIGINT, SMALLINT, INTEGER, REAL, DOUBLE = 16, 17, 20, 21, 23, 700, 701
TEXTS: Final = frozenset({25, 1042, 1043})
READ_AS_JSON: Final = frozenset({BOOLEAN, BIGINT, SMALLINT, INTEGER, REAL, DOUBLE, *FORMS})
"""Columns that take no JSON string, or any JSON."""
TAKES: Final = {
    "@topic": TEXTS,
    "@partition": frozenset({INTEGER, BIGINT}),
    "@offset": frozenset({BIGINT}),
    "@timestamp": epoch.OIDS | {BIGINT},
    "@value": TEXTS | {BYTEA, *FORMS},
}
"""What columns a source fits, where not all."""

Decode = Callable[[Iterable[Message]], list[tuple[Any, ...]]]
"""From messages to rows of Python values; raises what `refusal` understands, of the first that is refused."""
Reader = Callable[[bytes | None], Any]


def mistake(entry: Field, key_format: KeyFormat) -> str | None:
    """Say why a column's source does not go with its type."""
    column = entry.column
    source = Source(entry.place, entry.path)
    takes, mend = TAKES.get(entry.place), ""
    if entry.place == "@key" and key_format == "bytes":
        takes, mend = frozenset({BYTEA}), '; write key_format = "text" or "json" at the top of the file to have it read'
    if entry.place == "@key" and key_format == "text" and column.oid in {BYTEA, *FORMS}:
        fitting = "bytes" if column.oid == BYTEA else "json"
        return (
            f'is {column.type_name}, which takes a key as it is: write key_format = "{fitting}" at the top of the file'
        )
    if takes is not None and column.oid not in takes:
        fitting = ", ".join(name for oid, name in SUPPORTED.items() if oid in takes)
        return f"is {column.type_name}, and {source} goes into {fitting} alone{mend}"
    if entry.unit is not None and column.oid not in epoch.OIDS:
        return f"is {column.type_name}, and `unit` goes with date, timestamp and timestamptz alone: take it out"
    return None


def decoder(fields: tuple[Field, ...], key_format: KeyFormat, known: tuple[Path, ...] | None = None) -> Decode:
    """Return the function that decodes messages into the given columns; with `known` as in `json.decoder`.

    It raises TypeError for a message without a value.
    """
    compiler = json.Compiler(fields, strict=known is not None)
    tree = json.tree(fields, known or ())
    documents = any(entry.place == "@value" and entry.column.oid in FORMS for entry in fields)
    decode: Callable[[bytes], Any]
    if tree.below:
        decode = msgspec.json.Decoder(compiler.struct(tree, "r", ())).decode
    elif documents:
        decode = msgspec.json.Decoder(msgspec.Raw).decode
    else:
        decode = _there
    for index, entry in enumerate(fields):
        if entry.place == "@value" and entry.column.oid in FORMS and not tree.below:
            compiler.expressions[index] = pick(entry, "r", compiler.names, index)
        elif entry.place != "field":
            compiler.expressions[index] = _expression(entry, index, compiler, key_format)
    headers = " for h in [dict(m.headers() or ())]" if any(entry.place == "@headers" for entry in fields) else ""
    rows = f"lambda messages: [({compiler.row()}) for m in messages for v in [m.value()] for r in [decode(v)]{headers}]"
    names = compiler.names | {"decode": decode, "dict": dict}
    decoding: Decode = eval(rows, names)  # noqa: S307 - all names in it are made here
    return decoding


def _there(value: bytes | None) -> bytes:
    if not value:
        raise TypeError("no value")
    return value


def _expression(entry: Field, index: int, compiler: json.Compiler, key_format: KeyFormat) -> str:
    """Return the expression that makes a column's value from a message `m`, its value `v` and its headers `h`."""
    column, default, read = entry.column, compiler.defaults[index], f"read{index}"
    match entry.place:
        case "@partition" | "@offset":
            return f"m.{entry.place[1:]}()"
        case "@timestamp":
            compiler.names[read] = _timestamp(entry, default)
            return f"{read}(m.timestamp())"
        case "@value" if column.oid in FORMS:
            return "(version + v)" if column.oid == JSONB else "v"
        case "@key":
            compiler.names[read] = key_reader(entry, key_format, default)
            return f"{read}(m.key())"
        case "@headers":
            compiler.names[f"name{index}"] = entry.path[0]
            convert, argument = _text(entry), f"h.get(name{index})"
        case _:
            convert, argument = _text(entry), "m.topic().encode()" if entry.place == "@topic" else "v"
    compiler.names[read] = _reader(entry, default, convert)
    return f"{read}({argument})"


def key_reader(entry: Field, key_format: KeyFormat, default: object = None) -> Reader:
    """Return what makes a message's key, or what is at a path in it, a column's value."""
    return _reader(entry, default, _document(entry, entry.path) if key_format == "json" else _text(entry))


def _reader(entry: Field, default: object, convert: Callable[[bytes], Any]) -> Reader:
    """Return what reads a key or a header that may be absent, and tells a refusal with column and source."""
    name, source = entry.column.name, Source(entry.place, entry.path)
    required = entry.column.not_null and entry.default is ABSENT

    def read(data: bytes | None) -> Any:  # noqa: ANN401 - of the column's type
        if data is None:
            if required:
                raise Poison(refuse("missing", f"the message has no {source}", name))
            return default
        try:
            return convert(data)
        except (ValueError, RecursionError, Poison) as error:
            refused = refusal(error)
            message = f"{source}: {refused.message.replace('$.value', '$')}"
            raise Poison(replace(refused, column=name, message=message)) from error

    return read


def _text(entry: Field) -> Callable[[bytes], Any]:
    """Return what makes text a column's value; bytea takes it as it is."""
    column = entry.column
    if column.oid == BYTEA:
        return bytes
    if column.oid in TEXTS:
        return _string(column)
    document = _document(entry, ())
    if column.oid in READ_AS_JSON or column.element is not None or entry.unit is not None:
        return document
    return lambda data: document(msgspec.json.encode(data.decode()))


def _string(column: Column) -> Callable[[bytes], str]:
    longest = column.max_length

    def string(data: bytes) -> str:
        text = data.decode()
        if longest is not None and len(text) > longest:
            raise Poison(refuse("range", f"longer than {longest} characters", column.name))
        return text

    return string


def _document(entry: Field, path: Path) -> Callable[[bytes], Any]:
    """Return what makes a JSON text of its own, or what is at a path in it, a column's value."""
    decode = json.decoder((replace(entry, place="field", path=path or ("value",)),))
    alone = msgspec.json.Decoder(msgspec.Raw).decode

    def document(data: bytes) -> Any:  # noqa: ANN401 - of the column's type
        ((found,),) = decode((data if path else b"".join((b'{"value":', alone(data), b"}")),))
        return found

    return document


def _timestamp(entry: Field, default: object) -> Callable[[tuple[int, int]], Any]:
    """Return what makes a message's timestamp a column's value; a message may have none."""
    column = entry.column
    required = column.not_null and entry.default is ABSENT

    def timestamp(stamp: tuple[int, int]) -> Any:  # noqa: ANN401 - of the column's type
        kind, milliseconds = stamp
        if not kind:
            if required:
                raise Poison(refuse("missing", "the message has no @timestamp", column.name))
            return default
        return milliseconds if column.oid == BIGINT else epoch.moment(milliseconds, "ms", column)

    return timestamp
