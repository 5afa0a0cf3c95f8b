"""A message's key as a tombstone's row: each key is the row that it names, or a refusal; none is guessed at."""

from pathlib import Path
from typing import Any

import pytest

from consumerd.catalog import Column, Table
from consumerd.config import HandlerConfig
from consumerd.encode import Encoder
from consumerd.errors import ConfigError, Refusal

TYPES = {
    "bigint": 20,
    "text": 25,
    "bytea": 17,
    "integer": 23,
    "jsonb": 3802,
    "uuid": 2950,
    "numeric": 1700,
    "json": 114,
}


class Keyed:
    """A message with a key, and most often without a value."""

    def __init__(self, key: bytes | None, value: bytes | None = None) -> None:
        self._key, self._value = key, value

    def key(self) -> bytes | None:
        """Give the key."""
        return self._key

    def value(self) -> bytes | None:
        """Give the value."""
        return self._value


def column(name: str, type_name: str, *, not_null: bool = False) -> Column:
    """Make a column."""
    return Column(name=name, oid=TYPES[type_name], typmod=-1, type_name=type_name, not_null=not_null, automatic=False)


def encoder(key_format: str, sources: dict[str, str], *columns: Column, tombstones: str = "delete") -> Encoder:
    """Make the encoder of an upsert whose tombstones delete."""
    key = frozenset(sources)
    table: dict[str, Any] = {"name": "t", "write": "upsert", "key": sorted(key), "tombstones": tombstones}
    table |= {"tombstone_key": sources} if tombstones == "delete" else {}
    data = {"name": "t", "path": Path("t.toml"), "topics": ["t"], "key_format": key_format, "table": table}
    handler = HandlerConfig.model_validate(data, by_name=False, by_alias=True, context={"folder": Path("/etc")})
    return Encoder(Table(name="t", identifier="t", columns=columns, unique=(key,), fingerprint=""), handler)


def encoded(encoder: Encoder, *messages: Keyed) -> tuple[list[tuple[Any, ...]], list[int], dict[int, Refusal]]:
    """Return rows, their positions and the refusals."""
    refused: dict[int, Refusal] = {}
    rows = encoder.encode(messages, refused)  # type: ignore[arg-type]
    return rows.rows, list(rows.positions), refused


@pytest.mark.parametrize(
    ("key_format", "source", "type_name", "key", "value"),
    [
        ("json", "@key", "bigint", b"42", 42),
        ("json", "@key", "text", b'"a \\u00e9"', "a é"),
        ("json", "@key.id", "bigint", b'{"id": 7, "other": [1]}', 7),
        ("json", "@key.a.b", "text", b' {"a": {"b": "x"}} ', "x"),
        ("text", "@key", "text", 'né"\\\n'.encode(), 'né"\\\n'),
        ("text", "@key", "text", b"", ""),
        ("bytes", "@key", "bytea", b"\xff\x00", b"\xff\x00"),
    ],
)
def test_a_tombstone_names_its_row(key_format: str, source: str, type_name: str, key: bytes, value: object) -> None:
    """A message without a value is the row of its key that deletes, between those that do not."""
    it = encoder(key_format, {"id": source}, column("v", "text"), column("id", type_name))
    rows, positions, refused = encoded(it, Keyed(key), Keyed(key))
    assert (rows, positions, refused) == ([(None, value, True)] * 2, [0, 1], {})


def test_rows_and_deletions_in_order() -> None:
    """Rows that delete stand between the others, in offset order; each says which it is."""
    it = encoder("json", {"id": "@key"}, column("id", "bigint"), column("v", "text"))
    some = (
        Keyed(b"1", b'{"id": 1, "v": "a"}'),
        Keyed(b"1"),
        Keyed(b"x"),
        Keyed(b"2", b"no"),
        Keyed(None, b'{"id": 3}'),
    )
    rows, positions, refused = encoded(it, *some)
    assert rows == [(1, "a", False), (1, None, True), (3, None, False)]
    assert positions == [0, 1, 4]
    assert sorted(refused) == [2, 3]
    assert encoded(it, some[0], some[4]) == ([(1, "a", False), (3, None, False)], [0, 1], {})


