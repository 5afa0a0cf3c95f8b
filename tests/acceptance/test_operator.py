"""P10: Kafka's own tools take effect exactly, with the checkpoint in Postgres; what is lost or restored resets nothing.

rules.md 10 and 11 on a real broker and a real database. The lines of rule 10 that halt are in test_checkpoint_halts.py.
"""

import json
import random
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.events import Events, MakeEvents, checkpoints, commit, commits, committed, members, wait_for_halt
from tests.acceptance.stream import POISON_EVERY, Stream, rows
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import blocked, execute

TIMEOUT = 30
PARTITIONS = 3
CRASHES = 4


def tool(kafka: KafkaServer, group: str, *arguments: str) -> str:
    """Run kafka-consumer-groups for a group."""
    return kafka.tool("kafka-consumer-groups", "--bootstrap-server", kafka.bootstrap, "--group", group, *arguments)


def expected(stream: Stream, times: dict[tuple[int, int], int]) -> Counter[int]:
    """Return how often each good record's number belongs into the table, given how often its offset was read."""
    return Counter({n: times[source] for source, n in stream.sent.items() if n % POISON_EVERY and times[source]})


def read_once(stream: Stream) -> dict[tuple[int, int], int]:
    """Return every offset as read once."""
    return dict.fromkeys(stream.sent, 1)


def read_again(stream: Stream, times: dict[tuple[int, int], int], offsets: dict[int, int]) -> None:
    """Count what is read again from these offsets on."""
    for partition, offset in stream.sent:
        if partition in offsets and offset >= offsets[partition]:
            times[partition, offset] += 1


def run_to_the_end(made: Events) -> None:
    """Start, catch up, stop."""
    made.start_again()
    made.catches_up()
    assert made.run.stop() == 0


@pytest.fixture
def sent(database: str, events: MakeEvents) -> Events:
    """Make a topic and send some."""
    made = events(database, PARTITIONS)
    made.stream.produce(900)
    return made


@pytest.fixture
def written(sent: Events) -> Events:
    """Run a daemon, its table without a key, to the end of what was sent, and stop it."""
    sent.start()
    sent.catches_up()
    assert sent.run.stop() == 0
    return sent


