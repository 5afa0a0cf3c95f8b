"""What a JSON value must be for a column: the type that decodes it, its default, and what is checked beyond the type.

A value that does not fit is refused with its path; none is rounded or cut, and no refusal repeats a value.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import decimal
import json
import math
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import msgspec

from consumerd.errors import ConfigError, Poison, PoisonReason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.catalog import Column
    from consumerd.paths import Path, Place, Unit

ABSENT: Final = object()
"""The default of a path that has none."""

JSONB_VERSION: Final = b"\x01"
"""The byte that stands before the text in jsonb's binary form."""

JSON: Final = 114
JSONB: Final = 3802
NUMERIC: Final = 1700
REAL: Final = 700
DOUBLE: Final = 701
TIME: Final = 1083

FORMS: Final = {JSON: b"", JSONB: JSONB_VERSION}
"""What stands before a JSON column's text in its binary form."""

LEAST_INFINITE_REAL: Final = (2 - 2**-24) * 2.0**127
"""From here on the nearest real is infinite, half-way between the largest and what would come after it."""

LARGEST_ZERO_REAL: Final = 2.0**-150
"""Up to here the nearest real is 0."""

DOUBLE_DIGITS: Final = 300
"""Zeros behind the point from which on a number without an exponent may be too small for a double."""

MAX_NUMERIC_DIGITS: Final = 131072
"""Digits that Postgres's numeric holds before the point. Without the check a JSON number of twelve characters,
`1e999999999`, would be expanded to a gigabyte of zeros."""

MIDNIGHT: Final = "00:00:00"

MAX_DIMENSIONS: Final = 6
"""Of an array, in Postgres (MAXDIM)."""

_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `|$)", re.DOTALL)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
"""A name that a letter may repeat. Others might be values: addresses or numbers of people that are keys of a map."""

_OTHER_DIGITS = re.compile(r"(?![0-9 \t\r\n])[\d\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One column and where its value comes from (`paths.Source`), with the unit of its number where it counts time."""

    column: Column
    path: Path
    default: Any = ABSENT
    place: Place = "field"
    unit: Unit | None = None


def refusal(error: Exception) -> Refusal:
    """Say why a value was refused; the text of msgspec's errors holds paths and types, never a value."""
    if isinstance(error, Poison):
        return error.refusal
    text = str(error)
    what, _, where = text.partition(" - at `$")
    reason: PoisonReason = "type"
    if isinstance(error, UnicodeError):
        reason, text = "encoding", "text is not valid UTF-8"
    elif isinstance(error, RecursionError):
        reason, text = "malformed", "JSON is nested too deeply"
    elif not isinstance(error, msgspec.ValidationError):
        reason = "malformed"
    elif text.startswith(("Object missing", "Expected `array` of at least")) or "got `null`" in what:
        reason = "missing"
    elif unknown := _UNKNOWN.match(text):
        name = unknown[1] if _PLAIN_NAME.fullmatch(unknown[1]) else "…"
        reason, text = "unknown_field", f"the field {name} is read by no column"
    elif "range" in what or "= " in what:
        reason = "range"
    names = [where.rstrip("`").lstrip(".")]
    if text.startswith("Object missing required field `"):
        names.append(what.split("`")[1])
    return refuse(reason, text, ".".join(filter(None, names)) or None, type(error))


def refuse(reason: PoisonReason, text: str, column: str | None, error: type[Exception] = Poison) -> Refusal:
    """Return a refusal by the decoder; `text` holds no value."""
    name = f"{error.__module__}.{error.__qualname__}".removeprefix("builtins.")
    return Refusal(reason=reason, stage="decode", error=name, message=text, column=column)


def _integer(bits: int) -> object:
    bound = 2 ** (bits - 1)
    return Annotated[int, msgspec.Meta(ge=-bound, le=bound - 1)]


TYPES: dict[int, Any] = {
    16: bool,
    17: bytes,
    20: _integer(64),
    21: _integer(16),
    23: _integer(32),
    25: str,
    JSON: msgspec.Raw,
    REAL: Annotated[float, msgspec.Meta(ge=-LEAST_INFINITE_REAL, le=LEAST_INFINITE_REAL)],
    DOUBLE: float,
    1042: str,
    1043: str,
    1082: dt.date,
    TIME: Annotated[dt.time, msgspec.Meta(tz=False)],
    1114: Annotated[dt.datetime, msgspec.Meta(tz=False)],
    1184: Annotated[dt.datetime, msgspec.Meta(tz=True)],
    NUMERIC: decimal.Decimal,
    2950: uuid.UUID,
    JSONB: msgspec.Raw,
}
"""What a value must be for a column, by the type's oid; ranges included."""


def kept(column: Column) -> bool:
    """Whether a value's bytes are kept as they were sent, for `reader` to make the row's of them."""
    return column.oid in FORMS or column.element is not None or column.by_text


