"""What a writer does with a batch between two tries."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from consumerd import postgres, writer
from consumerd.accumulator import Batch
from consumerd.checkpoint import Lease
from consumerd.errors import Cancelled, ConsumerdError, Outage, Refusal
from consumerd.packed import Packed
from consumerd.types import Message, TopicPartition
from consumerd.writer import Work, Writer
from tests.unit.test_accumulator import Fake


def a_batch(messages: int) -> Batch:
    """Make a batch of a partition."""
    fakes: list[Message] = [Fake(at) for at in range(messages)]
    return Batch(
        partition=TopicPartition("orders", 0),
        first_offset=0,
        next_offset=messages,
        messages=fakes,
        size=messages,
        reason="age",
        gathered_since=0.0,
    )


def a_work(batch: Batch) -> Work:
    """Return a write of one batch."""
    return [(batch, Lease(epoch=1, next_offset=0, max_offset=0))]


@pytest.mark.parametrize(
    ("error", "in_doubt"),
    [(Outage("postgres", "the connection was lost"), True), (Cancelled("postgres", "too long"), False)],
)
def test_what_may_be_committed_is_not_cut(
    error: ConsumerdError, in_doubt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose COMMIT was not answered goes again whole: of its parts none would find its own checkpoint."""

    @asynccontextmanager
    async def transaction(*_: object, **__: object) -> AsyncIterator[list[list[tuple[Any, ...]]]]:
        yield [[("orders", 0)], [], [("as it was",)]]
        raise error

    async def connection(*_: object) -> None:
        pass

    monkeypatch.setattr(postgres, "transaction", transaction)
    monkeypatch.setattr(Writer, "_connection", connection)
    member = MagicMock(limit=100, transformer=None, packing=asyncio.Lock(), confirm_topics=AsyncMock())
    member.letters.send, member.checkpoints.mode = AsyncMock(), "postgres"
    mapping = cast("Any", SimpleNamespace(table=SimpleNamespace(fingerprint="as it was", name="t", lock=""), sink=None))
    mapping.sink = AsyncMock()
    mapping.sink.write.return_value = 0
    batch = a_batch(100)
    batch.packed = [Packed(mapping=mapping, messages=100, rows=100)]
    one, work = Writer(member, "writer"), a_work(batch)

    async def tries() -> None:
        for _ in range(2):
            with pytest.raises(Outage):
                await one._step(work, mapping)
            member.limit = 50

    asyncio.run(tries())
    assert in_doubt is (not member.split.called)


def test_what_an_altered_table_may_take() -> None:
    """What was refused for the table as it was, by Postgres too, is tried again; what letters tell of stays."""
    refusal = Refusal(reason="rejected", stage="write", error="Error", message="refused")
    batch = a_batch(3)
    batch.refused = {0: refusal, 1: refusal, 2: refusal}
    batch.lettered, batch.on_their_way = {1}, {2}
    writer._forget_refusals(a_work(batch))
    assert {1, 2} == batch.refused.keys()
