"""Where a column's value comes from: array elements, epoch numbers, what stands beside the value, unknown fields."""

import datetime as dt
import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from consumerd import paths
from consumerd.catalog import SUPPORTED, Column, Table
from consumerd.config import HandlerConfig
from consumerd.encode import TOMBSTONE, Encoder
from consumerd.errors import ConfigError, Halt, Poison, Refusal
from consumerd.formats import json, messages
from consumerd.formats.values import ABSENT, Field, refusal
from consumerd.paths import KeyFormat, Source, Unit

UTC = dt.UTC
OIDS = {name: oid for oid, name in SUPPORTED.items()}
JSONB = b"\x01"


def field(
    type_name: str,
    source: str,
    *,
    not_null: bool = False,
    default: object = ABSENT,
    unit: Unit | None = None,
    length: int | None = None,
) -> Field:
    """Make a column `c` that reads a source."""
    column = Column(
        name="c",
        oid=OIDS[type_name],
        typmod=-1 if length is None else length + 4,
        type_name=type_name,
        not_null=not_null,
        automatic=False,
    )
    read = paths.parse(source)
    return Field(column=column, path=read.path, place=read.place, default=default, unit=unit)


@dataclass
class Fake:
    """A message."""

    body: bytes | None = b"{}"
    its_key: bytes | None = None
    its_headers: list[tuple[str, bytes | None]] | None = None
    time: tuple[int, int] = (1, 1_700_000_000_123)
    at: int = 2**40

    def __len__(self) -> int:
        return len(self.body or b"")

    def topic(self) -> str:
        """Give the topic."""
        return "orders"

    def partition(self) -> int:
        """Give the partition."""
        return 3

    def key(self) -> bytes | None:
        """Give the key."""
        return self.its_key

    def value(self) -> bytes | None:
        """Give the value."""
        return self.body

    def offset(self) -> int:
        """Give the offset."""
        return self.at

    def leader_epoch(self) -> int | None:
        """Give none."""
        return None

    def timestamp(self) -> tuple[int, int]:
        """Give the time."""
        return self.time

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        """Give the headers."""
        return self.its_headers


def value(text: bytes | str, *fields: Field) -> tuple[Any, ...]:
    """Decode a value."""
    (found,) = json.decoder(fields)([text.encode() if isinstance(text, str) else text])
    return found


def row(message: Fake, *fields: Field, key_format: KeyFormat = "bytes") -> tuple[Any, ...]:
    """Decode a message."""
    (found,) = messages.decoder(fields, key_format)([message])
    return found


def why(text: bytes | str, *fields: Field, known: tuple[paths.Path, ...] | None = None) -> tuple[str, str | None]:
    """Decode a value that is refused; give reason and column."""
    with pytest.raises((ValueError, RecursionError, Poison)) as caught:
        json.decoder(fields, known)([text.encode() if isinstance(text, str) else text])
    found = refusal(caught.value)
    return found.reason, found.column


def refused(message: Fake, *fields: Field, key_format: KeyFormat = "bytes") -> Refusal:
    """Decode a message that is refused."""
    with pytest.raises((ValueError, RecursionError, Poison)) as caught:
        row(message, *fields, key_format=key_format)
    return refusal(caught.value)


# How sources are written.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", Source("field", ("a",))),
        ("a.b c.é", Source("field", ("a", "b c", "é"))),
        ("items[0].sku", Source("field", ("items", 0, "sku"))),
        ("m[0][12]", Source("field", ("m", 0, 12))),
        ("[1].a", Source("field", (1, "a"))),
        ('["a.b"].c', Source("field", ("a.b", "c"))),
        ("['@type']", Source("field", ("@type",))),
        ('a["b]"][0]', Source("field", ("a", "b]", 0))),
        ("@topic", Source("@topic")),
        ("@key", Source("@key")),
        ("@key.a[0].b", Source("@key", ("a", 0, "b"))),
        ("@key[0]", Source("@key", (0,))),
        ("@headers.a.b-c", Source("@headers", ("a.b-c",))),
        ('@headers["a b"]', Source("@headers", ("a b",))),
        ("@headers['x']", Source("@headers", ("x",))),
    ],
)
def test_sources(text: str, expected: Source) -> None:
    """A source is a path with names and indexes, or a place of the message."""
    assert paths.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be a path"),
        ("a[", "must be a path"),
        ("a[x]", "must be a path"),
        ("a[-1]", "must be a path"),
        ("a[0]b", "must be a path"),
        ("a.[0]", "must be a path"),
        ("a[256]", "an index is a number from 0 to 255"),
        ("a[" + "9" * 5000 + "]", "an index is a number from 0 to 255"),
        ("@offsets", r'there is no @offsets: .*@offset.* written \["@offsets"\]'),
        ("@", "there is no @"),
        ("@topic.x", "@topic has nothing below it"),
        ("@value[0]", "@value has nothing below it"),
        ("@headers", "lacks the header's name"),
        ("@headers.", "lacks the header's name"),
        ("@key.", "must be a path"),
        ("@key..a", "must be a path"),
    ],
)
def test_no_source(text: str, told: str) -> None:
    """What is no source is refused by a sentence that says what to write."""
    with pytest.raises(ValueError, match=told):
        paths.parse(text)


