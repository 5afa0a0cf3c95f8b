"""A partition that is assigned is leased sooner or later, whatever comes in between."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumerd.assignment import Assignment
from consumerd.brokers import Found
from consumerd.decide import Stored
from consumerd.types import TopicPartition

PARTITION, OTHER = TopicPartition("orders", 0), TopicPartition("orders", 1)


class Checkpoints:
    """Lets each claim succeed, and then a zombie's come before it is placed, unless told otherwise."""

    mode = "postgres"

    def __init__(self, *, placed: bool) -> None:
        self._placed = placed

    def target(self, _: str) -> str:
        """Return the one table."""
        return "orders"

    async def claim(self, _: object, partitions: list[TopicPartition], *__: object) -> dict[TopicPartition, Stored]:
        """Claim them."""
        stored = Stored(epoch=1, next_offset=None, max_offset=None, topic_id=None, target="orders")
        return dict.fromkeys(partitions, stored)

    async def place(self, *_: object, **__: object) -> bool:
        """Find the claim's epoch, or another."""
        return self._placed


class Thread:
    """Knows partitions without a committed offset, of which some have no leader."""

    def __init__(self, *leaderless: TopicPartition) -> None:
        self._leaderless = leaderless
        self.commits = SimpleNamespace(leave=lambda _: None)

    async def found(self, partitions: list[TopicPartition]) -> dict[TopicPartition, Found]:
        """Find no committed offset."""
        return {
            partition: Found(bounds=None if partition in self._leaderless else (0, 9), committed=None, metadata=None)
            for partition in partitions
        }


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[TopicPartition]:
    """Note what is to be claimed later."""
    noted: list[TopicPartition] = []
    monkeypatch.setattr(Assignment, "claim_later", lambda _, partition, *__: noted.append(partition))
    return noted


def make(thread: Thread, *, placed: bool) -> Assignment:
    """Make what assigns partitions of one handler."""
    return Assignment(
        cast("Any", SimpleNamespace(bootstrap_servers="broker:9092")),
        cast("Any", SimpleNamespace(name="orders", group_id="orders", start="earliest")),
        topics={},
        store="store",
        checkpoints=cast("Any", Checkpoints(placed=placed)),
        thread=cast("Any", thread),
        on_commit=lambda: None,
    )


async def test_a_claim_that_a_zombies_overtook_is_made_again(again: list[TopicPartition]) -> None:
    """A partition that another member claimed before it was placed is claimed again, if it is assigned here still."""
    assignment = make(Thread(), placed=False)
    assignment.assign([PARTITION])
    assert await assignment.claim(await assignment.next_to_claim(), cast("Any", None)) == {}
    assert again == [PARTITION]


async def test_a_partition_without_a_leader_holds_up_no_other(again: list[TopicPartition]) -> None:
    """What brokers can tell of is leased; the other is told of, and claimed later; when it goes nothing is told."""
    assignment = make(Thread(PARTITION), placed=True)
    assignment.assign([PARTITION, OTHER])
    leases = await assignment.claim(await assignment.next_to_claim(), cast("Any", None))
    assert {partition: lease.next_offset for partition, lease in leases.items()} == {OTHER: 0}
    assert again == [PARTITION]
    assert "orders:0 has no leader" in str(assignment.held_up[PARTITION])
    assignment.unassign([PARTITION])
    assert not assignment.held_up
