"""`consumerd dlq`: letters that a daemon wrote are listed, shown, redriven, discarded and exported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer

from tests.acceptance.halts import TIMEOUT, handler
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, Daemon, consumerd
from tests.servers.kafka import KafkaServer
from tests.servers.process import Process, wait_until
from tests.servers.sql import blocked, execute

OK, FAILED = 0, 1
PARTITIONS = 3
TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, n integer NOT NULL CONSTRAINT small CHECK (n < 100))"
MENDED = "ALTER TABLE t ALTER n DROP NOT NULL, DROP CONSTRAINT small"
TAKEN = """\
INSERT INTO consumerd.letters (group_id, topic, topic_id, partition, source_offset, status, attempts, epoch, failed_at,
                               run, changed_by)
SELECT %s, %s, topic_id, partition, 0, 'failed', 2, 1, now(), gen_random_uuid(), 'another' FROM consumerd.checkpoint
WHERE partition = %s"""
BAD: list[object] = [{"n": 100}, {"n": None}, {"n": "secret"}, {"id": 0, "n": 1}, b"{secret"]
"""Two that a mended table takes, and three that it does not."""


class Scene:
    """A daemon, its topic of some partitions, and the letters that it wrote."""

    def __init__(self, kafka: KafkaServer, database: str, topic: str, run: Daemon) -> None:
        self.kafka, self.database, self.topic, self.run = kafka, database, topic, run
        self.producer = Producer({"bootstrap.servers": kafka.bootstrap})
        self.sent = 0

    def send(self, values: Iterable[object], partition: int = 0) -> list[int]:
        """Send messages, each with an id of its own unless it has one; return their ids."""
        first = self.sent
        for value in values:
            data = value if isinstance(value, bytes) else json.dumps({"id": self.sent, **dict(value)}).encode()  # type: ignore[call-overload]
            self.producer.produce(self.topic, data, b"k%d" % self.sent, partition, headers=[("trace", b"secret")])
            self.sent += 1
        assert self.producer.flush(TIMEOUT) == 0
        return list(range(first, self.sent))

    def settles(self) -> None:
        """Wait until each message is a row or a letter."""

        def done() -> bool:
            now = self.run.status()["handlers"]["t"]
            return bool(now["written"] + sum(now["dead_lettered"].values()) == self.sent)

        wait_until(done, TIMEOUT, "rows and letters")

    def dlq(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return consumerd("dlq", command, "t", *arguments, cwd=self.run.config.parent)

    def lines(self, command: str, *arguments: str, code: int = OK) -> list[dict[str, Any]]:
        """Run a command and return its JSON lines."""
        output = () if command == "export" else ("-o", "json")
        done = self.dlq(command, *output, *arguments)
        assert code == done.returncode, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def letters(self) -> dict[tuple[str, str], int]:
        """Return how many letters there are of each status and reason."""
        return {(each["status"], each["reason"]): each["letters"] for each in self.lines("list")}

    def ids(self) -> list[int]:
        """Return the table's ids, each as often as it is there."""
        return [row[0] for row in execute(self.database, "SELECT id FROM t ORDER BY id")]


