"""The README's commands and configs, and the handlers that ship, run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer
from psycopg.rows import dict_row

from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, Daemon, consumerd
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port, wait_until

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((REPOSITORY / "handlers").glob("*.toml"))


def block(kind: str, beginning: str = "") -> str:
    """Return the one fenced block of a kind that begins like this."""
    (found,) = [text for found, text in BLOCKS if found == kind and text.startswith(beginning)]
    return str(found)


def send(kafka: KafkaServer, topic: str, value: str) -> None:
    """Send one message."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
    producer.produce(topic, value.encode())
    assert producer.flush(10) == 0


def only_row(dsn: str, table: str) -> dict[str, object]:
    """Wait for the first row of a table, and return it."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
        wait_until(lambda: bool(conn.execute(f"SELECT FROM {table}").rowcount), 20, f"a row in {table}")
        (row,) = conn.execute(f"SELECT * FROM {table}").fetchall()
    return row


def test_the_readme_takes_a_message_to_its_table(
    kafka: KafkaServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's table, files and commands bring its message into its table; its addresses and commands answer."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(block("sql"))
    kafka.typed(block("sh", "kafka-topics").strip().replace('"$KAFKA"', kafka.bootstrap))
    listen = f"127.0.0.1:{free_port()}"
    (tmp_path / "handlers").mkdir()
    (tmp_path / "consumerd.toml").write_text(
        block("toml", "# consumerd.toml") + f'\n[daemon]\nlisten = "{listen}"\n', encoding="utf-8"
    )
    handler = block("toml", "# handlers/page_views.toml")
    (tmp_path / "handlers" / "page_views.toml").write_text(handler, encoding="utf-8")
    environment = {"KAFKA": kafka.bootstrap, "DATABASE_URL": database}
    run = Daemon(tmp_path / "consumerd.toml", env=environment)
    try:
        run.start()
        run.wait_ready()
        (message,) = re.findall(r"^\{.*\}$", block("sh", "kafka-console-producer"), re.MULTILINE)
        send(kafka, "page_views", message)
        row = only_row(database, "page_views")
        assert {"id": 1, "visitor": "Ada", "url": "/", "properties": {"ab": "b"}}.items() <= row.items()
        for path in re.findall(r"^curl http://127\.0\.0\.1:9464(/\w+)$", README, re.MULTILINE):
            assert (path, 200) == (path, run.get(path)[0])
        assert "\nconsumerd status page_views " in README
        assert "written 1 rows" in consumerd("status", "page_views", cwd=tmp_path).stdout
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for line in block("sh", "consumerd lag").splitlines():
            assert (line, 0) == (line, consumerd(*line.split()[1:], cwd=tmp_path).returncode)
        assert run.stop() == 0
    finally:
        run.close()


def test_the_sql_that_setup_prints_makes_the_schema(database: str, tmp_path: Path) -> None:
    """What `consumerd setup --sql` prints runs as it is, and twice."""
    (tmp_path / "handlers").mkdir()
    (tmp_path / "consumerd.toml").write_text(block("toml", "# consumerd.toml"), encoding="utf-8")
    (tmp_path / "handlers" / "page_views.toml").write_text(block("toml", "# handlers/"), encoding="utf-8")
    assert block("sh", "consumerd setup") == "consumerd setup --sql\n"
    printed = subprocess.run(
        [sys.executable, "-m", "consumerd", "setup", "--sql"],
        cwd=tmp_path,
        env=os.environ | {"DATABASE_URL": database, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(printed.encode())
        conn.execute(printed.encode())
        assert conn.execute("SELECT count(*) FROM consumerd.store").fetchone() == (1,)


def test_the_make_targets_of_the_readme_are_there() -> None:
    """Each `make TARGET` that the README names is a target of the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)$|`make (\w+)`", README, re.MULTILINE))
    named = {name for pair in named for name in pair if name}
    assert {"demo", "test", "lint", "bench", "lock"} <= named
    assert [] == [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_a_handler_that_ships_does_what_its_comment_says(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, example: Path
) -> None:
    """The table in a handler's comment takes the message in its comment, each column filled."""
    text = example.read_text(encoding="utf-8")
    comment = "\n".join(line.removeprefix("#") for line in text.split("\n\n", 1)[0].splitlines())
    table_sql, message = re.findall(r"(CREATE SCHEMA.*?\);)\n.*?(\{.*\})", comment, re.DOTALL)[0]
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(table_sql.encode())
    name = topic(1, prefix=example.stem)
    text = re.sub(r"^topics = .*$", f'topics = ["{name}"]\ngroup_id = "{name}"', text, flags=re.MULTILINE)
    modules = {path.name: path.read_text(encoding="utf-8") for path in example.parent.glob(f"{example.stem}.py")}
    run = daemon({example.stem: text, **modules})
    send(kafka, name, message)
    (table,) = re.findall(r'^name = "(.*)"$', text, re.MULTILINE)
    row = only_row(database, table)
    assert [] == [column for column, value in row.items() if value is None]
    assert run.stop() == 0
