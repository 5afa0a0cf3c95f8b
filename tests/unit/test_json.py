"""From a message's JSON to a row: each value is a row as it was sent, or a refusal with its reason; nothing crashes."""

import datetime as dt
import re
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from consumerd.accumulator import Batch
from consumerd.catalog import SUPPORTED, VARHDRSZ, Column, Table
from consumerd.config import HandlerConfig
from consumerd.encode import TOMBSTONE, Encoder
from consumerd.errors import ConfigError, Poison, Refusal
from consumerd.formats.json import decoder
from consumerd.formats.values import ABSENT, Field, refusal
from consumerd.types import TopicPartition

JSONB = b"\x01"
"""What stands before jsonb's text in its binary form."""
UTC = dt.UTC
OIDS = {name: oid for oid, name in SUPPORTED.items()} | {"character varying": 1043, "timestamp with time zone": 1184}


def field(
    type_name: str, path: str = "a", *, not_null: bool = False, default: object = ABSENT, name: str = ""
) -> Field:
    """Make a column that reads a path; the type modifier is made from the type's own text."""
    typmod = -1
    if "(" in type_name:
        numbers = [int(each) for each in type_name.partition("(")[2].partition(")")[0].split(",")]
        packed = numbers[0] << 16 | numbers[1] & 0x7FF if type_name.startswith("numeric") else numbers[0]
        typmod = packed + VARHDRSZ
    oid = OIDS[re.sub(r"\(.*\)", "", type_name)]
    column = Column(name=name or path, oid=oid, typmod=typmod, type_name=type_name, not_null=not_null, automatic=False)
    return Field(column=column, path=tuple(path.split(".")), default=default)


def row(value: bytes | str, *fields: Field) -> tuple[Any, ...]:
    """Decode one value."""
    (found,) = decoder(fields)([value.encode() if isinstance(value, str) else value])
    return found


def refused(value: bytes | str, *fields: Field) -> Refusal:
    """Decode one value that is refused."""
    with pytest.raises((ValueError, RecursionError, Poison)) as caught:
        row(value, *fields)
    return refusal(caught.value)


def why(value: bytes | str, *fields: Field) -> tuple[str, str | None]:
    """Decode one value that is refused; give reason and column."""
    found = refused(value, *fields)
    assert found.stage == "decode"
    return found.reason, found.column


# Paths.


def test_by_name() -> None:
    """Columns come in the table's order, whatever the value's, and names that no column has are left out."""
    assert row('{"z": [1], "b": 2, "a": "x"}', field("text"), field("bigint", "b")) == ("x", 2)


def test_nested() -> None:
    """A path leads into objects, as deep as it goes, beside others."""
    fields = (field("text", "c.d.e"), field("bigint", "c.f"), field("boolean", "g"))
    assert row('{"g": true, "c": {"f": 3, "d": {"e": "x"}}}', *fields) == ("x", 3, True)


@pytest.mark.parametrize("value", ["{}", '{"a": null}', '{"c": 1}', '{"a": {}}', '{"a": {"b": null}}'])
def test_absent_is_null(value: str) -> None:
    """What is absent or null on the way to a nullable column is null."""
    assert row(value, field("text", "a.b")) == (None,)


@pytest.mark.parametrize("type_name", ["text", "numeric", "jsonb", "bigint", "timestamp with time zone", "uuid"])
def test_absent_and_null_into_not_null(type_name: str) -> None:
    """A column that needs a value refuses an absent one and a null as missing, with its path."""
    assert why("{}", field(type_name, not_null=True)) == ("missing", "a")
    assert why('{"a": null}', field(type_name, not_null=True)) == ("missing", "a")


def test_absent_below() -> None:
    """A missing name below an object is told with its whole path, and so is a missing object."""
    it = field("text", "a.b", not_null=True)
    assert why('{"a": {}}', it) == ("missing", "a.b")
    assert why("{}", it) == ("missing", "a")
    assert why('{"a": null}', it) == ("missing", "a")


