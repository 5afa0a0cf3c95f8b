"""`where`: what it takes, what it passes over, what it cannot tell, and what is no `where`."""

import json
from pathlib import Path
from typing import Any

import pytest

from consumerd import where
from consumerd.catalog import Column, Table
from consumerd.config import HandlerConfig
from consumerd.encode import Encoder
from consumerd.errors import Poison, Refusal
from consumerd.formats.selection import selector
from consumerd.formats.values import refusal
from consumerd.paths import KeyFormat
from tests.unit.test_mapping import Fake

MESSAGE = {
    "kind": "buy",
    "n": 5,
    "f": 2.5,
    "yes": True,
    "no": False,
    "nil": None,
    "big": 2**53 + 1,
    "huge": 10**30,
    "s5": "5",
    "é": "ü",
    "order id": 1,
    "o": {"a": {"b": "x"}, "l": [1, {"c": "y"}], "e": {}},
    "list": ["p", ["q"]],
}
BODY = json.dumps(MESSAGE, ensure_ascii=False).encode()
HEADERS: list[tuple[str, bytes | None]] = [
    ("type", b"old"),
    ("type", b"new"),
    ("a.b", b"1"),
    ("none", None),
    ("bad", b"\xff"),
]


def takes(text: str, message: Fake | None = None, key_format: KeyFormat = "bytes") -> bool:
    """Whether a `where` takes a message."""
    test = where.parse(text)
    where.check(test, key_format)
    select = selector(test, key_format)
    message = Fake(BODY, b"key", HEADERS) if message is None else message
    found = select([message])
    assert select([message, message]) == ([0, 1] if found else [])
    return found == [0]


def refused(text: str, message: Fake | None = None, key_format: KeyFormat = "bytes") -> tuple[str, str | None]:
    """Ask a `where` about a message that it cannot tell; give reason and column."""
    with pytest.raises((ValueError, RecursionError, Poison)) as caught:
        takes(text, message, key_format)
    found = refusal(caught.value)
    return found.reason, found.column


@pytest.mark.parametrize(
    "text",
    [
        "kind == 'buy'",
        'kind == "buy"',
        "kind = 'buy'",
        "kind != 'sell'",
        "kind <> 'it''s'",
        "kind in ('sell', 'buy')",
        "kind not in ('sell')",
        "not kind in ('sell', 'x')",
        "kind >= 'buy' and kind < 'buz'",
        "n == 5",
        "n == 5.0",
        "n > 4 and n >= 5 and n < 5.5 and n <= 5 and n != -5",
        "n in (1, 5, 'x')",
        "f == 2.5",
        "f > 2",
        "f < 1e3",
        "big > 9007199254740992 and big == 9007199254740993",
        "yes",
        "yes == true",
        "not no",
        "no == false",
        "no != true",
        "nil is null",
        "absent is null",
        "kind is not null",
        "not kind is null",
        "o is not null and o.e is not null",
        "o.a.b == 'x'",
        "o.a.zz is null",
        "absent.deep.er is null",
        "nil.a is null",
        "o.l[0] == 1",
        "o.l[1].c == 'y'",
        "o.l[7] is null",
        "list[1][0] == 'q'",
        "o.a is not null and o.a.b == 'x'",
        "é == 'ü'",
        '["order id"] == 1',
        "@topic == 'orders'",
        "@partition in (1, 3)",
        "@offset >= 1099511627776",
        "@timestamp < 1700000000124 and @timestamp >= 1.7e12",
        "@headers.type == 'new'",
        "@headers.a.b == '1'",
        "@headers[\"a.b\"] == '1'",
        "@headers.absent is null and @headers.none is null",
        "@key is not null",
        "@value is not null",
        "kind == 'sell' or n == 5",
        "kind == 'sell' and n == 4 or n == 5",
        "not (kind == 'sell' or n == 4)",
        "not (kind == 'sell' and n == 5)",
        "NOT (Kind IS NOT NULL) AND kind IN ('buy')",
        "not not yes",
        "not n < 5 and not n > 5 and not n <= 4 and not n >= 6 and not n != 5",
        "((((kind == 'buy'))))",
        " \n kind\t==\n'buy' ",
    ],
)
def test_taken(text: str) -> None:
    """A `where` that holds takes the message; its opposite does not."""
    assert takes(text)
    assert not takes(f"not ({text})")


