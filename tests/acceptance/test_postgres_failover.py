"""P1, P2, rule 7: a standby takes over. What it has not got, rows and checkpoint together, is written again, once."""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.outage import Scene, tell
from tests.acceptance.stream import Stream, make_table, rows, slow_commits
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import wait_until

BEHIND = 300
"""Rows that the primary has and the standby has not."""
LOOKED_WITHIN = 75
"""Seconds in which a daemon without messages notices that the checkpoint went back: it looks each minute."""


@pytest.fixture
def primary(servers_folder: Path) -> Iterator[PostgresServer]:
    """Start a server of the test's own."""
    server = PostgresServer(Path(tempfile.mkdtemp(prefix="primary-", dir=servers_folder)))
    server.folder.chmod(0o711)
    server.start()
    yield server
    server.close()


@pytest.fixture
def standby(primary: PostgresServer, servers_folder: Path) -> Iterator[PostgresServer]:
    """Start its standby, with the table in both."""
    make_table(primary.dsn, "events")
    slow_commits(primary.dsn, "events")
    folder = Path(tempfile.mkdtemp(prefix="standby-", dir=servers_folder))
    folder.chmod(0o711)
    server = primary.standby(folder)
    yield server
    server.close()


@pytest.fixture
def scene(
    kafka: KafkaServer, primary: PostgresServer, standby: PostgresServer, topic: MakeTopic, daemon: MakeDaemon
) -> Callable[..., Scene]:
    """Make a scene whose DSN names both servers, as libpq's documentation has it for a failover."""

    def make(attributes: str = "read-write") -> Scene:
        dsn = (
            f"host=127.0.0.1,127.0.0.1 port={primary.port},{standby.port} user=postgres dbname=postgres "
            f"target_session_attrs={attributes}"
        )
        return Scene(Stream(kafka.bootstrap, topic(2), 2), dsn, daemon, {})

    return make


def test_a_synchronous_standby_takes_over(
    scene: Callable[..., Scene], primary: PostgresServer, standby: PostgresServer
) -> None:
    """P1, P2: a primary killed amid COMMITs, its synchronous standby promoted: each record once, no letter twice."""
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    synchronous = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
    wait_until(lambda: primary.execute(synchronous) != [], 20, "a synchronous standby")
    with scene() as events:
        primary.kill()
        events.waits("read-only", "onnection refused")
        standby.promote()
        events.recovers()
        events.dsn = standby.dsn
        events.check()


@pytest.mark.parametrize("since", ["running", "quiet", "claimed"])
def test_an_asynchronous_standby_that_was_behind_takes_over(
    scene: Callable[..., Scene], primary: PostgresServer, standby: PostgresServer, since: str
) -> None:
    """P1, P2, rule 7: rows that went back with their checkpoint are written again, once, and the log names the range.

    With messages coming in; with none, so that nothing but looking finds it; and with the claim gone back as well.
    """
    with scene() as events:
        cut_off(standby)
        reached = events.written() + BEHIND
        wait_until(lambda: events.written() > reached, 30, "rows that the standby has not")
        if since == "claimed":
            assert events.run.stop() == 0
            events.run.start()
            events.run.wait_ready()
            wait_until(lambda: events.written() > 0, 30, "rows of the second run")
        if since == "quiet":
            events.catches_up()
        went_back = dict(checkpoints(standby))
        lost = set(rows(primary.dsn, "events")) - set(rows(standby.dsn, "events"))
        assert len(lost) >= BEHIND
        primary.kill()
        if since != "quiet":
            events.waits("read-only", "onnection refused")
        standby.promote()
        events.dsn = standby.dsn
        began = time.monotonic()
        wait_until(lambda: lost <= set(rows(standby.dsn, "events")), LOOKED_WITHIN, "the lost rows")
        tell("the lost rows", began)
        if since == "quiet":
            events.resume()
        events.check(again=True)
    for partition, offset in went_back.items():
        assert re.search(rf'back[^"]*\b{offset}\b.*"{events.stream.topic}:{partition}"', events.run.logs())


def test_a_standby_that_is_not_promoted_yet(
    scene: Callable[..., Scene], primary: PostgresServer, standby: PostgresServer
) -> None:
    """P4: with `target_session_attrs=any` a standby refuses writes, which halts nothing; promoted, it takes them."""
    with scene("any") as events:
        events.catches_up()
        wait_until(lambda: rows(standby.dsn, "events") == rows(primary.dsn, "events"), 20, "the standby")
        primary.kill()
        events.resume()
        events.waits("25006", "read-only", "recovery")
        threading.Event().wait(1)
        standby.promote()
        events.recovers()
        events.dsn = standby.dsn
        events.check()


def cut_off(standby: PostgresServer) -> None:
    """Let a standby receive nothing more."""
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    wait_until(lambda: standby.execute("SELECT 1 FROM pg_stat_wal_receiver") == [], 20, "the end of the WAL receiver")


def checkpoints(server: PostgresServer) -> list[tuple[int, int]]:
    """Return partition and next offset of each checkpoint."""
    return [(p, o) for p, o in server.execute("SELECT partition, next_offset FROM consumerd.checkpoint")]
