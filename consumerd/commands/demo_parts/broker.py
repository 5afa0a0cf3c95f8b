"""The embedded broker: librdkafka's mock cluster, inside this process.

It is made through ctypes on the very librdkafka that confluent_kafka has loaded, because its Python interface lacks the
calls for topics with any number of partitions and for the 3 s that a group's first rebalance waits. It runs in threads
of its own, speaks the real protocol on a loopback port, and keeps what fits into LOG_LIMIT for each partition; what is
older it drops without a word, so `bounds` is asked after every phase.
"""

from __future__ import annotations

import ctypes
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import confluent_kafka as ck
from confluent_kafka import cimpl

from consumerd.commands.demo_parts.check import Letter, Message, Source
from consumerd.commands.demo_parts.process import DemoFailed
from consumerd.dead_letter import CONNECT_PREFIX, OUR_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LOG_LIMIT = 5 * 1024 * 1024
"""Bytes that the mock cluster keeps of a partition (rdkafka_mock.c: max_size); compressed batches count as they are."""
RECORD_OVERHEAD = 40
"""Bytes that a record needs beside key, value and headers, at most: varints, and its share of a batch's header."""
CALL_TIMEOUT = 10.0
"""Seconds for one call; the broker is a thread of this process."""
READ_TIMEOUT = 0.2
"""Seconds of one look for messages, so that a signal is heard."""
READ_MESSAGES = 1000
PROGRESS_EVERY = 2000
"""Messages between two strokes of the progress bar."""
PRODUCER = 0
"""RD_KAFKA_PRODUCER"""

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rd_kafka_conf_new": (ctypes.c_void_p, ()),
    "rd_kafka_conf_set": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
    ),
    "rd_kafka_new": (ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)),
    "rd_kafka_destroy": (None, (ctypes.c_void_p,)),
    "rd_kafka_mock_cluster_new": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int)),
    "rd_kafka_mock_cluster_destroy": (None, (ctypes.c_void_p,)),
    "rd_kafka_mock_cluster_bootstraps": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "rd_kafka_mock_topic_create": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, (ctypes.c_void_p, ctypes.c_int32)),
}
"""Result and arguments of what is called (rdkafka.h, rdkafka_mock.h)."""


