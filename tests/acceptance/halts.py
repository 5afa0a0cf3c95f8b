"""What the tests of halts share: small messages, small tables, and what a halt must say."""

import json
from collections.abc import Iterable
from typing import Any

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.acceptance.events import wait_for_halt
from tests.servers.daemon import Daemon, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

TIMEOUT = 30  # seconds for anything that a test waits for
UPSERT = {"write": "upsert", "key": ["id"]}


def handler(topic: str, table: str, /, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler of ``topic`` into ``table``, in append unless told otherwise."""
    return {
        "topics": [topic],
        "table": {"name": table, "write": "append"},
        "batch": {"max_age": "100ms"},
        "dead_letter": {"create": True},
        **more,
    }


def send(kafka: KafkaServer, topic: str, numbers: Iterable[int] = range(10)) -> None:
    """Produce ``{"id": i, "n": i}`` for each number."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number in numbers:
        producer.produce(topic, json.dumps({"id": number, "n": number}).encode(), partition=0)
    assert producer.flush(TIMEOUT) == 0


def expect_rows(database: str, table: str, numbers: Iterable[int] = range(10)) -> None:
    """Wait until the table has as many rows as numbers were sent, and compare them."""
    expected = [(number, number) for number in numbers]
    wait_until(lambda: len(landed(database, table)) >= len(expected), TIMEOUT, f"{len(expected)} rows in {table}")
    assert expected == landed(database, table)


def landed(database: str, table: str) -> list[tuple[Any, ...]]:
    """Return a table's rows."""
    return execute(database, f"SELECT id, n FROM {table} ORDER BY id")


def expect_halt(daemon: Daemon, name: str, *essential: str) -> str:
    """Wait until a handler has halted with these words, in /status and in the log; return its sentence."""
    sentence = wait_for_halt(daemon, name)
    assert [] == [words for words in essential if words not in sentence], sentence
    lines = [json.loads(line) for line in daemon.logs().splitlines()]
    assert f"halted: {sentence}" in [line["message"] for line in lines if line.get("handler") == name]
    return sentence


def expect_not_ready(daemon: Daemon, *halted: str) -> None:
    """Expect a /readyz of 503 that names the halted handlers and no others, in a process that is healthy."""
    code, body = daemon.get("/readyz")
    assert (503, {f"{name}: halted" for name in halted}) == (code, set(body.splitlines()))
    assert 200 == daemon.get("/healthz")[0]


def make_tables(database: str, *names: str) -> None:
    """Make tables as ``send`` fills them."""
    execute(database, "; ".join(f"CREATE TABLE {name} (id bigint, n bigint)" for name in names))


def checkpoint(database: str, group: str) -> int | None:
    """Return the checkpoint of a group's partition 0."""
    rows = execute(database, f"SELECT next_offset FROM consumerd.checkpoint WHERE group_id = '{group}'")
    return rows[0][0] if rows else None


def letters(kafka: KafkaServer, topic: str) -> int:
    """Count what a topic of one partition holds."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": "count"})
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=TIMEOUT)
    consumer.close()
    return int(high - low)


def set_offset(admin: AdminClient, group: str, topic: str, offset: int) -> None:
    """Do what ``kafka-consumer-groups --reset-offsets --execute`` does."""
    wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, offset)])
    (future,) = admin.alter_consumer_group_offsets([wanted]).values()
    (answer,) = future.result(TIMEOUT).topic_partitions
    assert answer.error is None


def restart(daemon: Daemon, handlers: dict[str, dict[str, Any]] | None = None) -> None:
    """Start a stopped daemon, with other handlers if they are given; all must run now."""
    if handlers is not None:
        write_config(daemon.config.parent, daemon.config.read_text(encoding="utf-8"), handlers)
    daemon.start()
    daemon.wait_ready()
