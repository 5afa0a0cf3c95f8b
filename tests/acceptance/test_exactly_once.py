"""P1, P2: nothing lost, nothing twice, however the daemon ends."""

import random
import threading
from typing import Any

import psycopg
from confluent_kafka import Consumer, TopicPartition

from tests.acceptance.stream import Stream, doubled, letters, make_table, rows, slow_commits, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

KILLS = 10
PACE = 4000.0
"""Messages/s while the daemon is killed again and again."""


def caught_up(daemon: Daemon, streams: dict[str, Stream]) -> bool:
    """Whether the checkpoint of each handler stands at the end of its topic."""
    handlers = daemon.status()["handlers"]
    for handler, stream in streams.items():
        at = {p["partition"]: p["checkpoint"] for p in handlers[handler]["partitions"]}
        ends = {p: max((o + 1 for q, o in stream.sent if q == p), default=0) for p in range(stream.partitions)}
        if at != ends:
            return False
    return True


def handlers_of(daemon: Daemon) -> list[dict[str, Any]]:
    """Return the status of each handler."""
    return list(daemon.status()["handlers"].values())


def handler(topic: str, table: str, **table_keys: object) -> dict[str, object]:
    """Return a handler of small, quick batches, so that a kill finds one in flight."""
    return {
        "topics": [topic],
        "group_id": topic,
        "table": {"name": table, **table_keys},
        "batch": {"max_age": "30ms", "max_messages": 500},
        "dead_letter": {"create": True},
    }


def test_ten_kills_lose_and_double_nothing(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """SIGKILL at ten random moments leaves each record once in an append table without a key, and an upsert exact."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to repeat a failure
    dice = random.Random(seed)
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
    over = threading.Event()

    def produce(stream: Stream) -> None:
        while not over.is_set():
            stream.produce(200, per_second=PACE)

    producers = [threading.Thread(target=produce, args=[stream]) for stream in streams.values()]
    for producer in producers:
        producer.start()
    try:
        for kill in range(KILLS):
            if kill % 4:  # each fourth comes while it starts, the others while it writes
                run.wait_ready()
                wait_until(lambda: all(handler["written"] for handler in handlers_of(run)), 30, "rows of this run")
            threading.Event().wait(dice.uniform(0.0, 1.0))
            run.kill()
            run.start()
    finally:
        over.set()
        for producer in producers:
            producer.join()
    run.wait_ready()
    wait_until(lambda: caught_up(run, streams), 120, "both handlers at the end of their topics")
    assert run.stop() == 0

    events = rows(database, "events")
    assert doubled(events) == {}
    assert set(events) == streams["events"].good()
    assert set(rows(database, "states")) == streams["states"].latest()
    for stream in streams.values():
        assert {source_of(letter) for letter in letters(kafka.bootstrap, f"{stream.topic}.dlq")} == stream.bad()


def test_a_clean_stop_repeats_nothing_and_commits_the_end(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """SIGTERM under load leaves Kafka's offsets at the checkpoints, every letter sent once, and status 0."""
    stream = Stream(kafka.bootstrap, topic(3), 3)
    make_table(database, "events")
    run = daemon({"events": handler(stream.topic, "events", write="append")})
    producer = threading.Thread(target=stream.produce, args=[20_000], kwargs={"per_second": PACE})
    producer.start()
    try:
        wait_until(lambda: run.status()["handlers"]["events"]["written"] > 2_000, 30, "the first rows")
        assert run.stop() == 0
        assert committed(kafka, stream) == checkpoints(database, stream)
    finally:
        producer.join()
    run.start()
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic, again")
    assert run.stop() == 0

    numbers = rows(database, "events")
    assert doubled(numbers) == {}
    assert set(numbers) == stream.good()
    sources = [source_of(letter) for letter in letters(kafka.bootstrap, f"{stream.topic}.dlq")]
    assert sorted(sources) == sorted(stream.bad())


def test_two_members_share_without_loss_or_double(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A second member that joins under load, and the first that is killed, leave each record once."""
    stream = Stream(kafka.bootstrap, topic(4), 4)
    make_table(database, "events")
    handlers = {"events": handler(stream.topic, "events", write="append")}
    first = daemon(handlers)
    producer = threading.Thread(target=stream.produce, args=[60_000], kwargs={"per_second": 8000.0})
    producer.start()
    try:
        second = daemon(handlers)

        def shared() -> bool:
            return [len(d.status()["handlers"]["events"]["partitions"]) for d in (first, second)] == [2, 2]

        wait_until(shared, 30, "two partitions for each")
        first.kill()
        wait_until(lambda: len(second.status()["handlers"]["events"]["partitions"]) == 4, 30, "all for the second")
    finally:
        producer.join()
    wait_until(lambda: caught_up(second, {"events": stream}), 30, "the end of the topic")
    assert second.stop() == 0

    numbers = rows(database, "events")
    assert doubled(numbers) == {}
    assert set(numbers) == stream.good()


def test_a_database_that_went_back_is_written_again(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Rows and checkpoint taken back together under load (a failover) are read and written again, each once."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    run = daemon({"events": handler(stream.topic, "events", write="append")})
    producer = threading.Thread(target=stream.produce, args=[30_000], kwargs={"per_second": PACE})
    producer.start()
    try:
        for times in range(1, 9):
            wait_until(lambda n=times: handlers_of(run)[0]["written"] > 2_000 * n, 30, "rows to take back")  # type: ignore[misc]
            go_back(database, stream, 300)
    finally:
        producer.join()
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    assert run.metrics()['consumerd_fenced_writes_total{handler="events"}'] > 0
    assert run.stop() == 0

    numbers = rows(database, "events")
    assert doubled(numbers) == {}
    assert set(numbers) == stream.good()


def go_back(dsn: str, stream: Stream, offsets: int) -> None:
    """Take the last offsets of each partition back: rows and checkpoint, as a standby that was behind has them."""
    with psycopg.connect(dsn) as conn:
        stood = conn.execute("SELECT partition, next_offset FROM consumerd.checkpoint FOR UPDATE").fetchall()
        for partition, offset in stood:
            back = max(0, offset - offsets)
            gone = [stream.sent[partition, taken] for taken in range(back, offset)]
            conn.execute("DELETE FROM events WHERE n = ANY (%s)", [gone])
            conn.execute("UPDATE consumerd.checkpoint SET next_offset = %s WHERE partition = %s", [back, partition])


def committed(kafka: KafkaServer, stream: Stream) -> dict[int, int]:
    """Return the offsets that Kafka has for a group."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": stream.topic})
    try:
        asked = [TopicPartition(stream.topic, partition) for partition in range(stream.partitions)]
        return {found.partition: found.offset for found in consumer.committed(asked, timeout=10)}
    finally:
        consumer.close()


def checkpoints(dsn: str, stream: Stream) -> dict[int, int]:
    """Return the checkpoints of a group."""
    with psycopg.connect(dsn) as conn:
        found = conn.execute(
            "SELECT partition, next_offset FROM consumerd.checkpoint WHERE group_id = %s", [stream.topic]
        ).fetchall()
    return dict(found)