@pytest.mark.parametrize(
    "test",
    [
        "{} == 1", "{} != 1", "{} < 1", "{} >= 1", "{} in (1, 'a')", "{} not in (1)", "{} == 'a'", "{} != 'a'",
        "{}", "{} == true", "{} != false",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["absent", "nil", "o.none", "absent.deeper", "list[5]", "nil[0]"])
def test_null(test: str, path: str) -> None:
    """As in SQL, a comparison with null is not true, and neither is its opposite; nor what is made of both."""
    text = test.format(path)
    assert not takes(text)
    assert not takes(f"not ({text})")
    assert takes(f"{text} or {path} is null")
    assert not takes(f"not ({text} and {path} is null)")


def test_and_before_or() -> None:
    """`and` binds before `or`, and `not` before both."""
    assert takes("yes or no and no")
    assert not takes("(yes or no) and no")
    assert takes("not no and yes")
    assert takes("not no or no")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("kind == 5", "kind"),
        ("kind != 5", "kind"),
        ("kind > 5", "kind"),
        ("kind", "kind"),
        ("not kind", "kind"),
        ("s5 == 5", "s5"),
        ("n == '5'", "n"),
        ("n in ('5', 'x')", "n"),
        ("n == true", "n"),
        ("yes == 1", "yes"),
        ("yes > 0", "yes"),
        ("yes in (1, 2)", "yes"),
        ("o == 'x'", "o"),
        ("o.a == 'x'", "o.a"),
        ("list == 'x'", "list"),
        ("o.a == 'x' or o.a.b == 'x'", "o.a"),
        ("kind.below == 1", "kind"),
        ("o.a.b.c.d is null", "o.a.b"),
        ("o[0] == 1", "o"),
        ("list.x == 1", "list"),
    ],
)
def test_of_another_kind(text: str, column: str) -> None:
    """A value of another kind than what it is compared with is neither taken nor passed over: it is refused."""
    assert refused(text) == ("type", column)


@pytest.mark.parametrize(
    "text",
    [
        "kind == 'sell' and n == 'x'",
        "kind == 'sell' and kind.below == 1",
        "@topic == 'x' and n == 'x'",
        "@topic == 'x' and @headers.bad == 'x'",
        "not (kind == 'buy' or n == 'x')",
    ],
)
def test_what_stands_before_decides(text: str) -> None:
    """What is behind a test that has decided is not looked at."""
    assert not takes(text)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "malformed"),
        (b"[1]", "type"),
        (b"null", "missing"),
        (b'{"kind": "\xff"}', "encoding"),
        (b'{"kind": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "malformed"),
        (b'{"z": 1, "kind": 1e400}', "range"),
    ],
)
def test_value_that_cannot_be_told(body: bytes, reason: str) -> None:
    """A value that cannot be read is refused; by a `where` that does not read fields it is taken or not like any."""
    assert refused("kind == 'buy'", Fake(body))[0] == reason
    assert takes("@topic == 'orders'", Fake(body))
    assert not takes("@topic != 'orders'", Fake(body))


def test_what_it_does_not_read_may_be_anything() -> None:
    """Fields that no test reads are not decoded: bytes that are no text, numbers of any size."""
    body = b'{"x": "\xff", "y": 1e999999, "kind": "buy", "o": {"q": "\xff"}, "l": ["\xff", 2]}'
    assert takes("kind == 'buy' and o.absent is null and l[1] == 2", Fake(body))


def test_header_that_is_no_text() -> None:
    """A header that is compared is text."""
    assert refused("@headers.bad == 'x'")[0] == "encoding"


def test_message_without() -> None:
    """Without timestamp, headers, key or value these are null."""
    bare = Fake(None, time=(0, -1))
    assert takes("@headers.x is null and @key is null and @value is null and @timestamp is null", bare)
    assert not takes("@timestamp > 0 or @timestamp <= 0", bare)


def test_key_as_text() -> None:
    """A text key is compared as text."""
    assert takes("@key == 'key' and @key < 'kez'", key_format="text")
    assert not takes("@key == 'x'", Fake(its_key=None), "text")


