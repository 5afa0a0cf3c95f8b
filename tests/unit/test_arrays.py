"""Arrays, and values of types that go by their text form: each element is as in a column of its own, or is refused."""

import datetime as dt
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from psycopg import sql

from consumerd.catalog import Column
from consumerd.formats import messages
from consumerd.formats.values import Field
from consumerd.sinks.copy import CopyData, Packer, copy_statement
from tests.unit.test_json import JSONB, field, row, why
from tests.unit.test_mapping import Fake

INET, ANY_ARRAY = 869, 1007


def array(type_name: str, *, not_null: bool = False) -> Field:
    """Make a column of an array."""
    entry = field(type_name, not_null=not_null)
    element = replace(entry.column, not_null=False, type_oid=entry.column.oid)
    column = replace(entry.column, oid=ANY_ARRAY, typmod=-1, type_name=f"{type_name}[]", element=element)
    return replace(entry, column=column)


def by_text(*, not_null: bool = False, **more: Any) -> Field:  # noqa: ANN401 - what a column or a field has
    """Make a column of a type without a binary form."""
    column = Column(name="a", oid=INET, typmod=-1, type_name="inet", not_null=not_null, automatic=False)
    return Field(column=column, path=("a",), **more)


TAKEN = [
    ("integer", "[1, null, -2]", [1, None, -2]),
    ("integer", "[]", []),
    ("integer", "[[1, 2], [3, null]]", [[1, 2], [3, None]]),
    ("integer", "[[[[[[7]]]]]]", [[[[[[7]]]]]]),
    ("text", '["a", "null", null, ""]', ["a", "null", None, ""]),
    ("text", '[["\\u00e9"]]', [["é"]]),
    ("character varying(2)", '["ab"]', ["ab"]),
    ("numeric", '[1.10, "2.50", 123456789012345678901234567890]', None),
    ("numeric(3,2)", "[9.99]", [Decimal("9.99")]),
    ("double precision", "[0.0, 1e-300, 1]", [0.0, 1e-300, 1.0]),
    ("boolean", "[true, false]", [True, False]),
    ("bytea", '["AA=="]', [b"\0"]),
    ("date", '["2026-11-23"]', [dt.date(2026, 11, 23)]),
    ("time", '["00:00:00"]', [dt.time(0)]),
    ("jsonb", '[{"a": 1.10}, [null], "x", null]', [JSONB + b'{"a": 1.10}', JSONB + b"[null]", JSONB + b'"x"', None]),
    ("json", "[1e999]", [b"1e999"]),
]


@pytest.mark.parametrize(("type_name", "literal", "expected"), TAKEN)
def test_taken(type_name: str, literal: str, expected: list[Any] | None) -> None:
    """An array whose elements fit is the row's, exactly; of nested ones each is a dimension, but of JSON an element."""
    (found,) = row(f'{{"a": {literal} }}', array(type_name, not_null=True))
    if expected is None:
        assert list(map(str, found)) == ["1.10", "2.50", "123456789012345678901234567890"]
    else:
        assert found == expected


REFUSED = [
    ("type", "integer", ['"{1,2}"', "1", "{}", "true"]),
    ("type", "integer", ["[1.5]", '["1"]', "[true]", "[{}]", '[[1], ["x"]]']),
    ("range", "integer", ["[2147483648]", "[[1], [-2147483649]]"]),
    ("type", "integer", ["[1, [2]]", "[[1], 2]", "[[1], [2, 3]]", "[[1], null]", "[[1], []]"]),
    ("type", "integer", ["[[]]", "[[], []]", "[[[]]]", "[[[[[[[1]]]]]]]", "[" * 500 + "]" * 500]),
    ("range", "smallint", ["[1, 32768]"]),
    ("range", "character varying(2)", ['["abc"]', '[["ab"], ["abc"]]']),
    ("range", "numeric(3,2)", ["[10]"]),
    ("range", "numeric", ['["NaN"]', "[1e131072]"]),
    ("type", "numeric", ['["\uff11"]']),
    ("range", "double precision", ["[1e-400]", "[1e309]"]),
    ("range", "real", ["[1e-46]"]),
    ("range", "time", ['["23:59:59.9999999"]']),
    ("type", "timestamp with time zone", ['["2020-01-01T00:00:00"]', "[1]"]),
]