# Elements of arrays.


def test_elements() -> None:
    """An index takes its element, and what is behind the last that is named may be anything."""
    fields = (field("text", "items[1].sku"), field("bigint", "items[0].n"), field("bigint", "m[1][0]"))
    assert value('{"items": [{"n": 1}, {"sku": "x"}, 5], "m": [0, [7, "z"]]}', *fields) == ("x", 1, 7)
    assert value('{"items": ["skipped"]}', field("text", "items[1]")) == (None,)


@pytest.mark.parametrize(
    "text",
    ["{}", '{"a": null}', '{"a": []}', '{"a": [0]}', '{"a": [0, null]}', '{"a": [0, {}]}', '{"a": [0, {"b": null}]}'],
)
def test_element_absent(text: str) -> None:
    """An element that is not there is absent, like a field; into NOT NULL it is missing."""
    assert value(text, field("text", "a[1].b")) == (None,)
    assert why(text, field("text", "a[1].b", not_null=True))[0] == "missing"
    if "null" not in text:
        assert value(text, field("text", "a[1].b", default="d")) == ("d",)


def test_element_that_must_be_there_behind_one_that_need_not() -> None:
    """What must be there is found missing whatever stands before it."""
    fields = (field("bigint", "a[0]"), field("bigint", "a[2]", not_null=True), field("bigint", "a[3]", default=9))
    assert value('{"a": [null, "skipped", 5]}', *fields) == (None, 5, 9)
    assert why('{"a": [1, 2]}', *fields)[0] == "missing"
    assert why('{"a": [1, 2, null]}', *fields) == ("missing", "a[2]")


def test_element_of_another_type() -> None:
    """What does not fit is refused with its path, indexes and all; so is an object where an array is read."""
    assert why('{"a": [0, {"b": "x"}]}', field("bigint", "a[1].b")) == ("type", "a[1].b")
    assert why('{"a": {"b": 1}}', field("bigint", "a[1].b")) == ("type", "a")
    assert why("{}", field("bigint", "[0].b")) == ("type", None)
    assert value('[{"b": 1}]', field("bigint", "[0].b")) == (1,)


def test_number_in_an_array_is_looked_at() -> None:
    """What the decode looks up in the message again, a float's digits, is found below an index too."""
    assert why('{"a": [[], {"b": 1e-400}]}', field("double precision", "a[1].b"))[0] == "range"


def test_shared_array() -> None:
    """One column may take an array whole and another an element of it; what does not fit is told with its path."""
    fields = (field("jsonb", "a"), field("bigint", "a[1].b"))
    assert value('{"a": [0, {"b": 1}]}', *fields) == (JSONB + b'[0, {"b": 1}]', 1)
    assert why('{"a": [0, {"b": "x"}]}', *fields) == ("type", "a[1].b")


def test_object_and_array() -> None:
    """A mapping that reads one value as both is a mistake of the configuration."""
    with pytest.raises(ConfigError, match="as an object and another as an array"):
        json.decoder((field("text", "a[0]"), field("text", "a.b")))


# Numbers that count time.

EPOCHS: list[tuple[Unit, str, dt.datetime]] = [
    ("s", "0", dt.datetime(1970, 1, 1, tzinfo=UTC)),
    ("s", "1700000000", dt.datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)),
    ("s", "-1", dt.datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ("s", "1700000000.123456", dt.datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)),
    ("s", "1.7e9", dt.datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)),
    ("s", "0.0000005", dt.datetime(1970, 1, 1, tzinfo=UTC)),
    ("s", "0.0000015", dt.datetime(1970, 1, 1, 0, 0, 0, 2, tzinfo=UTC)),
    ("s", "0.0000005" + "0" * 90 + "1", dt.datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
    ("s", "253402300799.999999", dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    ("s", "-62135596800", dt.datetime(1, 1, 1, tzinfo=UTC)),
    ("ms", "1700000000123", dt.datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=UTC)),
    ("ms", "1700000000123.4565", dt.datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)),
    ("us", "1700000000123456", dt.datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)),
    ("ns", "1700000000123456500", dt.datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)),
    ("ns", "1700000000123457500", dt.datetime(2023, 11, 14, 22, 13, 20, 123458, tzinfo=UTC)),
    ("ns", "-1", dt.datetime(1970, 1, 1, tzinfo=UTC)),
]  # fmt: skip


