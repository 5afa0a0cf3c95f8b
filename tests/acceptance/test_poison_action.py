"""`[poison] action`, and the breaker: what becomes of poison, and that no restart makes it more."""

import json
import re
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from tests.acceptance.events import MakeEvents, wait_for_halt
from tests.acceptance.halts import TIMEOUT, expect_halt, handler, landed, letters, restart
from tests.acceptance.stream import letters as stream_letters
from tests.acceptance.stream import rows, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

MIN_MESSAGES = 200


def send(kafka: KafkaServer, topic: str, *values: object) -> None:
    """Produce ``{"id": i, "n": value}`` for each value, ids from 0."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number, value in enumerate(values):
        producer.produce(topic, json.dumps({"id": number, "n": value}).encode(), partition=0)
    assert producer.flush(TIMEOUT) == 0


def test_poison_is_passed_over(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """`skip`: good rows land, poison is counted by reason and told without its value; no letters' topic is needed."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint NOT NULL CHECK (n <> 13))")
    made = handler(name, "t", poison={"action": "skip", "max_ratio": 1.0}, dead_letter={})
    run = daemon({"t": made})
    send(kafka, name, 0, "secret", 2, 13, None, 5)

    def done() -> bool:
        now = run.status()["handlers"]["t"]
        return bool(now["written"] == 3 and now["skipped"] == {"type": 1, "rejected": 1, "missing": 1})

    wait_until(done, TIMEOUT, "rows, and what is passed over")
    assert run.status()["handlers"]["t"]["dead_lettered"] == {}
    assert run.metrics()['consumerd_messages_skipped_total{handler="t",reason="rejected"}'] == 1
    assert run.stop() == 0
    assert landed(database, "t") == [(0, 0), (2, 2), (5, 5)]
    told = [json.loads(line) for line in run.logs().splitlines() if '"skipped"' in line]
    assert {reason for line in told for reason in line.get("reasons", {})} >= {"type"}
    assert "secret" not in run.logs()
    assert "consumerd.t.dlq" not in AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics


def test_what_is_passed_over_stays_so_through_kills(database: str, events: MakeEvents) -> None:
    """`skip` under SIGKILL: each good record is there once, and none of the bad ones."""
    made = events(database, 2, poison={"action": "skip", "max_ratio": 1.0}, dead_letter={})
    run = made.start({"kafka": {"group_instance_id": "one"}})
    with made.stream.flowing(2000):
        for _ in range(3):
            wait_until(lambda: made.written() > 500, TIMEOUT, "rows of this run")
            run.kill()
            made.start_again()
    made.catches_up()
    assert run.stop() == 0
    found = rows(database, "events")
    assert set(found) == made.stream.good()
    assert max(found.values()) == 1


