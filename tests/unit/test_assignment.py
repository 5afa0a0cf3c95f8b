"""A partition that is assigned is leased sooner or later, whatever comes in between."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumerd.assignment import Assignment
from consumerd.brokers import Found
from consumerd.decide import Stored
from consumerd.types import TopicPartition

PARTITION = TopicPartition("orders", 0)


class Checkpoints:
    """Lets a claim succeed, and then a zombie's come before it is placed."""

    mode = "postgres"
    target = "orders"

    async def claim(self, *_: object) -> dict[TopicPartition, Stored]:
        """Claim it."""
        return {PARTITION: Stored(epoch=1, next_offset=None, max_offset=None, topic_id=None, target="orders")}

    async def place(self, *_: object) -> bool:
        """Find another epoch."""
        return False


class Thread:
    """Knows one partition."""

    async def found(self, _: object) -> dict[TopicPartition, Found]:
        """Find no committed offset."""
        return {PARTITION: Found(low=0, high=9, committed=None, metadata=None)}


async def test_a_claim_that_a_zombies_overtook_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition that another member claimed before it was placed is claimed again, if it is assigned here still."""
    again: list[TopicPartition] = []
    monkeypatch.setattr(Assignment, "claim_later", lambda _, partition: again.append(partition))
    assignment = Assignment(
        cast("Any", SimpleNamespace(bootstrap_servers="broker:9092")),
        cast("Any", SimpleNamespace(name="orders", group_id="orders", start="earliest")),
        topics={},
        store="store",
        checkpoints=cast("Any", Checkpoints()),
        thread=cast("Any", Thread()),
        on_commit=lambda: None,
    )
    assignment.assign([PARTITION])
    assert await assignment.claim(await assignment.next_to_claim(), cast("Any", None)) == {}
    assert again == [PARTITION]