@pytest.mark.parametrize(("unit", "literal", "expected"), EPOCHS)
def test_epoch(unit: Unit, literal: str, expected: dt.datetime) -> None:
    """A number in a unit is its instant, digit by digit, rounded half to even beyond microseconds; in UTC elsewhere."""
    text = f'{{"a": {literal} }}'
    assert value(text, field("timestamptz", "a", unit=unit)) == (expected,)
    assert value(text, field("timestamp", "a", unit=unit)) == (expected.replace(tzinfo=None),)
    assert value(text, field("date", "a", unit=unit)) == (expected.date(),)


@pytest.mark.parametrize(
    ("reason", "literal"),
    [
        ("type", '"1700000000"'),
        ("type", "true"),
        ("type", "[1]"),
        ("type", '"\\u00e9"'),
        ("range", "253402300800"),
        ("range", "253402300799.9999995"),
        ("range", "-62135596801"),
        ("range", "9" * 5000),
        ("range", "1e999999999"),
        ("missing", "null"),
    ],
)
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_no_epoch(reason: str, literal: str, unit: Unit) -> None:
    """What is no number, or a time beyond the years 1 to 9999, is refused; and never is a gigabyte of zeros made."""
    if unit == "ns" and reason == "range" and literal[0] in "2-":
        literal = literal.replace(".", "") + "0" * 9
    assert why(f'{{"a": {literal}}}', field("timestamptz", "a", unit=unit, not_null=True)) in {
        (reason, "c"),
        (reason, "a"),
    }


def test_tiny_epoch() -> None:
    """A number too small to matter is 1970."""
    expected = dt.datetime(1970, 1, 1, tzinfo=UTC)
    assert value('{"a": 1e-999999999}', field("timestamptz", "a", unit="s")) == (expected,)


def test_epoch_absent() -> None:
    """Absent and null are null; a default is in the column's unit, also below an object that is not there."""
    it = field("timestamptz", "a.b", unit="ms")
    assert [value(text, it) for text in ("{}", '{"a": null}', '{"a": {"b": null}}')] == [(None,)] * 3
    stand_in = field("timestamptz", "a.b", unit="ms", default=1500, not_null=True)
    assert value("{}", stand_in) == (dt.datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC),)
    assert why("{}", field("timestamptz", "a", unit="ms", not_null=True)) == ("missing", "a")


@pytest.mark.parametrize("default", ["2020-01-01T00:00:00Z", True, math.inf, math.nan, 1e30])
def test_epoch_default(default: object) -> None:
    """A default that is no number of the unit is a mistake of the configuration."""
    with pytest.raises(ConfigError, match=r"columns\.c\.default is no number of s since 1970"):
        json.decoder((field("timestamptz", "a", unit="s", default=default),))


# What stands beside the value.


def test_of_the_message() -> None:
    """Topic, partition, offset and timestamp go into their types, beside fields of the value, in the columns' order."""
    fields = (
        field("bigint", "@offset"),
        field("text", "a"),
        field("text", "@topic"),
        field("integer", "@partition"),
        field("timestamptz", "@timestamp"),
        field("bigint", "@timestamp"),
        field("date", "@timestamp"),
    )
    moment = dt.datetime(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=UTC)
    expected = (2**40, "x", "orders", 3, moment, 1_700_000_000_123, moment.date())
    assert row(Fake(b'{"a": "x"}'), *fields) == expected


def test_no_timestamp() -> None:
    """A message without a timestamp gives null, the default, or is missing where a value is needed."""
    without = Fake(time=(0, -1))
    assert row(without, field("timestamptz", "@timestamp")) == (None,)
    assert row(without, field("bigint", "@timestamp", default=5)) == (5,)
    found = refused(without, field("timestamptz", "@timestamp", not_null=True))
    assert (found.reason, found.column, found.message) == ("missing", "c", "the message has no @timestamp")