def test_error_text(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """`error_text`: the words of Postgres and of a transform's exception are in letters and log then, and only then."""
    name, secret = topic(), "8675309"
    raises = "def transform(it):\n    if it['n'] == 13:\n        raise ValueError('of thirteen')\n    return it\n"
    handlers: dict[str, dict[str, Any]] = {}
    for table, error_text in (("silent", False), ("told", True)):
        execute(database, f"CREATE TABLE {table} (id bigint, n bigint CHECK (n <> {secret}))")
        poison = {"error_text": error_text, "max_ratio": 1.0}
        of = {
            "transform": {"function": "raising:transform"},
            "dead_letter": {"create": True, "topic": f"{name}.{table}"},
        }
        handlers[table] = handler(name, table, poison=poison, **of)
    run = daemon({**handlers, "raising.py": raises})
    send(kafka, name, 0, int(secret), 13)
    said: dict[str, list[str]] = {}
    for table in handlers:
        wait_until(lambda table=table: letters(kafka, f"{name}.{table}") == 2, TIMEOUT, "letters")  # type: ignore[misc]
        found = sorted(stream_letters(kafka.bootstrap, f"{name}.{table}"), key=source_of)
        messages = [dict(letter.headers() or [])["__connect.errors.exception.message"] for letter in found]
        said[table] = [str(message, "utf-8") for message in messages if isinstance(message, bytes)]
    assert run.stop() == 0
    assert said["silent"][0] == "refused by Postgres: CheckViolation, constraint silent_n_check"
    assert said["told"][0].startswith(
        "refused by Postgres: CheckViolation, constraint told_n_check: new row for relation"
    )
    assert said["told"][0].endswith(f"Failing row contains (1, {secret}).")
    assert said["told"][1] == f"{said['silent'][1]}: of thirteen"
    lines = [json.loads(line) for line in run.logs().splitlines() if '"dead-lettered"' in line]
    assert {"told"} == {line["handler"] for line in lines if "error" in line}
    assert {"silent", "told"} == {line["handler"] for line in lines}
    assert secret not in "".join(line for line in run.logs().splitlines() if '"told"' not in line)


@pytest.mark.parametrize(
    "kind",
    [("many", "Expected `int | null`, got `str`", "postgres"), (13, "refused by Postgres: CheckViolation", "kafka")],
    ids=["found by the decode", "found by Postgres, at least once"],
)
def test_poison_halts_before_it(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, kind: tuple[object, str, str]
) -> None:
    """`halt`: what is before the poison lands, and nothing after it at any start; the line that is told passes it."""
    name, (bad, why, checkpoint) = topic(), kind
    execute(database, "CREATE TABLE t (id bigint, n bigint CHECK (n <> 13))")
    made = handler(name, "t", poison={"action": "halt"}, dead_letter={}, checkpoint=checkpoint, group_id=name)
    send(kafka, name, *range(7), bad, *range(108, 120), bad, 21)
    run = daemon({"t": made}, wait=False)
    sentence = ""
    for offset in (7, 20):
        halted = f"topic {name} partition 0 offset {offset} cannot become a row: {why}"
        for _ in range(2):
            sentence = expect_halt(run, "t", halted, "[poison] action is halt")
            assert [row[0] for row in landed(database, "t")] == [number for number in range(offset) if number != 7]
            assert run.stop() == 0
            run.start()
        run.stop()
        kafka.typed(re.findall("kafka-consumer-groups .*? --execute", sentence)[0])
        run.start()
    wait_until(lambda: (21, 21) in landed(database, "t"), TIMEOUT, "what is behind the last")
    assert run.stop() == 0
    assert [row[0] for row in landed(database, "t")] == [number for number in range(22) if number not in {7, 20}]


@pytest.mark.parametrize("checkpoint", ["postgres", "kafka"])
def test_a_restart_does_not_reset_the_breaker(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, checkpoint: str
) -> None:
    """P6: started again and again, a handler whose topic is poison lets no more of it through than in one run."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint)")
    made: dict[str, Any] = handler(name, "t", checkpoint=checkpoint, group_id=name)
    made["batch"] = {"max_age": "100ms", "max_messages": 60}
    made["poison"] = {"min_messages": MIN_MESSAGES, "max_ratio": 0.1}
    send(kafka, name, *["poison" if number % 2 else number for number in range(4 * MIN_MESSAGES)])
    run = daemon({"t": made}, wait=False)
    for _ in range(4):
        sentence = expect_halt(run, "t", "over the limit of 10.0%", "restart, which forgets none of them")
        assert int(re.findall(r"of the last (\d+) messages", sentence)[0]) >= MIN_MESSAGES
        assert letters(kafka, f"{name}.dlq") < MIN_MESSAGES / 2
        assert run.stop() == 0
        run.start()
    made["poison"]["max_ratio"] = 1.0
    run.stop()
    restart(run, {"t": made})
    wait_until(lambda: len(landed(database, "t")) == 2 * MIN_MESSAGES, TIMEOUT, "the rest")
    assert letters(kafka, f"{name}.dlq") == 2 * MIN_MESSAGES
    assert run.stop() == 0


def test_another_member_does_not_reset_the_breaker(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P6: the member that takes a halted one's partitions over counts on from where that one stood."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint)")
    made = handler(name, "t", group_id=name)
    made["batch"] = {"max_age": "100ms", "max_messages": 60}
    made["poison"] = {"min_messages": MIN_MESSAGES, "max_ratio": 0.1}
    members = [daemon({"t": made}) for _ in range(3)]
    send(kafka, name, *["poison" if number % 2 else number for number in range(4 * MIN_MESSAGES)])
    for member in members:
        wait_for_halt(member, "t")
    assert letters(kafka, f"{name}.dlq") < MIN_MESSAGES / 2
    assert [member.stop() for member in members] == [0, 0, 0]


def test_a_schema_made_before_the_breaker_was_kept(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A schema that lacks the breaker's columns and the claims gets them at the next start, and it goes on."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint, n bigint)")
    run = daemon({"t": handler(name, "t", group_id=name)})
    send(kafka, name, *range(10))
    wait_until(lambda: len(landed(database, "t")) == 10, TIMEOUT, "ten rows")
    assert run.stop() == 0
    gone = ", ".join(f"DROP COLUMN judged_{what}" for what in ("messages", "refused", "at"))
    execute(database, f"ALTER TABLE consumerd.checkpoint {gone}; DROP TABLE consumerd.claims")
    restart(run)
    send(kafka, name, *range(10))
    wait_until(lambda: len(landed(database, "t")) == 20, TIMEOUT, "ten more")
    assert execute(database, "SELECT next_offset, judged_messages, judged_refused FROM consumerd.checkpoint") == [
        (20, 10, 0)
    ]
    assert run.stop() == 0