def test_several_columns() -> None:
    """A key of several columns comes from several places of the message's key."""
    it = encoder("json", {"b": "@key.x.y", "a": "@key.z"}, column("a", "integer"), column("b", "text"))
    assert encoded(it, Keyed(b'{"z": 1, "x": {"y": "q"}}')) == ([(1, "q", True)], [0], {})


@pytest.mark.parametrize(
    ("key_format", "source", "type_name", "key", "why"),
    [
        ("json", "@key", "bigint", None, ("missing", "@key")),
        ("json", "@key", "bigint", b"", ("malformed", None)),
        ("json", "@key", "bigint", b"null", ("missing", "@key")),
        ("json", "@key", "bigint", b'"1"', ("type", "@key")),
        ("json", "@key", "integer", b"2147483648", ("range", "@key")),
        ("json", "@key", "bigint", b'1, "@key": 2', ("malformed", None)),
        ("json", "@key", "bigint", b"1} {", ("malformed", None)),
        ("json", "@key.id", "bigint", b"{}", ("missing", "@key.id")),
        ("json", "@key.id", "bigint", b"7", ("type", "@key")),
        ("json", "@key", "text", b'"\xff"', ("encoding", None)),
        ("text", "@key", "text", b"\xff", ("encoding", None)),
        ("text", "@key", "uuid", b"no uuid", ("type", "@key")),
        ("text", "@key", "numeric", b"NaN", ("range", "id")),
    ],
)
def test_a_tombstone_that_names_none(
    key_format: str, source: str, type_name: str, key: bytes | None, why: tuple[str, str | None]
) -> None:
    """A tombstone whose key is no value of its column is refused, with the reason and the path into the key."""
    it = encoder(key_format, {"id": source}, column("id", type_name))
    rows, _, refused = encoded(it, Keyed(key))
    assert rows == []
    assert (refused[0].reason, refused[0].column) == why


def test_an_empty_value_is_no_tombstone() -> None:
    """Of the values that hold nothing only null deletes: an empty one is malformed."""
    _, _, refused = encoded(encoder("json", {"id": "@key"}, column("id", "bigint")), Keyed(b"1", b""), Keyed(b"1"))
    assert {position: refusal.reason for position, refusal in refused.items()} == {0: "malformed"}


@pytest.mark.parametrize(
    ("key_format", "type_name", "words"),
    [
        ("bytes", "bigint", 'column id is bigint, and the key is read as bytes: write key_format = "json" or "text"'),
        ("text", "bigint", 'column id is bigint, which text is not: write key_format = "json"'),
        ("text", "jsonb", 'write key_format = "json"'),
    ],
)
def test_a_key_that_never_fits(key_format: str, type_name: str, words: str) -> None:
    """A column that no key of this format is a value of is told when the table is read."""
    with pytest.raises(ConfigError, match="tombstone_key") as caught:
        encoder(key_format, {"id": "@key"}, column("id", type_name))
    assert words in str(caught.value)


def test_tombstones_that_are_passed_over() -> None:
    """By default a tombstone is neither row nor refusal, and is counted; otherwise it is refused."""
    columns = (column("id", "bigint"), column("v", "text"))
    messages: Any = [Keyed(b"1"), Keyed(b"1", b'{"id": 1}'), Keyed(None), Keyed(None, b"")]
    refused: dict[int, Refusal] = {}
    rows = encoder("bytes", {"id": "@key"}, *columns, tombstones="ignore").encode(messages, refused)
    assert (rows.rows, list(rows.positions), rows.skipped) == ([(1, None)], [1], {"tombstone": 2})
    assert list(refused) == [3]
    refused.clear()
    rows = encoder("bytes", {"id": "@key"}, *columns, tombstones="dead-letter").encode(messages, refused)
    assert (rows.rows, rows.skipped, sorted(refused)) == ([(1, None)], {}, [0, 2, 3])
