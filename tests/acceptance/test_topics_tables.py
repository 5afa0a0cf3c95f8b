"""Several topics of one handler: all into one table, or each into its own, those that come later too."""

import itertools
import json
import random
import secrets
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.acceptance.events import TIMEOUT, handler, kill_while_writing
from tests.acceptance.halts import expect_rows, landed, make_tables, send
from tests.acceptance.stream import Stream, doubled, letters, make_table, rows, slow_commits
from tests.conftest import MakeDaemon
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

OFTEN = {"kafka": {"properties": {"topic.metadata.refresh.interval.ms": 300}}}
"""How often a pattern is looked up again."""
KILLS = 4


@pytest.fixture
def prefix() -> str:
    """Give what the names of a test's topics begin with."""
    return f"Many.{secrets.token_hex(4)}"


def streams(kafka: KafkaServer, names: Iterable[str], partitions: int = 2) -> list[Stream]:
    """Make topics, and a stream for each whose numbers are its own."""
    made = []
    for place, name in enumerate(names):
        kafka.make_topic(name, partitions)
        made.append(Stream(kafka.bootstrap, name, partitions, _next=itertools.count(place * 1_000_000)))
    return made


def by_topic(prefix: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler of all topics of a test, each with a table in the schema `raw`."""
    table = {"name": "raw.${topic}", "write": "append"}
    return {**handler(f"^{prefix}\\.", "events"), "group_id": prefix, "table": table, **more}


def table_of(topic: str) -> str:
    """Return the table of a topic."""
    return f'raw."{topic}"'


def status(run: Daemon) -> dict[str, Any]:
    """Return what /status says of the one handler."""
    return dict(run.status()["handlers"]["many"])


def all_written(run: Daemon, many: Sequence[Stream]) -> bool:
    """Whether the checkpoints stand at the end of each stream."""
    at = {(p["topic"], p["partition"]): p["checkpoint"] for p in status(run)["partitions"]}
    return at == {(stream.topic, number): end for stream in many for number, end in stream.ends().items()}


def bad(many: Sequence[Stream]) -> set[tuple[str, int, int]]:
    """Return topic, partition and offset of each record that belongs into the dead-letter topic."""
    return {(stream.topic, *source) for stream in many for source in stream.bad()}


def lettered(kafka: KafkaServer, topic: str) -> set[tuple[str, int, int]]:
    """Return topic, partition and offset that the letters in a topic name."""
    names = [f"__connect.errors.{name}" for name in ("topic", "partition", "offset")]
    found = set()
    for letter in letters(kafka.bootstrap, topic):
        headers: dict[str, Any] = dict(letter.headers() or [])
        source, partition, offset = (headers[name].decode() for name in names)
        found.add((source, int(partition), int(offset)))
    return found


def test_several_topics_and_a_pattern_share_a_table(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, dice: random.Random, prefix: str
) -> None:
    """P1, P2: named topics and those of a pattern land in one table, each record once, though the daemon is killed."""
    many = streams(kafka, [f"{prefix}.{name}" for name in "abc"] + [f"other-{prefix}"])
    make_table(database, "events")
    slow_commits(database, "events")
    topics = [many[-1].topic, f"^{prefix}\\."]
    run = daemon(
        {"many": {**handler("", "events", write="append"), "topics": topics, "group_id": prefix}},
        {"kafka": {"group_instance_id": "one"}},
        wait=False,
    )
    with ExitStack() as flowing:
        for stream in many:
            flowing.enter_context(stream.flowing(500))
        for _ in range(KILLS):
            kill_while_writing(run, dice)
    run.wait_ready()
    wait_until(lambda: all_written(run, many), TIMEOUT, "all topics")
    assert 0 == run.stop()
    numbers = rows(database, "events")
    assert {} == doubled(numbers)
    assert set().union(*(stream.good() for stream in many)) == set(numbers)
    assert bad(many) == lettered(kafka, f"{prefix}.dlq")


def test_each_topic_has_its_own_table(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, dice: random.Random, prefix: str
) -> None:
    """P1, P2: with `${topic}` each record lands once in its topic's table, named with dots, dashes and upper case."""
    many = streams(kafka, [f"{prefix}.{name}" for name in ("Orders-v1", "orders-v1", "clicks.eu")])
    execute(database, "CREATE SCHEMA raw")
    for number, stream in enumerate(many):
        make_table(database, table_of(stream.topic))
        execute(database, f"ALTER TABLE {table_of(stream.topic)} ADD COLUMN number{number} bigint DEFAULT {number}")
    columns = {name: name for name in ("n", "grp", "amount", "label", "doc")}
    config = {"kafka": {"group_instance_id": "one"}}
    run = daemon({"many": by_topic(prefix, columns=columns, max_connections=2)}, config, wait=False)
    with ExitStack() as flowing:
        for stream in many:
            flowing.enter_context(stream.flowing(700))
        for _ in range(KILLS):
            kill_while_writing(run, dice)
    run.wait_ready()
    wait_until(lambda: all_written(run, many), TIMEOUT, "all topics")
    assert 0 == run.stop()
    for stream in many:
        numbers = rows(database, table_of(stream.topic))
        assert {} == doubled(numbers)
        assert stream.good() == set(numbers)
    assert bad(many) == lettered(kafka, f"{prefix}.dlq")
    targets = dict(execute(database, "SELECT topic, target FROM consumerd.checkpoint"))
    assert {stream.topic: table_of(stream.topic) for stream in many} == targets


def test_a_topic_without_its_table_holds_up_no_other(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str
) -> None:
    """What fits is written; a topic whose table is missing or does not fit is told, and goes on once that is mended."""
    names = ("there", "missing", "unfit", f"{'long' * 20}")
    there, missing, unfit, long = (f"{prefix}.{name}" for name in names)
    for name in (there, missing, unfit, long):
        kafka.make_topic(name)
        send(kafka, name)
    execute(database, "CREATE SCHEMA raw")
    make_tables(database, table_of(there))
    execute(database, f"CREATE UNLOGGED TABLE {table_of(unfit)} (id bigint, n bigint)")
    run = daemon({"many": by_topic(prefix)})
    expect_rows(database, table_of(there))

    def told() -> str:
        return str(status(run)["waiting_for"].get("postgres", ""))

    essential = [
        f"topic {missing} waits for its table, the others go on: table {table_of(missing)} does not exist",
        f"table {table_of(unfit)} is unlogged",
        f"{table_of(long)} is a longer name than Postgres takes",
    ]
    wait_until(lambda: all(words in told() for words in essential), TIMEOUT, "what is waited for")
    assert f"waiting: {told()}" in [json.loads(line)["message"] for line in run.logs().splitlines()]
    assert ("waiting", True) == (status(run)["state"], status(run)["ready"])
    lags = {p["topic"]: p["lag_messages"] for p in status(run)["partitions"]}
    assert {there: 0, missing: 10, unfit: 10, long: 10} == lags
    assert 10 == run.metrics()[f'consumerd_lag_messages{{handler="many",partition="0",topic="{missing}"}}']

    make_tables(database, table_of(missing))
    execute(database, f"ALTER TABLE {table_of(unfit)} SET LOGGED")
    for name in (missing, unfit):
        expect_rows(database, table_of(name))
    wait_until(lambda: "missing" not in told() and "unfit" not in told(), TIMEOUT, "no more word of them")
    assert long in told()
    assert 0 == run.stop()


def test_a_table_that_goes_while_it_is_written_holds_up_its_topic_alone(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str
) -> None:
    """P1, P2: a table that was dropped, or may not be written, is waited for; all that comes meanwhile lands once."""
    many = streams(kafka, [f"{prefix}.{name}" for name in "abc"])
    dropped, stays, renamed = (table_of(stream.topic) for stream in many)
    execute(database, "CREATE SCHEMA raw")
    for table in (dropped, stays, renamed):
        make_table(database, table)
    run = daemon({"many": by_topic(prefix)})
    for stream in many:
        stream.produce(200)
    wait_until(lambda: all_written(run, many), TIMEOUT, "the first records")
    before = rows(database, dropped)
    execute(database, f"DROP TABLE {dropped}; ALTER TABLE {renamed} RENAME COLUMN label TO title")
    for stream in many:
        stream.produce(200)

    def told() -> str:
        return str(status(run)["waiting_for"].get("postgres", ""))

    essential = (f"table {dropped} does not exist", f"column label of table {renamed} is gone")
    wait_until(lambda: all(words in told() for words in essential), TIMEOUT, "what is waited for")
    wait_until(lambda: set(rows(database, stays)) == many[1].good(), TIMEOUT, "the others")
    lags = {p["topic"]: p["lag_seconds"] for p in status(run)["partitions"] if p["lag_messages"]}
    assert {many[0].topic, many[2].topic} == lags.keys()
    assert all(seconds > 0 for seconds in lags.values())

    make_table(database, dropped)
    execute(database, f"ALTER TABLE {renamed} RENAME COLUMN title TO label")
    wait_until(lambda: all_written(run, many), TIMEOUT, "all of them")
    wait_until(lambda: status(run)["state"] == "running", TIMEOUT, "nothing to be waited for")
    assert 0 == run.stop()
    assert set(rows(database, dropped)) == many[0].good() - before.keys()
    assert set(rows(database, renamed)) == many[2].good()
    assert {} == doubled(rows(database, dropped) + before + rows(database, renamed))
    assert bad(many) == lettered(kafka, f"{prefix}.dlq")


def test_an_altered_table_is_read_again_and_the_others_are_left_alone(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str
) -> None:
    """Rule 9: of several tables only the one that was altered is read again, and every row of it lands."""
    names = [f"{prefix}.{name}" for name in "ab"]
    execute(database, "CREATE SCHEMA raw")
    for name in names:
        kafka.make_topic(name)
        make_tables(database, table_of(name))
    run = daemon({"many": by_topic(prefix, max_connections=1)})
    for name in names:
        send(kafka, name)
        expect_rows(database, table_of(name))
    execute(database, f"ALTER TABLE {table_of(names[0])} ALTER n TYPE integer")
    for name in names:
        send(kafka, name, range(10, 20))
        expect_rows(database, table_of(name), range(20))
    assert 0 == run.stop()
    assert 1 == run.logs().count("the table has changed")


def test_upserts_of_many_topics_keep_their_staging_tables(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str
) -> None:
    """Rule 30: one connection that writes several tables by turns makes a staging table for each, once."""
    names = [f"{prefix}.{name}" for name in "abc"]
    execute(database, "CREATE SCHEMA raw")
    for name in names:
        kafka.make_topic(name)
        execute(database, f"CREATE TABLE {table_of(name)} (id bigint PRIMARY KEY, n bigint)")
    table = {"name": "raw.${topic}", "write": "upsert", "key": ["id"]}
    run = daemon({"many": by_topic(prefix, max_connections=1, table=table)})
    staging = "SELECT oid FROM pg_class WHERE relname LIKE 'consumerd_staging%' AND relkind = 'r' ORDER BY oid"
    seen = []
    for turn in range(1, 4):
        for name in names:
            send(kafka, name, [number % 5 for number in range(5 * turn)])
        done = 15 * turn * (turn + 1) // 2
        wait_until(lambda done=done: status(run)["written"] == done, TIMEOUT, "each turn")  # type: ignore[misc]
        seen.append(execute(database, staging))
    assert 3 == len(seen[0])
    assert [seen[0]] * 3 == seen
    for name in names:
        assert [(number, number) for number in range(5)] == landed(database, table_of(name))
    assert 0 == run.stop()


@pytest.mark.parametrize("checkpoint", ["postgres", "kafka"])
def test_a_topic_that_comes_to_match_is_read_from_its_start(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str, checkpoint: str
) -> None:
    """Rule 13, 24: it is picked up while the daemon runs, with `start = "latest"` too; dead-letter topics are not."""
    first, second, never, third = (f"{prefix}.{name}" for name in ("first", "second", "third.dlq", "letters-of-many"))
    make_tables(database, "events")
    kafka.make_topic(first)
    send(kafka, first)
    many = {
        **handler(f"^{prefix}\\.", "events", write="append"),
        "group_id": prefix,
        "start": "latest",
        "checkpoint": checkpoint,
        "dead_letter": {"create": True, "topic": third},
    }
    run = daemon({"many": many}, OFTEN)
    wait_until(lambda: [p["checkpoint"] for p in status(run)["partitions"]] == [10], TIMEOUT, "the first topic's end")
    for name in (never, second):
        kafka.make_topic(name, 1)
        send(kafka, name, range(100, 110))
    expect_rows(database, "events", range(100, 110))
    send(kafka, first, range(10, 15))
    expect_rows(database, "events", [*range(10, 15), *range(100, 110)])
    assert [first, second] == sorted(p["topic"] for p in status(run)["partitions"])
    assert 0 == run.stop()


@pytest.mark.parametrize("action", ["skip", "halt"])
def test_a_topic_that_comes_to_match_needs_no_letters_where_there_are_none(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str, action: str
) -> None:
    """Without a dead-letter topic, which neither action needs, a topic that appears is read as those before it."""
    make_tables(database, "events")
    kafka.make_topic(f"{prefix}.first")
    many = {
        **handler(f"^{prefix}\\.", "events", write="append"),
        "group_id": prefix,
        "poison": {"action": action},
        "dead_letter": {"topic": f"{prefix}-never-made"},
    }
    run = daemon({"many": many}, OFTEN)
    kafka.make_topic(f"{prefix}.second", 1)
    send(kafka, f"{prefix}.second")
    expect_rows(database, "events")
    assert "running" == status(run)["state"]
    assert 0 == run.stop()


def test_a_table_that_is_locked_holds_up_no_other(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str
) -> None:
    """The catalog waits for the lock on a table: its topic waits with it, and the others are claimed meanwhile."""
    free, locked = (f"{prefix}.{name}" for name in ("free", "locked"))
    for name in (free, locked):
        kafka.make_topic(name)
        send(kafka, name)
    execute(database, "CREATE SCHEMA raw")
    make_tables(database, table_of(free))
    execute(database, f"CREATE TABLE {table_of(locked)} (id bigint DEFAULT 0, n bigint)")
    with psycopg.connect(database) as conn:
        conn.execute(sql.SQL("LOCK TABLE {}").format(sql.Identifier("raw", locked)))
        run = daemon({"many": by_topic(prefix)}, wait=False)
        expect_rows(database, table_of(free))
        wait_until(lambda: "postgres" in status(run)["waiting_for"], TIMEOUT, "the topic that waits")
    expect_rows(database, table_of(locked))
    assert 0 == run.stop()


def test_a_table_that_comes_to_be_locked_holds_up_no_other(
    kafka: KafkaServer, database: str, daemon: MakeDaemon, prefix: str
) -> None:
    """P1: each partition of a topic has something for its locked table, and no connection is lost to the others."""
    free, locked = streams(kafka, [f"{prefix}.{name}" for name in ("free", "locked")], 4)
    execute(database, "CREATE SCHEMA raw")
    for stream in (free, locked):
        make_table(database, table_of(stream.topic))
    settings = {"postgres": {"settings": {"lock_timeout": "300ms"}}}
    run = daemon({"many": by_topic(prefix, max_connections=4)}, settings)
    for stream in (free, locked):
        stream.produce(100)
    wait_until(lambda: all_written(run, [free, locked]), TIMEOUT, "the first records")
    with psycopg.connect(database) as conn:
        conn.execute(sql.SQL("LOCK TABLE {}").format(sql.Identifier("raw", locked.topic)))
        retries = 'consumerd_retries_total{cause="postgres",handler="many"}'
        for count in (1, 1, 1, 1, 50):  # one after another, the first four into one partition each
            before = run.metrics()[retries]
            locked.produce(count)
            wait_until(lambda before=before: run.metrics()[retries] > before, TIMEOUT, "a try")  # type: ignore[misc]
        free.produce(100)
        wait_until(lambda: set(rows(database, table_of(free.topic))) == free.good(), TIMEOUT, "the free ones")
        assert "lock timeout" in status(run)["waiting_for"]["postgres"]
        assert "waiting" == status(run)["state"]
    wait_until(lambda: all_written(run, [free, locked]), TIMEOUT, "the end")
    wait_until(lambda: status(run)["state"] == "running", TIMEOUT, "the recovery")
    assert 0 == run.stop()
    for stream in (free, locked):
        numbers = rows(database, table_of(stream.topic))
        assert {} == doubled(numbers)
        assert stream.good() == set(numbers)
    sent = letters(kafka.bootstrap, f"{prefix}.dlq")
    assert len(bad([free, locked])) == len(sent)
    assert bad([free, locked]) == lettered(kafka, f"{prefix}.dlq")
