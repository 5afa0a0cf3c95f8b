"""`consumerd lag`: how far each partition is behind, by the checkpoint, the log, and the oldest message not written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner, Result

from consumerd.cli import app
from tests.acceptance.events import Events, MakeEvents, commit
from tests.acceptance.stream import Stream
from tests.conftest import MakeTopic
from tests.servers.daemon import write_config
from tests.servers.kafka import KafkaServer
from tests.servers.sql import locked

OK, FAILED, USAGE, NOT_REACHED = 0, 1, 2, 75
TIMEOUT = 60
HOUR = 3600.0


def typed(folder: Path, *arguments: str) -> Result:
    """Run `lag` for the files in a folder, in this process."""
    return CliRunner().invoke(app, ["lag", *arguments, "-c", str(folder / "consumerd.toml")])


class Behind:
    """A handler of one topic that no daemon reads: its offsets are what a test commits."""

    def __init__(self, kafka: KafkaServer, database: str, topic: str, partitions: int, folder: Path) -> None:
        self.kafka, self.database, self.folder = kafka, database, folder
        self.stream = Stream(kafka.bootstrap, topic, partitions)
        self.configure()

    def configure(self, config: dict[str, Any] | None = None, **keys: object) -> None:
        """Write the files."""
        config = config or {"kafka": {"bootstrap_servers": self.kafka.bootstrap}, "postgres": {"dsn": self.database}}
        handler = {"topics": [self.stream.topic], "group_id": self.stream.topic}
        write_config(self.folder, config, {"events": handler | {"table": {"name": "events", "write": "append"}} | keys})

    def send(self, *ages: float, partition: int = 0, transaction: str = "") -> None:
        """Send messages of these ages in seconds; in a transaction that is to "commit" or to "abort" if told so."""
        settings = {"transactional.id": f"{self.stream.topic}-{transaction}"} if transaction else {}
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap, **settings})
        if transaction:
            producer.init_transactions(TIMEOUT)
            producer.begin_transaction()
        for age in ages:
            producer.produce(self.stream.topic, b"{}", partition=partition, timestamp=int((time.time() - age) * 1000))
        assert producer.flush(TIMEOUT) == 0
        if transaction:
            (producer.commit_transaction if transaction == "commit" else producer.abort_transaction)(TIMEOUT)

    def lags(self, *arguments: str, status: int = OK) -> list[dict[str, Any]]:
        """Run `lag` and return its JSON lines."""
        done = typed(self.folder, "-o", "json", *arguments)
        assert (status, "") == (done.exit_code, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def behind(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Behind:
    """Set up topic and files."""
    return Behind(kafka, database, topic(2), 2, tmp_path)


def test_time_lag_is_the_age_of_the_oldest_message_not_written(behind: Behind) -> None:
    """At each checkpoint it is the age of the message there, not of the oldest nor of the newest in the log."""
    behind.send(3 * HOUR, HOUR, 2 * HOUR)
    for at, age, left in ((0, 3 * HOUR, 3), (1, HOUR, 2), (2, 2 * HOUR, 1)):
        commit(behind.stream, {0: at, 1: 0})
        first, second = behind.lags()
        assert (at, 3, left) == tuple(first[key] for key in ("checkpoint", "high_watermark", "lag_messages"))
        assert age <= first["lag_seconds"] < age + TIMEOUT
        assert (0, 0, 0.0) == tuple(second[key] for key in ("checkpoint", "lag_messages", "lag_seconds"))
    behind.lags("--max-seconds", str(3 * HOUR))
    behind.lags("--max-seconds", str(HOUR), status=FAILED)


def test_offsets_without_a_message_are_no_lag(behind: Behind) -> None:
    """Markers and what was aborted are passed over: the next message's age counts, and where there is none nothing."""
    behind.send(3 * HOUR, transaction="commit")  # 0, and a marker
    behind.send(2 * HOUR, 2 * HOUR, transaction="abort")  # 2, 3, and a marker
    commit(behind.stream, {0: 1, 1: 0})
    assert (0, 0.0) == tuple(behind.lags()[0][key] for key in ("lag_messages", "lag_seconds"))
    behind.send(HOUR)  # 5
    (first, _) = behind.lags()
    assert (1, 6) == (first["checkpoint"], first["high_watermark"])
    assert HOUR <= first["lag_seconds"] < HOUR + TIMEOUT


def test_partitions_without_a_checkpoint_say_where_they_begin(behind: Behind) -> None:
    """Without a checkpoint the lag is that from `start`; a partition that came later begins at its log's start."""
    behind.send(2 * HOUR, HOUR)
    assert [(None, 0, 2), (None, 0, 0)] == [_begins(lag) for lag in behind.lags()]
    behind.configure(start="latest")
    (first, _) = behind.lags()
    assert ((None, 2, 0), 0.0) == (_begins(first), first["lag_seconds"])
    behind.configure(start=_time(1.5 * HOUR))
    (first, _) = behind.lags()
    assert (None, 1, 1) == _begins(first)
    assert HOUR <= first["lag_seconds"] < HOUR + TIMEOUT
    behind.configure(start="latest", checkpoint="kafka")
    commit(behind.stream, {1: 0}, json.dumps(_stamp(behind, partitions=0)))
    assert (None, 0, 2) == _begins(behind.lags()[0])


