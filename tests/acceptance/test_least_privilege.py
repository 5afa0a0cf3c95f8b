"""A role with what `consumerd setup --sql` prints, and the grants on its tables that docs/security.md has."""

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.acceptance.halts import TIMEOUT, UPSERT, handler
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

MODES: dict[str, dict[str, Any]] = {
    "append": {"write": "append"},
    "skip-existing": {"write": "skip-existing"},
    "upsert": UPSERT,
    "delete": {**UPSERT, "tombstones": "delete", "tombstone_key": {"id": "@key"}},
}
"""By handler and table, what the file says of the table."""


@pytest.fixture
def loader(database: str) -> Iterator[str]:
    """Make a role that may log in, in a database where nobody may do anything unless it is granted."""
    name = f"loader_{secrets.token_hex(4)}"
    own = conninfo_to_dict(database)["dbname"]
    execute(
        database,
        f"CREATE ROLE {name} LOGIN; REVOKE ALL ON DATABASE {own} FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC",
    )
    yield name
    execute(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


def printed(database: str, folder: Path) -> str:
    """Return what `setup --sql` prints for a DBA."""
    done = consumerd("setup", "--sql", cwd=folder)
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def documented(mode: str) -> str:
    """Return the grant on the table that the docs have for a mode."""
    text = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| .*\| `GRANT ([A-Z, ]+) ON sales.orders TO loader` \| {mode} \|$", text, re.MULTILINE)
    assert found, mode
    return found[1]


def test_nothing_else_is_needed(  # noqa: PLR0917 - fixtures
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, loader: str, tmp_path: Path
) -> None:
    """Each write mode, letters, a replay and a redrive work with those grants alone."""
    name = topic()
    key = {"key_format": "json"}
    handlers = {
        mode: handler(
            name, mode, group_id=f"{name}-{mode}", table={"name": mode, **table}, poison={"max_ratio": 1.0}, **key
        )
        for mode, table in MODES.items()
    }
    config = {
        "kafka": {"bootstrap_servers": kafka.bootstrap},
        "postgres": {"dsn": make_conninfo(database, user=loader)},
    }
    write_config(tmp_path, config, handlers)
    sql = printed(database, tmp_path)
    grants = "".join(line.removeprefix("-- ") + "\n" for line in sql.splitlines() if line.startswith("-- GRANT"))
    execute(database, sql)
    execute(database, re.sub(r"\bloader\b", loader, grants) + f"GRANT USAGE ON SCHEMA public TO {loader}")
    for mode in MODES:
        execute(database, f'CREATE TABLE "{mode}" (id bigint PRIMARY KEY, n integer NOT NULL CHECK (n < 100))')
        execute(database, f'GRANT {documented(mode)} ON "{mode}" TO {loader}')
    execute(database, f"CREATE TABLE copied (LIKE append); GRANT INSERT ON copied TO {loader}")
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number in range(10):
        producer.produce(name, b'{"id": %d, "n": %d}' % (number, number), b"%d" % number)
    producer.produce(name, b'{"id": 10, "n": 100}', b"10")
    assert producer.flush(TIMEOUT) == 0
    run = daemon(handlers, config)

    def settled() -> bool:
        now = run.status()["handlers"].values()
        return all(each["written"] == 10 and sum(each["dead_lettered"].values()) == 1 for each in now)

    wait_until(settled, TIMEOUT, "rows and letters")
    producer.produce(name, None, b"0")
    producer.flush(TIMEOUT)
    wait_until(lambda: execute(database, 'SELECT count(*) FROM "delete"') == [(9,)], TIMEOUT, "the deletion")
    folder = run.config.parent
    checked = consumerd("check", cwd=folder)
    assert 0 == checked.returncode, checked.stdout
    replayed = consumerd("replay", "append", "--into", "copied", "--execute", cwd=folder)
    assert 0 == replayed.returncode, replayed.stdout + replayed.stderr
    assert [(11,)] == execute(database, "SELECT count(*) FROM copied")
    execute(database, "ALTER TABLE append DROP CONSTRAINT append_n_check")
    redriven = consumerd("dlq", "redrive", "append", "--execute", cwd=folder)
    assert 0 == redriven.returncode, redriven.stdout + redriven.stderr
    assert [(11,)] == execute(database, "SELECT count(*) FROM append")
    assert 0 == run.stop()
