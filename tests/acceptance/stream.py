"""A numbered stream with a known share of poison, and the comparison of what arrived with what was sent.

Every record carries its number; every seventeenth or so is poison of one kind after another. What the broker took is
noted by its delivery report, so table and letters are compared record by record, not by counts.
"""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

POISON_EVERY = 47
"""One record in this many is poison: 2 %, below the breaker's 5 %."""
LETTERS_IDLE = 20.0
"""Seconds in which more of a dead-letter topic must come."""

TABLE = """
CREATE TABLE {name} (
    n bigint {constraint}, grp integer NOT NULL, amount numeric(12, 2) CHECK (amount >= 0), label varchar(12), doc jsonb
)"""

COLUMNS = {name: name for name in ("n", "grp", "amount", "label", "doc")}
"""All of them, for a handler whose table has more."""

SLOW_COMMIT = """
CREATE FUNCTION slow_{name}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.03); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER slow AFTER INSERT OR UPDATE ON {name} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.{number} % 250 = 1) EXECUTE FUNCTION slow_{name}()"""


def poison(number: int) -> bytes:
    """Return a value that cannot become a row: half of the kinds are found by the decode, half by Postgres."""
    good = record(number)
    kinds: list[bytes] = [
        b'{"n": ',
        json.dumps(good | {"grp": "many"}).encode(),
        json.dumps(good | {"grp": 2**31}).encode(),
        json.dumps(good | {"label": "far too long a label"}).encode(),
        json.dumps(good | {"amount": -1}).encode(),
        json.dumps(good | {"doc": "\0"}).encode(),
        json.dumps(good | {"label": "\0"}).encode(),
    ]
    return kinds[(number // POISON_EVERY) % len(kinds)]


def record(number: int) -> dict[str, Any]:
    """Return a good record; `grp` is the key that upsert tests use."""
    return {
        "n": number,
        "grp": number % 1000,
        "amount": number / 4,
        "label": f"l{number}",
        "doc": {"of": number, "list": [number, None, "ü"]},
    }


@dataclass
class Stream:
    """What was sent to one topic: by source partition and offset, the number of each record."""

    bootstrap: str
    topic: str
    partitions: int
    sent: dict[tuple[int, int], int] = field(default_factory=dict)
    _next: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        """Make the producer."""
        self._producer = Producer(
            {
                "bootstrap.servers": self.bootstrap,
                "linger.ms": 5,
                "enable.idempotence": True,  # an outage would otherwise have it send a record twice, and report one
                "reconnect.backoff.max.ms": 100,  # what is measured is the daemon's recovery, not this one's
                "log_level": 0,
            }
        )

    def produce(self, count: int, *, per_second: float | None = None) -> None:
        """Send records; a key always goes to the same partition. Returns when the broker has all of them."""
        started = time.monotonic()
        for done in range(count):
            number = next(self._next)
            key, value = self.message(number)
            partition = number % 1000 % self.partitions

            def delivered(error: KafkaError | None, message: Message, number: int = number) -> None:
                assert error is None
                self.sent[message.partition() or 0, message.offset() or 0] = number

            while True:
                try:
                    self._producer.produce(self.topic, value, key, partition=partition, on_delivery=delivered)
                    break
                except BufferError:
                    self._producer.poll(0.1)
            self._producer.poll(0)
            if per_second and (ahead := started + done / per_second - time.monotonic()) > 0:
                self._producer.poll(ahead)
        self._producer.flush(30)

    def message(self, number: int) -> tuple[bytes, bytes | None]:
        """Return a record's key and value."""
        good = json.dumps(record(number)).encode()
        return str(number).encode(), good if number % POISON_EVERY else poison(number)

    @contextmanager
    def flowing(self, per_second: float) -> Iterator[None]:
        """Send records as long as the block lasts."""
        over = threading.Event()

        def produce() -> None:
            while not over.is_set():
                self.produce(int(per_second / 20), per_second=per_second)

        producer = threading.Thread(target=produce, name="stream", daemon=True)
        producer.start()
        try:
            yield
        finally:
            over.set()
            producer.join()

    def ends(self) -> dict[int, int]:
        """Return the offset behind the last record of each partition."""
        ends = dict.fromkeys(range(self.partitions), 0)
        for partition, offset in self.sent:
            ends[partition] = max(ends[partition], offset + 1)
        return ends

    def good(self) -> set[int]:
        """Return the numbers that belong into the table."""
        return {number for number in self.sent.values() if number % POISON_EVERY}

    def bad(self) -> set[tuple[int, int]]:
        """Return source partition and offset of each record that belongs into the dead-letter topic."""
        return {source for source, number in self.sent.items() if number % POISON_EVERY == 0}

    def latest(self) -> set[int]:
        """Return the last good number of each key: what an upsert by `grp` leaves."""
        last: dict[int, int] = {}
        for _, number in sorted(self.sent.items()):
            if number % POISON_EVERY:
                last[number % 1000] = number
        return set(last.values())

    def lettered(self) -> list[tuple[int, int]]:
        """Return source partition and offset of each letter in the dead-letter topic."""
        return [source_of(letter) for letter in letters(self.bootstrap, f"{self.topic}.dlq")]

    def check(self, dsn: str, *, letters_once: bool = False) -> None:
        """Compare table and letters with what was sent: each good record is there once, each bad one is a letter."""
        numbers = rows(dsn, "events")
        assert doubled(numbers) == {}
        assert set(numbers) == self.good()
        sources = self.lettered()
        assert set(sources) == self.bad()
        assert not letters_once or len(sources) == len(self.bad())


def make_table(dsn: str, name: str, constraint: str = "") -> None:
    """Make the table that the records fit; `constraint` stands behind its first column."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(TABLE.format(name=name, constraint=constraint))


def slow_commits(dsn: str, name: str) -> None:
    """Make COMMIT of a table's rows take a while: whoever is killed then has a transaction that commits without it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(SLOW_COMMIT.format(name=name, number="n").encode())


def rows(dsn: str, table: str) -> Counter[int]:
    """Return how often each number is in a table; a row that is not its record's counts as number -1."""
    with psycopg.connect(dsn) as conn:
        found = conn.execute(f"SELECT n, grp, amount, label, doc FROM {table}").fetchall()
    numbers: Counter[int] = Counter()
    for n, grp, amount, label, doc in found:
        same = {"n": n, "grp": grp, "amount": amount, "label": label, "doc": doc} == record(n)
        numbers[n if same else -1] += 1
    return numbers


def letters(bootstrap: str, topic: str) -> list[Message]:
    """Return everything in a dead-letter topic."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "letters", "enable.auto.commit": False})
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        ends = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[1] for p in partitions}
        consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
        found: list[Message] = []
        while missing := sum(ends.values()) - len(found):
            messages = consumer.consume(min(missing, 1000), LETTERS_IDLE)
            assert messages, f"{topic} ends early: {len(found)} of {sum(ends.values())}"
            found += [message for message in messages if message.error() is None]
        return found
    finally:
        consumer.close()


def source_of(letter: Message) -> tuple[int, int]:
    """Return the source partition and offset that a letter's headers name."""
    headers = dict(letter.headers() or [])
    return (
        int(headers["__connect.errors.partition"] or b""),
        int(headers["__connect.errors.offset"] or b""),
    )


def doubled(numbers: Counter[int]) -> dict[int, int]:
    """Return the numbers that are there more than once."""
    return {number: count for number, count in numbers.items() if count > 1}
