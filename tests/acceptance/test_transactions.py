"""Topics of transactional producers: what was aborted is not there, and what holds no message is no lag (rule 15)."""

import json

import pytest
from confluent_kafka import Producer

from tests.acceptance.events import MakeEvents, committed
from tests.acceptance.stream import record, rows
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

TIMEOUT = 30


@pytest.mark.parametrize("checkpoint", ["postgres", "kafka"])
def test_a_log_that_ends_without_messages_is_drained(
    kafka: KafkaServer, database: str, events: MakeEvents, checkpoint: str
) -> None:
    """Behind a committed and an aborted transaction lag is 0, in our metrics and for Kafka's tools; and it goes on."""
    made = events(database, 1, checkpoint=checkpoint)
    name = made.stream.topic
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": name})
    producer.init_transactions(TIMEOUT)
    transact(producer, name, range(10), commit=True)
    transact(producer, name, range(10, 20), commit=False)
    run = made.start()
    end = 22  # two transactions of ten, a marker behind each
    wait_until(lambda: committed(made.stream) == {0: end}, TIMEOUT, "the commit behind the last marker")
    handler = made.status()
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