BODY = b' {"a": 1.50, "b": 123456789012345678901234567890}\n'


def test_whole_value() -> None:
    """The whole value goes into json and jsonb with each digit, into bytea byte for byte and into text."""
    assert row(Fake(BODY), field("jsonb", "@value")) == (JSONB + BODY.strip(),)
    assert row(Fake(BODY), field("json", "@value"), field("numeric", "a")) == (BODY, Decimal("1.50"))
    assert row(Fake(BODY), field("bytea", "@value"), field("text", "@value")) == (BODY, BODY.decode())
    assert row(Fake(b"\xff\x00"), field("bytea", "@value")) == (b"\xff\x00",)


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"{", "malformed"), (b'{"a": 1} 2', "malformed"), (b"[" * 9_999, "malformed"), (b"null", "missing")],
)
def test_whole_value_that_is_no_json(body: bytes, reason: str) -> None:
    """What is not JSON is found before Postgres sees it; a null is null."""
    assert refused(Fake(body), field("jsonb", "@value", not_null=True)).reason == reason
    assert row(Fake(b"null"), field("jsonb", "@value")) == (None,)
    assert row(Fake(b"[1]"), field("json", "@value")) == (b"[1]",)


def test_whole_value_as_text() -> None:
    """Text that is not UTF-8, or too long, is refused by column and source."""
    found = refused(Fake(b"\xff"), field("text", "@value"))
    assert (found.reason, found.column, found.message) == ("encoding", "c", "@value: text is not valid UTF-8")
    assert refused(Fake(b"abc"), field("varchar", "@value", length=2)).reason == "range"
    assert row(Fake("éé".encode()), field("varchar", "@value", length=2)) == ("éé",)


