"""P4: an outage is not a poison message. Waits visibly, for ever, and goes on by itself; nothing is dead-lettered."""

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.acceptance.stream import Stream, doubled, letters, make_table, rows, slow_commits, source_of
from tests.acceptance.test_exactly_once import caught_up, handler
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaCluster, KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import free_port, wait_until
from tests.servers.proxy import Proxy


def state(daemon: Daemon) -> str:
    """Return the state of the handler `events`."""
    return str(daemon.status()["handlers"]["events"]["state"])


def retries(daemon: Daemon) -> float:
    """Return how often Postgres was tried again."""
    return daemon.metrics()['consumerd_retries_total{cause="postgres",handler="events"}']


def check(kafka: KafkaServer | KafkaCluster, dsn: str, stream: Stream) -> None:
    """Compare table and letters with what was sent."""
    numbers = rows(dsn, "events")
    assert doubled(numbers) == {}
    assert set(numbers) == stream.good()
    assert {source_of(letter) for letter in letters(kafka.bootstrap, f"{stream.topic}.dlq")} == stream.bad()


def test_postgres_killed_and_started_again(
    kafka: KafkaServer,
    breakable_postgres: PostgresServer,
    breakable_database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
) -> None:
    """A crashed Postgres is waited for, with the server's sentence in the status; the daemon goes on by itself."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(breakable_database, "events")
    handlers = {"events": handler(stream.topic, "events", write="append") | {"retry": {"max": "1s"}}}
    run = daemon(handlers, {"postgres": {"dsn": breakable_database}})
    stream.produce(5_000)
    breakable_postgres.kill()
    try:
        stream.produce(5_000)
        wait_until(lambda: state(run) == "waiting", 20, "the state `waiting`")
        assert "ostgres" in run.status()["handlers"]["events"]["waiting_for"]["postgres"]
        assert run.get("/healthz")[0] == 200
    finally:
        breakable_postgres.start()
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    assert state(run) == "running"
    assert retries(run) > 0
    assert run.logs().count("recovered") >= 1
    check(kafka, breakable_database, stream)


def test_connections_terminated(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Backends terminated in the middle of writes roll back, and their batches are written by new connections."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    run = daemon({"events": handler(stream.topic, "events", write="append")})
    with psycopg.connect(database, autocommit=True) as conn:
        for _ in range(10):
            stream.produce(500, per_second=2000.0)
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'consumerd/events'"
            )
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    assert retries(run) > 0
    check(kafka, database, stream)


def test_connections_cut(
    kafka: KafkaServer,
    breakable_postgres: PostgresServer,
    breakable_database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
) -> None:
    """Connections reset without a word from the server, COMMITs among them, neither lose nor double a row."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(breakable_database, "events")
    slow_commits(breakable_database, "events")
    proxy = Proxy(breakable_postgres.port)
    proxy.start()
    try:
        parameters = conninfo_to_dict(breakable_database) | {"host": "127.0.0.1", "port": str(proxy.port)}
        dsn = " ".join(f"{name}={value}" for name, value in parameters.items())
        run = daemon({"events": handler(stream.topic, "events", write="append")}, {"postgres": {"dsn": dsn}})
        for _ in range(10):
            stream.produce(500, per_second=2000.0)
            proxy.cut()
        wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
        assert retries(run) > 0
    finally:
        proxy.close()
    check(kafka, breakable_database, stream)


def test_a_locked_table_is_waited_for(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """A table locked past `lock_timeout` is an outage; when it is free again everything lands."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    handlers = {"events": handler(stream.topic, "events", write="append") | {"retry": {"max": "500ms"}}}
    run = daemon(handlers, {"postgres": {"settings": {"lock_timeout": "300ms"}}})
    with psycopg.connect(database) as conn:
        conn.execute("LOCK TABLE events")
        stream.produce(3_000)
        wait_until(lambda: state(run) == "waiting", 20, "the state `waiting`")
        assert "55P03" in run.status()["handlers"]["events"]["waiting_for"]["postgres"]
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    check(kafka, database, stream)


def test_the_broker_killed_and_started_again(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A crashed broker is waited for, visibly; what was not committed to Kafka is not written twice."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    run = daemon({"events": handler(stream.topic, "events", write="append")})
    stream.produce(5_000)
    kafka.kill()
    try:
        wait_until(lambda: state(run) == "waiting", 30, "the state `waiting`")
        assert run.status()["handlers"]["events"]["waiting_for"]["kafka"]
    finally:
        kafka.start()
    stream.produce(5_000)
    wait_until(lambda: caught_up(run, {"events": stream}), 60, "the end of the topic")
    wait_until(lambda: state(run) == "running", 20, "the state `running`")
    check(kafka, database, stream)


def test_both_down_at_start(
    kafka: KafkaServer,
    breakable_postgres: PostgresServer,
    breakable_database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
) -> None:
    """Started with nothing there it waits and says for what; when both are there it begins by itself."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(breakable_database, "events")
    stream.produce(1_000)
    kafka.stop()
    breakable_postgres.stop()
    try:
        handlers = {"events": handler(stream.topic, "events", write="append") | {"retry": {"max": "1s"}}}
        run = daemon(handlers, {"postgres": {"dsn": breakable_database}}, wait=False)
        wait_until(lambda: b"waiting: Kafka" in run.log.read_bytes(), 30, "the line that it waits for Kafka")
        assert run.get("/readyz")[0] == 503
        kafka.start()
        wait_until(lambda: b"cannot connect to Postgres" in run.log.read_bytes(), 60, "the line about Postgres")
    finally:
        kafka.start()
        breakable_postgres.start()
    run.wait_ready(60)
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    check(kafka, breakable_database, stream)


def test_a_wrong_password_is_waited_for(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A database that does not exist is waited for, and its server's sentence is in the status."""
    make_table(database, "events")
    handlers = {"events": handler(topic(1), "events", write="append")}
    parameters = conninfo_to_dict(database) | {"dbname": "nowhere"}
    dsn = " ".join(f"{name}={value}" for name, value in parameters.items())
    run = daemon(handlers, {"postgres": {"dsn": dsn}}, wait=False)
    wait_until(lambda: b'database \\"nowhere\\" does not exist' in run.log.read_bytes(), 20, "the server's sentence")
    assert run.get("/readyz")[0] == 503
    assert run.stop() == 0


def test_no_broker_at_the_address(database: str, daemon: MakeDaemon) -> None:
    """A wrong broker address is waited for, and the sentence names it."""
    address = f"127.0.0.1:{free_port()}"
    make_table(database, "events")
    run = daemon(
        {"events": handler("orders", "events", write="append")}, {"kafka": {"bootstrap_servers": address}}, wait=False
    )
    wait_until(lambda: address.encode() in run.log.read_bytes(), 20, "the address")
    assert run.stop() == 0