class Broker:
    """One broker, with the topics that are asked for."""

    def __init__(self, topics: Mapping[str, int]) -> None:
        """Start it; `topics` are names and numbers of partitions."""
        self._library = library = _library()
        error = ctypes.create_string_buffer(512)
        settings = library.rd_kafka_conf_new()
        library.rd_kafka_conf_set(settings, b"log_level", b"2", error, len(error))
        with _signals_blocked():
            self._client = library.rd_kafka_new(PRODUCER, settings, error, len(error))
            self._cluster = library.rd_kafka_mock_cluster_new(self._client, 1) if self._client else None
        if not self._cluster:
            raise DemoFailed(f"librdkafka's mock cluster does not start: {error.value.decode()}")
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        for name, partitions in topics.items():
            library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)
        self.address: str = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def close(self) -> None:
        """Stop it; what it kept is gone."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    def produce(self, topic: str, messages: Sequence[tuple[Source, Message]], progress: Callable[[int], None]) -> None:
        """Produce messages, each to be at the partition and offset of its source; raises DemoFailed if not all are."""
        _must_fit(messages)
        failures: list[str] = []

        def delivered(error: ck.KafkaError | None, _: ck.Message) -> None:
            if error is not None:
                failures.append(str(error))

        # Idempotent: in order without gaps, so that the n-th message of a partition has the offset n.
        producer = self._producer()
        for number, (source, message) in enumerate(messages):
            producer.produce(
                topic,
                value=message.value,
                key=message.key,
                headers=list(message.headers),
                timestamp=message.timestamp,
                partition=source.partition,
                on_delivery=delivered,
            )
            if number % PROGRESS_EVERY == 0:
                producer.poll(0)
                progress(number)
        left = producer.flush(CALL_TIMEOUT)
        if left or failures:
            raise DemoFailed(f"{left + len(failures)} messages were not produced: {failures[:1]}")

    def _producer(self) -> ck.Producer:
        return ck.Producer(
            {
                "bootstrap.servers": self.address,
                "compression.type": "lz4",
                "enable.idempotence": True,
                "linger.ms": 20,
                "queue.buffering.max.messages": 0,
                "log_level": 2,
            }
        )

    def bounds(self, topic: str) -> dict[int, int]:
        """Return the end of each partition's log; raises DemoFailed when the broker has dropped its beginning."""
        consumer = self._consumer()
        try:
            ends = {}
            for partition in consumer.list_topics(topic, CALL_TIMEOUT).topics[topic].partitions:
                low, high = consumer.get_watermark_offsets(ck.TopicPartition(topic, partition), CALL_TIMEOUT)
                if low != 0:
                    raise DemoFailed(f"the embedded broker dropped the first {low} messages of {topic}:{partition}")
                ends[partition] = high
            return ends
        finally:
            consumer.close()

    def letters(self, topic: str, source_topic: str) -> list[Letter]:
        """Return every letter of a dead-letter topic."""
        ends = self.bounds(topic)
        left = sum(ends.values())
        consumer = self._consumer()
        letters: list[Letter] = []
        try:
            consumer.assign([ck.TopicPartition(topic, partition, 0) for partition in ends])
            while left > len(letters):
                for message in consumer.consume(READ_MESSAGES, READ_TIMEOUT):
                    if message.error() is not None:
                        raise DemoFailed(f"reading {topic}: {message.error()}")
                    letters.append(_letter(message, source_topic))
        finally:
            consumer.close()
        return letters

    def _consumer(self) -> ck.Consumer:
        return ck.Consumer({"bootstrap.servers": self.address, "group.id": "demo", "log_level": 2})


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep signals from the threads that are begun here: they inherit the mask.

    A signal that is delivered to the mock cluster's thread interrupts its poll(), at which it ends (rdkafka_mock.c:
    rd_kafka_mock_cluster_io_poll), and who then destroys the cluster waits for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _library() -> ctypes.CDLL:
    """Return librdkafka as confluent_kafka has loaded it: the look-up goes through its module to what that links."""
    library = ctypes.CDLL(cimpl.__file__)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _must_fit(messages: Sequence[tuple[Source, Message]]) -> None:
    """Raise unless every partition fits into the broker's memory even without compression."""
    sizes: dict[int, int] = {}
    for source, (key, value, headers, _) in messages:
        size = RECORD_OVERHEAD + len(key or b"") + len(value or b"")
        size += sum(len(name) + len(content or b"") for name, content in headers)
        sizes[source.partition] = sizes.get(source.partition, 0) + size
    largest = max(sizes.values())
    if largest > LOG_LIMIT:
        raise DemoFailed(f"{largest} bytes for one partition: the embedded broker keeps {LOG_LIMIT}")


def _letter(message: ck.Message, source_topic: str) -> Letter:
    """Take a letter apart; raises DemoFailed when its headers do not say where it is from."""
    headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    own = tuple((name, value) for name, value in headers if not name.startswith((CONNECT_PREFIX, OUR_PREFIX)))
    ours = {name: (value or b"").decode() for name, value in headers if name.startswith((CONNECT_PREFIX, OUR_PREFIX))}
    try:
        if ours[f"{CONNECT_PREFIX}topic"] != source_topic:
            raise DemoFailed(f"a letter is from topic {ours[f'{CONNECT_PREFIX}topic']}, not {source_topic}")
        source = Source(int(ours[f"{CONNECT_PREFIX}partition"]), int(ours[f"{CONNECT_PREFIX}offset"]))
        reason = ours[f"{OUR_PREFIX}reason"]
    except (KeyError, ValueError) as error:
        raise DemoFailed(f"a letter's headers do not say where it is from: {error!r}") from error
    kind, timestamp = message.timestamp()
    original = Message(message.key(), message.value(), own, timestamp if kind == ck.TIMESTAMP_CREATE_TIME else -1)
    return Letter(source=source, message=original, reason=reason)
