"""The harness tests itself: what the other tests rely on when they break a server."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Consumer, Producer
from psycopg.errors import AdminShutdown, OperationalError

from tests.conftest import MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import wait_until
from tests.servers.proxy import Proxy

DEADLINE = 30.0  # seconds


def _produce(kafka: KafkaServer, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "message.max.bytes": 20_000_000})
    producer.produce(topic, value)
    assert producer.flush(DEADLINE) == 0


def _consume(kafka: KafkaServer, topic: str) -> bytes | None:
    settings: dict[str, str | int] = {
        "bootstrap.servers": kafka.bootstrap,
        "group.id": topic,
        "auto.offset.reset": "earliest",
    }
    consumer = Consumer(settings)
    consumer.subscribe([topic])
    message = consumer.poll(DEADLINE)
    consumer.close()
    assert message is not None
    assert message.error() is None
    return message.value()


def _proxied(proxy: Proxy, database: str) -> psycopg.Connection:
    return psycopg.connect(database, port=proxy.port, connect_timeout=2, autocommit=True)


def test_broker_carries_a_message(kafka: KafkaServer, topic: MakeTopic) -> None:
    """A message that was produced is consumed by a group."""
    name = topic(partitions=3)
    _produce(kafka, name, b"one")
    assert _consume(kafka, name) == b"one"


def test_broker_takes_ten_megabytes(kafka: KafkaServer, topic: MakeTopic) -> None:
    """A value of 10 MB fits through the broker's limit."""
    name = topic()
    _produce(kafka, name, bytes(10_000_000))
    assert _consume(kafka, name) == bytes(10_000_000)


@pytest.mark.parametrize("end", [KafkaServer.stop, KafkaServer.kill])
def test_broker_keeps_its_data(kafka: KafkaServer, topic: MakeTopic, end: object) -> None:
    """A broker that was stopped or killed comes back on its port with what it had."""
    name = topic()
    _produce(kafka, name, b"kept")
    assert callable(end)
    end(kafka)
    assert not kafka.running
    kafka.start()
    assert _consume(kafka, name) == b"kept"


def test_kafka_tool_runs(kafka: KafkaServer, topic: MakeTopic) -> None:
    """Kafka's own command for groups is there, as an operator would use it."""
    name = topic()
    _produce(kafka, name, b"one")
    _consume(kafka, name)
    assert name in kafka.tool("kafka-consumer-groups", "--bootstrap-server", kafka.bootstrap, "--list")


def test_postgres_answers(database: str) -> None:
    """A test's database takes a statement."""
    with psycopg.connect(database) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_postgres_is_durable(breakable_database: str) -> None:
    """The server of the tests syncs its log, as one in production does."""
    with psycopg.connect(breakable_database) as connection:
        assert connection.execute("show fsync").fetchone() == ("on",)


@pytest.mark.parametrize("end", [PostgresServer.stop, PostgresServer.kill])
def test_postgres_keeps_its_data(breakable_postgres: PostgresServer, breakable_database: str, end: object) -> None:
    """A Postgres that was stopped or killed breaks its sessions and comes back on its port with what was committed."""
    with psycopg.connect(breakable_database, autocommit=True) as connection:
        connection.execute("create table kept as select 7 as n")
        assert callable(end)
        end(breakable_postgres)
        with pytest.raises((AdminShutdown, OperationalError)):
            connection.execute("select 1")
    with pytest.raises(OperationalError):
        psycopg.connect(breakable_database)
    breakable_postgres.start()
    with psycopg.connect(breakable_database) as connection:
        assert connection.execute("select n from kept").fetchone() == (7,)


def test_proxy_carries(proxy: Proxy, breakable_database: str) -> None:
    """A connection through the proxy works, also for more than one buffer."""
    with _proxied(proxy, breakable_database) as connection:
        row = connection.execute("select repeat('x', 3000000)").fetchone()
        assert row is not None
        assert len(row[0]) == 3_000_000


def test_proxy_stops_and_starts(proxy: Proxy, breakable_database: str) -> None:
    """A stopped proxy breaks what is open and refuses what comes, on a port that works again after start."""
    with _proxied(proxy, breakable_database) as connection:
        proxy.stop()
        with pytest.raises(OperationalError):
            connection.execute("select 1")
    with pytest.raises(OperationalError, match="refused"):
        _proxied(proxy, breakable_database)
    proxy.start()
    _proxied(proxy, breakable_database).close()


def test_proxy_cuts(proxy: Proxy, breakable_database: str) -> None:
    """A cut resets what is open and takes new connections at once."""
    with socket.create_connection(("127.0.0.1", proxy.port)) as raw, _proxied(proxy, breakable_database) as connection:
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            raw.recv(1)
        with pytest.raises(OperationalError):
            connection.execute("select 1")
    _proxied(proxy, breakable_database).close()


def test_proxy_goes_deaf(proxy: Proxy, breakable_database: str) -> None:
    """A deaf proxy takes connections and answers nothing, and after hear() it carries again."""
    proxy.deaf()
    with socket.create_connection(("127.0.0.1", proxy.port)) as raw:
        raw.settimeout(0.2)
        raw.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # a request for TLS, which Postgres answers at once
        with pytest.raises(TimeoutError):
            raw.recv(1)
    proxy.hear()
    _proxied(proxy, breakable_database).close()


def test_processes_die_with_their_parent(tmp_path: Path) -> None:
    """What the harness started is gone when pytest is killed."""
    starter = (
        "import sys, time; from pathlib import Path; from tests.servers.process import Process;"
        "print(Process(['sleep', '600'], Path(sys.argv[1])).pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    with parent.stdout as lines:
        child = int(lines.readline())
    command = Path(f"/proc/{child}/cmdline")
    wait_until(lambda: command.read_bytes().startswith(b"sleep"), DEADLINE, "the child")
    parent.kill()
    parent.wait()

    def gone() -> bool:
        with suppress(ProcessLookupError):
            os.kill(child, 0)
            return "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()  # where nobody reaps orphans
        return True

    try:
        wait_until(gone, DEADLINE, "the end of the child")
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_start_is_quick(kafka: KafkaServer) -> None:
    """A broker starts within seconds, so that tests can afford to restart it."""
    kafka.stop()
    begin = time.monotonic()
    kafka.start()
    assert time.monotonic() - begin < 60.0
