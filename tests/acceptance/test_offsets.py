"""`consumerd offsets show` and `reset`: as kafka-consumer-groups, but of both stores."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner, Result

from consumerd import loader
from consumerd.cli import app
from consumerd.commands import reset
from consumerd.commands.aim import Aim, aim
from consumerd.commands.group import Group
from consumerd.commands.offsets import Plan, planned
from consumerd.errors import Halt
from consumerd.types import TopicPartition
from tests.acceptance.control import CONTROL
from tests.acceptance.control import done as typed
from tests.acceptance.events import Events, MakeEvents, checkpoints, commit, commits, committed, wait_for_halt
from tests.acceptance.stream import POISON_EVERY, rows
from tests.acceptance.test_operator import expected, read_again, read_once, run_to_the_end, tool
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

OK, FAILED, USAGE = 0, 1, 2
PARTITIONS = 2
TIMEOUT = 30


@pytest.fixture
def written(database: str, events: MakeEvents) -> Events:
    """Run a daemon, its table without a key, to the end of what was sent, and stop it."""
    return ran(events(database, PARTITIONS))


def ran(made: Events) -> Events:
    """Send some, write it, stop."""
    made.stream.produce(200)
    made.start()
    made.catches_up()
    assert made.run.stop() == 0
    return made


def command(made: Events, name: str, *arguments: str) -> Result:
    """Run `offsets` for the daemon's files, in this process."""
    return CliRunner().invoke(app, ["offsets", name, "events", *arguments, "-c", str(made.run.config)])


