"""The headers of a letter: Kafka Connect's names and ours (interface.md), and never a value of the row."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from consumerd.accumulator import Batch
from consumerd.catalog import Column, Table
from consumerd.config import HandlerConfig, PoisonConfig
from consumerd.dead_letter import headers
from consumerd.encode import Encoder
from consumerd.errors import Refusal
from consumerd.types import TopicPartition

CONNECT = "__connect.errors."
NAMES = [
    "__connect.errors.topic",
    "__connect.errors.partition",
    "__connect.errors.offset",
    "__connect.errors.connector.name",
    "__connect.errors.stage",
    "__connect.errors.class.name",
    "__connect.errors.exception.class.name",
    "__connect.errors.exception.message",
    "consumerd.group",
    "consumerd.reason",
    "consumerd.sqlstate",
    "consumerd.column",
    "consumerd.timestamp",
    "consumerd.failed_at",
    "consumerd.attempt",
]
REFUSAL = Refusal(
    reason="rejected",
    stage="write",
    error="psycopg.errors.UniqueViolation",
    message="refused by Postgres: UniqueViolation, constraint orders_pkey",
    sqlstate="23505",
    column="id",
)
Given = Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Fake:
    """A message."""

    body: bytes | None = b"{}"
    given: Given | None = None
    time: tuple[int, int] = (1, 1_600_000_000_123)

    def __len__(self) -> int:
        return len(self.body or b"")

    def topic(self) -> str:
        """Give some topic."""
        return "orders"

    def partition(self) -> int:
        """Give some partition."""
        return 0

    def key(self) -> bytes | None:
        """Give none."""
        return None

    def value(self) -> bytes | None:
        """Give the value."""
        return self.body

    def offset(self) -> int:
        """Give an offset."""
        return 4711

    def leader_epoch(self) -> int | None:
        """Give none."""
        return None

    def timestamp(self) -> tuple[int, int]:
        """Give kind and time."""
        return self.time

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        """Give the message's own headers."""
        return None if self.given is None else list(self.given)


HANDLER = HandlerConfig.model_validate(
    {"name": "loader", "path": Path("loader.toml"), "topics": ["orders"], "table": {"name": "t", "write": "append"}},
    by_name=False,
    by_alias=True,
    context={"folder": Path("/etc/consumerd")},
)


def batch(message: Fake) -> Batch:
    """Make a batch of one message."""
    return Batch(
        partition=TopicPartition("orders", 3),
        first_offset=message.offset(),
        next_offset=message.offset() + 1,
        messages=[message],
        size=1,
        reason="age",
        gathered_since=0.0,
    )


def made(message: Fake, refusal: Refusal = REFUSAL) -> list[tuple[str, bytes | None]]:
    """Make the headers of a letter."""
    return headers(HANDLER, batch(message), message, refusal)


def test_names_and_values() -> None:
    """A letter has all headers of interface.md, as text, and its failure's time in RFC 3339."""
    before = dt.datetime.now(dt.UTC)
    found = made(Fake())
    assert [name for name, _ in found] == NAMES
    values = {name: (value or b"").decode() for name, value in found}
    failed_at = dt.datetime.fromisoformat(values.pop("consumerd.failed_at"))
    assert before <= failed_at <= dt.datetime.now(dt.UTC)
    assert failed_at.utcoffset() == dt.timedelta(0)
    assert values == {
        f"{CONNECT}topic": "orders",
        f"{CONNECT}partition": "3",
        f"{CONNECT}offset": "4711",
        f"{CONNECT}connector.name": "loader",
        f"{CONNECT}stage": "TASK_PUT",
        f"{CONNECT}class.name": "consumerd",
        f"{CONNECT}exception.class.name": "psycopg.errors.UniqueViolation",
        f"{CONNECT}exception.message": "refused by Postgres: UniqueViolation, constraint orders_pkey",
        "consumerd.group": "consumerd.loader",
        "consumerd.reason": "rejected",
        "consumerd.sqlstate": "23505",
        "consumerd.column": "id",
        "consumerd.timestamp": "1600000000123",
        "consumerd.attempt": "1",
    }


