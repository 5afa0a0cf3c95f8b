"""`consumerd init`: a handler's file from a topic's messages and a table, which then runs as it is."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.conftest import MakeTopic
from tests.servers.daemon import Daemon, consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port, wait_until
from tests.servers.sql import execute

OK, FAILED, CONFIG = 0, 1, 78
TIMEOUT = 60

MESSAGES: list[dict[str, Any]] = [
    {
        "orderId": number,
        "customer": {"fullName": f"c{number}", "address": {"city": "Brno"}},
        "placedAt": 1_700_000_000_000 + number,
        "total": number + 0.25,
        "note": None if number % 2 else "n",
        "tags": ["a", number],
    }
    for number in range(20)
]
TABLE = """\
CREATE TABLE orders (
    order_id bigint PRIMARY KEY, full_name text NOT NULL, city varchar(20), placed_at timestamptz NOT NULL,
    total numeric(10, 2), note text, tags jsonb, extra integer, number bigint GENERATED ALWAYS AS IDENTITY
)"""


class Bench:
    """A topic with orders, and a daemon's file without handlers."""

    def __init__(self, kafka: KafkaServer, database: str, topic: str, folder: Path) -> None:
        self.kafka, self.database, self.topic, self.folder = kafka, database, topic, folder
        self.config = write_config(
            folder,
            {
                "kafka": {"bootstrap_servers": kafka.bootstrap},
                "postgres": {"dsn": database},
                "daemon": {"listen": f"127.0.0.1:{free_port()}"},
            },
            {},
        )
        self.handlers = folder / "handlers"

    def init(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `init` for the topic."""
        return consumerd("init", self.topic, *arguments, cwd=self.folder)

    def rows(self, query: str, count: int) -> list[tuple[Any, ...]]:
        """Run the daemon until a table has so many rows, and return what a query finds."""
        run = Daemon(self.config)
        run.start()
        try:
            run.wait_ready()
            wait_until(lambda: len(execute(self.database, query)) == count, TIMEOUT, "the rows")
            assert run.stop() == 0
        finally:
            run.close()
        return execute(self.database, query)


@pytest.fixture
def bench(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Bench:
    """Send the orders."""
    made = Bench(kafka, database, topic(), tmp_path)
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for message in MESSAGES:
        producer.produce(made.topic, json.dumps(message))
    assert producer.flush(TIMEOUT) == 0
    return made


def test_a_table_that_is_there(bench: Bench) -> None:
    """Columns find their fields in other writing, within objects, as epochs; what is written then runs as it is."""
    execute(bench.database, TABLE)
    name = f"h-{bench.topic}"
    done = bench.init("orders", "--key", "order_id", "--name", name, "--execute")
    assert OK == done.returncode, done.stderr
    written = (bench.handlers / f"{name}.toml").read_text(encoding="utf-8")
    assert written in done.stdout
    parsed = tomllib.loads(written)
    assert {"name": "orders", "write": "upsert", "key": ["order_id"]} == parsed["table"]
    assert {
        "order_id": "orderId",
        "full_name": "customer.fullName",
        "city": "customer.address.city",
        "placed_at": {"from": "placedAt", "unit": "ms"},
        "total": "total",
        "note": "note",
        "tags": "tags",
    } == parsed["columns"]
    assert '# extra = ""    # integer: no field of the sample is it' in written
    assert OK == consumerd("check", cwd=bench.folder).returncode
    rows = bench.rows("SELECT order_id, full_name, city, total::float8, note, tags FROM orders ORDER BY 1", 20)
    assert [
        (m["orderId"], m["customer"]["fullName"], "Brno", m["total"], m["note"], m["tags"]) for m in MESSAGES
    ] == rows


def test_a_table_that_is_not_there(bench: Bench) -> None:
    """A dry run changes nothing; --execute makes the table, the schema, the dead-letter topic and the file."""
    admin = AdminClient({"bootstrap.servers": bench.kafka.bootstrap})
    name = f"n-{bench.topic}"
    dry = bench.init("sales.orders", "--key", "order_id", "--name", name, "-o", "json")
    assert (OK, "Nothing was changed; --execute makes all of this.\n") == (dry.returncode, dry.stderr)
    proposed = json.loads(dry.stdout)
    assert [] == list(bench.handlers.glob("*"))
    assert [] == execute(bench.database, "SELECT nspname FROM pg_namespace WHERE nspname IN ('sales', 'consumerd')")
    assert f"consumerd.{name}.dlq" not in admin.list_topics(timeout=TIMEOUT).topics
    done = bench.init("sales.orders", "--key", "order_id", "--name", name, "--execute")
    assert OK == done.returncode, done.stderr
    assert proposed["sql"] in done.stdout
    assert proposed["toml"] == (bench.handlers / f"{name}.toml").read_text(encoding="utf-8")
    assert f"consumerd.{name}.dlq" in admin.list_topics(timeout=TIMEOUT).topics
    columns = execute(
        bench.database,
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
        "WHERE attrelid = 'sales.orders'::regclass AND attnum > 0 ORDER BY attnum",
    )
    assert [
        ("order_id", "bigint", True),
        ("customer", "jsonb", True),
        ("placed_at", "bigint", True),
        ("total", "numeric", True),
        ("note", "text", False),
        ("tags", "jsonb", True),
    ] == columns
    assert [("checkpoint",), ("claims",), ("store",)] == execute(
        bench.database, "SELECT tablename FROM pg_tables WHERE schemaname = 'consumerd' ORDER BY 1"
    )
    rows = bench.rows("SELECT order_id, customer FROM sales.orders ORDER BY 1", 20)
    assert [(m["orderId"], m["customer"]) for m in MESSAGES] == rows


def test_what_would_be_refused_is_told(bench: Bench) -> None:
    """A column that cannot take some of the sample is told in the file, with how many and why."""
    execute(bench.database, "CREATE TABLE orders (order_id bigint NOT NULL, note text NOT NULL)")
    done = bench.init("orders")
    assert OK == done.returncode, done.stderr
    assert "# Of the sample 10 messages would be refused: missing at note" in done.stdout
    assert "# Fields that go nowhere: customer.fullName, customer.address.city, placedAt, total, tags" in done.stdout


def test_mistakes(bench: Bench) -> None:
    """What cannot be proposed is one sentence."""
    for arguments, code, words in [
        (["orders", "--key", "id"], CONFIG, "--key id: the columns would be order_id, customer"),
        (["numbers", "--key", "id"], CONFIG, "numbers.toml would not do: columns lacks id, which table.key names"),
        (["numbers", "--key", "order_id", "--key", "order_id"], CONFIG, "table.key names the same twice"),
        (["empty"], FAILED, "no column of empty has the name of a field; the fields are: orderId, customer,"),
    ]:
        execute(bench.database, "CREATE TABLE IF NOT EXISTS empty (nothing text)")
        execute(bench.database, "CREATE TABLE IF NOT EXISTS numbers (order_id bigint)")
        done = bench.init(*arguments)
        assert (code, 1) == (done.returncode, len(done.stderr.splitlines())), done.stderr
        assert words in done.stderr
    absent = consumerd("init", "not-there", "orders", cwd=bench.folder)
    assert (FAILED, True) == (absent.returncode, "topic not-there does not exist" in absent.stderr)
    bench.kafka.make_topic(f"{bench.topic}-empty")
    empty = consumerd("init", f"{bench.topic}-empty", "orders", cwd=bench.folder)
    assert (FAILED, True) == (empty.returncode, "it holds no message" in empty.stderr)


def test_no_file_is_overwritten(bench: Bench) -> None:
    """A file that is there stays as it is, and the way on is named."""
    handler = {"topics": ["a"], "table": {"name": "b", "write": "append"}}
    write_config(bench.folder, bench.config.read_text(), {"orders": handler})
    before = (bench.handlers / "orders.toml").read_text()
    done = bench.init("orders", "--execute")
    assert CONFIG == done.returncode
    assert "orders.toml is there already, and is never overwritten: give the new one another --name" in done.stderr
    assert before == (bench.handlers / "orders.toml").read_text()


def test_a_kafka_connect_sink(bench: Bench) -> None:
    """Its file becomes a handler of its group, which goes on at the offsets that the sink has committed."""
    execute(bench.database, 'CREATE TABLE orders ("orderId" bigint PRIMARY KEY, total numeric(10, 2), note text)')
    name = f"sink-{bench.topic}"
    sink = {
        "connector.class": "io.aiven.connect.jdbc.JdbcSinkConnector",
        "topics": bench.topic,
        "table.name.format": "orders",
        "value.converter.schemas.enable": "false",
        "errors.tolerance": "all",
        "errors.deadletterqueue.topic.name": f"{name}-dlq",
    }
    (bench.folder / "sink.json").write_text(json.dumps({"name": name, "config": sink}), encoding="utf-8")
    consumer = Consumer({"bootstrap.servers": bench.kafka.bootstrap, "group.id": f"connect-{name}"})
    consumer.commit(offsets=[TopicPartition(bench.topic, 0, 15)], asynchronous=False)
    consumer.close()
    done = consumerd("init", "--from-connect", "sink.json", "--execute", cwd=bench.folder)
    assert OK == done.returncode, done.stderr
    assert f"wrote {bench.handlers / f'{name}.toml'}" in done.stderr
    expected = [(m["orderId"], m["note"]) for m in MESSAGES[15:]]
    assert expected == bench.rows('SELECT "orderId", note FROM orders ORDER BY 1', len(expected))
    again = consumerd("init", "--from-connect", "sink.json", cwd=bench.folder)
    assert (CONFIG, True) == (again.returncode, "is never overwritten" in again.stderr)
    both = consumerd("init", bench.topic, "orders", "--from-connect", "sink.json", cwd=bench.folder)
    assert (2, True) == (both.returncode, "write TOPIC TABLE, or --from-connect FILE" in both.stderr)
