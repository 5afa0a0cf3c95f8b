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
from dataclasses import dataclass
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


def annotation(column: Column) -> Any:  # noqa: ANN401 - a type form
    """Return the type that decodes a column's value, but for null."""
    if column.max_length is not None:
        return Annotated[str, msgspec.Meta(max_length=column.max_length)]
    return TYPES[column.oid]


def pick(entry: Field, source: str, names: dict[str, Any], index: int) -> str:
    """Return the expression that makes a decoded value the row's; `v` is the message's value."""
    column = entry.column
    if column.oid in FORMS:
        otherwise = "None"
        if column.not_null:
            names[f"missing{index}"] = _missing(column.name)
            otherwise = f"missing{index}()"
        form = "version" if column.oid == JSONB else "plain"
        return f"({form} + {source} if {source} != null else {otherwise})"
    if column.oid == NUMERIC:
        names[f"numeric{index}"] = _numeric(entry)
        return f"numeric{index}({source}, v)"
    if column.oid == DOUBLE:
        names[f"zero{index}"] = _zero(entry)
        return f"({source} or zero{index}({source}, v))"
    if column.oid in {REAL, TIME}:
        names[f"checked{index}"] = _real(entry) if column.oid == REAL else _time(entry)
        return f"checked{index}({source}, v)"
    return source


def default_of(entry: Field) -> Any:  # noqa: ANN401 - of the column's type
    """Return a default as the row's value, checked against the column like any other."""
    if entry.default is ABSENT:
        return None
    column = entry.column
    if column.oid in FORMS:
        return FORMS[column.oid] + msgspec.json.encode(entry.default)
    try:
        value = msgspec.convert(entry.default, annotation(column))
        return _numeric(entry)(value, b"") if column.oid == NUMERIC else value
    except (msgspec.ValidationError, Poison) as error:
        raise ConfigError(f"columns.{column.name}.default does not fit {column.type_name}: {error}") from error


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
        if value is not None and (b"e-" in message or b"E-" in message or len(message) > DOUBLE_DIGITS):
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
            sent = decimal.Decimal(_literal(message, entry.path))
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
        if value == dt.time.min and not _literal(message, entry.path).startswith("00:00:00"):
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


def _missing(column: str) -> Callable[[], NoReturn]:
    def missing() -> NoReturn:
        raise Poison(refuse("missing", "null where the column needs a value", column))

    return missing
