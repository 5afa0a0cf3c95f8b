"""After each halt the command that its sentence names goes on: exactly there, and nowhere else."""

import json
import re
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.acceptance.control import CONTROL, command, done, refused, typed
from tests.acceptance.halts import (
    TIMEOUT,
    checkpoint,
    expect_halt,
    expect_rows,
    handler,
    landed,
    letters,
    make_tables,
    restart,
    send,
)
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

NO_LETTERS: dict[str, Any] = {"poison": {"action": "halt"}, "dead_letter": {}}


def skipped(run: Daemon, name: str = "t") -> int:
    """Return how many messages an operator has passed over."""
    return int(run.metrics()[f'consumerd_messages_skipped_total{{handler="{name}",reason="operator"}}'])


def truncate(admin: AdminClient, topic: str, offset: int) -> None:
    """Do what retention does."""
    admin.delete_records([TopicPartition(topic, 0, offset)])[TopicPartition(topic, 0)].result(TIMEOUT)


@pytest.mark.parametrize("mode", ["postgres", "kafka"])
def test_a_gap_is_accepted_as_it_was_shown(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon, *, mode: str
) -> None:
    """Its lag is told, a restart halts again, a gap that has grown asks again; then all that is left lands, once."""
    name = topic()
    make_tables(database, "t")
    send(kafka, name)
    run = daemon({"t": handler(name, "t", group_id=name, checkpoint=mode)}, CONTROL)
    expect_rows(database, "t")
    run.stop()
    send(kafka, name, range(10, 40))
    truncate(admin, name, 25)
    run.start()
    shown = expect_halt(run, "t", "offsets 10..24 are gone", f"--accept-gap {name}:0")
    (partition,) = run.status()["handlers"]["t"]["partitions"]
    assert (partition["checkpoint"], partition["lag_messages"]) == (10, 30)
    assert "has halted again" in refused(run, "restart", "t")

    truncate(admin, name, 30)
    asked_again = typed(shown)
    assert asked_again.exit_code == 1
    assert "offsets 10..29 are gone" in asked_again.stderr
    assert typed(expect_halt(run, "t", "offsets 10..29 are gone")).exit_code == 0
    expect_rows(database, "t", [*range(10), *range(30, 40)])
    assert run.logs().count(f"accepted: {name}:0 goes on at 30: offsets 10..29 are skipped") == 1
    run.stop()
    send(kafka, name, [40])
    restart(run)
    expect_rows(database, "t", [*range(10), *range(30, 41)])


def test_the_gaps_of_all_partitions_are_one_halt(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Retention overtook several partitions: one sentence names them all, and one command goes on after them."""
    name = topic(3)
    make_tables(database, "t")
    producer = Producer({"bootstrap.servers": kafka.bootstrap})

    def fill(numbers: range) -> None:
        for number in numbers:
            producer.produce(name, json.dumps({"id": number, "n": number}), partition=number % 3)
        assert producer.flush(TIMEOUT) == 0

    fill(range(30))
    run = daemon({"t": handler(name, "t", group_id=name)}, CONTROL)
    expect_rows(database, "t", range(30))
    run.stop()
    fill(range(30, 90))
    admin.delete_records([TopicPartition(name, n, 20) for n in range(2)])[TopicPartition(name, 1)].result(TIMEOUT)
    run.start()
    shown = expect_halt(run, "t", f"{name}:0: offsets 10..19", f"{name}:1: offsets 10..19")
    assert typed(shown).exit_code == 0
    expect_rows(database, "t", [n for n in range(90) if n // 3 not in range(10, 20) or n % 3 == 2])


@pytest.mark.parametrize(("mode", "stopped"), [("postgres", True), ("postgres", False), ("kafka", False)])
def test_a_new_topic_is_read_from_its_start(
    kafka: KafkaServer,
    admin: AdminClient,
    database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
    *,
    mode: str,
    stopped: bool,
) -> None:
    """Accepted, all of it lands, whatever `start` says; a restart alone halts again, and later ones go on in it."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint)")
    if mode == "postgres":
        execute(database, "ALTER TABLE t ADD UNIQUE (id)")
    run = daemon({"t": handler(name, "t", group_id=name, checkpoint=mode, start="latest")}, CONTROL)
    send(kafka, name)
    expect_rows(database, "t")
    if stopped:
        run.stop()
    admin.delete_topics([name])[name].result(TIMEOUT)
    wait_until(lambda: name not in admin.list_topics(timeout=TIMEOUT).topics, TIMEOUT, "the topic's end")
    kafka.make_topic(name)
    send(kafka, name, range(5, 25) if mode == "postgres" else range(10, 25))
    if stopped:
        run.start()
    shown = expect_halt(run, "t", "was deleted and made again", f"--accept-new-topic {name}")
    assert f"--accept-new-topic {name}" in refused(run, "restart", "t")
    assert typed(shown).exit_code == 0
    expect_rows(database, "t", range(25))
    if mode == "postgres":  # the old topic's highest offset says nothing of the new one
        wait_until(lambda: letters(kafka, f"{name}.dlq") == 5, TIMEOUT, "letters of what is there already")
    run.stop()
    send(kafka, name, [25])
    restart(run)
    expect_rows(database, "t", range(26))


