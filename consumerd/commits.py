"""Offsets on their way to Kafka: the newest for each partition, one request at a time.

The loop leaves offsets, the Kafka thread sends them; a lock is between the two. A synchronous `commit()` has no
timeout (seen: over 100 s with the broker down), so commits are asynchronous and their callback settles whoever waits.
Commits in Kafka inform; what counts is the checkpoint in Postgres, so one that fails is only sent again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import confluent_kafka as ck

from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

log = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two requests."""
TIMEOUT = 10.0
"""Seconds after which a request that was not answered no longer holds back the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """An offset to commit, with its stamp."""

    partition: TopicPartition
    offset: int
    leader_epoch: int | None
    metadata: str


class Commits:
    """What one consumer has to commit. `tell` calls a function on the event loop."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._waiting: dict[TopicPartition, Commit] = {}
        self._awaited: list[tuple[Commit, asyncio.Future[None]]] = []
        self._urgent = False
        # Only the Kafka thread touches these.
        self._sent: dict[TopicPartition, Commit] = {}
        self._unanswered = 0
        self._sent_at = 0.0
        self._next = 0.0

    def leave(self, commits: Iterable[Commit]) -> None:
        """Leave offsets to be committed soon; newer ones replace older ones. Called on the loop."""
        with self._lock:
            self._waiting.update({commit.partition: commit for commit in commits})

    def drop(self, partitions: Iterable[TopicPartition]) -> None:
        """Drop what was left of partitions that are lost, since the thread forgot them. Called on the loop.

        A write may have ended in between; the partition may come back, and others commit meanwhile.
        """
        with self._lock:
            for partition in partitions:
                self._waiting.pop(partition, None)

    def promise(self, commits: Sequence[Commit]) -> list[asyncio.Future[None]]:
        """Commit offsets now; each future is done when the broker has acknowledged its commit. Called on the loop."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[None]] = [loop.create_future() for _ in commits]
        with self._lock:
            self._waiting.update({commit.partition: commit for commit in commits})
            self._awaited += zip(commits, futures, strict=True)
            self._urgent = True
        return futures

    def send(self, consumer: ck.Consumer, owned: Collection[TopicPartition], now: float, *, at_once: bool) -> None:
        """Send what is due. Offsets of partitions that are not owned are dropped: a broker would take them."""
        if self._unanswered and now - self._sent_at < TIMEOUT and not at_once:
            return
        with self._lock:
            if not self._waiting or (now < self._next and not self._urgent and not at_once):
                return
            commits, self._waiting, self._urgent = self._waiting, {}, False
            self._awaited = [entry for entry in self._awaited if entry[0].partition in owned]
        commits = {partition: commit for partition, commit in commits.items() if partition in owned}
        if commits:
            offsets = [
                ck.TopicPartition(*c.partition, c.offset, c.metadata, -1 if c.leader_epoch is None else c.leader_epoch)
                for c in commits.values()
            ]
            consumer.commit(offsets=offsets, asynchronous=True)
            self._sent |= commits
            self._unanswered += 1
            self._sent_at, self._next = now, now + INTERVAL

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Drop what is left of partitions that are given up: they may come back, and others commit in between."""
        gone = set(partitions)
        with self._lock:
            for partition in gone:
                self._waiting.pop(partition, None)
                self._sent.pop(partition, None)
            self._awaited = [entry for entry in self._awaited if entry[0].partition not in gone]

    def on_answer(self, error: ck.KafkaError | None, partitions: list[ck.TopicPartition]) -> None:
        """Settle those who wait; what failed is sent again, unless it was replaced. Called on the Kafka thread."""
        self._unanswered -= 1
        failed = {TopicPartition(p.topic, p.partition): error or p.error for p in partitions if error or p.error}
        if failed:
            reason = next(iter(failed.values()))
            log.warning("a commit to Kafka failed; the checkpoint stands", extra={"error": str(reason)})
        good = {
            (p.topic, p.partition, p.offset) for p in partitions if TopicPartition(p.topic, p.partition) not in failed
        }
        with self._lock:
            settled = [future for commit, future in self._awaited if (*commit.partition, commit.offset) in good]
            self._awaited = [entry for entry in self._awaited if entry[1] not in settled and not entry[1].done()]
            for partition in failed:
                if partition in self._sent:
                    self._waiting.setdefault(partition, self._sent[partition])
        for future in settled:
            self._tell(_acknowledge, future)

    def all_answered(self) -> bool:
        """Whether nothing is left to send or to be answered."""
        with self._lock:
            return not self._waiting and self._unanswered <= 0


def _acknowledge(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