TEXTS = [
    ("text", b"a\xc3\xa9", "aé"),
    ("bytea", b"\xff\x00", b"\xff\x00"),
    ("bigint", b"42", 42),
    ("boolean", b"true", True),
    ("double precision", b"1.5", 1.5),
    ("numeric", b"1.50", Decimal("1.50")),
    ("uuid", b"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
    ("timestamptz", b"2020-01-01T00:00:00Z", dt.datetime(2020, 1, 1, tzinfo=UTC)),
    ("jsonb", b'{"a": 1.50}', JSONB + b'{"a": 1.50}'),
    ("json", b"null", None),
]


@pytest.mark.parametrize(("type_name", "data", "expected"), TEXTS)
def test_header(type_name: str, data: bytes, expected: object) -> None:
    """A header goes into a column as a JSON string would, or, where that takes none, as the JSON that it holds."""
    it = field(type_name, "@headers.h")
    assert row(Fake(its_headers=[("h", data)]), it) == (expected,)
    if type_name not in {"bytea", "json", "jsonb"}:
        key = field(type_name, "@key")
        assert row(Fake(its_key=data), key, key_format="text") == (expected,)


@pytest.mark.parametrize(
    ("type_name", "data", "reason"),
    [
        ("text", b"\xff", "encoding"),
        ("bigint", b"x", "malformed"),
        ("bigint", b"1.0", "type"),
        ("bigint", b'"1"', "type"),
        ("bigint", b'1,"value":2', "malformed"),
        ("bigint", b"99999999999999999999", "range"),
        ("bigint", b"", "malformed"),
        ("jsonb", b'1},{"a":2', "malformed"),
        ("numeric", b"x", "type"),
        ("uuid", b"\xff", "encoding"),
    ],
)
def test_header_that_does_not_fit(type_name: str, data: bytes, reason: str) -> None:
    """A header that its column cannot take is refused with the reason, the column's name and its own."""
    found = refused(Fake(its_headers=[("h", data)]), field(type_name, "@headers.h"))
    assert (found.reason, found.column, found.message.partition(":")[0]) == (reason, "c", "@headers.h")
    assert "$.value" not in found.message


def test_headers_of_one_name() -> None:
    """The last header of a name counts; one without a value, and none at all, are absent."""
    headers: list[tuple[str, bytes | None]] = [("a", b"1"), ("b", b"x"), ("a", b"2"), ("n", None)]
    fields = (field("text", "@headers.a"), field("text", "@headers.n"), field("text", "@headers.A", default="d"))
    assert row(Fake(its_headers=headers), *fields) == ("2", None, "d")
    assert row(Fake(), *fields) == (None, None, "d")
    found = refused(Fake(), field("text", "@headers.a", not_null=True))
    assert (found.reason, found.column, found.message) == ("missing", "c", "the message has no @headers.a")


def test_header_with_unit() -> None:
    """A header may count time."""
    expected = dt.datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert row(Fake(its_headers=[("h", b"1000")]), field("timestamptz", "@headers.h", unit="ms")) == (expected,)


def test_key_as_bytes() -> None:
    """A key of bytes is bytea, an empty one too; none is null."""
    assert row(Fake(its_key=b"\xff"), field("bytea", "@key")) == (b"\xff",)
    assert row(Fake(its_key=b""), field("bytea", "@key")) == (b"",)
    assert row(Fake(), field("bytea", "@key")) == (None,)
    assert refused(Fake(), field("bytea", "@key", not_null=True)).reason == "missing"


def test_key_as_json() -> None:
    """A JSON key is read like a value: whole, or by a path; none is null, or the default."""
    fields = (field("bigint", "@key.id"), field("text", "@key.of[1]", default="d"), field("jsonb", "@key"))
    key = b'{"id": 7, "of": ["x", "y"]}'
    assert row(Fake(its_key=key), *fields, key_format="json") == (7, "y", JSONB + key)
    assert row(Fake(its_key=b'{"id": 7}'), *fields[:2], key_format="json") == (7, "d")
    assert row(Fake(), *fields, key_format="json") == (None, "d", None)
    assert row(Fake(its_key=b"5"), field("bigint", "@key"), key_format="json") == (5,)
    assert row(Fake(its_key=b'"x"'), field("text", "@key"), key_format="json") == ("x",)


@pytest.mark.parametrize(
    ("key", "reason", "told"),
    [
        (b"x", "malformed", "@key.id: "),
        (b"", "malformed", "@key.id: "),
        (b"{}", "missing", "@key.id: "),
        (b'{"id": "x"}', "type", "@key.id: Expected `int`, got `str` - at `$.id`"),
        (b"[1]", "type", "@key.id: "),
        (None, "missing", "the message has no @key.id"),
    ],
)
def test_key_that_does_not_fit(key: bytes | None, reason: str, told: str) -> None:
    """A JSON key that cannot be read is refused, by column and path."""
    found = refused(Fake(its_key=key), field("bigint", "@key.id", not_null=True), key_format="json")
    assert (found.reason, found.column) == (reason, "c")
    assert found.message.startswith(told)


# Unknown fields.


def test_unknown_fields() -> None:
    """A field that nothing reads is refused where that is asked for, at each level that is read, and told by name."""
    fields = (field("text", "a"), field("text", "o.b"), field("jsonb", "whole"), field("bigint", "l[0].x"))
    good = b'{"a": "x", "o": {"b": "y"}, "whole": {"any": 1}, "l": [{"x": 1}, {"y": 2}]}'
    ((*found,),) = json.decoder(fields, ())([good])
    assert found == ["x", "y", JSONB + b'{"any": 1}', 1]
    assert why(b'{"z": 1}', *fields, known=()) == ("unknown_field", None)
    assert why(b'{"o": {"z": 1}}', *fields, known=()) == ("unknown_field", "o")
    assert why(b'{"l": [{"z": 1}]}', *fields, known=()) == ("unknown_field", "l[0]")


def test_what_where_reads_is_known() -> None:
    """What `where` reads is not unknown, with all below it, though no column reads it."""
    fields = (field("text", "a"), field("text", "o.b"))
    known: tuple[paths.Path, ...] = (("kind", "deep"), ("o", "k"), ("a",), ("l", 2))
    body = b'{"a": "x", "o": {"b": "y", "k": [1]}, "kind": {"deep": 1, "more": 2}, "l": [1, {"x": 2}]}'
    assert json.decoder(fields, known)([body]) == [("x", "y")]
    assert why(b'{"o": {"z": 1}}', *fields, known=known) == ("unknown_field", "o")


@pytest.mark.parametrize(
    ("name", "told"), [("total_2", "total_2"), ("ada@example.com", "…"), ("x" * 61, "…"), ("a`b", "…"), ("a\\nb", "…")]
)
def test_unknown_field_is_told_if_it_is_a_name(name: str, told: str) -> None:
    """The letter tells an unknown field's name, but not what may be somebody's data, nor a megabyte of it."""
    with pytest.raises(ValueError, match="unknown") as caught:
        json.decoder((field("text", "a"),), ())([f'{{"{name}": 1}}'.encode()])
    assert refusal(caught.value).message == f"the field {told} is read by no column"


# A handler.

ID = Column(name="id", oid=OIDS["bigint"], typmod=-1, type_name="bigint", not_null=True, automatic=False)
AT = Column(name="at", oid=OIDS["timestamptz"], typmod=-1, type_name="timestamptz", not_null=False, automatic=False)
DOC = Column(name="doc", oid=OIDS["jsonb"], typmod=-1, type_name="jsonb", not_null=False, automatic=False)


def encoder(**config: object) -> Encoder:
    """Make the encoder of a handler."""
    data = {
        "name": "h",
        "path": Path("h.toml"),
        "topics": ["o"],
        "table": {"name": "t", "write": "append", "tombstones": "dead-letter"},
        **config,
    }
    handler = HandlerConfig.model_validate(data, by_name=False, by_alias=True, context={"folder": Path("/etc")})
    return Encoder(Table(name="t", identifier="t", columns=(ID, AT, DOC), unique=(), fingerprint=""), handler)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"columns": {"id": "@topic"}}, "column id of t is bigint, and @topic goes into text, char, varchar alone"),
        ({"columns": {"id": "@key"}}, 'and @key goes into bytea alone; write key_format = "text" or "json"'),
        (
            {"columns": {"id": "id", "doc": "@key"}, "key_format": "text"},
            "is jsonb, which takes a key as it is: write key_format",
        ),
        ({"columns": {"id": "id", "doc": "@offset"}}, "is jsonb, and @offset goes into bigint alone"),
        ({"columns": {"id": "@value"}}, "is bigint, and @value goes into bytea, text"),
        ({"columns": {"id": "id", "doc": "@timestamp"}}, "is jsonb, and @timestamp goes into bigint, date"),
        ({"columns": {"id": {"from": "id", "unit": "s"}}}, "is bigint, and `unit` goes with date, timestamp and"),
    ],
)
def test_source_of_another_kind(config: dict[str, object], told: str) -> None:
    """A source that does not go with its column's type is a sentence before anything is consumed."""
    with pytest.raises(Halt) as caught:
        encoder(**config)
    assert told in str(caught.value)
    assert "in h.toml)" in str(caught.value)


