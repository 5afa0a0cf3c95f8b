# ruff: noqa: D102 - the methods are confluent_kafka's, documented there
"""The words that all modules share."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        """As Kafka's own tools write it: `orders:3`."""
        return f"{self.topic}:{self.partition}"


class Tally(NamedTuple):
    """What the breaker has counted of a partition, as it is kept beside the checkpoint."""

    messages: int = 0
    refused: int = 0
    age: float = 0.0
    """Seconds since the last of them was counted."""


NO_TALLY = Tally()


class Message(Protocol):
    """What the path needs of a consumed message (`confluent_kafka.Message` has it)."""

    def __len__(self) -> int: ...
    def topic(self) -> str: ...
    def partition(self) -> int: ...
    def key(self) -> bytes | None: ...
    def value(self) -> bytes | None: ...
    def offset(self) -> int: ...
    def leader_epoch(self) -> int | None: ...
    def timestamp(self) -> tuple[int, int]: ...
    def headers(self) -> list[tuple[str, bytes | None]] | None: ...