def test_key_as_json() -> None:
    """A JSON key is compared by what it holds, whole or at a path."""
    key = Fake(its_key=b'{"id": 7, "of": ["x", {"y": null}]}')
    assert takes("@key.id == 7 and @key.of[0] == 'x' and @key.of[1].y is null and @key.of[9] is null", key, "json")
    assert takes("@key.none.deeper is null", key, "json")
    assert takes("@key == 5", Fake(its_key=b"5"), "json")
    assert takes("@key is null and @key.id is null", Fake(its_key=None), "json")
    assert refused("@key.id == 7", Fake(its_key=b"{"), "json") == ("malformed", "@key")
    assert refused("@key.id == 7", Fake(its_key=b"5"), "json") == ("type", "@key.id")
    assert refused("@key.id[0] == 7", key, "json") == ("type", "@key.id[0]")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "character 1, where a path"),
        ("kind ==", "character 8, where a string in quotes, a number"),
        ("kind = = 'a'", "character 8, where a string in quotes"),
        ("kind == buy", "character 9, where a string in quotes"),
        ("'buy' == kind", "character 1, where a path"),
        ("kind == 'buy", "character 9, where a path, an operator, a string in quotes"),
        ("kind == 'a' kind", 'character 13, where "and", "or" or the end'),
        ("kind == 'a' and", "character 16, where a path"),
        ("(kind == 'a'", r'character 13, where "\)"'),
        ("kind == 'a')", 'character 12, where "and", "or" or the end'),
        ("kind in 'a'", "character 9, where a list such as"),
        ("kind in ['a']", "character 9, where"),
        ("kind in ()", "character 10, where a string in quotes"),
        ("kind in ('a' 'b')", 'character 14, where "," or'),
        ("kind not == 'a'", 'character 10, where "in"'),
        ("kind is 'a'", 'character 9, where "null"'),
        ("kind == null", 'compares with null, which is never true: write "is null"'),
        ("kind in ('a', null)", "compares with null"),
        ("yes in (true)", "holds strings and numbers"),
        ("yes > true", "true and false have no order"),
        ("n == 1e999", "a number that is too large"),
        ("n == 12abc", "character 6, where"),
        ("n == 1 + 1", "character 8, where"),
        ("n & 1", "character 3, where"),
        ("__import__('os')", "character 11, where"),
        ("a[0", "character 2, where"),
        ("a[999] == 1", "an index is a number from 0 to 255"),
        ("@ofset == 1", "there is no @ofset"),
        ("@topic.x == 'a'", "has nothing below it"),
        ("(" * 31 + "a", "more than 30 parentheses"),
        ("(" * 3000, "more than 30 parentheses"),
        ("a == 1" + " " * 4000, "longer than 4,000"),
        ("@offset == '5'", "@offset is a number, and is compared with something else"),
        ("@timestamp > '2026-01-01'", "milliseconds since 1970"),
        ("@headers.v == 2", "@headers.v is text"),
        ("@headers.v", "@headers.v is text"),
        ("@topic in ('a', 2)", "@topic is text"),
        ("@key == 'a'", '@key is bytes, and goes with .* alone, unless key_format is "text" or "json"'),
        ("@value == 'a'", '@value is bytes, and goes with "is null" and "is not null" alone$'),
    ],
)
def test_no_where(text: str, told: str) -> None:
    """What is no `where` is refused by a sentence that says where and what; none of it becomes code."""
    with pytest.raises(ValueError, match=told):
        where.check(where.parse(text), "bytes")


def test_as_deep_and_long_as_it_may_be() -> None:
    """The deepest and the longest that is read is compiled, too."""
    assert takes("(not " * 30 + "yes" + ")" * 30)
    assert takes("(" * 30 + "no or " + " or ".join(f"n == {number}" for number in range(200)) + ")" * 30)


# A handler.

COLUMN = Column(name="n", oid=20, typmod=-1, type_name="bigint", not_null=True, automatic=False)


def encoded(text: str, *bodies: bytes | None) -> tuple[list[Any], list[int], dict[int, str], dict[Any, int]]:
    """Encode messages by a handler; give its rows, their positions, reasons of refusals, and what was skipped."""
    data = {
        "name": "h",
        "path": Path("h.toml"),
        "topics": ["o"],
        "table": {"name": "t", "write": "append", "tombstones": "dead-letter"},
        "where": text,
    }
    handler = HandlerConfig.model_validate(data, by_name=False, by_alias=True, context={"folder": Path("/etc")})
    encoder = Encoder(Table(name="t", identifier="t", columns=(COLUMN,), unique=(), fingerprint=""), handler)
    refused: dict[int, Refusal] = {}
    rows = encoder.encode([Fake(body) for body in bodies], refused)
    return rows.rows, list(rows.positions), {at: each.reason for at, each in refused.items()}, dict(rows.skipped)


def test_handler_skips() -> None:
    """What is not taken is neither row nor letter, and is counted; the others keep their positions."""
    found = encoded(
        "kind == 'buy'", b'{"kind": "buy", "n": 1}', b'{"kind": "sell", "n": 2}', b'{"kind": "buy", "n": 3}'
    )
    assert found == ([(1,), (3,)], [0, 2], {}, {"where": 1})


def test_handler_with_poison() -> None:
    """Poison stays poison if it is taken or cannot be told; what is not taken is passed over, whatever it holds."""
    found = encoded(
        "kind == 'buy'",
        b'{"kind": "buy", "n": "x"}',
        b'{"kind": "sell", "n": "x"}',
        b'{"kind": "sell"}',
        b'{"kind": 5, "n": 1}',
        b"{",
        b'{"kind": "buy", "n": 7}',
        b'{"n": 1}',
    )
    assert found == ([(7,)], [5], {0: "type", 3: "type", 4: "malformed"}, {"where": 3})


def test_message_without_a_value() -> None:
    """A tombstone is judged by a `where` that reads no field; by another it is not passed over."""
    assert encoded("kind == 'buy'", None, b"") == ([], [], {0: "missing", 1: "malformed"}, {})
    assert encoded("@topic == 'orders'", None, b'{"n": 1}') == ([(1,)], [1], {0: "missing"}, {})
    assert encoded("@topic == 'x'", None, b"", b"{") == ([], [], {}, {"where": 3})
    assert encoded("@value is not null", None, b'{"n": 1}') == ([(1,)], [1], {}, {"where": 1})
    assert encoded("@value is not null", None, b'{"n": "x"}') == ([], [], {1: "type"}, {"where": 1})
