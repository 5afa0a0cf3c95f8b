"""P1, P2: nothing lost, nothing twice, however the daemon ends."""

import random
from contextlib import ExitStack

import psycopg

from tests.acceptance.events import (
    PACE,
    MakeEvents,
    caught_up,
    checkpoints,
    committed,
    handler,
    held,
    kill,
    kill_while_writing,
)
from tests.acceptance.stream import Stream, make_table, rows, slow_commits
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

KILLS = 10


def test_ten_kills_lose_and_double_nothing(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, dice: random.Random
) -> None:
    """SIGKILL at ten random moments leaves each record once in an append table without a key, and an upsert exact."""
    streams = {name: Stream(kafka.bootstrap, topic(3, prefix=name), 3) for name in ("events", "states")}
    make_table(database, "events")
    make_table(database, "states", ", UNIQUE (grp)")
    for table in streams:
        slow_commits(database, table)
    run = daemon(
        {
            "events": handler(streams["events"].topic, "events", write="append"),
            "states": handler(streams["states"].topic, "states", write="upsert", key=["grp"]),
        },
        {"kafka": {"group_instance_id": "one"}},
        wait=False,
    )
    with ExitStack() as flowing:
        for stream in streams.values():
            flowing.enter_context(stream.flowing(PACE / 2))
        for number in range(KILLS):
            if number % 4:  # each fourth comes while it starts, the others while it writes
                kill_while_writing(run, dice)
            else:
                kill(run, dice)
    run.wait_ready()
    wait_until(lambda: caught_up(run, streams), 120, "both handlers at the end of their topics")
    assert run.stop() == 0

    streams["events"].check(database)
    assert set(rows(database, "states")) == streams["states"].latest()
    assert set(streams["states"].lettered()) == streams["states"].bad()


def test_a_clean_stop_repeats_nothing_and_commits_the_end(database: str, events: MakeEvents) -> None:
    """SIGTERM under load leaves Kafka's offsets at the checkpoints, every letter sent once, and status 0."""
    made = events(database, 3)
    run = made.start()
    with made.stream.flowing(PACE):
        wait_until(lambda: made.written() > 2_000, 30, "the first rows")
        assert run.stop() == 0
        assert committed(made.stream) == checkpoints(database, made.stream)
    made.start_again()
    made.catches_up()
    assert run.stop() == 0
    made.stream.check(database, letters_once=True)


def test_two_members_share_without_loss_or_double(database: str, events: MakeEvents) -> None:
    """A second member that joins under load, and the first that is killed, leave each record once."""
    made = events(database, 4)
    first = made.start()
    with made.stream.flowing(PACE):
        second = made.start()
        wait_until(lambda: len(held(first)) == len(held(second)) == 2, 30, "two partitions for each")
        first.kill()
        wait_until(lambda: len(held(second)) == 4, 30, "all for the second")
    made.catches_up()
    assert second.stop() == 0
    made.stream.check(database)


def test_a_database_that_went_back_is_written_again(database: str, events: MakeEvents) -> None:
    """Rows and checkpoint taken back together under load (a failover) are read and written again, each once."""
    made = events(database)
    run = made.start()
    with made.stream.flowing(PACE):
        for times in range(1, 9):
            wait_until(lambda n=times: made.written() > 2_000 * n, 30, "rows to take back")  # type: ignore[misc]
            go_back(database, made.stream, 300)
    made.catches_up()
    assert run.metrics()['consumerd_fenced_writes_total{handler="events"}'] > 0
    assert run.stop() == 0
    made.stream.check(database)


def go_back(dsn: str, stream: Stream, offsets: int) -> None:
    """Take the last offsets of each partition back: rows and checkpoint, as a standby that was behind has them."""
    with psycopg.connect(dsn) as conn:
        stood = conn.execute("SELECT partition, next_offset FROM consumerd.checkpoint FOR UPDATE").fetchall()
        for partition, offset in stood:
            back = max(0, offset - offsets)
            gone = [stream.sent[partition, taken] for taken in range(back, offset)]
            conn.execute("DELETE FROM events WHERE n = ANY (%s)", [gone])
            conn.execute("UPDATE consumerd.checkpoint SET next_offset = %s WHERE partition = %s", [back, partition])