def annotation(column: Column) -> Any:  # noqa: ANN401 - a type form
    """Return the type that decodes a column's value, but for null."""
    if kept(column):
        return msgspec.Raw
    if column.max_length is not None:
        return Annotated[str, msgspec.Meta(max_length=column.max_length)]
    return TYPES[column.oid]


def pick(entry: Field, source: str, names: dict[str, Any], index: int) -> str:
    """Return the expression that makes a decoded value the row's; `v` is the message's value."""
    column = entry.column
    if kept(column):
        otherwise = "None"
        if column.not_null:
            names[f"missing{index}"] = _missing(column.name)
            otherwise = f"missing{index}()"
        if column.oid in FORMS:
            form = "version" if column.oid == JSONB else "plain"
            return f"({form} + {source} if {source} != null else {otherwise})"
        names[f"read{index}"] = reader(column)
        return f"(read{index}({source}) if {source} != null else {otherwise})"
    if column.oid not in CHECKS:
        return source
    names[f"checked{index}"] = CHECKS[column.oid](entry)
    unless = f"{source} or " if column.oid == DOUBLE else ""
    return f"({unless}checked{index}({source}, v))"


def reader(column: Column) -> Callable[[bytes], Any]:
    """Return what makes the row's value of one JSON value that is not null, given as its bytes alone."""
    if column.oid in FORMS:
        form = FORMS[column.oid]
        return lambda raw: form + raw
    if column.element is not None:
        return _Array(column, column.element)
    if column.by_text:
        return _words(column)
    decode = msgspec.json.Decoder(annotation(column)).decode
    if column.oid not in CHECKS:
        return decode
    check = CHECKS[column.oid](Field(column=column, path=()))
    return lambda raw: check(decode(raw), raw)


def default_of(entry: Field) -> Any:  # noqa: ANN401 - of the column's type
    """Return a default as the row's value, checked against the column like any other."""
    if entry.default is ABSENT:
        return None
    column = entry.column
    try:
        return reader(column)(msgspec.json.encode(entry.default))
    except (ValueError, Poison) as error:
        raise ConfigError(f"columns.{column.name}.default does not fit {column.type_name}: {error}") from error


def own_default(column: Column) -> Any:  # noqa: ANN401 - a default, or ABSENT
    """Return the table's own default of a column, where it is a literal and JSON can hold it."""
    if column.default is not None:
        with suppress(ValueError, Poison):
            reader(column)(column.default)
            return msgspec.Raw(column.default)
    return ABSENT


def raw_default(entry: Field) -> msgspec.Raw:
    """Return what an absent value is read as, where its bytes are kept."""
    return msgspec.Raw(b"null" if entry.default is ABSENT else msgspec.json.encode(entry.default))


def _words(column: Column) -> Callable[[bytes], str]:
    """Return what reads a value for a type that goes by its text form: the type's own input function judges it."""
    decode = msgspec.json.Decoder(str).decode

    def words(raw: bytes) -> str:
        sent = bytes(raw)
        if sent[:1] in {b"{", b"["}:
            raise Poison(refuse("type", "an object or an array where a string is needed", column.name))
        return decode(sent) if sent[:1] == b'"' else sent.decode()

    return words


class _Array:
    """Reads an array, each element as if it came for a column of its own."""

    def __init__(self, column: Column, element: Column) -> None:
        self._column = column.name
        self._split = msgspec.json.Decoder(list[msgspec.Raw]).decode
        self._read = reader(element)
        self._nests = element.oid not in FORMS
        """Whether an array in it is one more dimension; of JSON it is an element."""
        self._flat: Callable[[bytes], list[Any]] | None = None
        if not kept(element) and element.oid not in CHECKS:
            self._flat = msgspec.json.Decoder(GenericAlias(list, (annotation(element) | None,))).decode

    def __call__(self, raw: bytes) -> list[Any]:
        """Return the elements; in lists of their own where there are more dimensions than one."""
        with suppress(msgspec.ValidationError):  # nested, or refused, which is told below
            if self._flat is not None:
                return self._flat(raw)
        try:
            found = self._items(raw, 1)
        except msgspec.ValidationError as error:
            raise Poison(replace(refusal(error), column=self._column)) from error
        if 0 in self._lengths(found)[1:]:
            raise self._refused("an empty array within an array")
        return found

    def _items(self, raw: bytes, depth: int) -> list[Any]:
        return [self._item(bytes(each), depth) for each in self._split(raw)]

    def _item(self, sent: bytes, depth: int) -> Any:  # noqa: ANN401 - of the element's type, or a list
        if sent == b"null":
            return None
        if sent[:1] != b"[" or not self._nests:
            return self._read(sent)
        if depth == MAX_DIMENSIONS:
            raise self._refused(f"an array of more than {MAX_DIMENSIONS} dimensions")
        return self._items(sent, depth + 1)

    def _lengths(self, value: object) -> tuple[int, ...]:
        """Return the length of each dimension; raises Poison where it differs."""
        if not isinstance(value, list):
            return ()
        below = {self._lengths(each) for each in value}
        if len(below) > 1:
            raise self._refused("arrays within an array that differ in length or depth")
        return (len(value), *(below.pop() if below else ()))

    def _refused(self, text: str) -> Poison:
        return Poison(refuse("type", text, self._column))


