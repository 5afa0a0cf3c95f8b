# ruff: noqa: N818 - the names say what happens next, which a suffix would not
"""What a transform is written against: the one module that users' code imports.

    from consumerd.handler import Poison, Record, Retry

    def transform(record: Record) -> dict | list[dict] | None:
        if record["kind"] == "test":
            return None  # skipped
        if record["amount"] < 0:
            raise Poison("a negative amount")  # dead-lettered, with this sentence
        return {**record, "source": record.topic}

A function whose name ends in `_batch` takes a list of records, and returns a list with what becomes of each. What is
returned is JSON again (`encode`), and is mapped to columns as if the message had held it.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

decode: Final = msgspec.json.Decoder(dict[str, Any], float_hook=decimal.Decimal).decode
"""Reads a message's value, no digit lost; raises msgspec's errors, and ArithmeticError for an exponent out of reach."""

_encode: Final = msgspec.json.Encoder(decimal_format="number").encode


class Poison(Exception):
    """The record can never become a row: dead-letter it. The sentence goes into the letter's headers as it is."""


class Retry(Exception):
    """It cannot be done now: try again after a while, for as long as it takes. The sentence is shown in the status."""


class Misuse(TypeError):
    """What a batch function returned does not tell what becomes of which record."""


class Origin(NamedTuple):
    """Where a record came from."""

    topic: str
    partition: int
    offset: int
    timestamp: int | None = None
    """ms since 1970."""
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()


class Record(dict[str, Any]):
    """A message's value, as a dictionary, and beside it where it came from.

    Whole numbers are `int`, others `decimal.Decimal`, with every digit that was sent.
    """

    __slots__ = ("origin",)

    def __init__(self, value: Mapping[str, Any], origin: Origin) -> None:
        super().__init__(value)
        self.origin = origin

    @property
    def topic(self) -> str:
        """The message's topic."""
        return self.origin.topic

    @property
    def partition(self) -> int:
        """The message's partition."""
        return self.origin.partition

    @property
    def offset(self) -> int:
        """The message's offset."""
        return self.origin.offset

    @property
    def timestamp(self) -> dt.datetime | None:
        """The message's timestamp, in UTC; raises OverflowError for one that Python does not have."""
        ms = self.origin.timestamp
        return None if ms is None else EPOCH + dt.timedelta(milliseconds=ms)

    @property
    def key(self) -> bytes | None:
        """The message's key, as it is."""
        return self.origin.key

    @property
    def headers(self) -> list[tuple[str, bytes | None]]:
        """The message's headers in their order; a name may be there more than once."""
        return list(self.origin.headers)


Function = Callable[[Record], object] | Callable[[list[Record]], Sequence[object]]
"""A transform: of a record, or, where its name ends in `_batch`, of a list of them."""


def run(
    transform: Function,
    value: Mapping[str, Any] | bytes,
    *,
    topic: str = "topic",
    partition: int = 0,
    offset: int = 0,
    timestamp: dt.datetime | None = None,
    key: bytes | None = None,
    headers: Sequence[tuple[str, bytes | None]] = (),
) -> list[Any]:
    """Call a transform as the daemon does, with one message's value; return the records that it makes: a test's way.

    A skipped record is an empty list. Raises what the transform raises, and TypeError or ValueError for a value or
    records that are no JSON.
    """
    ms = None if timestamp is None else (timestamp - EPOCH) // dt.timedelta(milliseconds=1)
    origin = Origin(topic, partition, offset, ms, key, headers)
    record = Record(decode(value if isinstance(value, bytes) else _json(value)), origin)
    (returned,) = results_of(call(transform, [record]), 1) if is_batch(transform) else [call(transform, record)]
    records = list(records_of(returned))
    for made in records:
        encode(made)
    return records


def call(transform: Function, given: Record | list[Record]) -> Any:  # noqa: ANN401 - the user's own
    """Call a transform with what it takes."""
    return transform(given)  # type: ignore[arg-type]


def is_batch(transform: Function) -> bool:
    """Whether a transform takes a list of records."""
    return getattr(transform, "__name__", "").endswith("_batch")


def results_of(returned: object, count: int) -> Sequence[object]:
    """Return what a batch function returned, one for each of its records; raises Misuse."""
    if not isinstance(returned, list | tuple):
        raise Misuse(f"it must return a list with one entry for each record, not {type(returned).__qualname__}")
    if len(returned) != count:
        raise Misuse(f"it returned {len(returned)} entries for {count} records: one for each, in their order")
    return returned


def records_of(returned: object) -> Sequence[object]:
    """Return the records that a transform made of one: none, one, or those of a list."""
    if returned is None:
        return ()
    return returned if isinstance(returned, list | tuple) else (returned,)


def encode(record: object) -> bytes:
    """Return a record as the JSON that is mapped to columns.

    Raises TypeError for what is no record of JSON values, ValueError for a number that JSON has not.
    """
    value = _json(record)
    if not value.startswith(b"{"):
        raise TypeError(f"None, a dict or a list of dicts must be returned, not {type(record).__qualname__}")
    return value


def _json(record: object) -> bytes:
    value = _encode(record)
    if b"null" in value:  # which a float's NaN has become without a word
        json.dumps(msgspec.to_builtins(record), allow_nan=False)
    if b"NaN" in value or b"Infinity" in value:  # a Decimal's own are written as they are
        msgspec.json.decode(value)
    return value