@pytest.mark.parametrize(
    ("type_name", "default", "expected"),
    [
        ("text", "d", "d"),
        ("bigint", 7, 7),
        ("numeric", 0.1, Decimal("0.1")),
        ("numeric", "12.50", Decimal("12.50")),
        ("boolean", False, False),
        ("double precision", 1, 1.0),
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
        ("timestamp with time zone", "2020-01-01T00:00:00Z", dt.datetime(2020, 1, 1, tzinfo=UTC)),
        ("jsonb", "d", JSONB + b'"d"'),
        ("jsonb", 5, JSONB + b"5"),
    ],
)
@pytest.mark.parametrize("path", ["a", "a.b"])
@pytest.mark.parametrize("not_null", [True, False])
def test_default(type_name: str, default: object, expected: object, path: str, not_null: bool) -> None:
    """A default stands in for an absent value, of whatever column, also where the object around it is absent."""
    assert row("{}", field(type_name, path, default=default, not_null=not_null)) == (expected,)


def test_default_is_not_for_null() -> None:
    """An explicit null stays null, and is refused by NOT NULL, default or not."""
    assert row('{"a": null}', field("text", default="d")) == (None,)
    assert row('{"a": null}', field("jsonb", default="d")) == (None,)
    assert why('{"a": null}', field("text", default="d", not_null=True)) == ("missing", "a")


@pytest.mark.parametrize(
    ("type_name", "default"),
    [
        ("bigint", "x"),
        ("smallint", 40000),
        ("text", 1),
        ("character varying(2)", "abc"),
        ("uuid", "x"),
        ("timestamp with time zone", "2020-01-01T00:00:00"),
        ("boolean", 1),
        ("numeric", "x"),
        ("numeric", "NaN"),
        ("numeric(3,2)", 1000),
    ],
)
def test_default_that_does_not_fit(type_name: str, default: object) -> None:
    """A default that its column cannot hold is a mistake of the configuration, not poison of each message."""
    with pytest.raises(ConfigError, match=r"columns\.a\.default"):
        decoder((field(type_name, default=default),))


# Shared paths.


def test_shared_path_of_different_types() -> None:
    """Several columns may read one name, each in its own type, and what is below it."""
    whole, part, leaf = field("jsonb", "o"), field("jsonb", "o.s"), field("text", "o.s.t")
    fields = (whole, part, leaf, field("text", "n", name="x"), field("jsonb", "n", name="y"))
    assert row('{"o": {"s": {"t": "u"}}, "n": "v"}', *fields) == (
        JSONB + b'{"s": {"t": "u"}}',
        JSONB + b'{"t": "u"}',
        "u",
        "v",
        JSONB + b'"v"',
    )


@pytest.mark.parametrize("value", ["{}", '{"o": null}', '{"o": {}}', '{"o": {"s": null}}'])
def test_shared_path_absent(value: str) -> None:
    """An absent or null name that several columns read is null for each."""
    assert row(value, field("text", "o.s", name="x"), field("jsonb", "o.s", name="y")) == (None, None)


@pytest.mark.parametrize("path", ["s", "o.s"])
@pytest.mark.parametrize("not_null", [False, True])
def test_shared_path_default(path: str, not_null: bool) -> None:
    """A default stands in for an absent name also where another column reads the same name."""
    fields = (field("text", path, name="x", default="d", not_null=not_null), field("jsonb", path, name="y"))
    assert row("{}", *fields) == ("d", None)


def test_shared_path_that_one_refuses() -> None:
    """What one of several columns on a name cannot hold is refused with the name's path."""
    fields = (field("bigint", "o.s", name="x"), field("jsonb", "o.s", name="y"))
    assert why('{"o": {"s": "q"}}', *fields) == ("type", "o.s")


# What each type takes.

