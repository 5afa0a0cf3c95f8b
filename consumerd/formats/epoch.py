"""Numbers that count from 1970 into timestamptz, timestamp (in UTC) and date (of UTC), exact to the microsecond.

The number's own digits are read, not a double near to it; what is finer than microseconds is rounded, half to even, as
Postgres does. Years are 1 to 9999, as for timestamps that are written out.
"""

from __future__ import annotations

import datetime as dt
import decimal
import math
from typing import TYPE_CHECKING, Any, Final

from consumerd.errors import ConfigError, Poison
from consumerd.formats.values import ABSENT, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.catalog import Column
    from consumerd.formats.values import Field
    from consumerd.paths import Unit

DATE, TIMESTAMP, TIMESTAMPTZ = 1082, 1114, 1184
OIDS: Final = frozenset({DATE, TIMESTAMP, TIMESTAMPTZ})
"""Columns that a unit goes with."""

EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_DIGITS: Final[dict[Unit, int]] = {"s": 6, "ms": 3, "us": 0, "ns": -3}
"""Decimal digits from the unit to microseconds."""
_LONGEST: Final = 25
"""Digits before the point from which on a number is out of range in any unit."""
_ROUNDING = decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN)


def reader(entry: Field) -> Callable[[bytes], Any]:
    """Return what makes a JSON number, as it was sent, the column's value. b"" is an absent one."""
    column, unit, default = entry.column, entry.unit or "s", default_of(entry)

    def read(raw: bytes) -> Any:  # noqa: ANN401 - of the column's type
        literal = bytes(raw)
        if not literal:
            return default
        if literal == b"null":
            if column.not_null:
                raise Poison(refuse("missing", "null where the column needs a value", column.name))
            return None
        return moment(_number(literal, column.name), unit, column)

    return read


def default_of(entry: Field) -> Any:  # noqa: ANN401 - of the column's type
    """Return a default in the unit as the row's value."""
    if entry.default is ABSENT:
        return None
    try:
        if isinstance(entry.default, bool | str) or not math.isfinite(entry.default):
            raise Poison(refuse("type", "not a number", entry.column.name))  # noqa: TRY301
        return moment(decimal.Decimal(repr(entry.default)), entry.unit or "s", entry.column)
    except Poison as error:
        raise ConfigError(
            f"columns.{entry.column.name}.default is no number of {entry.unit} since 1970: {error}"
        ) from error


def moment(number: int | decimal.Decimal, unit: Unit, column: Column) -> dt.datetime | dt.date:
    """Return a column's value for so many units since 1970; raises Poison when that is out of range."""
    digits = _DIGITS[unit]
    if isinstance(number, int) and digits >= 0:
        microseconds = number * 10**digits
    else:
        exact = decimal.Decimal(number)
        if exact.adjusted() > _LONGEST:
            raise _out_of_range(column)
        smallest = decimal.Decimal((0, (1,), -digits))
        microseconds = int(_ROUNDING.scaleb(exact.quantize(smallest, context=_ROUNDING), digits))
    try:
        time = EPOCH + dt.timedelta(microseconds=microseconds)
    except OverflowError:
        raise _out_of_range(column) from None
    if column.oid == TIMESTAMPTZ:
        return time
    return time.date() if column.oid == DATE else time.replace(tzinfo=None)


def _number(literal: bytes, column: str) -> int | decimal.Decimal:
    try:
        return int(literal)
    except ValueError:  # a fraction, an exponent, thousands of digits, or no number
        try:
            return decimal.Decimal(literal.decode("latin-1"))
        except decimal.InvalidOperation:
            raise Poison(refuse("type", "not a number, which a column with a unit takes", column)) from None


def _out_of_range(column: Column) -> Poison:
    return Poison(refuse("range", "a time outside of the years 1 to 9999", column.name))