def shown(made: Events) -> list[dict[str, Any]]:
    """Run `show` and return its JSON lines."""
    done = command(made, "show", "-o", "json")
    assert (OK, "") == (done.exit_code, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def stores(made: Events) -> tuple[dict[int, int], dict[int, int]]:
    """Return the offsets of both stores."""
    return checkpoints(made.dsn, made.stream), committed(made.stream)


def plan(made: Events, way: str, number: int = 0) -> Plan:
    """Plan a reset of all topics."""
    config = loader.load(made.run.config)
    return asyncio.run(planned(config, config.handlers[0], Aim(way=way, number=number), {}))


def carry_out(made: Events, planned: Plan) -> list[str]:
    """Carry a plan out; return what there is to say."""
    config = loader.load(made.run.config)
    return asyncio.run(reset.execute(config, config.handlers[0], planned))


def test_show(written: Events) -> None:
    """Both stores, whose Kafka's offset is, the log, and what the next start would do about an operator's."""
    first, second = shown(written)
    topic_id = first["topic_id"]
    assert {
        "topic": written.stream.topic,
        "partition": 0,
        "checkpoint": 100,
        "committed": 100,
        "stamp": "ok",
        "log_start": 0,
        "log_end": 100,
        "highest": 100,
        "epoch": 1,
        "topic_id": topic_id,
        "note": "",
    } == first
    stamp = str(commits(written.stream)[1].metadata)
    commit(written.stream, {0: 40})
    commit(written.stream, {1: 60}, stamp)  # copied by a tool
    first, second = shown(written)
    assert [("operator's", 100, 40), ("operator's", 100, 60)] == [
        (each["stamp"], each["checkpoint"], each["committed"]) for each in (first, second)
    ]
    assert "the next start takes up 40" == first["note"]
    commit(written.stream, {1: 60}, json.dumps(json.loads(stamp) | {"store": "another"}))
    head, line, another = command(written, "show").stdout.splitlines()
    assert ["partition", "checkpoint", "kafka", "stamp"] == head.split()[:4]
    assert [f"{written.stream.topic}:0", "100", "40", "operator's", "0", "100"] == line.split()[:6]
    assert "another database's" in another


def test_a_dry_run_says_what_is_repeated_and_skipped_and_changes_nothing(written: Events) -> None:
    """Present and new offset of each partition, and the range between; the stores stay as they are."""
    before = stores(written)
    execute(written.dsn, "UPDATE consumerd.checkpoint SET next_offset = 30 WHERE partition = 1")
    done = command(written, "reset", "--to-offset", "50", "--all-topics")
    head, first, second = done.stdout.splitlines()
    assert ["partition", "present", "new"] == head.split()
    assert [f"{written.stream.topic}:0", "100", "50", "repeats", "50..99"] == first.split()
    assert [f"{written.stream.topic}:1", "30", "50", "skips", "30..49"] == second.split()
    assert "Nothing was changed; --execute sets these offsets." in done.stderr
    assert "append writes them a second time: no unique index refuses them" in done.stderr
    assert ({0: 100, 1: 30}, before[1]) == stores(written)
    execute(written.dsn, "ALTER TABLE events ADD UNIQUE (n)")
    done = command(written, "reset", "--to-offset", "50", "--all-topics")
    assert "append halts at the first that a unique index finds in the table" in done.stderr


def test_a_reset_moves_both_stores_and_takes_effect_exactly(written: Events) -> None:
    """The next run repeats, or skips, exactly what the dry run named; Kafka's offset has our stamp."""
    stream = written.stream
    times = read_once(stream)
    done = command(written, "reset", "--to-offset", "70", "--topic", f"{stream.topic}:1", "--execute")
    assert OK == done.exit_code
    assert "Set: 1 partition. The next start goes on there" in done.stderr
    assert ({0: 100, 1: 70}, {0: 100, 1: 70}) == stores(written)
    assert [100, 70] == [json.loads(str(each.metadata))["offset"] for each in commits(stream)]  # stamped
    assert [(1,), (2,)] == execute(written.dsn, "SELECT epoch FROM consumerd.checkpoint ORDER BY partition")
    run_to_the_end(written)
    read_again(stream, times, {1: 70})
    assert rows(written.dsn, "events") == expected(stream, times)
    assert "an operator" not in written.run.logs()

    stream.produce(40)
    carry_out(written, plan(written, "shift-by", 5))
    run_to_the_end(written)
    times |= {source: int(source[1] >= 105) for source in stream.sent if source not in times}
    assert rows(written.dsn, "events") == expected(stream, times)
    stream.produce(20)
    carry_out(written, plan(written, "to-latest"))
    assert ({0: 130, 1: 130}, {0: 130, 1: 130}) == stores(written)
    assert ["stays", "stays"] == [each.change for each in plan(written, "to-current").resets]


@pytest.mark.parametrize(
    ("operators", "crash"),
    [(True, "after Kafka's offset"), (True, "after the checkpoint"), (False, "after the checkpoint")],
)
def test_a_crash_between_the_stores_resolves_to_the_new_offset(
    written: Events, monkeypatch: pytest.MonkeyPatch, *, crash: str, operators: bool
) -> None:
    """Killed between the stores, with an operator's earlier reset not taken up yet or without: the new offset holds."""
    stream, times = written.stream, read_once(written.stream)
    if operators:
        commit(stream, {0: 20, 1: 20})
    wanted = plan(written, "to-offset", 60)

    whole = Group.commit

    async def dies(self: Group, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Be killed before the commit that is the last, or right after the first."""
        if any(stamp for _, stamp in offsets.values()):
            raise KeyboardInterrupt
        await whole(self, offsets)
        if crash == "after Kafka's offset":
            raise KeyboardInterrupt

    monkeypatch.setattr(Group, "commit", dies)
    with pytest.raises(KeyboardInterrupt):
        carry_out(written, wanted)
    run_to_the_end(written)
    read_again(stream, times, {0: 60, 1: 60})
    assert rows(written.dsn, "events") == expected(stream, times)


def test_nothing_is_set_where_it_is_not_as_it_was_shown(written: Events) -> None:
    """Compare-and-set: a checkpoint that moved, or was claimed, since the plan was made leaves both stores alone."""
    before = stores(written)
    wanted = plan(written, "to-offset", 60)
    for change in ("next_offset = 99", "next_offset = 100, epoch = epoch + 1"):
        execute(written.dsn, f"UPDATE consumerd.checkpoint SET {change} WHERE partition = 1")
        with pytest.raises(Halt, match=f"the checkpoint of {written.stream.topic}:1 is not as it was shown any more"):
            carry_out(written, wanted)
    assert before == stores(written)


def test_no_offset_is_set_under_members(database: str, events: MakeEvents) -> None:
    """While the group has members a reset names them and changes nothing; a dry run still shows the plan."""
    made = events(database, PARTITIONS)
    made.stream.produce(100)
    made.start()
    made.catches_up()
    dry = command(made, "reset", "--to-earliest", "--all-topics")
    assert (OK, 3) == (dry.exit_code, len(dry.stdout.splitlines()))
    done = command(made, "reset", "--to-earliest", "--all-topics", "--execute")
    assert FAILED == done.exit_code
    for told in (dry, done):
        assert f"group {made.stream.topic} has members (rdkafka at 127.0.0.1)" in told.stderr
    assert {0: 50, 1: 50} == checkpoints(database, made.stream)


def test_a_halted_handler_is_set_and_restarted(database: str, events: MakeEvents) -> None:
    """Its daemon stays up: the handler has left its group, and a restart takes up what was set."""
    made = events(database, 1, poison={"action": "halt"})
    made.stream.produce(POISON_EVERY)  # the first of them is poison
    made.start(CONTROL)
    wait_for_halt(made.run)
    carry_out(made, plan(made, "to-offset", 1))
    typed(made.run, "restart", "events")
    made.catches_up()
    assert rows(database, "events") == expected(made.stream, read_once(made.stream))


def test_what_is_exported_is_what_kafkas_tool_exports(kafka: KafkaServer, written: Events, tmp_path: Path) -> None:
    """The CSV of both tools says the same, what is clipped to the log included, and each reads the other's."""
    stream, way = written.stream, ("--shift-by", "1000", "--topic", written.stream.topic)
    theirs = tool(kafka, stream.topic, "--reset-offsets", "--dry-run", "--export", *way)
    ours = command(written, "reset", *way, "--export").stdout
    assert sorted(theirs.split()) == sorted(ours.split()) == [f"{stream.topic},0,100", f"{stream.topic},1,100"]
    (file := tmp_path / "plan.csv").write_text(theirs)
    assert [100, 100] == list(aim({"from-file": file}).offsets.values())
    file.write_text(plan(written, "to-offset", 30).csv())
    tool(kafka, stream.topic, "--reset-offsets", "--execute", "--from-file", str(file))
    assert {0: 30, 1: 30} == committed(stream)


def test_to_a_time(written: Events) -> None:
    """It is the first message at or after the time; the log's end where there is none so late."""
    between = time.time_ns() // 1_000_000 + 1
    wait_until(lambda: time.time_ns() // 1_000_000 > between, TIMEOUT, "a later millisecond")
    written.stream.produce(20)
    for moment, offset in ((0, 0), (between, 100), (between + 3_600_000, 110)):
        assert [offset, offset] == [each.new for each in plan(written, "to-datetime", moment).resets]


def test_before_the_first_run(database: str, events: MakeEvents) -> None:
    """A partition that is set begins there, the others where `start` says: they did not come later than the group."""
    made = events(database, PARTITIONS, start="latest")
    made.stream.produce(200)
    made.start(wait=False).kill()
    done = command(made, "reset", "--to-offset", "90", "--topic", f"{made.stream.topic}:0", "--execute")
    assert OK == done.exit_code, done.stderr
    assert "begins at 90" in done.stdout
    made.start_again()
    made.catches_up()
    assert made.run.stop() == 0
    times = {source: int(source[0] == 0 and source[1] >= 90) for source in made.stream.sent}
    assert rows(database, "events") == expected(made.stream, times)


def test_a_topic_made_again(kafka: KafkaServer, admin: AdminClient, written: Events) -> None:
    """What counts from the old topic's offset is refused; an offset of the new one is where the handler goes on."""
    stream = written.stream
    admin.delete_topics([stream.topic])[stream.topic].result(TIMEOUT)
    wait_until(lambda: stream.topic not in admin.list_topics(timeout=TIMEOUT).topics, TIMEOUT, "the topic's end")
    kafka.make_topic(stream.topic, PARTITIONS)
    before = Counter(rows(written.dsn, "events"))
    stream.sent.clear()
    stream.produce(40)
    done = command(written, "reset", "--shift-by", "-5", "--all-topics", "--execute")
    assert FAILED == done.exit_code
    assert (
        f"topic {stream.topic} was deleted and made again: offset 100 of {stream.topic}:0 is of the old" in done.stderr
    )
    wanted = plan(written, "to-offset", 5)
    assert {"the topic was made again: goes on in the new one at 5"} == {each.change for each in wanted.resets}
    assert [] == wanted.warnings
    carry_out(written, wanted)
    run_to_the_end(written)
    times = {source: int(source[1] >= 5) for source in stream.sent}
    assert before + expected(stream, times) == rows(written.dsn, "events")


def test_at_least_once(database: str, events: MakeEvents) -> None:
    """With its checkpoint in Kafka a handler goes on where that is set, with what was known beside it."""
    made = ran(events(database, PARTITIONS, checkpoint="kafka"))
    seen = [json.loads(str(each.metadata)) for each in commits(made.stream)]
    carry_out(made, plan(made, "to-offset", 40))
    stamps = [json.loads(str(each.metadata)) for each in commits(made.stream)]
    assert [each | {"offset": 40, "partitions": PARTITIONS} for each in seen] == stamps
    run_to_the_end(made)
    times = read_once(made.stream)
    read_again(made.stream, times, {0: 40, 1: 40})
    assert rows(database, "events") == expected(made.stream, times)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE consumerd.checkpoint SET target = 'public.others'", "wrote {topic}:0 to public.others"),
        ("UPDATE consumerd.store SET store = gen_random_uuid()", "commits {topic}:0 for another database"),
        ("UPDATE consumerd.checkpoint SET group_id = 'another'", "group another writes {topic} to public.events"),
        ("DROP TABLE events", "table events does not exist"),
    ],
)
def test_what_no_reset_is_the_way_on_of(written: Events, statement: str, words: str) -> None:
    """Another table, database or group keeps its halt and its sentence; a reset would only hide it."""
    execute(written.dsn, statement)
    with pytest.raises(Halt) as halt:
        plan(written, "to-earliest")
    assert words.format(topic=written.stream.topic) in str(halt.value)


def test_mistakes(written: Events) -> None:
    """What is mistyped is one sentence with the way on, and exit status 2 where it is the command line."""
    for arguments, status, words in (
        (("--to-latest",), USAGE, "write either --topic TOPIC"),
        (("--to-latest", "--topic", f"{written.stream.topic}:1,7"), FAILED, "has no partition 7"),
    ):
        done = command(written, "reset", *arguments)
        assert (status, "", 1) == (done.exit_code, done.stdout, len(done.stderr.splitlines())), done.stderr
        assert words in done.stderr
