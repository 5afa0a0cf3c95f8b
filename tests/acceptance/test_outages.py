"""P4: an outage is not a poison message. Waits visibly, for ever, and goes on by itself; nothing is dead-lettered."""

from psycopg.conninfo import make_conninfo

from tests.acceptance.events import MakeEvents
from tests.acceptance.stream import slow_commits
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import free_port, wait_until
from tests.servers.proxy import Proxy


def test_connections_cut(proxy: Proxy, breakable_database: str, events: MakeEvents) -> None:
    """Connections reset without a word from the server, COMMITs among them, neither lose nor double a row."""
    made = events(breakable_database)
    slow_commits(breakable_database, "events")
    made.start({"postgres": {"dsn": make_conninfo(breakable_database, host="127.0.0.1", port=proxy.port)}})
    for _ in range(10):
        made.stream.produce(500, per_second=2000.0)
        proxy.cut()
    made.catches_up()
    assert made.run.metrics()['consumerd_retries_total{cause="postgres",handler="events"}'] > 0
    made.stream.check(breakable_database)


def test_both_down_at_start(
    kafka: KafkaServer, breakable_postgres: PostgresServer, breakable_database: str, events: MakeEvents
) -> None:
    """Started with nothing there it waits and says for what; when both are there it begins by itself."""
    made = events(breakable_database, retry={"max": "1s"})
    made.stream.produce(1_000)
    kafka.stop()
    breakable_postgres.stop()
    try:
        run = made.start(wait=False)
        wait_until(lambda: b"waiting: Kafka" in run.log.read_bytes(), 30, "the line that it waits for Kafka")
        assert run.get("/readyz")[0] == 503
        kafka.start()
        wait_until(lambda: b"cannot connect to Postgres" in run.log.read_bytes(), 60, "the line about Postgres")
    finally:
        kafka.start()
        breakable_postgres.start()
    run.wait_ready(60)
    made.catches_up()
    made.stream.check(breakable_database)


def test_a_database_that_does_not_exist_is_waited_for(database: str, events: MakeEvents) -> None:
    """A database that does not exist is waited for, and its server's sentence is in the status."""
    elsewhere = {"postgres": {"dsn": make_conninfo(database, dbname="nowhere")}}
    run = events(database, 1).start(elsewhere, wait=False)
    wait_until(lambda: b'database \\"nowhere\\" does not exist' in run.log.read_bytes(), 20, "the server's sentence")
    assert run.get("/readyz")[0] == 503
    assert run.stop() == 0


def test_no_broker_at_the_address(database: str, events: MakeEvents) -> None:
    """A wrong broker address is waited for, and the sentence names it."""
    address = f"127.0.0.1:{free_port()}"
    run = events(database, 1).start({"kafka": {"bootstrap_servers": address}}, wait=False)
    wait_until(lambda: address.encode() in run.log.read_bytes(), 20, "the address")
    assert run.stop() == 0