TAKEN = [
    ("boolean", "true", True),
    ("smallint", "-32768", -32768),
    ("integer", "2147483647", 2147483647),
    ("bigint", "-9223372036854775808", -(2**63)),
    ("bigint", "9223372036854775807", 2**63 - 1),
    ("double precision", "1e308", 1e308),
    ("double precision", "3", 3.0),
    ("double precision", "-0.0", -0.0),
    ("numeric", "1.10", Decimal("1.10")),
    ("numeric", '"1.10"', Decimal("1.10")),
    ("numeric", "123456789012345678901234567890.000000000000000000001", None),
    ("numeric", "1e131071", Decimal("1e131071")),
    ("numeric(3,2)", "9.99", Decimal("9.99")),
    ("numeric(3,2)", "0e50", Decimal("0e50")),
    ("numeric(2,5)", "0.00099", Decimal("0.00099")),
    ("numeric(2,-3)", "99000", Decimal(99000)),
    ("text", ' \r\n""\t', ""),
    ("text", '"\\u00e9\\ud83d\\ude00"', "é😀"),
    ("character varying(2)", '"é😀"', "é😀"),
    ("uuid", '"A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"', UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
    ("timestamp with time zone", '"9999-12-31T23:59:59.999999Z"', None),
    ("timestamp(3) with time zone", '"0001-01-01T00:00:00+01:00"', None),
    ("timestamp with time zone", '"2020-01-01T02:00:00+02:00"', dt.datetime(2020, 1, 1, tzinfo=UTC)),
    ("jsonb", '{"b":1, "a":1.50, "b":2}', JSONB + b'{"b":1, "a":1.50, "b":2}'),
    ("jsonb", "1e999999999", JSONB + b"1e999999999"),
    ("jsonb", '"null"', JSONB + b'"null"'),
]


@pytest.mark.parametrize(("type_name", "literal", "expected"), TAKEN)
def test_taken(type_name: str, literal: str, expected: object) -> None:
    """A value that fits is the row's, exactly."""
    (found,) = row(f'{{"a": {literal} }}', field(type_name, not_null=True))
    if expected is not None:
        assert (type(found), str(found)) == (type(expected), str(expected)) or found == expected
    elif isinstance(found, Decimal):
        assert str(found) == literal
    else:
        assert found == dt.datetime.fromisoformat(literal.strip('"'))


REFUSED = [
    ("type", "boolean", ["1", "0", '"true"', "[]"]),
    ("type", "bigint", ["1.5", "1.0", "1e3", '"1"', "true", "{}"]),
    ("range", "smallint", ["32768", "-32769"]),
    ("range", "integer", ["2147483648", "-2147483649"]),
    ("range", "bigint", [str(2**63), str(-(2**63) - 1), str(2**64), "9" * 400, "-" + "9" * 5000]),
    ("range", "double precision", ["1e309", "-1e309", "9" * 400, "1e-400"]),
    ("type", "double precision", ['"1.5"', '"NaN"', "true"]),
    ("range", "numeric", ["1e999999999", "-1e999999999", "1e131072", '"NaN"', '"Infinity"', '"-Infinity"', '"sNaN"']),
    ("type", "numeric", ["1e99999999999999999999", "1e-99999999999999999999"]),  # beyond what Decimal holds
    ("type", "numeric", ['"abc"', '""', "true", "[1]", '"\uff11\uff12"']),
    ("range", "numeric(3,2)", ["10", "-10.00", "1e1", "12345678901234567890"]),
    ("range", "numeric(2,5)", ["0.001"]),
    ("type", "text", ["1", "true", "{}", "[]"]),
    ("range", "character varying(3)", ['"abcd"', '"abc "']),
    ("type", "uuid", ['"x"', '"a0eebc99"', "1"]),
    ("type", "timestamp with time zone", ["1577836800", '"2020-01-01"', '"2020-01-01T00:00:00"', '"yesterday"']),
    ("type", "timestamp with time zone", ['"10000-01-01T00:00:00Z"', '"294277-01-01T00:00:00Z"', '"infinity"']),
    ("type", "timestamp with time zone", ['"0000-01-01T00:00:00Z"', '"2020-02-30T00:00:00Z"']),
]


@pytest.mark.parametrize(
    ("reason", "type_name", "literal"),
    [(reason, type_name, literal) for reason, type_name, literals in REFUSED for literal in literals],
    ids=lambda value: value[:40],
)
def test_refused(reason: str, type_name: str, literal: str) -> None:
    """A value that does not fit is refused with its reason and column, never changed to fit."""
    assert why(f'{{"a": {literal}}}', field(type_name)) == (reason, "a")


NOT_JSON = {
    "empty": b"",
    "blank": b"  ",
    "truncated": b'{"a": "x"',
    "BOM": b'\xef\xbb\xbf{"a": "x"}',
    "trailing bytes": b'{"a": "x"}x',
    "two values": b'{"a": "x"}{"a": "y"}',
    "trailing NUL": b'{"a": "x"}\x00',
    "trailing comma": b'{"a": "x",}',
    "NaN": b'{"a": NaN}',
    "-Infinity": b'{"a": -Infinity}',
    "raw control character": b'{"a": "x\x00y"}',
    "lone high surrogate": b'{"a": "\\ud800"}',
    "lone low surrogate": b'{"a": "\\udc00"}',
    "high surrogate before text": b'{"a": "\\ud800xxxxxxxx"}',
    "surrogates reversed": b'{"a": "\\udc00\\ud800"}',
    "lone surrogate in a name": b'{"\\ud800": 1, "a": "x"}',
    "leading zero": b'{"a": 01}',
    "10 MB of garbage": b"\x00" * 10_000_000,
}


@pytest.mark.parametrize("type_name", ["text", "jsonb"])
@pytest.mark.parametrize("name", NOT_JSON)
def test_malformed(name: str, type_name: str) -> None:
    """What is not JSON is malformed, whatever the column."""
    assert why(NOT_JSON[name], field(type_name)) == ("malformed", None)


@pytest.mark.parametrize("value", [b'[{"a": "x"}]', b'"a"', b"1", b"true", b"[" * 100_000])
def test_not_an_object(value: bytes) -> None:
    """A value that is no object is of another type, and a null is missing (docs/values.md)."""
    assert why(value, field("text")) == ("type", None)
    assert why(b"null", field("text")) == ("missing", None)


def test_nul_character() -> None:
    """A NUL character is the row's: the database refuses it in text (22021) and in jsonb (22P05)."""
    assert row('{"a": "x\\u0000y"}', field("text")) == ("x\0y",)
    assert row('{"a": "x\\u0000y"}', field("jsonb")) == (JSONB + b'"x\\u0000y"',)


@pytest.mark.parametrize("levels", [1_000, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"x":'])
@pytest.mark.parametrize("path", ["a", "b"])
def test_nested_deeply(levels: int, opening: bytes, path: str) -> None:
    """JSON nested beyond what the decoder follows is malformed, in a column and beside it; nothing crashes."""
    closing = b"]" if opening == b"[" else b"}"
    value = b'{"a": ' + opening * levels + b"1" + closing * levels + b"}"
    found = refused(value, field("jsonb", path))
    assert (found.reason, found.message) == ("malformed", "JSON is nested too deeply")
    nested = b"[" * 200 + b"]" * 200  # moderately: a row
    assert row(b'{"a": ' + nested + b"}", field("jsonb")) == (JSONB + nested,)


def test_ten_megabytes() -> None:
    """A value of 10 MB is a row, in text and in jsonb."""
    text = "é" * 5_000_000
    assert row(f'{{"a": "{text}"}}', field("text")) == (text,)
    assert row(f'{{"a": "{text}"}}', field("jsonb")) == (JSONB + f'"{text}"'.encode(),)


def test_ten_million_digits() -> None:
    """A number of 10 million digits is refused as out of range, in time."""
    for type_name in ("numeric", "bigint", "double precision"):
        assert why(b'{"a": ' + b"9" * 10_000_000 + b"}", field(type_name)) == ("range", "a")


def test_invalid_utf8() -> None:
    """Bytes that are not UTF-8 are refused as encoding; in a name or value that no column reads they do not matter."""
    assert why(b'{"a": "\xff"}', field("text"))[0] == "encoding"
    assert why(b'{"a": "\xed\xa0\x80"}', field("text"))[0] == "encoding"
    assert row(b'{"a": "x", "b": "\xff"}', field("text")) == ("x",)
    assert row(b'{"a": "\xff"}', field("jsonb")) == (JSONB + b'"\xff"',)  # as it came: the database refuses it


def test_duplicate_names() -> None:
    """Of a name that stands twice the last counts, as in jsonb; an earlier one that does not fit is still refused."""
    assert row('{"a": "x", "a": "y"}', field("text")) == ("y",)
    assert row('{"a": "x", "a": null}', field("text")) == (None,)
    assert why('{"a": 1, "a": "y"}', field("text")) == ("type", "a")


@pytest.mark.parametrize("path", ["range", "price_range", "orange.x", "a= b"])
def test_reason_does_not_depend_on_names(path: str) -> None:
    """The reason is what is wrong with the value, whatever the column is called."""
    nested = path.split(".")
    inner = '"x"'
    for name in reversed(nested):
        inner = f'{{"{name}": {inner}}}'
    assert refused(inner, field("integer", path)).reason == "type"


@pytest.mark.parametrize("column", ["id", "select", "a'b", "a b", "f0", "é", "{x}"])
def test_any_name(column: str) -> None:
    """A column may have any name: none of it becomes code."""
    assert row(f'{{"{column}": 1.5}}', field("numeric", column)) == (Decimal("1.5"),)


def test_a_name_that_json_must_escape() -> None:
    """Names with a quote or a backslash in them are refused by a sentence that names them, no others, and a way on."""
    with pytest.raises(ConfigError, match=r"field 'a\"b', 'c\\\\d' has .*\[transform\]") as raised:
        decoder(tuple(field("numeric", name) for name in ("good", 'a"b', "it's", "c\\d")))
    assert "good" not in str(raised.value)


# A batch of messages.


TABLE = {"name": "t", "write": "append", "tombstones": "dead-letter"}


class Fake:
    """A message with a value."""

    def __init__(self, value: bytes | None) -> None:
        self._value = value

    def value(self) -> bytes | None:
        """Give the value."""
        return self._value


def encoder(*columns: Column) -> Encoder:
    """Make the encoder of a handler without a mapping."""
    data = {"name": "h", "path": Path("h.toml"), "topics": ["o"], "table": TABLE}
    handler = HandlerConfig.model_validate(data, by_name=False, by_alias=True, context={"folder": Path("/etc")})
    return Encoder(Table(name="t", identifier="t", columns=columns, unique=(), fingerprint=""), handler)


def batch(*values: bytes | None) -> Batch:
    """Make a batch."""
    messages: list[Any] = [Fake(value) for value in values]
    return Batch(
        partition=TopicPartition("o", 0),
        first_offset=0,
        next_offset=len(messages),
        messages=messages,
        size=1,
        reason="age",
        gathered_since=0.0,
    )


def test_batch_with_poison() -> None:
    """The good messages of a batch are rows with their positions; each bad one, a tombstone too, is refused alone."""
    it = batch(b'{"a":"x"}', None, b"", b'{"a":"y"}', b'{"a":1}', b'{"b":' + b"[" * 9999, b'{"a":"\xff"}', b'{"a":"z"}')
    rows = encoder(field("text").column).encode(it.messages, it.refused)
    assert (rows.rows, list(rows.positions)) == ([("x",), ("y",), ("z",)], [0, 3, 7])
    reasons = {position: each.reason for position, each in it.refused.items()}
    assert reasons == {1: "missing", 2: "malformed", 4: "type", 5: "malformed", 6: "encoding"}
    assert it.refused[1] == TOMBSTONE


def test_batch_encoded_again() -> None:
    """What is refused already, by the database too, is left out of the rows."""
    it = batch(b'{"a":"x"}', b'{"a":"y"}', b'{"a":"z"}')
    it.refused[1] = TOMBSTONE
    rows = encoder(field("text").column).encode(it.messages, it.refused)
    assert (rows.rows, list(rows.positions), list(it.refused)) == ([("x",), ("z",)], [0, 2], [1])
