"""Runs that end by themselves, runs of some handlers, and daemons beside each other."""

import secrets
from contextlib import closing
from typing import Any

import pytest
from confluent_kafka import Consumer

from tests.acceptance.events import TIMEOUT, Events, MakeEvents
from tests.acceptance.events import handler as of_events
from tests.acceptance.halts import expect_rows, handler, landed, make_tables, send
from tests.acceptance.stream import rows
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

OK, FAILED = 0, 1
END = "--until-end"


def test_a_run_ends_once_all_is_written(database: str, events: MakeEvents, daemon: MakeDaemon) -> None:
    """P9: it writes what was there, poison too, and exits with 0; the next writes what came since, or nothing."""
    made = events(database, 3)
    for records in (2_000, 500, 0):
        made.stream.produce(records)
        run = ends(made, daemon)
        assert OK == run.process.wait(TIMEOUT)
        assert "the end is reached" in run.logs()
        made.stream.check(database, letters_once=True)


@pytest.mark.parametrize("checkpoint", ["postgres", "kafka"])
def test_a_run_ends_though_more_comes(database: str, events: MakeEvents, daemon: MakeDaemon, checkpoint: str) -> None:
    """What was there at the start is written; that more comes all the time does not keep it from ending."""
    made = events(database, checkpoint=checkpoint)
    made.stream.produce(1_000)
    before = made.stream.good()
    with made.stream.flowing(500):
        assert OK == ends(made, daemon).process.wait(TIMEOUT)
        assert before <= set(rows(database, "events"))
    assert OK == ends(made, daemon).process.wait(TIMEOUT)
    made.stream.check(database)


def test_two_runs_of_one_group_end_together(database: str, events: MakeEvents, daemon: MakeDaemon) -> None:
    """P2: each ends once all partitions are written, its own and the other's, and none is left behind."""
    made = events(database, 4)
    made.stream.produce(20_000)
    runs = [ends(made, daemon) for _ in range(2)]
    assert [OK, OK] == [run.process.wait(TIMEOUT) for run in runs]
    made.stream.check(database)


def test_a_run_that_cannot_end_says_so(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """A handler that halts, or a topic without its table, is status 1, once the others have written all of theirs."""
    name, prefix = topic(), f"own-{secrets.token_hex(4)}"
    make_tables(database, "healthy", f'"{prefix}-there"')
    for each in (f"{prefix}-there", f"{prefix}-missing"):
        kafka.make_topic(each)
        send(kafka, each)
    send(kafka, name)
    own = handler(f"^{prefix}-", "${topic}", group_id=prefix)
    for broken in ({"halts": handler(name, "absent", group_id=f"{name}-halts")}, {"own": own}):
        group = f"{name}-{next(iter(broken))}-healthy"
        run = daemon({"healthy": handler(name, "healthy", group_id=group), **broken}, None, END, wait=False)
        assert FAILED == run.process.wait(TIMEOUT)
        assert "the end cannot be reached" in run.logs()
        execute(database, "DELETE FROM consumerd.checkpoint WHERE topic = '" + name + "'")
    assert [(number, number) for number in range(10) for _ in range(2)] == landed(database, "healthy")
    assert [(number, number) for number in range(10)] == landed(database, f'"{prefix}-there"')


def test_a_run_that_is_stopped_before_its_end_has_failed(database: str, events: MakeEvents, daemon: MakeDaemon) -> None:
    """SIGTERM while another member holds what is not written is status 1: what follows a run may rely on 0."""
    made = events(database)
    made.stream.produce(100)
    twin = Consumer(
        {
            "bootstrap.servers": made.stream.bootstrap,
            "group.id": made.stream.topic,
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
        }
    )
    twin.subscribe([made.stream.topic])
    with closing(twin):
        wait_until(lambda: [twin.poll(0.1), *twin.assignment()][1:] != [], TIMEOUT, "the twin's partitions")
        run = ends(made, daemon)
        wait_until(lambda: (twin.poll(0.1), rows(database, "events").total())[1] > 0, TIMEOUT, "its rows")
        assert run.running
        assert FAILED == run.stop()


def test_only_the_handlers_that_are_named_run(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """`--handler`, which may be repeated, runs these alone; a pattern passes over the letters of all others too."""
    prefix = f"some-{secrets.token_hex(4)}"
    names = {letter: f"{prefix}-{letter}" for letter in "abc"}
    make_tables(database, *names)
    for name in names.values():
        kafka.make_topic(name)
        send(kafka, name)
    kafka.make_topic(f"{prefix}-letters")
    send(kafka, f"{prefix}-letters")
    handlers = {letter: handler(name, letter, group_id=name) for letter, name in names.items()}
    handlers["b"]["topics"] = [f"^{prefix}-"]
    handlers["c"]["dead_letter"] = {"topic": f"{prefix}-letters"}
    run = daemon(handlers, None, "--handler", "a", "--handler", "b", END, wait=False)
    assert OK == run.process.wait(TIMEOUT)
    assert [10, 30, 0] == [len(landed(database, letter)) for letter in names]


def test_two_daemons_beside_each_other(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """A second config with a port of its own runs beside the first, in the same schema or another."""
    handlers: dict[str, dict[str, Any]] = {}
    for number in range(3):
        name = topic()
        make_tables(database, f"t{number}")
        send(kafka, name)
        handlers[f"h{number}"] = handler(name, f"t{number}", group_id=name)
    postgres: list[dict[str, Any]] = [{}, {}, {"postgres": {"schema": "other"}}]
    runs = [daemon({name: handlers[name]}, more) for name, more in zip(handlers, postgres, strict=True)]
    for number in range(3):
        expect_rows(database, f"t{number}")
    assert [OK] * 3 == [run.stop() for run in runs]
    count = "SELECT count(*) FROM {}.checkpoint"
    assert [[(2,)], [(1,)]] == [execute(database, count.format(schema)) for schema in ("consumerd", "other")]


def ends(made: Events, daemon: MakeDaemon) -> Daemon:
    """Start a run of the events that is to end by itself."""
    handlers = {"events": of_events(made.stream.topic, "events", write="append") | made.keys}
    return daemon(handlers, {"postgres": {"dsn": made.dsn}}, END, wait=False)
