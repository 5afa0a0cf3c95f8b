"""What a transform made of messages becomes rows, all of a message's or none, and the books balance."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumerd.accumulator import Batch
from consumerd.catalog import Column, Table
from consumerd.config import HandlerConfig, TransformConfig
from consumerd.encode import Encoder
from consumerd.errors import Halt, Outage, Refusal
from consumerd.live_table import Mapping
from consumerd.packed import Packed
from consumerd.sinks.append import Append
from consumerd.transform import Outcome
from consumerd.types import TopicPartition
from consumerd.writer import Writer, _packed

COLUMN = Column(name="n", oid=20, typmod=-1, type_name="bigint", not_null=True, automatic=False)
TABLE = Table(name="t", identifier="public.t", columns=(COLUMN,), unique=(), fingerprint="")
REFUSED = Refusal(reason="transform", stage="transform", error="ValueError", message="ValueError at orders.py:1")


@dataclass(frozen=True)
class Fake:
    """A message."""

    body: bytes | None = b"{}"
    at: int = 0

    def __len__(self) -> int:
        return len(self.body or b"")

    def value(self) -> bytes | None:
        """Give the value."""
        return self.body

    def key(self) -> None:
        """Give none."""

    def headers(self) -> None:
        """Give none."""

    def offset(self) -> int:
        """Give the offset."""
        return self.at


@pytest.fixture
def mapping() -> Mapping:
    """Make a mapping of a table with one column, for a handler with a transform."""
    handler = HandlerConfig.model_validate(
        {
            "name": "t",
            "path": Path("/etc/consumerd/handlers/t.toml"),
            "topics": ["t"],
            "table": {"name": "t", "write": "append", "tombstones": "dead-letter"},
            "transform": {"function": "t:transform"},
        },
        by_name=False,
        by_alias=True,
    )
    assert isinstance(handler.transform, TransformConfig)
    return Mapping(Encoder(TABLE, handler), Append(TABLE, TABLE.columns), transforms=True)


def batch(*outcomes: Outcome, values: dict[int, bytes | None] | None = None) -> Batch:
    """Make a batch of messages that were transformed."""
    messages = [Fake((values or {}).get(at, b'{"n": 0}'), at) for at in range(len(outcomes))]
    return Batch(
        partition=TopicPartition("o", 0),
        first_offset=0,
        next_offset=len(outcomes),
        messages=cast("Any", messages),
        size=0,
        reason="age",
        gathered_since=0.0,
        packed=[Packed(messages=2), Packed(messages=len(outcomes) - 2)],
        outcomes=list(outcomes),
    )


OUTCOMES: list[Outcome] = [
    (b'{"n": 1}',),
    (b'{"n": 2}', b'{"n": 3}'),
    (),
    REFUSED,
    (b'{"n": 4}', b'{"n": "no"}', b"{}"),
    None,
    (b'{"n": 5}', b'{"n": 6}', b'{"n": 7}'),
    "where",
]


def test_all_rows_of_a_message_or_none(mapping: Mapping) -> None:
    """Rows come in their order; one record that does not fit refuses its message, with the reason of the first."""
    it = batch(*OUTCOMES, values={5: None})
    refused: dict[int, Refusal] = {}
    rows = mapping.rows(it.messages, refused, it.outcomes)
    assert [(1,), (2,), (3,), (5,), (6,), (7,)] == rows.rows
    assert [0, 1, 1, 6, 6, 6] == list(rows.positions)
    assert {3: "transform", 4: "type", 5: "missing"} == {at: refused[at].reason for at in sorted(refused)}


def test_a_refused_message_has_no_row(mapping: Mapping) -> None:
    """A message that Postgres refused for one of its rows has none of them written."""
    it = batch(*OUTCOMES[:2])
    rows = mapping.rows(it.messages, {1: REFUSED}, it.outcomes)
    assert [(1,)] == rows.rows


def test_nothing_is_packed_before_it_is_transformed(mapping: Mapping) -> None:
    """The Kafka thread packs nothing of a handler with a transform: it calls none."""
    packed = mapping.pack(batch(*OUTCOMES).messages)
    assert (None, 8, 0, b"") == (packed.mapping, packed.messages, packed.rows, packed.data)


def test_the_books_balance(mapping: Mapping) -> None:
    """Messages that became rows, are skipped or refused are as many as there were; rows may be more."""
    it = batch(*OUTCOMES, values={5: None})
    data = asyncio.run(_packed([(it, cast("Any", None))], mapping))
    skipped = {"transform": 1, "where": 1}
    assert (6, 3, 3, skipped) == (data.rows, it.extra, len(it.refused), dict(it.skipped))
    asyncio.run(_packed([(it, cast("Any", None))], mapping))
    assert (3, skipped) == (it.extra, dict(it.skipped))


def test_books_that_do_not_balance_are_a_halt(mapping: Mapping) -> None:
    """A row too many for the messages that there are is never written."""
    it = batch(*OUTCOMES)

    @dataclass(frozen=True)
    class Miscounted:
        def pack(self, *arguments: Any) -> Packed:  # noqa: ANN401 - as the mapping's own
            packed = mapping.pack(*arguments)
            return replace(packed, extra=packed.extra + 1)

    with pytest.raises(Halt):
        asyncio.run(_packed([(it, cast("Any", None))], cast("Any", Miscounted())))


def test_a_cut_parts_what_was_transformed() -> None:
    """The outcomes of a batch that is cut go with their messages, as far as there are any."""
    it = batch(*OUTCOMES)
    del it.outcomes[5:]
    rest = it.cut(3)
    assert (OUTCOMES[:3], OUTCOMES[3:5]) == (it.outcomes, rest.outcomes)
    assert (3, 5) == (len(it.messages), len(rest.messages))


class Calls:
    """A transformer that wants to try one batch again later, and gets through two messages of each other."""

    async def complete(self, batch: Batch) -> int:
        """Complete a batch, or raise."""
        if batch.partition.partition == 0:
            raise Outage("transform", "later")
        batch.outcomes = [()] * 2
        return 60


def transformed(*partitions: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the partitions that are transformed now, and where batches were cut."""
    cut: list[tuple[int, int]] = []
    member = SimpleNamespace(
        transformer=Calls(),
        budget=SimpleNamespace(batch=SimpleNamespace(max_bytes=100)),
        holds=lambda batch, _: batch.partition.partition != 9,
        split=lambda batch, count: cut.append((batch.partition.partition, count)),
    )
    work = [replace(batch(*OUTCOMES), partition=TopicPartition("o", partition)) for partition in partitions]
    done = asyncio.run(Writer(cast("Any", member), "w")._transformed([(one, cast("Any", None)) for one in work]))
    return [one.partition.partition for one, _ in done], cut


def test_who_waits_holds_up_nobody_else() -> None:
    """The batches of a write that can be transformed now go on; one that cannot is an outage when it is alone."""
    assert [1] == transformed(0, 1)[0]
    with pytest.raises(Outage):
        transformed(0, 0)


def test_a_write_is_what_fits_into_memory() -> None:
    """A write ends with the batch that fills the bound, a batch with what was transformed of it."""
    assert ([1, 2], [(1, 2), (2, 2)]) == transformed(1, 2, 3)
    assert ([1], [(9, 2), (1, 2)]) == transformed(9, 1)
