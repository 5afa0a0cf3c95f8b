"""What a first run says to what is wrong: one sentence with the way on, and nothing is consumed before it is right."""

import secrets
from contextlib import suppress
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from psycopg.conninfo import make_conninfo

from tests.acceptance.events import state
from tests.acceptance.halts import TIMEOUT, expect_halt, handler, landed, make_tables, send
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until


def expect_nothing_consumed(run: Daemon, kafka: KafkaServer, group: str) -> None:
    """Expect no message to have been consumed, and no group to have been joined."""
    assert 0 == run.status()["handlers"]["mistaken"]["consumed"]
    groups = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_consumer_groups().result(TIMEOUT).valid
    assert group not in {each.group_id for each in groups}


def waits_for(run: Daemon) -> str:
    """Return what a handler waits for; nothing while the daemon does not listen yet."""
    with suppress(OSError):
        return str(run.status()["handlers"]["mistaken"]["waiting_for"])
    return ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kafka": {"bootstrap_servers": "127.0.0.1:1"}}, ["127.0.0.1:1", "Connection refused"]),
        ({"postgres": {"dsn": {"dbname": "absent"}}}, ['database "absent" does not exist']),
        ({"postgres": {"dsn": {"user": "nobody"}}}, ['role "nobody" does not exist']),
        ({"postgres": {"dsn": {"port": "1"}}}, ["cannot connect to Postgres", "Connection refused"]),
    ],
    ids=["brokers", "database", "role", "port"],
)
def test_what_may_come_right_by_itself_is_waited_for(
    *,
    kafka: KafkaServer,
    database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
    given: dict[str, dict[str, Any]],
    words: list[str],
) -> None:
    """A wrong address, database or role is state `waiting` with the server's sentence: it may only be down."""
    make_tables(database, "t")
    name, group = topic(), f"group-{secrets.token_hex(4)}"
    send(kafka, name)
    dsn = given.get("postgres", {}).get("dsn", {})
    config = {**given, "postgres": {"dsn": make_conninfo(database, **dsn)}}
    run = daemon({"mistaken": handler(name, "t", group_id=group)}, config, wait=False)
    wait_until(lambda: all(word in waits_for(run) for word in words), TIMEOUT, f"{words} to be waited for")
    assert "waiting" == state(run, "mistaken")
    expect_nothing_consumed(run, kafka, group)
    assert [] == landed(database, "t")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"topics": ["^nothing-is-called-so"]}, ["no topic matches ^nothing-is-called-so", "make the topic"]),
        ({"columns": {"id": "id", "m": "n"}}, ["no column 'm'", "ALTER TABLE public.t ADD COLUMN"]),
        ({"columns": {"id": {"from": "id", "default": "x"}}}, ["columns.id.default does not fit bigint"]),
        ({"dead_letter": {"topic": "small"}}, ["max.message.bytes is 1000", "kafka-configs"]),
        ({"transform": {"function": "absent:f"}}, ["absent"]),
    ],
    ids=["pattern", "column", "default", "small letters", "transform"],
)
def test_what_is_wrong_halts_before_the_first_message(
    *,
    kafka: KafkaServer,
    database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
    given: dict[str, Any],
    words: list[str],
) -> None:
    """A pattern that matches nothing, a column, a default, a dead-letter topic, a transform: each is told at once."""
    make_tables(database, "t")
    name, group = topic(), f"group-{secrets.token_hex(4)}"
    send(kafka, name)
    if given.get("dead_letter"):
        given = {"dead_letter": {"topic": topic(config={"max.message.bytes": "1000"})}}
    run = daemon({"mistaken": handler(name, "t", group_id=group, **given)}, wait=False)
    sentence = expect_halt(run, "mistaken", *words)
    assert "\n" not in sentence
    expect_nothing_consumed(run, kafka, group)
    assert [] == landed(database, "t")
