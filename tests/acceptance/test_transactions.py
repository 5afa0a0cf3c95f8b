"""Topics of transactional producers: what was aborted is not there, and what holds no message is no lag (rule 15)."""

import json

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from tests.acceptance.stream import make_table, record, rows
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

TIMEOUT = 30


@pytest.mark.parametrize("checkpoint", ["postgres", "kafka"])
def test_a_log_that_ends_without_messages_is_drained(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, checkpoint: str
) -> None:
    """Behind a committed and an aborted transaction lag is 0, in our metrics and for Kafka's tools; and it goes on."""
    name = topic(1)
    make_table(database, "events")
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": name})
    producer.init_transactions(TIMEOUT)
    transact(producer, name, range(10), commit=True)
    transact(producer, name, range(10, 20), commit=False)
    run = daemon(
        {
            "events": {
                "topics": [name],
                "group_id": name,
                "checkpoint": checkpoint,
                "table": {"name": "events", "write": "append"},
                "dead_letter": {"create": True},
            }
        }
    )
    end = 22  # two transactions of ten, a marker behind each
    wait_until(lambda: committed(kafka, name) == end, TIMEOUT, "the commit behind the last marker")
    handler = run.status()["handlers"]["events"]
    assert (handler["lag_messages"], handler["partitions"][0]["checkpoint"]) == (0, end)
    assert set(rows(database, "events")) == set(range(10))

    transact(producer, name, range(20, 25), commit=True)
    wait_until(lambda: set(rows(database, "events")) == {*range(10), *range(20, 25)}, TIMEOUT, "what came after")
    assert run.stop() == 0
    assert max(rows(database, "events").values()) == 1


def transact(producer: Producer, topic: str, numbers: range, *, commit: bool) -> None:
    """Produce records in one transaction."""
    producer.begin_transaction()
    for number in numbers:
        producer.produce(topic, json.dumps(record(number)).encode(), partition=0)
    producer.flush(TIMEOUT)
    if commit:
        producer.commit_transaction(TIMEOUT)
    else:
        producer.abort_transaction(TIMEOUT)


def committed(kafka: KafkaServer, topic: str) -> int:
    """Return the offset that Kafka has for the topic's group."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": topic})
    try:
        return consumer.committed([TopicPartition(topic, 0)], timeout=TIMEOUT)[0].offset
    finally:
        consumer.close()