@pytest.mark.parametrize("mode", ["postgres", "kafka"])
def test_one_poison_message_is_passed_over(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, mode: str
) -> None:
    """`action = "halt"`: each message that halts needs a command of its own, the topic's last one too."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint CHECK (n NOT IN (7, 12, 19)))")
    send(kafka, name, range(20))
    run = daemon({"t": handler(name, "t", group_id=name, checkpoint=mode, **NO_LETTERS)}, CONTROL, wait=False)
    shown = expect_halt(run, "t", f"--skip {name}:0@7")
    assert "is no way on" in refused(run, "resume", "t", "--skip", f"{name}:0@8")
    assert "is not paused but halted" in refused(run, "resume", "t")
    command(run, "restart", "t")
    for offset in (7, 12, 19):
        shown = expect_halt(run, "t", f"--skip {name}:0@{offset}")
        assert [row[0] for row in landed(database, "t")] == [n for n in range(offset) if n not in {7, 12}]
        typed(shown)
    wait_until(lambda: skipped(run) == 3, TIMEOUT, "three that were passed over")
    status = run.status()["handlers"]["t"]
    assert (status["state"], status["written"], status["skipped"]["operator"]) == ("running", 17, 3)
    lines = [json.loads(line) for line in run.logs().splitlines()]
    told = [line["offset"] for line in lines if line["message"] == "passed over a message, as an operator told"]
    assert told == [7, 12, 19]
    send(kafka, name, [20])
    expect_rows(database, "t", [n for n in range(21) if n not in {7, 12, 19}])
    run.stop()
    restart(run)
    assert run.status()["handlers"]["t"]["consumed"] == 0


def test_one_letter_that_is_too_large_is_passed_over(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Of letters that are sent together the large ones are named, which no setting foresees: they were compressed."""
    name = topic(config={"max.message.bytes": "10000"})
    execute(database, "CREATE TABLE t (id bigint, n bigint)")
    run = daemon({"t": handler(name, "t", group_id=name, poison={"max_ratio": 1.0})}, CONTROL)
    # They are small when they are compressed, as the source counts them.
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "linger.ms": 50, "compression.type": "gzip"})
    for number in range(10):
        size = 120_000 if number in {3, 6} else 10
        producer.produce(name, json.dumps({"id": number, "n": "x" * size if number % 3 == 0 else number}), partition=0)
    assert producer.flush(TIMEOUT) == 0
    passed: list[int] = []
    for _ in range(2):
        shown = expect_halt(run, "t", f"is too large for {name}.dlq", "--skip")
        passed.append(int(re.findall(r"--skip \S+@(\d+)", shown)[0]))
        typed(shown)
    wait_until(lambda: skipped(run) == 2, TIMEOUT, "two that were passed over")
    assert sorted(passed) == [3, 6]
    assert [row[0] for row in landed(database, "t")] == [n for n in range(10) if n % 3]
    wait_until(lambda: checkpoint(database, name) == 10, TIMEOUT, "the end")
    assert run.status()["handlers"]["t"]["dead_lettered"] == {"type": 2}


def test_one_message_that_postgres_cancels_or_refuses_is_passed_over(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A trigger that takes for ever over one row, and one whose own code is no refusal of a row: both are known."""
    name = topic()
    execute(
        database,
        "CREATE TABLE t (id bigint, n bigint);"
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.id = 5 THEN PERFORM pg_sleep(9); ELSIF NEW.id = 8 THEN RAISE 'no' USING ERRCODE = 'XY123'; END IF; "
        "RETURN NEW; END $$;"
        "CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    send(kafka, name)
    config = {**CONTROL, "postgres": {"settings": {"statement_timeout": "40ms"}}}
    run = daemon({"t": handler(name, "t", group_id=name, retry={"initial": "1ms", "max": "2ms"})}, config, wait=False)
    shown = expect_halt(run, "t", "cancels the write of a single message", f"--skip {name}:0@5")
    typed(shown)
    expect_halt(run, "t", "XY123", f"--skip {name}:0@")
    done(run, "resume", "t", "--skip", f"{name}:0@8")
    expect_rows(database, "t", [n for n in range(10) if n not in {5, 8}])
    wait_until(lambda: skipped(run) == 2, TIMEOUT, "two that were passed over")


@pytest.mark.parametrize("mode", ["postgres", "kafka"])
def test_the_breaker_forgets(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, mode: str
) -> None:
    """A restart forgets nothing; --breaker does, and lets pass as much as a handler without a history would."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint CHECK (n % 2 = 0))")
    made = handler(name, "t", group_id=name, checkpoint=mode, poison={"min_messages": 20, "max_ratio": 0.1})
    made["batch"] = {"max_age": "100ms", "max_messages": 1}  # what is judged together is then the same each time
    send(kafka, name, range(100))
    run = daemon({"t": made}, CONTROL, wait=False)
    shown = expect_halt(run, "t", "over the limit of 10.0%", "--breaker")
    stood = letters(kafka, f"{name}.dlq")
    assert stood < 20
    assert command(run, "restart", "t").exit_code in {0, 1}  # it may be running for a moment
    expect_halt(run, "t", "over the limit")
    assert letters(kafka, f"{name}.dlq") == stood
    typed(shown)
    wait_until(lambda: letters(kafka, f"{name}.dlq") > stood, TIMEOUT, "more letters")
    expect_halt(run, "t", "over the limit")
    assert letters(kafka, f"{name}.dlq") < stood + 20
    assert run.logs().count("accepted: what the breaker had counted is forgotten") == 1


def test_a_log_of_older_leaders_is_accepted(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A restored cluster's log is another one, and is read on from the checkpoint once that is accepted."""
    name = topic()
    make_tables(database, "t")
    send(kafka, name)
    run = daemon({"t": handler(name, "t", group_id=name)}, CONTROL)
    expect_rows(database, "t")
    run.stop()
    execute(database, "UPDATE consumerd.checkpoint SET leader_epoch = 99")
    send(kafka, name, range(10, 20))
    run.start()
    shown = expect_halt(run, "t", "is another one", f"--accept-gap {name}:0")
    assert typed(shown).exit_code == 0
    expect_rows(database, "t", range(20))