@pytest.fixture
def scene(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> Scene:
    """Start a daemon on an empty topic."""
    execute(database, TABLE)
    name = topic(PARTITIONS)
    made = handler(name, "t", group_id=name, poison={"max_ratio": 1.0})
    return Scene(kafka, database, name, daemon({"t": made}))


def test_killed_in_the_middle(scene: Scene, tmp_path: Path) -> None:
    """P1, P2: a redrive killed and run again has the row of each mended letter once; the others have failed again."""
    mended, rounds = [], 8
    scene.send([{"n": 1}])
    for partition in range(PARTITIONS):
        for _ in range(rounds):
            ids = scene.send(BAD, partition)
            mended += ids[:2]
    scene.settles()
    execute(scene.database, MENDED)
    assert OK == consumerd("setup", cwd=scene.run.config.parent).returncode
    with psycopg.connect(scene.database) as other:  # another redrive, of one letter of the last partition
        other.execute(TAKEN.encode(), [scene.topic, scene.topic, PARTITIONS - 1])
        command = [sys.executable, "-m", "consumerd", "dlq", "redrive", "t", "--execute"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = Process(command, tmp_path / "redrive.log", cwd=scene.run.config.parent, env=environment)
        wait_until(lambda: blocked(scene.database), TIMEOUT, "the letter that another has taken")
        process.kill()
        other.rollback()
    before = scene.ids()
    assert [0, *mended[: -2 * rounds]] == before
    (report,) = scene.lines("redrive", "--execute", code=FAILED)
    assert sorted([0, *mended]) == scene.ids()
    assert 2 * rounds == report["redriven"]
    states = execute(
        scene.database, "SELECT status, count(*), min(attempts), max(attempts) FROM consumerd.letters GROUP BY 1"
    )
    failed = 3 * rounds * PARTITIONS
    assert [("failed", failed, 2, 3), ("redriven", len(mended), 2, 2)] == sorted(states)
    reasons = {"missing", "type", "malformed", "rejected"}
    assert {("redriven", "missing"), ("redriven", "rejected")} <= scene.letters().keys()
    assert reasons == {reason for _, reason in scene.letters()}


def test_from_the_first_look_to_the_last(scene: Scene) -> None:
    """Letters are counted by reason, shown without their values, exported with them, redriven, and discarded."""
    scene.send([{"n": 1}])
    scene.send([*BAD, *BAD])
    scene.settles()
    listed = scene.lines("list")
    assert {("open", "rejected"): 2, ("open", "malformed"): 2, ("open", "missing"): 2, ("open", "type"): 2} == {
        (each["status"], each["reason"]): each["letters"] for each in listed if "Unique" not in each["error"]
    }
    (unique,) = (each for each in listed if "Unique" in each["error"])
    assert ("psycopg.errors.UniqueViolation", 2, 4, 9) == (
        *(unique[name] for name in ("error", "letters")),
        *(unique[end]["offset"] for end in ("first", "last")),
    )
    shown = scene.dlq("show", "-n", "3", "--error", "UniqueViolation").stdout
    assert f"{scene.topic}:0@9  open\n  why         rejected: refused by Postgres: UniqueViolation" in shown
    assert 2 == shown.count("constraint t_pkey")
    assert "secret" not in shown
    exported = scene.lines("export", "--reason", "malformed")
    assert [("k5", "{secret"), ("k10", "{secret")] == [(each["key"], each["value"]) for each in exported]
    execute(scene.database, MENDED)
    dry = scene.dlq("redrive")
    assert (OK, "Nothing was changed; --execute does it.\n") == (dry.returncode, dry.stderr)
    assert "4 letters would be redriven (4 rows).\n" in dry.stdout
    assert "2 would fail again: malformed, msgspec.DecodeError\n" in dry.stdout
    done = scene.dlq("redrive", "--reason", "missing", "--reason", "malformed", "--execute")
    assert (FAILED, "") == (done.returncode, done.stderr)
    assert "2 letters redriven (2 rows).\n2 failed again: malformed, msgspec.DecodeError\n" == done.stdout
    assert [0, 2, 7] == scene.ids()
    assert "8 letters would be discarded.\n" == scene.dlq("discard").stdout
    assert "2 letters discarded.\n" == scene.dlq("discard", "--status", "failed", "--execute").stdout
    told = scene.dlq("list").stdout
    assert "10 letters: 6 open, 2 redriven, 2 discarded." in told
    assert ["discarded", "malformed", "msgspec.DecodeError", "2"] in [line.split()[:4] for line in told.splitlines()]


def test_back_to_the_topic(scene: Scene) -> None:
    """--to-topic sends messages back, for the daemon to read again: a letter that comes of one counts on."""
    scene.send([{"n": 1}, *BAD])
    scene.settles()
    execute(scene.database, MENDED)
    done = scene.dlq("redrive", "--to-topic", "--execute")
    assert OK == done.returncode, done.stderr
    assert "Whoever else reads the topics that they came from sees these messages again" in done.stderr
    assert "5 letters redriven.\n" == done.stdout
    scene.sent += 5
    scene.settles()
    assert [0, 1, 2] == scene.ids()
    again = scene.lines("show", "--status", "open")
    assert [(8, 2), (9, 2), (10, 2)] == sorted((each["source"]["offset"], each["attempts"]) for each in again)


def test_what_became_a_row_after_all_is_not_redriven(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, tmp_path: Path
) -> None:
    """P2: letters that a halt left behind, whose messages were rows after the mend, are no letters any more."""
    execute(database, "CREATE TABLE t (id bigint, n integer)")
    name = topic(PARTITIONS)
    poison = {"min_messages": 15, "max_ratio": 0.1}
    control = {"daemon": {"control": str(tmp_path / "control")}}
    run = daemon({"t": handler(name, "t", group_id=name, poison=poison, batch={"max_age": "2s"})}, control)
    scene = Scene(kafka, database, name, run)
    for partition in range(PARTITIONS):
        scene.send([{"n": "of text"}] * 10, partition)
    wait_until(lambda: run.status()["handlers"]["t"]["state"] == "halted", TIMEOUT, "the breaker's halt")
    left_behind = sum(scene.letters().values())
    assert 10 <= left_behind < 30
    execute(database, "ALTER TABLE t ALTER n TYPE text")
    typed = consumerd("resume", "t", "--breaker", cwd=run.config.parent)
    assert OK == typed.returncode, typed.stderr
    wait_until(lambda: run.status()["handlers"]["t"]["lag_messages"] == 0, TIMEOUT, "the rows")
    (report,) = scene.lines("redrive", "--execute")
    wait_until(lambda: len(scene.ids()) >= scene.sent, TIMEOUT, "each message")
    assert list(range(scene.sent)) == scene.ids(), report
    outlived = left_behind - sum(scene.letters().values())
    assert (f"{outlived} more are of messages" in scene.dlq("list").stdout) == (outlived > 0)
    typo = scene.dlq("list", "--reason", "typ")
    assert (2, True) == (typo.returncode, "--reason typ: one of malformed, missing, type," in typo.stderr)