def _numeric(entry: Field) -> Callable[[decimal.Decimal | None, bytes], decimal.Decimal | None]:
    """Return a check for what a numeric column cannot hold, and for digits of other scripts."""
    limit = entry.column.integer_digits
    digits = MAX_NUMERIC_DIGITS if limit is None else limit

    def numeric(value: decimal.Decimal | None, message: bytes) -> decimal.Decimal | None:
        if value is None:
            return None
        if not value.is_finite():
            raise Poison(refuse("range", "not a number that JSON has", entry.column.name))
        if value and value.adjusted() >= digits:
            raise Poison(refuse("range", f"more than {digits} digits before the point", entry.column.name))
        if _may_hold_other_digits(message) and not _literal(message, entry.path).isascii():
            raise Poison(refuse("type", "digits that are not 0 to 9", entry.column.name))
        return value

    return numeric


def _may_hold_other_digits(message: bytes) -> bool:
    """Whether a string in a message may hold digits or blanks of other scripts, as they are or escaped."""
    return b"\\u" in message or (
        not message.isascii() and _OTHER_DIGITS.search(message.decode("utf-8", "replace")) is not None
    )


def _zero(entry: Field) -> Callable[[float | None, bytes], float | None]:
    """Return a check for a zero that was a number too small for a double; a look at the message where that may be."""

    def zero(value: float | None, message: bytes) -> float | None:
        if value == 0 and (b"e-" in message or b"E-" in message or len(message) > DOUBLE_DIGITS):
            mantissa = _literal(message, entry.path).lower().partition("e")[0]
            if any(digit in mantissa for digit in "123456789"):
                raise Poison(refuse("range", "a number too small for double precision", entry.column.name))
        return value

    return zero


def _real(entry: Field) -> Callable[[float | None, bytes], float | None]:
    """Return what makes a double the one whose real is nearest to the number that was sent, as Postgres reads it."""
    zero = _zero(entry)

    def real(value: float | None, message: bytes) -> float | None:
        if not value:
            return zero(value, message)
        if abs(value) <= LARGEST_ZERO_REAL:
            raise Poison(refuse("range", "a number too small for real", entry.column.name))
        if _half_way(value):
            sent = decimal.Decimal(_literal(message, entry.path) or value)  # a default is checked beforehand
            if sent != decimal.Decimal(value):
                value = math.nextafter(value, math.copysign(math.inf, sent - decimal.Decimal(value)))
            if abs(value) >= LEAST_INFINITE_REAL:
                raise Poison(refuse("range", "a number too large for real", entry.column.name))
        return value

    return real


def _half_way(value: float) -> bool:
    """Whether a double lies in the middle between two reals: rounded twice, it might become the wrong one."""
    nearest = _as_real(value)
    return nearest != value and _as_real(2 * value - nearest) == 2 * value - nearest


def _as_real(value: float) -> float:
    return float(ctypes.c_float(value).value)


def _time(entry: Field) -> Callable[[dt.time | None, bytes], dt.time | None]:
    """Return a check for midnight, which a time may have become by rounding a fraction finer than microseconds."""

    def time(value: dt.time | None, message: bytes) -> dt.time | None:
        if value == dt.time.min and not (_literal(message, entry.path) or MIDNIGHT).startswith(MIDNIGHT):
            raise Poison(refuse("range", "a time that is rounded to the next day", entry.column.name))
        return value

    return time


def _literal(message: bytes, path: Path) -> str:
    """Return what stands at a path as it was sent: a number's digits, or a string; '' where there is neither."""
    found: object = json.loads(message.decode("utf-8", "replace"), parse_float=str, parse_int=str)
    for step in path:
        if isinstance(found, list) and isinstance(step, int):
            found = found[step] if step < len(found) else None
        else:
            found = found.get(step) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


CHECKS: Final[dict[int, Callable[[Field], Callable[[Any, bytes], Any]]]] = {
    NUMERIC: _numeric,
    REAL: _real,
    DOUBLE: _zero,
    TIME: _time,
}
"""What is looked at beyond the type, by the type's oid: makes a function of a value and of the bytes that it is in."""


def _missing(column: str) -> Callable[[], NoReturn]:
    def missing() -> NoReturn:
        raise Poison(refuse("missing", "null where the column needs a value", column))

    return missing
