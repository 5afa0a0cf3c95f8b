"""`consumerd dlq`: letters that a daemon wrote are listed, shown, redriven, discarded and exported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.acceptance.halts import TIMEOUT, handler
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, Daemon, consumerd
from tests.servers.kafka import KafkaServer
from tests.servers.process import Process, wait_until
from tests.servers.sql import execute

OK, FAILED, USAGE = 0, 1, 2
PARTITIONS = 3
TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, n integer NOT NULL CONSTRAINT small CHECK (n < 100))"
MENDED = "ALTER TABLE t ALTER n DROP NOT NULL, DROP CONSTRAINT small"
SLOW = """\
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END';
CREATE TRIGGER slow AFTER INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION slow()"""
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
    """P1, P2: a redrive that is killed and run again has each mended letter's row once; the others have failed again."""
    mended = []
    scene.send([{"n": 1}])
    for partition in range(PARTITIONS):
        for _ in range(20):
            ids = scene.send(BAD, partition)
            mended += ids[:2]
    scene.settles()
    execute(scene.database, f"{MENDED}; {SLOW}")
    command = [sys.executable, "-m", "consumerd", "dlq", "redrive", "t", "--execute"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = Process(command, tmp_path / "redrive.log", cwd=scene.run.config.parent, env=environment)
    wait_until(lambda: len(scene.ids()) > 1, TIMEOUT, "the first rows")
    process.kill()
    before = len(scene.ids())
    assert 1 < before < 1 + len(mended)
    (report,) = scene.lines("redrive", "--execute", code=FAILED)
    assert sorted([0, *mended]) == scene.ids()
    states = dict(execute(scene.database, "SELECT status, count(*) FROM consumerd.letters GROUP BY status"))
    assert {"redriven": len(mended), "failed": 3 * 20 * PARTITIONS} == states
    attempts = {
        row[0] for row in execute(scene.database, "SELECT attempts FROM consumerd.letters WHERE status = 'failed'")
    }
    assert {2, 3} == attempts
    assert 1 + len(mended) - before == report["redriven"]
    assert {("redriven", "missing"), ("redriven", "rejected")} <= scene.letters().keys()