def test_beside_a_daemon_that_cannot_write(database: str, events: MakeEvents) -> None:
    """While a daemon runs, its lag is what it has not written; both grow while its table is locked."""
    made = events(database, 2)
    run = made.start()
    made.stream.produce(10)
    made.catches_up()
    assert [(5, 0, 0.0)] * 2 == [_lag(lag) for lag in _lags(made)]
    with locked(database, "events"):
        made.stream.produce(6)
        held_up = _lags(made)
    assert [(5, 3)] * 2 == [_lag(lag)[:2] for lag in held_up]
    assert all(0 < lag["lag_seconds"] < TIMEOUT for lag in held_up)
    made.catches_up()
    assert run.stop() == 0
    assert [(8, 0, 0.0)] * 2 == [_lag(lag) for lag in _lags(made)]


def test_what_makes_a_lag_meaningless_is_said(behind: Behind, admin: AdminClient) -> None:
    """A checkpoint outside the log, or of a topic made again, has a sentence, and never passes as caught up."""
    behind.send(HOUR, HOUR)
    commit(behind.stream, {0: 5})
    (first, _) = behind.lags("--max-seconds", "10000", status=FAILED)
    assert (None, None, "the checkpoint is beyond the log's end") == _told(first)
    behind.configure(checkpoint="kafka")
    commit(behind.stream, {0: 1}, json.dumps(_stamp(behind, topic_id="another")))
    (first, _) = behind.lags("--max-seconds", "10000", status=FAILED)
    assert "the topic was deleted and made again" in first["note"]


def test_many_partitions_in_one_look(behind: Behind, topic: MakeTopic) -> None:
    """The ages of 200 partitions' oldest messages are told at once, each its own."""
    behind.stream = Stream(behind.kafka.bootstrap, topic(200), 200)
    behind.configure()
    producer = Producer({"bootstrap.servers": behind.kafka.bootstrap})
    now = time.time()
    for partition in range(200):
        for age in (HOUR + partition, HOUR / 2):
            producer.produce(behind.stream.topic, b"{}", partition=partition, timestamp=int((now - age) * 1000))
    assert producer.flush(TIMEOUT) == 0
    ages = [lag["lag_seconds"] - HOUR - lag["partition"] for lag in behind.lags()]
    assert 200 == len(ages)
    assert all(abs(age - ages[0]) < 0.01 for age in ages)


def test_a_table_for_people(behind: Behind) -> None:
    """Each partition is a line, with what its numbers do not say."""
    behind.send(HOUR)
    done = typed(behind.folder)
    assert (OK, "") == (done.exit_code, done.stderr)
    head, first, _ = done.stdout.splitlines()
    assert ["handler", "partition", "checkpoint", "end", "lag", "seconds"] == head.split()
    assert ["events", f"{behind.stream.topic}:0", "-", "1", "1"] == first.split()[:5]
    assert first.endswith("no checkpoint yet: begins at 0")


def test_a_handler_without_its_topic_hides_no_other(behind: Behind) -> None:
    """Its sentence is told, exit status 1, and the lag of the others all the same."""
    path = behind.folder / "handlers" / "absent.toml"
    path.write_text('topics = ["absent"]\ntable = { name = "events", write = "append" }\n')
    done = typed(behind.folder, "-o", "json")
    assert (FAILED, ["events", "events"]) == (
        done.exit_code,
        [json.loads(line)["handler"] for line in done.stdout.splitlines()],
    )
    assert done.stderr.startswith("absent: topic absent does not exist")


def test_mistakes(behind: Behind) -> None:
    """A handler that is not there and brokers that are away are one sentence each, with a code of their own."""
    done = typed(behind.folder, "evnets")
    assert (USAGE, "there is no handler evnets; there are: events\n") == (done.exit_code, done.stderr)
    for kafka, dsn in (("127.0.0.1:1", behind.database), (behind.kafka.bootstrap, "host=127.0.0.1 port=1")):
        behind.configure({"kafka": {"bootstrap_servers": kafka}, "postgres": {"dsn": dsn}})
        done = typed(behind.folder)
        assert (NOT_REACHED, "", 1) == (done.exit_code, done.stdout, len(done.stderr.splitlines())), done.stderr


def _begins(lag: dict[str, Any]) -> tuple[Any, ...]:
    return lag["checkpoint"], lag["begins"], lag["lag_messages"]


def _lag(lag: dict[str, Any]) -> tuple[Any, ...]:
    return lag["checkpoint"], lag["lag_messages"], lag["lag_seconds"]


def _told(lag: dict[str, Any]) -> tuple[Any, ...]:
    return lag["lag_messages"], lag["lag_seconds"], lag["note"]


def _lags(made: Events) -> list[dict[str, Any]]:
    done = typed(made.run.config.parent, "events", "-o", "json")
    assert (OK, "") == (done.exit_code, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _stamp(behind: Behind, **keys: object) -> dict[str, object]:
    return {"v": 1, "mode": "kafka", "store": "", "group": behind.stream.topic, "topic_id": None, "offset": 0} | keys


def _time(age: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age))
