"""Rule 10: a checkpoint that does not fit what is there halts its handler, and what an operator sets wins."""

import time

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from tests.acceptance.halts import (
    TIMEOUT,
    UPSERT,
    checkpoint,
    expect_halt,
    expect_not_ready,
    expect_rows,
    handler,
    landed,
    letters,
    make_tables,
    restart,
    send,
    set_offset,
)
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import blocked, execute, locked


def test_a_gap_halts_naming_its_range_and_a_reset_goes_on_after_it(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Messages that retention took before they were read are a halt with the exact range, not a silent jump."""
    name, good = topic(), topic()
    make_tables(database, "gap", "healthy")
    send(kafka, name)
    run = daemon({"gap": handler(name, "gap"), "healthy": handler(good, "healthy")})
    expect_rows(database, "gap")
    run.stop()
    send(kafka, name, range(10, 40))
    admin.delete_records([TopicPartition(name, 0, 25)])[TopicPartition(name, 0)].result(TIMEOUT)

    run.start()
    reset = ("kafka-consumer-groups --bootstrap-server", "--reset-offsets", "--to-offset 25")
    expect_halt(run, "gap", f"{name}:0", "offsets 10..24 are gone", *reset)
    send(kafka, good)
    expect_rows(database, "healthy")
    assert 10 == checkpoint(database, "consumerd.gap")
    set_offset(admin, "consumerd.gap", name, 25)  # the group has no member: it can be done while the daemon runs
    run.stop()
    restart(run)
    expect_rows(database, "gap", [*range(10), *range(25, 40)])
    assert "skips 10..24" in run.logs()


def test_an_operators_reset_rewinds_exactly_and_once(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """rules.md 10, 11: an offset set by an operator becomes the checkpoint, once; a crash after it repeats nothing."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint PRIMARY KEY, n bigint)")
    send(kafka, name, range(100))
    run = daemon({"reset": handler(name, "t", table={"name": "t", **UPSERT})})
    expect_rows(database, "t", range(100))
    run.stop()

    execute(database, "UPDATE t SET n = -1")
    set_offset(admin, "consumerd.reset", name, 40)
    run.start()
    wait_until(lambda: execute(database, "SELECT n FROM t WHERE id = 99") == [(99,)], TIMEOUT, "the repeat")
    assert [(i, -1 if i < 40 else i) for i in range(100)] == landed(database, "t")
    assert 1 == run.logs().count("an operator set the offset to 40: repeats 40..99")
    run.kill()

    execute(database, "UPDATE t SET n = -2")
    send(kafka, name, [100])
    run.start()
    wait_until(lambda: len(landed(database, "t")) == 101, TIMEOUT, "the new row")
    assert [(i, -2 if i < 100 else i) for i in range(101)] == landed(database, "t")
    assert 1 == run.logs().count("an operator set the offset")


def test_checkpoints_that_went_back_alone_make_no_row_poison(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Rule 17: with the rows in the table still, what is read again is refused by its key, and is no poison."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint PRIMARY KEY, n bigint)")
    send(kafka, name, range(30))
    run = daemon({"back": handler(name, "t")})
    expect_rows(database, "t", range(30))
    execute(
        database,
        "UPDATE consumerd.checkpoint SET next_offset = 20, max_offset = 20;"
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'consumerd/%'",
    )
    expect_halt(run, "back", f"{name}:0 was set back to before 30", "delete those rows", "--reset-offsets")
    assert "Postgres went back: the checkpoint is at 20, and had been at 30" in run.logs()
    assert 0 == letters(kafka, "consumerd.back.dlq")
    expect_rows(database, "t", range(30))