def test_handler_with_sources() -> None:
    """A handler's messages become rows, good ones and refused ones apart, whatever its columns read."""
    it = encoder(columns={"id": "@key.id", "at": {"from": "ts", "unit": "ms"}, "doc": "@value"}, key_format="json")
    good = Fake(b'{"ts": 0}', b'{"id": 1}')
    moment = dt.datetime(1970, 1, 1, tzinfo=UTC)
    row_of_good = (1, moment, JSONB + b'{"ts": 0}')
    refused: dict[int, Refusal] = {}
    rows = it.encode([good, good], refused)
    assert (rows.rows, list(rows.positions), refused) == ([row_of_good, row_of_good], [0, 1], {})
    rows = it.encode(
        [Fake(b'{"ts": 0}'), good, Fake(None, b'{"id": 2}'), Fake(b"", b'{"id": 2}'), Fake(b"{", b"{}")], refused
    )
    assert (rows.rows, list(rows.positions)) == ([row_of_good], [1])
    assert {at: (each.reason, each.column) for at, each in refused.items()} == {
        0: ("missing", "id"),
        2: ("missing", None),
        3: ("malformed", None),
        4: ("malformed", None),
    }
    assert refused[2] == TOMBSTONE


def test_tombstone_of_a_handler_that_reads_no_field() -> None:
    """A message without a value is one also for a handler that reads nothing of the value."""
    it = encoder(columns={"id": "@offset"})
    refused: dict[int, Refusal] = {}
    rows = it.encode([Fake(at=5), Fake(None), Fake(b"no json", at=7), Fake(b"")], refused)
    assert (rows.rows, {at: each.reason for at, each in refused.items()}) == (
        [(5,), (7,)],
        {1: "missing", 3: "malformed"},
    )


def test_unknown_fields_of_a_handler() -> None:
    """`unknown_fields` holds beside sources too, and knows what `where` reads."""
    strict = {"decode": {"unknown_fields": "dead-letter"}, "where": "kind == 'a'"}
    for columns in ({"id": "id"}, {"id": "id", "doc": "@value"}, None):
        it = encoder(columns=columns, **strict) if columns else encoder(**strict)
        refused: dict[int, Refusal] = {}
        rows = it.encode([Fake(b'{"id": 1, "kind": "a"}'), Fake(b'{"id": 1, "kind": "a", "z": 0}')], refused)
        assert len(rows.rows) == 1
        assert refused[1].message == "the field z is read by no column"
