"""Mistakes of ours halt one handler with nothing skipped, say what to type, and after that it runs."""

import re
import secrets
import subprocess
import sys

from tests.acceptance.halts import (
    TIMEOUT,
    UPSERT,
    checkpoint,
    expect_halt,
    expect_not_ready,
    expect_rows,
    handler,
    letters,
    make_tables,
    restart,
    send,
)
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute


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
    execute(database, "CREATE TABLE numbered (id bigint, n bigint, extra bigint GENERATED ALWAYS AS IDENTITY)")
    execute(database, "CREATE UNLOGGED TABLE unlogged (id bigint, n bigint)")
    handlers = {table: handler(name, table) for table in (*tables, "no_table", "numbered", "unlogged")}
    handlers["no_column"]["columns"] = {"id": "id", "n": "n", "lacking": "n"}
    handlers["numbered"]["columns"] = {"id": "id", "n": "n", "extra": "n"}
    handlers["no_index"]["table"] = {"name": "no_index", **UPSERT}
    handlers["no_topic"]["topics"] = [absent]
    handlers["no_letters"]["dead_letter"] = {"topic": letter_topics[0]}
    handlers["compacted"]["dead_letter"] = {"topic": letter_topics[1]}
    essential = {
        "no_table": ["table no_table does not exist", "create it", "`table.name`"],
        "no_column": ["no_column", "no column 'lacking'", 'ALTER TABLE public.no_column ADD COLUMN "lacking"'],
        "numbered": ["column extra", "GENERATED ALWAYS AS IDENTITY", "leave it out"],
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
    del handlers["numbered"]["columns"]
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
