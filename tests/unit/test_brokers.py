"""What librdkafka is told about memory follows from the bound."""

import pytest
from confluent_kafka import Consumer

from consumerd.brokers import FETCHED_PARTITIONS, MAX_FETCH, POLL_INTERVAL_MS, consumer_config
from consumerd.config import KafkaConfig

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
