"""Names that are SQL, format strings or quotes are names: of schema, table, columns, constraint and group."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from psycopg import sql

from tests.acceptance.halts import TIMEOUT
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

OWN_SCHEMA = """own"; DROP TABLE victim; -- {} 'x' $$"""
SCHEMA = """s'"; DROP TABLE victim; --"""
TABLE = """t'; DROP TABLE victim; --"{}%s$$ü"""
KEY = """id"; DROP TABLE victim; --"""
COLUMNS = ("%s", "{}", "%(n)s", "n'", 'n"', "ü 名\t", "select", "x" * 63, "$1", "\\")
"""Those that every row has, beside its key and its version."""
VERSION = "{version}%"
CHECK = """small'; DROP TABLE victim; -- %s {0}"""
GROUP = """'; DROP TABLE victim; -- "{}" %s $(touch pwned) ü """
TYPED = """\
import sys
from consumerd.cli import app

for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    try:
        app(eval(line))
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def quoted(name: str) -> str:
    """Return a name as SQL has it."""
    return sql.Identifier(name).as_string()


def make_tables(database: str) -> str:
    """Make the table, and one that must stay; return the first's name as SQL has it."""
    name = f"{quoted(SCHEMA)}.{quoted(TABLE)}"
    columns = ", ".join(f"{quoted(column)} integer" for column in (*COLUMNS, VERSION))
    constraint = f"CONSTRAINT {quoted(CHECK)} CHECK ({quoted(COLUMNS[0])} < 100)"
    execute(database, f"CREATE TABLE victim (); CREATE SCHEMA {quoted(SCHEMA)}")
    execute(database, f"CREATE TABLE {name} ({quoted(KEY)} integer PRIMARY KEY, {columns}, {constraint})")
    return name


def typed(folder: Path, *lines: list[str]) -> list[str]:
    """Run commands in one process; return what each prints, its exit status in the last line."""
    done = subprocess.run(
        [sys.executable, "-c", TYPED],
        input="\n".join(map(repr, lines)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT * 2,
        check=False,
    )
    return done.stdout.split("$ [")[1:]


def test_names_are_names(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Rows land, a letter is redriven, a replay is written, and nothing is run that stands in a name."""
    name, table, every = topic(), make_tables(database), (KEY, *COLUMNS, VERSION)
    group = f"{GROUP}{name}"
    handler: dict[str, Any] = {
        "topics": [name],
        "group_id": group.replace("$", "$$"),
        "table": {"name": table.replace("$", "$$"), "write": "upsert", "key": [KEY], "version": VERSION},
        "columns": {column: f"c{index}" for index, column in enumerate(every)},
        "dead_letter": {"topic": f"{name}.dlq", "create": True},
        "batch": {"max_age": "100ms"},
        "poison": {"max_ratio": 1.0},
    }
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    rows = [(number, *(number for _ in COLUMNS), 1) for number in range(10)] + [(10, *(100 for _ in COLUMNS), 1)]
    for row in rows:
        producer.produce(name, json.dumps({f"c{index}": value for index, value in enumerate(row)}))
    assert producer.flush(TIMEOUT) == 0
    run = daemon({"t": handler}, {"postgres": {"schema": OWN_SCHEMA.replace("$", "$$")}})

    def settled() -> bool:
        now = run.status()["handlers"]["t"]
        return bool(now["written"] == 10 and now["dead_lettered"]["rejected"] == 1)

    wait_until(settled, TIMEOUT, "rows and the letter")
    assert f'group_id="{group}"' not in run.get("/metrics")[1]
    folder = run.config.parent
    beside = typed(
        folder,
        ["check"],
        ["try", "t"],
        ["lag", "t"],
        ["offsets", "show", "t"],
        ["init", name, table, "--name", "odd"],
        ["setup", "--sql"],
        ["dlq", "list", "t"],
        ["dlq", "show", "t"],
    )
    assert "has the name of a field; the fields are: c0" in beside.pop(4)  # it knows the table, and guesses no name
    assert [] == [said for said in beside if not said.endswith("exit 0\n")]
    printed = beside[4].partition("\n")[2].rpartition("exit")[0]
    execute(database, printed)  # what is there already it makes again, and nothing else
    execute(database, f"ALTER TABLE {table} DROP CONSTRAINT {quoted(CHECK)}")
    assert 0 == run.stop()
    execute(database, f"DELETE FROM {table} WHERE {quoted(KEY)} < 5")
    after = typed(
        folder,
        ["dlq", "redrive", "t", "--execute"],
        ["replay", "t", "--execute"],
        ["offsets", "reset", "t", "--to-earliest", "--all-topics", "--execute"],
    )
    assert [] == [said for said in after if not said.endswith("exit 0\n")]
    assert rows == execute(database, f"SELECT * FROM {table} ORDER BY 1")
    assert [(group,)] == execute(database, f"SELECT DISTINCT group_id FROM {quoted(OWN_SCHEMA)}.checkpoint")
    assert [] == execute(database, "TABLE victim")
    assert not (folder / "pwned").exists()