@pytest.mark.parametrize("stopped", [True, False])
def test_a_topic_made_again_halts_and_a_deleted_group_changes_nothing(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon, *, stopped: bool
) -> None:
    """rules.md 10: a new topic of an old name holds other messages; a group that Kafka forgot has its checkpoint."""
    name, good = topic(), topic()
    make_tables(database, "again", "forgotten")
    send(kafka, name)
    send(kafka, good)
    handlers = {"again": handler(name, "again"), "forgotten": handler(good, "forgotten")}
    run = daemon(handlers)
    expect_rows(database, "again")
    expect_rows(database, "forgotten")
    if stopped:
        run.stop()
        admin.delete_consumer_groups(["consumerd.forgotten"])["consumerd.forgotten"].result(TIMEOUT)
    admin.delete_topics([name])[name].result(TIMEOUT)
    wait_until(lambda: name not in admin.list_topics(timeout=TIMEOUT).topics, TIMEOUT, "the topic's end")
    kafka.make_topic(name)
    send(kafka, name, range(20, 60))  # more than the old one held: a position in the old one is inside the new one
    if stopped:
        run.start()
    expect_halt(run, "again", f"topic {name} was deleted and made again", "`group_id`")
    send(kafka, good, range(10, 20))
    expect_rows(database, "forgotten", range(20))
    assert stopped == ("the checkpoint stands" in run.logs())
    expect_not_ready(run, "again")
    expect_rows(database, "again")  # nothing of the new topic
    run.stop()
    handlers["again"]["group_id"] = "consumerd.another"  # the old group is over: it is no handler renamed
    restart(run, handlers)
    expect_rows(database, "again", [*range(10), *range(20, 60)])


def test_a_topic_that_is_gone_halts_though_nothing_came_of_it(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P6: a topic that was deleted is missed, also by a handler that has nothing to read."""
    name, good = topic(), topic()
    make_tables(database, "gone", "healthy")
    handlers = {"gone": handler(name, "gone"), "healthy": handler(good, "healthy")}
    run = daemon(handlers)
    admin.delete_topics([name])[name].result(TIMEOUT)
    expect_halt(run, "gone", f"topic {name} is gone from the brokers", "make it again and set `group_id`")
    expect_not_ready(run, "gone")
    run.stop()
    kafka.make_topic(name)
    handlers["gone"]["group_id"] = "consumerd.another"
    send(kafka, name)
    restart(run, handlers)
    expect_rows(database, "gone")


@pytest.mark.parametrize("made_again", [False, True])
def test_what_was_gathered_of_a_topic_that_is_gone_is_written_first(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon, *, made_again: bool
) -> None:
    """P1: the table locked, the topic deleted (and made again): what the daemon holds is the only copy, and lands."""
    name = topic()
    make_tables(database, "gone")
    send(kafka, name)
    run = daemon({"gone": handler(name, "gone")})
    expect_rows(database, "gone")
    with locked(database, "gone"):
        send(kafka, name, range(10, 300))
        wait_until(lambda: run.status()["handlers"]["gone"]["consumed"] == 300, TIMEOUT, "all of them gathered")
        wait_until(lambda: blocked(database), TIMEOUT, "a write that waits")
        time.sleep(2)  # the last look at the topic's id came after the messages
        admin.delete_topics([name])[name].result(TIMEOUT)
        if made_again:
            wait_until(lambda: name not in admin.list_topics(timeout=TIMEOUT).topics, TIMEOUT, "the topic's end")
            kafka.make_topic(name)
        sentence = "made again" if made_again else "is gone from the brokers"
        wait_until(lambda: sentence in waiting_for(run), TIMEOUT, "the topic among what is waited for")
        assert "written" in waiting_for(run)
    expect_rows(database, "gone", range(300))
    expect_halt(run, "gone", sentence)


def waiting_for(run: Daemon) -> str:
    """Return what handler gone waits for of Kafka."""
    return str(run.status()["handlers"]["gone"]["waiting_for"].get("kafka", ""))


def test_another_database_or_another_name_halts(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """rules.md 10, 12: neither a group of another store nor another group for the same table writes it all again."""
    name, good = topic(), topic()
    make_tables(database, "t", "healthy")
    send(kafka, name)
    run = daemon({"before": handler(name, "t")})
    expect_rows(database, "t")
    run.stop()
    send(kafka, name, range(10, 20))

    elsewhere = {"postgres": {"schema": "elsewhere"}}  # a schema has a store of its own
    run = daemon({"before": handler(name, "t"), "healthy": handler(good, "healthy")}, elsewhere, wait=False)
    expect_halt(run, "before", "for another database", "`postgres.dsn`")
    send(kafka, good)
    expect_rows(database, "healthy")
    expect_not_ready(run, "before")
    run.stop()

    handlers = {"after": handler(name, "t")}
    run = daemon(handlers, wait=False)
    expect_halt(run, "after", "a renamed handler?", 'group_id = "consumerd.before"')
    expect_not_ready(run, "after")
    expect_rows(database, "t")
    run.stop()
    handlers["after"]["group_id"] = "consumerd.before"
    restart(run, handlers)
    expect_rows(database, "t", range(20))