@pytest.mark.parametrize(
    ("reason", "type_name", "literal"),
    [(reason, type_name, literal) for reason, type_name, literals in REFUSED for literal in literals],
    ids=lambda value: value[:40],
)
def test_refused(reason: str, type_name: str, literal: str) -> None:
    """An element that does not fit, or an array that is no rectangle, is refused with its reason and column."""
    assert why(f'{{"a": {literal}}}', array(type_name)) == (reason, "a")


@pytest.mark.parametrize("entry", [array("integer", not_null=True), by_text(not_null=True)], ids=["array", "by text"])
def test_absent_and_null(entry: Field) -> None:
    """Absent and null are null, and refused as missing by a column that needs a value."""
    optional = replace(entry, column=replace(entry.column, not_null=False))
    assert (row("{}", optional), row('{"a": null}', optional)) == ((None,), (None,))
    assert (why("{}", entry), why('{"a": null}', entry)) == (("missing", "a"), ("missing", "a"))


@pytest.mark.parametrize(
    ("literal", "expected"),
    [('"10.0.0.1"', "10.0.0.1"), ('"a\\u00e9\\n"', "aé\n"), ("1.50", "1.50"), ("1e400", "1e400"), ("true", "true")],
)
def test_words(literal: str, expected: str) -> None:
    """For a type that goes by its text form a string is its content; a number, true and false are as they were sent."""
    assert row(f'{{"a": {literal} }}', by_text()) == (expected,)


@pytest.mark.parametrize("literal", ["{}", "[1]"])
def test_no_words(literal: str) -> None:
    """An object or an array is no such value: the type's input function might read it as something else."""
    assert why(f'{{"a": {literal}}}', by_text()) == ("type", "a")


def test_default_of_words() -> None:
    """A default stands in for an absent value there too."""
    assert row("{}", by_text(default="10.0.0.1", not_null=True)) == ("10.0.0.1",)


def test_a_name_that_an_array_shares() -> None:
    """An array's name may be read by another column as well."""
    whole = replace(field("jsonb").column, name="whole")
    assert row('{"a": [1]}', array("integer"), Field(column=whole, path=("a",))) == ([1], JSONB + b"[1]")


def test_one_such_column_makes_its_table_go_by_text() -> None:
    """Beside a type without a binary form every column goes by text; without one, none does."""
    columns = [field("text", "b").column, field("jsonb", "c").column, field("bytea", "d").column]
    values = ("a\t\\\n\0é", JSONB + b'{"a":"\\n"}', b"\0\xff")
    assert Packer(columns).add(CopyData(), [values]).packed.startswith(b"\0\x03")
    assert b"FORMAT binary" in copy_statement(sql.SQL("t"), columns).query.as_bytes()
    columns.append(by_text().column)
    assert b"FORMAT text" in copy_statement(sql.SQL("t"), columns).query.as_bytes()
    expected = 'a\\t\\\\\\n\0é\t{"a":"\\\\n"}\t\\\\x00ff\t\\N\n'
    assert bytes(Packer(columns).add(CopyData(), [(*values, None)]).packed).decode() == expected


def test_an_array_names_its_elements_own_type() -> None:
    """An array of an enum or a domain is packed under that type's own oid, its elements as what it is made of."""
    entry = array("text")
    assert entry.column.element is not None
    column = replace(entry.column, element=replace(entry.column.element, type_oid=70_000))
    packed = bytes(Packer([column]).add(CopyData(), [(["x"],)]).packed)
    assert packed[6 + 8 : 6 + 12] == (70_000).to_bytes(4)
    assert packed.endswith(b"\0\0\0\x01x")


@pytest.mark.parametrize(
    ("entry", "header", "expected"),
    [(array("integer"), b"[1, 2]", [1, 2]), (by_text(), b"10.0.0.1", "10.0.0.1"), (by_text(), b"[1]", "[1]")],
    ids=["array", "by text", "by text, in brackets"],
)
def test_of_a_header(entry: Field, header: bytes, expected: object) -> None:
    """A header's text is read as JSON for an array, and is the words of a type that goes by its text form."""
    source = replace(entry, place="@headers", path=("h",))
    assert messages.decoder((source,), "bytes")([Fake(b"{}", its_headers=[("h", header)])]) == [(expected,)]
