"""What librdkafka is told about memory follows from the bound."""

from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError

from consumerd.brokers import FETCHED_PARTITIONS, MAX_FETCH, POLL_INTERVAL_MS, consumer_config
from consumerd.config import KafkaConfig
from consumerd.kafka import ConsumerThread

MIB = 1 << 20


@pytest.mark.parametrize(
    ("memory", "queued_kbytes", "queued_messages", "fetch"),
    [
        (64 * MIB, 64 * 1024, 16_384, MAX_FETCH),
        (8 * MIB, 8 * 1024, 2_048, 512 * 1024),
        (2 * MIB, 2 * 1024, 512, 128 * 1024),
        (1, 1, 1, 4 * 1024),
    ],
)
def test_limits(memory: int, queued_kbytes: int, queued_messages: int, fetch: int) -> None:
    """Rule 29: queue and fetches are in proportion to the memory, and librdkafka takes them."""
    config = consumer_config(KafkaConfig.model_validate({"bootstrap_servers": "localhost:9092"}), "group", memory)
    assert config["queued.max.messages.kbytes"] == queued_kbytes
    assert config["queued.min.messages"] == queued_messages
    assert config["fetch.max.bytes"] == config["message.max.bytes"] == fetch
    assert config["fetch.message.max.bytes"] == fetch // FETCHED_PARTITIONS
    Consumer(config).close()


@pytest.mark.parametrize(
    ("properties", "interval"),
    [
        ({}, POLL_INTERVAL_MS),
        ({"group.protocol": "consumer"}, POLL_INTERVAL_MS),
        ({"session.timeout.ms": 90_000}, 90_000),
        ({"session.timeout.ms": "120000"}, 120_000),
        ({"max.poll.interval.ms": 300_000}, 300_000),
    ],
)
def test_how_long_a_group_waits_for_a_member(properties: dict[str, str | int], interval: int) -> None:
    """A rebalance waits a minute for a member that does not answer, or its session, if that is longer."""
    kafka = KafkaConfig.model_validate({"bootstrap_servers": "localhost:9092", "properties": properties})
    config = consumer_config(kafka, "group", MIB)
    assert int(config["max.poll.interval.ms"]) == interval
    Consumer(config).close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (KafkaError.GROUP_AUTHORIZATION_FAILED, "grant this principal READ on the topic and on the group"),
        (KafkaError.INVALID_SESSION_TIMEOUT, 'correct "session.timeout.ms" under [kafka.properties]'),
    ],
)
def test_what_brokers_always_refuse(code: int, words: str) -> None:
    """What a group refuses, and will refuse again, is a halt that begins with the group and ends with the way on."""
    told: list[Exception] = []
    listener = SimpleNamespace(failed=None)
    thread: Any = SimpleNamespace(
        _config={"group.id": "mine"}, _listener=listener, _tell=lambda _, halt: told.append(halt)
    )
    message: Any = SimpleNamespace(error=lambda: KafkaError(code), topic=lambda: None, partition=lambda: 0)
    ConsumerThread._on_event(thread, SimpleNamespace(), message)  # type: ignore[arg-type]
    (halt,) = told
    assert str(halt).startswith(f"group mine: {KafkaError(code).str()}: {words}")
