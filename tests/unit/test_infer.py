"""What `consumerd init` learns of a sample: kinds of values, names, paths, units."""

import json
from typing import Any

import pytest

from consumerd import paths
from consumerd.catalog import Column
from consumerd.commands.infer import Sample, kind_of, match, new_columns, observe, written


def sample(*values: dict[str, Any]) -> Sample:
    """Observe objects."""
    return observe(json.dumps(value).encode() for value in values)


def column(name: str, oid: int, **more: Any) -> Column:  # noqa: ANN401
    """Make a column of a type."""
    plain = {"typmod": -1, "type_name": str(oid), "not_null": False, "automatic": False}
    return Column(name=name, oid=oid, **{**plain, **more})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (True, "boolean"),
        (2**63 - 1, "integer"),
        (2**63, "large"),
        (1.0, "number"),
        ("a", "text"),
        ("2026-11-23T10:15:00Z", "time"),
        ("2026-11-23T10:15:00.5+05:30", "time"),
        ("2026-11-23T10:15:00", "local time"),
        ("2026-13-23T10:15:00Z", "text"),
        ("2026-11-23", "date"),
        ("2026-02-30", "text"),
        ("6F9619FF-8B86-D011-B42D-00C04FC964FF", "uuid"),
        ([], "list"),
        ({}, "object"),
    ],
)
def test_kinds(value: object, kind: str) -> None:
    """A value's kind is the narrowest that it has."""
    assert kind == kind_of(value)


def test_a_table_for_a_sample() -> None:
    """Each field at the top is a column with a name as SQL has them and the narrowest type that takes all values."""
    found = sample(
        {"orderId": 1, "amount": 1, "at": "2026-11-23T10:15:00Z", "who": {"name": "a"}, "flag": True, "big": 2**70},
        {"orderId": 2, "amount": 1.5, "at": "soon", "Order-ID": None, "flag": None, "big": 1, "1st": "2026-11-23"},
    )
    assert {
        "order_id": (("orderId",), "bigint"),
        "amount": (("amount",), "numeric"),
        "at": (("at",), "text"),
        "who": (("who",), "jsonb"),
        "flag": (("flag",), "boolean"),
        "big": (("big",), "numeric"),
        "order_id_2": (("Order-ID",), "jsonb"),
        "_1st": (("1st",), "date"),
    } == new_columns(found)
    assert [True, False, False] == [found.always((name,)) for name in ("orderId", "flag", "who")]


def test_what_is_no_object_is_counted() -> None:
    """Messages without a value, of broken JSON or of another kind teach nothing and are counted."""
    found = observe([b'{"a": 1}', b"[1]", b"{", b"", None, b"1"])
    assert (1, 5, [("a",)]) == (found.objects, found.others, list(found.fields))


def test_columns_find_their_fields() -> None:
    """By name, by the name in another writing, within objects; of one that does not fit the next is tried."""
    found = sample({"id": "x", "ID": 7, "customerName": "a", "address": {"city": "b", "zip": 1}, "bill": {"zip": 2}})
    columns = [
        column("id", 20),
        column("customer_name", 25),
        column("city", 25),
        column("address_zip", 23),
        column("zip", 23),
        column("address", 3802),
        column("absent", 25),
        column("ID", 20, automatic=True),
    ]
    assert {
        "id": (("ID",), None),
        "customer_name": (("customerName",), None),
        "city": (("address", "city"), None),
        "address_zip": (("address", "zip"), None),
        "address": (("address",), None),
    } == match(columns, found)


def test_arrays_find_lists() -> None:
    """A column of an array takes a list, and no other value."""
    columns = [column("a", 1007, element=column("a", 23)), column("b", 1007, element=column("b", 23))]
    assert {"a": (("a",), None)} == match(columns, sample({"a": [1], "b": 1}))


@pytest.mark.parametrize(("number", "unit"), [(10**9, "s"), (10**12, "ms"), (10**15, "us"), (10**18, "ns")])
def test_units_of_epochs(number: int, unit: str) -> None:
    """A number into a time counts in the unit in which it would be a time of these decades."""
    assert {"at": (("at",), unit)} == match([column("at", 1184)], sample({"at": number}))


@pytest.mark.parametrize("name", ["a", "a b", "a.b", "@a", "a[0]", 'a"b', "it's", "ü"])
def test_paths_are_written_as_they_are_read(name: str) -> None:
    """A path that is written leads to the field that it was found at, alone and below another."""
    assert paths.Source("field", (name,)) == paths.parse(written((name,)))
    assert paths.Source("field", ("x", name)) == paths.parse(written(("x", name)))


def test_names_that_cannot_be_written() -> None:
    """A field whose name TOML cannot have here is passed over."""
    names = ["a\"b'c", "${HOME}", "", 'x\nsecret = "@value"', "tab\t", "back\\slash"]
    assert [("good",)] == list(sample({"good": 1, **dict.fromkeys(names, 1)}).fields)


def test_what_cannot_be_written_is_counted() -> None:
    """Fields whose names cannot be written are told in number: they are in the messages, and go nowhere."""
    found = sample({"good": 1, "x\ny": 1, "in": {"$": 1}}, {"x\ny": 2, "back\\slash": 1})
    assert {("x\ny",), ("in", "$"), ("back\\slash",)} == found.unnamed
    assert [("good",), ("in",)] == list(found.fields)
