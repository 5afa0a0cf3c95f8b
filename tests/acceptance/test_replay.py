"""`consumerd replay`: a range of messages written once more, each exactly once, and what it refuses to undo."""

import datetime as dt
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from consumerd.commands.ranges import parse
from consumerd.commands.replay import execute as run
from consumerd.commands.replay import plan
from consumerd.commands.replay_plan import Wish
from consumerd.errors import Halt
from consumerd.loader import load
from tests.acceptance.events import caught_up, handler
from tests.acceptance.stream import COLUMNS, Stream, doubled, letters, make_table, rows
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import Process, wait_until
from tests.servers.sql import execute

TIMEOUT = 60  # seconds for anything that a test waits for
OK, FAILED, USAGE = 0, 1, 2
INTO = ("--into", "copy", "--execute")
PACE = ("--rate", "100")
"""Slow enough for whatever is to happen in the middle."""


class Scene:
    """A stream, a handler that appends it to `events`, a table `copy` beside it, and no daemon."""

    def __init__(self, stream: Stream, dsn: str, folder: Path) -> None:
        self.stream, self.dsn, self.folder = stream, dsn, folder
        self.started: list[Process] = []

    def handler(self, **keys: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
        """Return the handler; keys are added to its table, or replace others."""
        return handler(self.stream.topic, "events", write="append") | keys

    def configure(self, *, settings: dict[str, str] | None = None, **keys: Any) -> None:  # noqa: ANN401 - TOML
        """Write the files."""
        postgres = {"dsn": self.dsn, "settings": settings or {}}
        config = {"kafka": {"bootstrap_servers": self.stream.bootstrap}, "postgres": postgres}
        write_config(self.folder, config, {"events": self.handler(**keys)})

    def start(self, *arguments: str) -> Process:
        """Start the command."""
        command = [sys.executable, "-m", "consumerd", "replay", "events", "-o", "json", *arguments]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        log = self.folder / f"replay-{len(self.started)}.log"
        process = Process(command, log, cwd=self.folder, env=env)
        self.started.append(process)
        return process

    def runs(self, *arguments: str, table: str = "copy", count: int = 0) -> Process:
        """Start the command, and return once it has written more rows than these."""
        process = self.start(*arguments)
        process.wait_ready(lambda: rows(self.dsn, table).total() > count, TIMEOUT, "the replay's first rows")
        return process

    def replay(self, *arguments: str, code: int = OK) -> dict[str, Any]:
        """Run the command; return what it tells as JSON, and what it says beside that."""
        done = consumerd("replay", "events", "-o", "json", *arguments, cwd=self.folder)
        assert code == done.returncode, done.stderr
        told: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith('{"handler"') else {}
        return told | {"said": done.stderr}

    def records(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the replays that there are."""
        done = consumerd("replay", "events", "--list", "-o", "json", *arguments, cwd=self.folder)
        assert OK == done.returncode, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def check_copy(self) -> None:
        """Compare the copy with what was sent: each good record is there once."""
        numbers = rows(self.dsn, "copy")
        assert {} == doubled(numbers)
        assert self.stream.good() == set(numbers)


@pytest.fixture
def scene(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Iterator[Scene]:
    """Set up topic, tables and files."""
    for table in ("events", "copy"):
        make_table(database, table)
    made = Scene(Stream(kafka.bootstrap, topic(2), 2), database, tmp_path)
    made.configure()
    yield made
    for process in made.started:
        process.kill_group()


def test_a_range_is_written_once(scene: Scene, admin: AdminClient) -> None:
    """P2: what an offset range holds is in another table, each good record once; the dry run had said so.

    It leaves neither a group in Kafka nor checkpoints, and its record.
    """
    scene.stream.produce(1_000)
    topic = scene.stream.topic
    asked = ("--from", f"{topic}:0@100", "--to", f"{topic}:0@300", "--into", "copy")
    tried = scene.replay(*asked)
    assert {} == dict(rows(scene.dsn, "copy"))
    assert [] == execute(scene.dsn, "SELECT 1 FROM pg_namespace WHERE nspname = 'consumerd'")
    done = scene.replay(*asked, "--execute")
    sent = {offset: number for (partition, offset), number in scene.stream.sent.items() if partition == 0}
    expected = {sent[offset] for offset in range(100, 300)} & scene.stream.good()
    assert expected == set(rows(scene.dsn, "copy"))
    assert {} == doubled(rows(scene.dsn, "copy"))
    counted = {"rows": len(expected), "refused": 200 - len(expected), "skipped": 0}
    assert counted == {name: done["record"][name] for name in counted}
    assert (tried["rows"], tried["refused"]) == (done["rows"], done["refused"])
    named = {refusal["offset"] for refusal in done["refusals"]}
    assert {offset for partition, offset in scene.stream.bad() if partition == 0 and 100 <= offset < 300} == named
    groups = {group.group_id for group in admin.list_consumer_groups().result(TIMEOUT).valid}
    assert [] == [group for group in groups if topic in group]
    (record,) = scene.records()
    assert counted == {name: record[name] for name in counted}
    assert record["finished"] is not None


def test_a_killed_replay_goes_on(scene: Scene) -> None:
    """P2, P3: SIGKILL in the middle, then the same command: each record is there once, in its partition's order."""
    scene.stream.produce(2_000)
    execute(scene.dsn, "ALTER TABLE copy ADD COLUMN at bigserial, ADD COLUMN part integer, ADD COLUMN source bigint")
    scene.configure(columns=COLUMNS | {"part": "@partition", "source": "@offset"})
    running = scene.runs(*INTO, *PACE, count=100)
    running.kill()
    before = rows(scene.dsn, "copy").total()
    (record,) = scene.records()
    assert (before, None) == (record["rows"], record["finished"])
    done = scene.replay(*INTO)
    assert done["goes_on"]
    assert before + done["rows"] == done["record"]["rows"] == len(scene.stream.good())
    scene.check_copy()
    backwards = "SELECT source < lag(source) OVER (PARTITION BY part ORDER BY at) AS back FROM copy"
    assert [(0,)] == execute(scene.dsn, f"SELECT count(*) FROM ({backwards}) AS x WHERE back")


def test_a_stopped_replay_goes_on_at_its_rate(scene: Scene) -> None:
    """P9: SIGTERM ends it with status 1, all that it wrote on record; at 100/s it had not written more than that."""
    scene.stream.produce(2_000)
    began = time.monotonic()
    running = scene.runs(*INTO, *PACE)
    assert FAILED == running.stop(TIMEOUT)
    assert rows(scene.dsn, "copy").total() <= 100 * (time.monotonic() - began + 1)
    (record,) = scene.records()
    assert ("stopped by a signal", rows(scene.dsn, "copy").total()) == (record["failed"], record["rows"])
    assert scene.replay(*INTO)["goes_on"]
    scene.check_copy()


def test_of_two_at_once_the_first_is_fenced(scene: Scene) -> None:
    """P2: whoever goes on with a replay takes all of it; the other writes nothing more, and says so."""
    scene.stream.produce(2_000)
    first = scene.runs(*INTO, *PACE)
    assert scene.replay(*INTO)["goes_on"]
    assert FAILED == first.wait(TIMEOUT)
    assert "another process goes on with this replay" in first.log_tail()
    scene.check_copy()
    (record,) = scene.records()
    assert (2, None) == (record["runs"], record["failed"])


def test_a_forgotten_replay_writes_nothing_more(scene: Scene) -> None:
    """`--forget` is a dry run without --execute; whoever runs what is forgotten is fenced. Then it begins anew."""
    scene.stream.produce(2_000)
    running = scene.runs(*INTO, "--rate", "20")
    assert 1 == len(scene.records("--forget", "1"))
    assert [(1,)] == execute(scene.dsn, "SELECT count(*) FROM consumerd.replays")
    assert [] == scene.records("--forget", "1", "--execute")
    assert FAILED == running.wait(TIMEOUT)
    assert "it was forgotten" in running.log_tail()
    execute(scene.dsn, "TRUNCATE copy")
    assert not scene.replay(*INTO)["goes_on"]
    scene.check_copy()
    assert "to public.copy already" in scene.replay(*INTO, code=FAILED)["said"]


async def test_of_two_replays_that_overlap_one_begins(scene: Scene) -> None:
    """P2: of two that were planned at once, each by another range, the second is refused where it would begin."""
    scene.stream.produce(100)
    config = load(scene.folder / "consumerd.toml")
    (appends,) = config.handlers
    now = dt.datetime.now(dt.UTC)
    wishes = [Wish(asked=parse((), (), None, topics, now=now), into="copy") for topics in ((), (scene.stream.topic,))]
    planned = [await plan(config, appends, wish) for wish in wishes]
    await run(config, appends, wishes[0], planned[0], lambda _: None)
    with pytest.raises(Halt, match=r"to public\.copy already"):
        await run(config, appends, wishes[1], planned[1], lambda _: None)
    scene.check_copy()


def test_skip_existing_fills_what_is_missing(scene: Scene, daemon: MakeDaemon, admin: AdminClient) -> None:
    """Beside a handler that runs, a replay brings back rows that were deleted, and disturbs nothing of it.

    What is refused has a letter already, and gets another one only when that is asked for.
    """
    execute(scene.dsn, "ALTER TABLE events ADD PRIMARY KEY (n)")
    scene.stream.produce(1_000)
    keys = {"table": {"name": "events", "write": "skip-existing"}}
    run = daemon({"events": scene.handler(**keys)}, {"postgres": {"dsn": scene.dsn}})
    scene.folder = run.config.parent
    wait_until(lambda: caught_up(run, {"events": scene.stream}), TIMEOUT, "all rows")
    checkpoints = execute(scene.dsn, "SELECT * FROM consumerd.checkpoint ORDER BY topic, partition")
    execute(scene.dsn, "DELETE FROM events WHERE n % 3 = 0")
    there = rows(scene.dsn, "events").total()
    assert there == scene.replay("--execute")["existing"]
    assert scene.stream.good() == set(rows(scene.dsn, "events"))
    assert len(scene.stream.bad()) == len(letters(scene.stream.bootstrap, f"{scene.stream.topic}.dlq"))
    assert len(scene.stream.bad()) == sum(scene.replay("--dead-letter")["refused"].values())
    assert len(scene.stream.bad()) == len(letters(scene.stream.bootstrap, f"{scene.stream.topic}.dlq"))
    scene.replay("--execute", "--dead-letter")
    assert 2 * len(scene.stream.bad()) == len(letters(scene.stream.bootstrap, f"{scene.stream.topic}.dlq"))
    assert checkpoints == execute(scene.dsn, "SELECT * FROM consumerd.checkpoint ORDER BY topic, partition")
    assert "running" == run.status()["handlers"]["events"]["state"]


def test_letters_of_a_replay_are_of_the_handlers_epoch(scene: Scene, daemon: MakeDaemon) -> None:
    """By its epoch a letter is told from the row that settled an earlier one: a replay's own would hide the next."""
    execute(scene.dsn, "ALTER TABLE events ADD PRIMARY KEY (n)")
    scene.stream.produce(100)
    keys = {"table": {"name": "events", "write": "skip-existing"}}
    run = daemon({"events": scene.handler(**keys)}, {"postgres": {"dsn": scene.dsn}})
    scene.folder = run.config.parent
    wait_until(lambda: caught_up(run, {"events": scene.stream}), TIMEOUT, "all rows")
    run.stop()
    execute(scene.dsn, "UPDATE consumerd.checkpoint SET epoch = 7")
    scene.replay("--execute", "--dead-letter")
    sent = letters(scene.stream.bootstrap, f"{scene.stream.topic}.dlq")
    assert {b"1", b"7"} == {dict(letter.headers() or [])["consumerd.epoch"] for letter in sent}


def test_what_would_double_rows_or_undo_newer_ones_is_refused(scene: Scene) -> None:
    """Rule 26: an append, an upsert without a guard up to elsewhere than its end, a table that another group writes."""
    execute(scene.dsn, "ALTER TABLE events ADD PRIMARY KEY (grp)")
    assert "appends to events" in scene.replay("--execute", code=FAILED)["said"]
    assert "appends to events" in scene.replay("--into", "public.events", code=FAILED)["said"]
    upsert = {"name": "events", "write": "upsert", "key": ["grp"]}
    end = ("--to", f"{scene.stream.topic}:0@0")
    scene.configure(table=upsert)
    assert "has no `version`, so older" in scene.replay(*end, code=FAILED)["said"]
    deletes = {"version": "n", "tombstones": "delete", "tombstone_key": {"grp": "@key"}}
    scene.configure(table=upsert | deletes, key_format="json")
    assert 'has tombstones = "delete", so older' in scene.replay(*end, code=FAILED)["said"]
    scene.configure(table=upsert | {"version": "n"})
    scene.replay(*end, "--execute")
    columns = "(group_id, topic, partition, next_offset, target, mode)"
    execute(scene.dsn, f"INSERT INTO consumerd.checkpoint {columns} VALUES ('g', 't', 0, 1, 'public.copy', 'postgres')")
    execute(scene.dsn, "ALTER TABLE copy ADD PRIMARY KEY (grp)")
    assert "group g writes to" in scene.replay(*INTO, code=FAILED)["said"]


def test_an_upsert_is_replayed_up_to_where_it_stands(scene: Scene, daemon: MakeDaemon) -> None:
    """Rule 26: without a guard a replay ends at the checkpoint, beside no member, and never behind a handler's back."""
    execute(scene.dsn, "ALTER TABLE events ADD PRIMARY KEY (grp)")
    scene.stream.produce(2_000)
    keys = {"table": {"name": "events", "write": "upsert", "key": ["grp"]}}
    run = daemon({"events": scene.handler(**keys)}, {"postgres": {"dsn": scene.dsn}})
    scene.folder = run.config.parent
    wait_until(lambda: caught_up(run, {"events": scene.stream}), TIMEOUT, "all rows")
    assert "has members (1): stop it first" in scene.replay("--execute", code=FAILED)["said"]
    assert OK == run.stop()
    scene.stream.produce(500)
    execute(scene.dsn, "TRUNCATE events")
    before = scene.replay("--execute")
    assert 2_000 == before["passed"]
    assert scene.stream.latest() != set(rows(scene.dsn, "events"))
    execute(scene.dsn, "TRUNCATE events")
    running = scene.runs("--execute", *PACE, table="events")
    run.start()
    assert FAILED == running.wait(TIMEOUT)
    assert "handler events has begun to write" in running.log_tail()


def test_a_gap_is_named_and_left_out_when_that_is_accepted(scene: Scene, admin: AdminClient) -> None:
    """P7: what retention has deleted of the range is named exactly, and skipped on the operator's word alone."""
    scene.stream.produce(1_000)
    topic = scene.stream.topic
    (deleted,) = admin.delete_records([TopicPartition(topic, 0, 50)]).values()
    deleted.result(TIMEOUT)
    asked = ("--from", f"{topic}:0@20", "--from", f"{topic}:1@0", *INTO)
    assert f"{topic}:0: offsets 20..49 are gone from the log; nothing" in scene.replay(*asked, code=FAILED)["said"]
    by_time = ("--from", "2020-01-01T00:00:00Z", *INTO)
    assert f"{topic}:0: offsets 0..49 are gone from the log, and may" in scene.replay(*by_time, code=FAILED)["said"]
    assert {} == dict(rows(scene.dsn, "copy"))
    scene.replay(*asked, "--accept-gap")
    for offset in range(50):
        scene.stream.sent.pop((0, offset))
    scene.check_copy()


def test_retention_that_overtakes_a_replay(scene: Scene, admin: AdminClient) -> None:
    """P7: a gap that opened since a replay began stops it too; with --accept-gap the same command goes on behind it."""
    scene.stream.produce(2_000)
    scene.runs(*INTO, *PACE).kill()
    (deleted,) = admin.delete_records([TopicPartition(scene.stream.topic, 1, 990)]).values()
    deleted.result(TIMEOUT)
    at = dict(execute(scene.dsn, "SELECT partition, next_offset FROM consumerd.replay_checkpoint"))[1]
    assert f"offsets {at}..989 are gone from the log; nothing" in scene.replay(*INTO, code=FAILED)["said"]
    assert scene.replay(*INTO, "--accept-gap")["goes_on"]
    for offset in range(at, 990):
        scene.stream.sent.pop((1, offset))
    scene.check_copy()


def test_a_topic_that_was_made_again_is_not_read(scene: Scene, admin: AdminClient, kafka: KafkaServer) -> None:
    """P7: the offsets of a replay that was interrupted are not those of another topic of the same name."""
    scene.stream.produce(2_000)
    scene.runs(*INTO, *PACE).kill()
    (gone,) = admin.delete_topics([scene.stream.topic]).values()
    gone.result(TIMEOUT)
    wait_until(lambda: scene.stream.topic not in admin.list_topics().topics, TIMEOUT, "the topic's end")
    kafka.make_topic(scene.stream.topic, 2)
    scene.stream.produce(2_000)
    before = rows(scene.dsn, "copy")
    assert "was deleted, and perhaps made again" in scene.replay(*INTO, code=FAILED)["said"]
    assert before == rows(scene.dsn, "copy")


def test_times_and_ends_without_messages(scene: Scene) -> None:
    """A range by time is as Kafka's own tools have it; others end behind a transaction's marker, and at the log's."""
    topic = scene.stream.topic
    producer = Producer({"bootstrap.servers": scene.stream.bootstrap, "transactional.id": topic})
    producer.init_transactions(TIMEOUT)
    began = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(hours=1)
    for numbers in (range(1, 31), range(31, 41)):
        producer.begin_transaction()
        for number in numbers:
            key, value = scene.stream.message(number)
            sent = began + dt.timedelta(seconds=number)
            producer.produce(topic, value, key, partition=0, timestamp=int(sent.timestamp() * 1000))
        producer.commit_transaction(TIMEOUT)
    times = [(began + dt.timedelta(seconds=number)).isoformat() for number in (5, 15)]
    scene.replay("--from", times[0], "--to", times[1], *INTO)
    assert set(range(5, 15)) == set(rows(scene.dsn, "copy"))
    assert 17 == scene.replay("--from", f"{topic}:0@14", "--to", f"{topic}:0@31", *INTO)["passed"]
    assert set(range(5, 31)) == set(rows(scene.dsn, "copy"))
    assert 11 == scene.replay("--from", f"{topic}:0@31", *INTO)["passed"]
    assert set(range(5, 41)) == set(rows(scene.dsn, "copy"))


def test_the_breaker_holds(scene: Scene) -> None:
    """P6: a range that is mostly poison halts the replay, and the dry run, before it is passed over."""
    for number in range(200):
        scene.stream.message(number)
    producer = Producer({"bootstrap.servers": scene.stream.bootstrap})
    for _ in range(200):
        producer.produce(scene.stream.topic, b"nonsense", partition=0)
    assert producer.flush(TIMEOUT) == 0
    scene.configure(poison={"action": "halt"})
    said = scene.replay("--into", "copy", code=FAILED)["said"].splitlines()[-1]
    assert "offset 0 cannot become a row" in said
    assert "--reset-offsets" not in said
    scene.configure(poison={"min_messages": 100})
    for more in ((), ("--execute",)):
        assert "over the limit of 5.0%" in scene.replay("--into", "copy", *more, code=FAILED)["said"]
    (record,) = scene.records()
    assert "over the limit" in record["failed"]
    assert record["failed"].endswith("the same command goes on")


def test_a_role_needs_what_setup_grants_and_its_table(scene: Scene, role: str) -> None:
    """Without the tables it is told to have them made; with what `consumerd setup --sql` prints it replays."""
    scene.stream.produce(100)
    execute(scene.dsn, f"GRANT INSERT ON copy TO {role}")
    scene.configure(settings={"role": role})
    assert "run what `consumerd setup --sql` prints" in scene.replay(*INTO, code=FAILED)["said"]
    printed = consumerd("setup", "--sql", cwd=scene.folder).stdout
    execute(scene.dsn, printed.replace("-- GRANT", "GRANT").replace("TO loader;", f"TO {role};"))
    scene.replay(*INTO)
    scene.check_copy()
    assert [] == scene.records("--forget", "1", "--execute")


def test_mistakes_are_told(scene: Scene) -> None:
    """What cannot be is one sentence with the way on, and status 2; no table, and the table's own sentence."""
    topic = scene.stream.topic
    for arguments, words in (
        (("--from", "yesterday"), "write a time with its zone"),
        (("--from", f"{topic}:7@0"), f"{topic}:7 is not among what this handler reads"),
        (("--into", "a.b.c"), 'write "table" or "schema.table"'),
        (("--forget", "7", "--execute"), "has no such replay"),
    ):
        into = () if "--into" in arguments else ("--into", "copy")
        assert words in scene.replay(*into, *arguments, code=USAGE)["said"]
    assert "absent does not exist" in scene.replay("--into", "absent", code=FAILED)["said"]
