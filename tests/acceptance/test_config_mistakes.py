"""What the command line says to mistakes: every one at once, one clear sentence each, and an exit code of its own."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port
from tests.servers.sql import execute

TIMEOUT = 10  # seconds for one answer
OK, FAILED, USAGE, NOT_REACHED, CONFIG = 0, 1, 2, 75, 78

TABLES = [("checkpoint",), ("claims",), ("letters",), ("replay_checkpoint",), ("replays",), ("store",)]
MADE = "SELECT tablename FROM pg_tables WHERE schemaname = '{}' ORDER BY 1"

HANDLER: dict[str, Any] = {"topics": ["orders"], "table": {"name": "orders", "write": "append"}}


def config(folder: Path, database: str, **more: Mapping[str, Any]) -> Path:
    """Write a daemon of one handler whose broker does not answer, and return its file."""
    whole = {"kafka": {"bootstrap_servers": "127.0.0.1:1"}, "postgres": {"dsn": database}, **more}
    return write_config(folder, whole, {"orders": HANDLER})


@pytest.fixture
def offline(tmp_path: Path) -> Path:
    """Write a good configuration that reaches nothing."""
    return config(tmp_path, "host=127.0.0.1 port=1 dbname=nowhere")


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    """Mistakes in several files are one sentence each, with file, line, key and the nearest name; exit 78."""
    daemon = """\
[kafka]
bootstrap_server = "localhost:9092"
[kafka.properties]
"enable.auto.commit" = true
[postgres]
dsn = "postgresql://loader:hunter2@db/warehouse"
[daemon]
max_buffered = "512MB"
"""
    orders = """\
topics = ["orders"]
[table]
name = "orders"
write = "upsret"
[batch]
max_age = 5
"""
    path = write_config(tmp_path, daemon, {"orders": orders, "broken": "topics = [\n"})
    done = consumerd("run", "-c", str(path), cwd=tmp_path)
    lines = done.stderr.splitlines()
    expected = [
        ("consumerd.toml:2", "bootstrap_server", "bootstrap_servers"),
        ("consumerd.toml:4", "enable.auto.commit"),
        ("consumerd.toml:6", "postgres.dsn", "password"),
        ("consumerd.toml:8", "daemon.max_buffered", "MiB"),
        ("broken.toml:",),
        ("orders.toml:4", "table.write", "upsert"),
        ("orders.toml:6", "batch.max_age", "unit"),
    ]
    found = [words for words in expected if 1 == sum(all(word in line for word in words) for line in lines)]
    assert (CONFIG, expected) == (done.returncode, found), done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "-c", "absent.toml"], CONFIG, "absent.toml"),
        (["run", "-X", "nonsense"], USAGE, "write NAME=VALUE"),
        (["run", "-X", "enable.auto.commit=true"], CONFIG, "enable.auto.commit"),
        (["run", "-X", "group.id=mine"], CONFIG, "group.id"),
        (
            ["run", "-X", "bogus.property=1"],
            CONFIG,
            '[kafka.properties], or -X: No such configuration property: "bogus',
        ),
        (["run", "--log-level", "loud"], USAGE, "debug, info, warning, error"),
        (["setup", "--log-level", "loud"], USAGE, "debug, info, warning, error"),
        (["run", "--nonsense"], USAGE, "No such option: --nonsense"),
        (["setup", "--sqll"], USAGE, "No such option: --sqll"),
        (["rum"], USAGE, "No such command 'rum'"),
        (["setup"], NOT_REACHED, "cannot connect to Postgres"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    offline: Path, arguments: list[str], code: int, words: str
) -> None:
    """What cannot be done ends at once, with an exit code of its kind and the sentence on standard error."""
    done = consumerd(*arguments, cwd=offline.parent)  # its consumerd.toml is found there
    assert (code, "") == (done.returncode, done.stdout)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    """A `daemon.listen` that somebody else has is told with key and address; exit 1: it may be free at the next try."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        path = config(tmp_path, "host=127.0.0.1 port=1", daemon={"listen": listen})
        done = consumerd("run", "-c", str(path), cwd=tmp_path)
    assert (FAILED, 1) == (done.returncode, len(done.stderr.splitlines()))
    assert f"cannot listen on {listen} (daemon.listen): Address already in use; each daemon needs" in done.stderr


def test_the_command_line_wins(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """-X replaces a librdkafka property of the file, --log-level its level."""
    execute(database, "CREATE TABLE orders (id bigint)")
    handler = {**HANDLER, "topics": [topic()], "dead_letter": {"create": True}}
    given = {"kafka": {"properties": {"client.id": "of-the-file"}}, "log": {"level": "info"}}
    daemon_run = daemon({"orders": handler}, given, "-X", "client.id=of-the-command", "--log-level", "error")
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    (described,) = admin.describe_consumer_groups(["consumerd.orders"]).values()
    assert ["of-the-command"] == [member.client_id for member in described.result(TIMEOUT).members]
    assert "" == daemon_run.logs()


def test_setup_may_be_repeated(tmp_path: Path, database: str) -> None:
    """`consumerd setup` makes the schema, says so, and changes nothing the second time."""
    path = config(tmp_path, database)
    stores = []
    for _ in range(2):
        done = consumerd("setup", "-c", str(path), cwd=tmp_path)
        assert (OK, "schema consumerd is there\n", "") == (done.returncode, done.stdout, done.stderr)
        stores += execute(database, "SELECT store FROM consumerd.store")
    assert stores[:1] * 2 == stores
    assert TABLES == execute(database, MADE.format("consumerd"))


def test_printed_sql_runs_as_it_is(tmp_path: Path, database: str) -> None:
    """`consumerd setup --sql` changes nothing itself; what it prints makes what `setup` makes, and may be repeated."""
    path = config(tmp_path, database, postgres={"dsn": database, "schema": 'its "own"'})
    done = consumerd("setup", "--sql", "-c", str(path), cwd=tmp_path)
    assert (OK, "") == (done.returncode, done.stderr)
    assert [] == execute(database, MADE.format('its "own"'))
    execute(database, done.stdout)
    stores = execute(database, 'SELECT store FROM "its ""own""".store')
    execute(database, done.stdout)
    assert stores == execute(database, 'SELECT store FROM "its ""own""".store')
    assert TABLES == execute(database, MADE.format('its "own"'))
    assert OK == consumerd("setup", "-c", str(path), cwd=tmp_path).returncode