@pytest.mark.parametrize("error_text", [False, True])
def test_error_text(error_text: bool) -> None:
    """The database's own words are in a letter where `poison.error_text` says so, and only there."""
    words = "duplicate key value; Key (id)=(8675309) already exists."
    refusal = replace(REFUSAL, words=words)
    handler = HANDLER.model_copy(update={"poison": PoisonConfig(error_text=error_text)})
    message = Fake()
    found = dict(headers(handler, batch(message), message, refusal))
    expected = f"{REFUSAL.message}: {words}" if error_text else REFUSAL.message
    assert expected.encode() == found.pop(f"{CONNECT}exception.message")
    assert not any(b"8675309" in (value or b"") for value in found.values())


def test_what_is_not_known_is_left_out() -> None:
    """Without SQLSTATE, column or timestamp there is no such header."""
    refusal = Refusal(reason="malformed", stage="decode", error="E", message="m")
    found = dict(made(Fake(time=(0, 0)), refusal))
    assert set(NAMES) - set(found) == {"consumerd.sqlstate", "consumerd.column", "consumerd.timestamp"}
    assert found[f"{CONNECT}stage"] == b"VALUE_CONVERTER"


def test_one_failure_is_told_from_another() -> None:
    """P1: the topic's id and the checkpoint's epoch are in the letter: a topic may be made again, or be read again."""
    found = dict(headers(HANDLER, batch(Fake()), Fake(), REFUSAL, topic_id="4Pd0wj8nT", epoch=7))
    assert (b"4Pd0wj8nT", b"7") == (found["consumerd.topic_id"], found["consumerd.epoch"])


def test_own_headers_stay() -> None:
    """The message's own headers come first, in order, byte for byte, repeated and without value too."""
    own: Given = [("trace", b"\xff\x00"), ("x", None), ("x", b""), ("trace", b"2"), ("consumerdx", b"own")]
    assert made(Fake(given=own))[:5] == own


def test_second_failure_replaces_ours() -> None:
    """A letter that fails again has our headers once, of the second failure; its own stay; the attempt counts on."""
    second = made(
        Fake(given=[("trace", b"1"), *made(Fake())]), Refusal(reason="type", stage="decode", error="E", message="m")
    )
    names = [name for name, _ in second]
    assert [name for name in names if names.count(name) > 1] == []
    found = dict(second)
    assert (found["trace"], found["consumerd.attempt"], found["consumerd.reason"]) == (b"1", b"2", b"type")
    assert "consumerd.sqlstate" not in found
    third = made(Fake(given=second))
    assert dict(third)["consumerd.attempt"] == b"3"


@pytest.mark.parametrize("attempt", [None, b"", b"x", b"-1", b"1.5", "²".encode(), b"9" * 5000])
def test_foreign_attempt(attempt: bytes | None) -> None:
    """A count that is none of ours begins at 1 again."""
    assert dict(made(Fake(given=[("consumerd.attempt", attempt)])))["consumerd.attempt"] == b"1"


TYPES = {
    "b": ("boolean", 16),
    "s": ("smallint", 21),
    "i": ("bigint", 20),
    "f": ("double precision", 701),
    "n": ("numeric", 1700),
    "t": ("text", 25),
    "v": ("character varying(3)", 1043),
    "z": ("timestamp with time zone", 1184),
    "u": ("uuid", 2950),
}
SECRET = "8675309"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    "literal",
    [
        f'"{SECRET}"',
        SECRET * 30,
        f"-{SECRET}.{SECRET}e-{SECRET}",
        f"{SECRET}e{SECRET}",
        f'["{SECRET}"]',
        f'{{"{SECRET}": "{SECRET}"}}',
        f'"{SECRET}\\ud800"',
        f'"{SECRET}\\u0000{SECRET}',
        SECRET + "x",
    ],
)
def test_no_value_of_the_row(name: str, literal: str) -> None:
    """Whatever is wrong with a value, no header but the message's own holds it."""
    type_name, oid = TYPES[name]
    column = Column(
        name=name,
        oid=oid,
        typmod=7 if "(3)" in type_name else -1,
        type_name=type_name,
        not_null=True,
        automatic=False,
    )
    table = Table(name="t", identifier="t", columns=(column,), unique=(), fingerprint="")
    it = batch(Fake(body=f'{{"{SECRET}": 1, "{name}": {literal}}}'.encode()))
    Encoder(table, HANDLER).encode(it.messages, it.refused)
    for refusal in it.refused.values():
        assert [(key, value) for key, value in made(Fake(), refusal) if SECRET.encode() in (value or b"")] == []