def test_every_way_to_reset_takes_effect_exactly(
    kafka: KafkaServer, database: str, written: Events, tmp_path: Path
) -> None:
    """Each variant of --reset-offsets repeats exactly the messages from where it sets the group, once."""
    stream = written.stream
    times = read_once(stream)
    time.sleep(0.002)  # a millisecond between the two halves, for --to-datetime
    between = datetime.now(UTC)
    stream.produce(300)
    run_to_the_end(written)
    times = {source: times.get(source, 1) for source in stream.sent}
    assert rows(database, "events") == expected(stream, times)

    first, second, whole = stream.topic + ":0", stream.topic + ":1", ("--topic", stream.topic)
    later = dict.fromkeys(range(PARTITIONS), 300)
    plan = tmp_path / "plan.csv"
    plan.write_text(f"{stream.topic},2,250\n", encoding="utf-8")
    variants: list[tuple[tuple[str, ...], dict[int, int]]] = [
        (("--to-earliest", *whole), dict.fromkeys(range(PARTITIONS), 0)),
        (("--to-latest", *whole), {}),
        (("--to-current", *whole), {}),
        (("--to-offset", "399", "--topic", first), {0: 399}),
        (("--shift-by", "-7", "--topic", second), {1: 393}),
        (("--to-datetime", between.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z", *whole), later),
        (("--by-duration", "P1D", "--all-topics"), dict.fromkeys(range(PARTITIONS), 0)),
        (("--from-file", str(plan)), {2: 250}),
    ]
    for arguments, offsets in variants:
        tool(kafka, stream.topic, "--reset-offsets", "--execute", *arguments)
        run_to_the_end(written)
        read_again(stream, times, offsets)
        assert rows(database, "events") == expected(stream, times), arguments
        assert committed(stream) == checkpoints(database, stream)


def test_a_crash_at_any_moment_of_adopting_repeats_nothing(
    kafka: KafkaServer, database: str, written: Events, dice: random.Random
) -> None:
    """Rule 11: killed at random moments around its start, the daemon repeats an operator's range exactly once."""
    stream, run = written.stream, written.run
    times = read_once(stream)
    for _ in range(CRASHES):
        to = dice.randrange(300)
        tool(kafka, stream.topic, "--reset-offsets", "--execute", "--topic", stream.topic, "--to-offset", str(to))
        read_again(stream, times, dict.fromkeys(range(PARTITIONS), to))
        run.start()
        threading.Event().wait(dice.uniform(0.5, 1.6))
        run.kill()
        wait_for_no_member(kafka, stream.topic)
        run_to_the_end(written)
        assert rows(database, "events") == expected(stream, times)


def wait_for_no_member(kafka: KafkaServer, group: str) -> None:
    """Wait until the broker has dropped a killed member."""
    wait_until(lambda: members(kafka, group) == 0, TIMEOUT, "a group without members")


def test_a_crash_between_checkpoint_and_acknowledgement_repeats_nothing(
    kafka: KafkaServer, database: str, written: Events
) -> None:
    """Rule 11: no row is written before Kafka has acknowledged the stamp of an adopted offset."""
    stream, run = written.stream, written.run
    tool(kafka, stream.topic, "--reset-offsets", "--execute", "--topic", stream.topic, "--to-offset", "100")
    wanted = dict.fromkeys(range(PARTITIONS), 100)
    with psycopg.connect(database) as conn:
        conn.execute("LOCK TABLE consumerd.checkpoint IN SHARE MODE")
        run.start()
        wait_until(lambda: blocked(database), TIMEOUT, "the claim")
        kafka.freeze()
        try:
            conn.commit()
            wait_until(lambda: 100 in checkpoints(database, stream).values(), TIMEOUT, "an adopted checkpoint")
            threading.Event().wait(1.0)
            assert sum(rows(database, "events").values()) == len(stream.good())
            run.kill()
        finally:
            kafka.thaw()
    wait_for_no_member(kafka, stream.topic)
    run_to_the_end(written)
    times = read_once(stream)
    read_again(stream, times, wanted)
    assert rows(database, "events") == expected(stream, times)


def test_what_is_ahead_or_behind_in_kafka_changes_nothing(database: str, written: Events) -> None:
    """Rule 10: a stamped offset behind the checkpoint changes nothing; ahead of it, Postgres went back, and is told."""
    stream = written.stream
    behind = json.loads(stamp_of(stream, 0)) | {"offset": 120}
    commit(stream, {0: 120}, json.dumps(behind))
    run_to_the_end(written)
    assert rows(database, "events") == expected(stream, read_once(stream))
    assert committed(stream) == checkpoints(database, stream)

    numbers = [n for (partition, offset), n in stream.sent.items() if partition == 1 and offset >= 200]
    execute(database, "UPDATE consumerd.checkpoint SET next_offset = 200 WHERE partition = 1")
    execute(database, f"DELETE FROM events WHERE n IN ({', '.join(map(str, numbers))})")
    run_to_the_end(written)
    assert rows(database, "events") == expected(stream, read_once(stream))
    assert "Postgres went back: 200..299 had been written" in written.run.logs()


def test_a_copied_stamp_is_an_operators_offset(database: str, written: Events) -> None:
    """Rule 10: metadata of ours at another offset was copied by a tool: the offset is adopted."""
    stream = written.stream
    commit(stream, {2: 50}, stamp_of(stream, 2))
    run_to_the_end(written)
    times = read_once(stream)
    read_again(stream, times, {2: 50})
    assert rows(database, "events") == expected(stream, times)


def test_another_consumers_group_is_taken_over(database: str, sent: Events) -> None:
    """Rule 10: without a checkpoint, offsets that another consumer committed are where it goes on."""
    stream = sent.stream
    commit(stream, {0: 0, 1: 100})
    sent.start()
    sent.catches_up()
    assert sent.run.stop() == 0
    taken = {source: int(source[1] >= (0, 100, 0)[source[0]]) for source in stream.sent}
    assert rows(database, "events") == expected(stream, taken)


def test_an_emptied_database_halts(database: str, written: Events) -> None:
    """Rule 10: offsets of ours without their checkpoints are those of another or a new database; nothing is written."""
    stream, run = written.stream, written.run
    execute(database, "DROP SCHEMA consumerd CASCADE")
    run.start()
    assert "another database" in wait_for_halt(run)
    assert run.stop() == 0
    store = json.loads(stamp_of(stream, 0))["store"]
    execute(database, f"UPDATE consumerd.store SET store = '{store}'")
    run.start()
    assert "it was restored or emptied" in wait_for_halt(run)
    assert run.stop() == 0
    assert rows(database, "events") == expected(stream, read_once(stream))


def stamp_of(stream: Stream, partition: int) -> str:
    """Return the metadata of a committed offset."""
    return str(commits(stream)[partition].metadata)
