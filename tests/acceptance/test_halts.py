"""Mistakes of ours halt one handler with nothing skipped, say what to type, and after that it runs."""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.acceptance.events import wait_for_halt
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, Daemon, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

TIMEOUT = 30  # seconds for anything that a test waits for
UPSERT = {"write": "upsert", "key": ["id"]}


def handler(topic: str, table: str, /, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler of ``topic`` into ``table``, in append unless told otherwise."""
    return {
        "topics": [topic],
        "table": {"name": table, "write": "append"},
        "batch": {"max_age": "100ms"},
        "dead_letter": {"create": True},
        **more,
    }


def send(kafka: KafkaServer, topic: str, numbers: Iterable[int] = range(10)) -> None:
    """Produce ``{"id": i, "n": i}`` for each number."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number in numbers:
        producer.produce(topic, json.dumps({"id": number, "n": number}).encode(), partition=0)
    assert producer.flush(TIMEOUT) == 0


def expect_rows(database: str, table: str, numbers: Iterable[int] = range(10)) -> None:
    """Wait until the table has as many rows as numbers were sent, and compare them."""
    expected = [(number, number) for number in numbers]
    wait_until(lambda: len(landed(database, table)) >= len(expected), TIMEOUT, f"{len(expected)} rows in {table}")
    assert expected == landed(database, table)


def landed(database: str, table: str) -> list[tuple[Any, ...]]:
    """Return a table's rows."""
    return execute(database, f"SELECT id, n FROM {table} ORDER BY id")


def expect_halt(daemon: Daemon, name: str, *essential: str) -> str:
    """Wait until a handler has halted with these words, in /status and in the log; return its sentence."""
    sentence = wait_for_halt(daemon, name)
    assert [] == [words for words in essential if words not in sentence], sentence
    lines = [json.loads(line) for line in daemon.logs().splitlines()]
    assert f"halted: {sentence}" in [line["message"] for line in lines if line.get("handler") == name]
    return sentence


def expect_not_ready(daemon: Daemon, *halted: str) -> None:
    """Expect a /readyz of 503 that names the halted handlers and no others, in a process that is healthy."""
    code, body = daemon.get("/readyz")
    assert (503, {f"{name}: halted" for name in halted}) == (code, set(body.splitlines()))
    assert 200 == daemon.get("/healthz")[0]


def make_tables(database: str, *names: str) -> None:
    """Make tables as ``send`` fills them."""
    execute(database, "; ".join(f"CREATE TABLE {name} (id bigint, n bigint)" for name in names))


def checkpoint(database: str, group: str) -> int | None:
    """Return the checkpoint of a group's partition 0."""
    rows = execute(database, f"SELECT next_offset FROM consumerd.checkpoint WHERE group_id = '{group}'")
    return rows[0][0] if rows else None


def letters(kafka: KafkaServer, topic: str) -> int:
    """Count what a topic of one partition holds."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": "count"})
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=TIMEOUT)
    consumer.close()
    return int(high - low)


def set_offset(admin: AdminClient, group: str, topic: str, offset: int) -> None:
    """Do what ``kafka-consumer-groups --reset-offsets --execute`` does."""
    wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, offset)])
    (future,) = admin.alter_consumer_group_offsets([wanted]).values()
    (answer,) = future.result(TIMEOUT).topic_partitions
    assert answer.error is None


def restart(daemon: Daemon, handlers: dict[str, dict[str, Any]] | None = None) -> None:
    """Start a stopped daemon, with other handlers if they are given; all must run now."""
    if handlers is not None:
        write_config(daemon.config.parent, daemon.config.read_text(encoding="utf-8"), handlers)
    daemon.start()
    daemon.wait_ready()


@pytest.fixture
def admin(kafka: KafkaServer) -> AdminClient:
    """Make a client for what an operator does."""
    return AdminClient({"bootstrap.servers": kafka.bootstrap})


@pytest.fixture
def role(database: str) -> Iterator[str]:
    """Make a role that may do nothing, and forget it after."""
    name = f"consumerd_test_{secrets.token_hex(4)}"
    execute(database, f"CREATE ROLE {name}")
    yield name
    execute(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_mistake_halts_its_handler_alone_and_says_what_to_type(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """What is missing or unfit halts that handler alone; once mended as its sentence says, it runs."""
    name = topic()
    absent = f"absent-{secrets.token_hex(4)}"
    letter_topics = [f"letters-{secrets.token_hex(4)}" for _ in range(2)]
    kafka.make_topic(letter_topics[1], config={"cleanup.policy": "compact"})
    tables = ("healthy", "no_column", "no_index", "no_topic", "no_letters", "compacted")
    make_tables(database, *tables)
    execute(database, "CREATE TABLE bad_type (id bigint, n bigint, extra bytea)")
    execute(database, "CREATE UNLOGGED TABLE unlogged (id bigint, n bigint)")
    handlers = {table: handler(name, table) for table in (*tables, "no_table", "bad_type", "unlogged")}
    handlers["no_column"]["columns"] = {"id": "id", "n": "n", "lacking": "n"}
    handlers["no_index"]["table"] = {"name": "no_index", **UPSERT}
    handlers["no_topic"]["topics"] = [absent]
    handlers["no_letters"]["dead_letter"] = {"topic": letter_topics[0]}
    handlers["compacted"]["dead_letter"] = {"topic": letter_topics[1]}
    essential = {
        "no_table": ["table no_table does not exist", "create it", "`table.name`"],
        "no_column": ["no_column", "no column 'lacking'", 'ALTER TABLE public.no_column ADD COLUMN "lacking"'],
        "bad_type": ["column extra", "bytea", "not supported yet", "bigint", "[columns]"],
        "no_index": ["unique index", 'CREATE UNIQUE INDEX CONCURRENTLY ON public.no_index ("id");'],
        "unlogged": ["unlogged", "ALTER TABLE public.unlogged SET LOGGED;"],
        "no_topic": [f"topic {absent} does not exist", f"kafka-topics --create --topic {absent}", "`topics`"],
        "no_letters": [f"kafka-topics --create --topic {letter_topics[0]}", "`dead_letter.create = true`"],
        "compacted": ["cleanup.policy is compact", f"--alter --topic {letter_topics[1]}"],
    }
    run = daemon(handlers, wait=False)
    said = {mistake: expect_halt(run, mistake, *words) for mistake, words in essential.items()}
    send(kafka, name)
    expect_rows(database, "healthy")
    expect_not_ready(run, *essential)
    assert 0 == run.stop()

    make_tables(database, "no_table")
    execute(database, str(re.findall(r"ALTER TABLE \S+ ADD COLUMN \S+", said["no_column"])[0]) + " bigint")
    execute(database, str(re.findall(r"CREATE UNIQUE INDEX .*?;", said["no_index"])[0]))
    execute(database, "ALTER TABLE public.unlogged SET LOGGED")
    kafka.make_topic(absent)
    send(kafka, absent)
    kafka.typed(re.findall("(kafka-topics .*?);", said["no_letters"])[0])
    kafka.typed(re.findall("(kafka-configs .*?);", said["compacted"])[0])
    handlers["bad_type"]["columns"] = {"id": "id", "n": "n"}
    restart(run, handlers)
    for table in (*essential, "healthy"):
        expect_rows(database, table)


def test_missing_privileges_halt_with_the_grants_to_type(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, role: str
) -> None:
    """A role that may not make the schema, then one that may not write its table: the sentences' SQL mends both."""
    name = topic()
    make_tables(database, "mine", "others")
    execute(database, f"GRANT INSERT ON mine TO {role}")
    send(kafka, name, range(5))
    handlers = {"mine": handler(name, "mine"), "others": handler(name, "others", table={"name": "others", **UPSERT})}
    execute(database, "CREATE UNIQUE INDEX ON others (id)")
    run = daemon(handlers, {"postgres": {"settings": {"role": role}}}, wait=False)
    for each in handlers:
        expect_halt(run, each, "cannot make schema consumerd", "`consumerd setup --sql`")
    expect_not_ready(run, "mine", "others")
    run.stop()

    command = [sys.executable, "-m", "consumerd", "setup", "--sql", "-c", str(run.config)]
    printed = subprocess.check_output(command, text=True, env={"PYTHONPATH": str(REPOSITORY)})
    execute(database, printed.replace("-- GRANT", "GRANT").replace("TO loader;", f"TO {role};"))
    run.start()
    grants = re.findall(r"GRANT .*?;", expect_halt(run, "others"))
    assert [f"GRANT INSERT, UPDATE, SELECT ON public.others TO {role};"] == grants
    expect_rows(database, "mine", range(5))
    expect_not_ready(run, "others")
    run.stop()

    execute(database, grants[0])
    restart(run)
    expect_rows(database, "others", range(5))


def test_a_table_that_changes_in_mid_run_skips_and_garbles_nothing(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Dropped or renamed halts; a type that still fits goes on; one that no longer fits makes letters, not garbage."""
    name = topic()
    tables = ("dropped", "wider", "other", "renamed")
    make_tables(database, *tables)
    handlers = {table: handler(name, table) for table in tables}
    handlers["renamed"]["columns"] = {"id": "id", "n": "n"}
    run = daemon(handlers)
    send(kafka, name)
    for table in tables:
        expect_rows(database, table)
    execute(database, "DROP TABLE dropped; ALTER TABLE renamed RENAME n TO m")
    execute(database, "ALTER TABLE wider ALTER n TYPE double precision")
    execute(database, "ALTER TABLE other ALTER n TYPE timestamptz USING to_timestamp(n)")
    send(kafka, name, range(10, 20))

    expect_rows(database, "wider", range(20))
    expect_halt(run, "renamed", "no column 'n'", 'ALTER TABLE public.renamed ADD COLUMN "n"')
    expect_halt(run, "dropped", "table dropped does not exist", "create it")
    wait_until(lambda: checkpoint(database, "consumerd.other") == 20, TIMEOUT, "the other type's letters")
    assert 10 == letters(kafka, "consumerd.other.dlq")
    assert [(10,)] == execute(database, "SELECT count(*) FROM other")
    for halted in ("renamed", "dropped"):
        assert 10 == checkpoint(database, f"consumerd.{halted}")
    expect_not_ready(run, "dropped", "renamed")
    run.stop()

    execute(database, "CREATE TABLE dropped (id bigint, n bigint); ALTER TABLE renamed RENAME m TO n")
    restart(run)
    expect_rows(database, "dropped", range(10, 20))
    expect_rows(database, "renamed", range(20))


def test_a_topic_full_of_poison_trips_the_breaker(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Over the limit the handler halts before the tripping batch's first letter, its offset unmoved."""
    name, good = topic(), topic()
    execute(database, "CREATE TABLE full_of_poison (id bigint, n text); CREATE TABLE healthy (id bigint, n bigint)")
    handlers = {
        "full_of_poison": handler(name, "full_of_poison", batch={"max_age": "100ms", "max_messages": 50}),
        "healthy": handler(good, "healthy"),
    }
    handlers["full_of_poison"]["poison"] = {"min_messages": 100, "max_ratio": 0.1}
    send(kafka, name, range(400))
    run = daemon(handlers, wait=False)
    expect_halt(run, "full_of_poison", "over the limit of 10.0%", "`max_ratio` under [poison]", "$.n")
    send(kafka, good)
    expect_rows(database, "healthy")
    lettered = letters(kafka, "consumerd.full_of_poison.dlq")
    assert lettered < 100
    assert lettered == checkpoint(database, "consumerd.full_of_poison")
    expect_not_ready(run, "full_of_poison")
    run.stop()

    handlers["full_of_poison"]["poison"]["max_ratio"] = 1.0
    restart(run, handlers)
    wait_until(lambda: letters(kafka, "consumerd.full_of_poison.dlq") == 400, TIMEOUT, "400 letters")


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


def test_a_duplicate_is_poison_also_where_postgres_went_back(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P3: rows that went back with their checkpoint are no reason to take a producer's repetition for our own."""
    name = topic()
    execute(database, "CREATE TABLE t (id bigint PRIMARY KEY, n bigint)")
    send(kafka, name, [*range(30), 5])
    run = daemon({"back": handler(name, "t", poison={"min_messages": 100})})
    wait_until(lambda: checkpoint(database, "consumerd.back") == 31, TIMEOUT, "the rows")
    execute(
        database,
        "BEGIN; DELETE FROM t WHERE id >= 20; UPDATE consumerd.checkpoint SET next_offset = 20, max_offset = 20;"
        "COMMIT;"
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'consumerd/%'",
    )
    expect_rows(database, "t", range(30))
    wait_until(lambda: checkpoint(database, "consumerd.back") == 31, TIMEOUT, "the rows again")
    assert "Postgres went back: the checkpoint is at 20, and had been at 31" in run.logs()
    assert 2 == letters(kafka, "consumerd.back.dlq")


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
    admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P6: a topic that was deleted is missed, also by a handler that has nothing to read."""
    name, good = topic(), topic()
    make_tables(database, "gone", "healthy")
    run = daemon({"gone": handler(name, "gone"), "healthy": handler(good, "healthy")})
    admin.delete_topics([name])[name].result(TIMEOUT)
    expect_halt(run, "gone", f"topic {name} is gone from the broker", "make it again")
    expect_not_ready(run, "gone")


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
