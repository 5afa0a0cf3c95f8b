"""P4, P9, rules 5 and 27: a database that is slow, silent or full is not waited for in vain, nor left half-written."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.acceptance.events import MakeEvents
from tests.acceptance.outage import RECOVERED_WITHIN, SEEN_WITHIN, MakeScene, Scene, tell
from tests.acceptance.stream import slow_commits
from tests.servers.postgres import SYSTEM_USER, PostgresServer
from tests.servers.process import wait_until
from tests.servers.proxy import Proxy
from tests.servers.sql import blocked, execute, locked

NOT_DRAINED = 75
DISK = 4 * 1024 * 1024
"""Bytes of the small disk."""
SPEED = """
CREATE TABLE pace (quick_from timestamptz NOT NULL);
INSERT INTO pace VALUES ('-infinity');
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
    IF now() < (SELECT quick_from FROM pace) THEN PERFORM pg_sleep({seconds}); END IF; RETURN NEW; END';
CREATE TRIGGER slow BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION slow()"""
"""Each row takes a while in transactions that began before `quick_from`: a later one is not held up by an older's."""
FOR_MINUTES = 120.0
"""Seconds for each row. A backend whose client has died notices only when it has written what it has received."""
LARGE = {"max_messages": 20_000, "max_age": "200ms"}

Config = Mapping[str, Mapping[str, Any]]


def slow_scene(scene: MakeScene, dsn: str, seconds: float, config: Config | None = None) -> Scene:
    """Return a scene of large batches; each row of its table can be made to take a while."""
    made = scene(dsn, config, batch=LARGE)
    execute(dsn, SPEED.format(seconds=seconds))
    return made


def turn(dsn: str, *, slow: bool) -> None:
    """Make transactions slow, or those that begin from now on quick."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("UPDATE pace SET quick_from = CASE WHEN %s THEN 'infinity' ELSE clock_timestamp() END", [slow])


def copying(dsn: str) -> bool:
    """Whether a session of the daemon is in the middle of a slow COPY."""
    asked = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'consumerd/events' "
        "AND query LIKE 'COPY%' AND wait_event = 'PgSleep'"
    )
    return execute(dsn, asked) != []


@pytest.fixture
def disk(servers_folder: Path, breakable_postgres: PostgresServer) -> Iterator[Path]:
    """Mount a small disk of its own for the tablespace `small`."""
    folder = servers_folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0711", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("a small disk is a tmpfs, which this user or container may not mount")
    try:
        space = folder / "space"
        space.mkdir()
        shutil.chown(space, SYSTEM_USER)
        with psycopg.connect(breakable_postgres.dsn, autocommit=True) as conn:
            conn.execute(f"CREATE TABLESPACE small LOCATION '{space}'".encode())
            yield folder
            conn.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(scene: MakeScene, disk: Path, breakable_database: str) -> None:
    """P4: rows that find no room wait for it, visibly, and land once when there is some; none is a dead letter."""
    events = scene(breakable_database)
    execute(breakable_database, "ALTER TABLE events SET TABLESPACE small")
    with events:
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(DISK))
        events.waits("53100")
        ballast.unlink()
        events.recovers()
        events.check()


def test_writes_longer_than_statement_timeout_become_smaller(scene: MakeScene, breakable_database: str) -> None:
    """Rule 27: a batch that cannot end within `statement_timeout` is written in smaller ones, and poison is found."""
    settings = {"postgres": {"settings": {"statement_timeout": "300ms"}}}
    with slow_scene(scene, breakable_database, 0.002, settings) as events:
        events.catches_up()
        turn(breakable_database, slow=True)
        events.stream.produce(1_500)
        events.waits("57014")
        events.recovers(60)
        turn(breakable_database, slow=False)
        events.check()


def test_one_cancelled_message_slows_nothing_down(events: MakeEvents, breakable_database: str) -> None:
    """Rule 27: a write of one message that was cancelled by hand says nothing of those that come after it."""
    made = events(breakable_database, 1)
    run = made.start()
    made.stream.produce(1)  # poison: no write
    made.catches_up()
    with locked(breakable_database, "events"):
        made.stream.produce(1)
        wait_until(lambda: blocked(breakable_database), 20, "a write that waits")
        execute(
            breakable_database,
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'consumerd/events'",
        )
        wait_until(lambda: "57014" in run.logs(), 20, "the cancelled write")
    made.stream.produce(20_000)
    made.catches_up(20)
    assert run.stop() == 0
    made.stream.check(breakable_database)


def test_a_lock_is_no_long_statement(scene: MakeScene, breakable_database: str) -> None:
    """P4: a table locked for longer than `statement_timeout` is waited for as a lock, and cancels no write."""
    with scene(breakable_database, {"postgres": {"settings": {"statement_timeout": "1s"}}}) as events:
        with locked(breakable_database, "events"):
            events.waits("55P03")
        events.recovers()
        assert "57014" not in events.run.logs()
        events.check()


def test_ten_rows_a_second_progress_and_a_stop_ends(scene: MakeScene, breakable_database: str) -> None:
    """Rule 27, P9: at 10 rows/s rows land; a stop ends in time with 75, and the next run writes the rest, each once."""
    config: Config = {"postgres": {"settings": {"statement_timeout": "1s"}}, "daemon": {"drain_timeout": "2s"}}
    with slow_scene(scene, breakable_database, 0.1, config) as events:
        events.catches_up()
        turn(breakable_database, slow=True)
        events.stream.produce(500)
        for _ in range(2):  # not the first small write alone
            events.goes_on(60)
        began = time.monotonic()
        assert NOT_DRAINED == events.run.stop()
        tell("exit with 75", began)
        assert time.monotonic() - began < 10
        turn(breakable_database, slow=False)
        events.start_again()
        events.check(again=True)


def test_what_a_killed_daemon_left_running_does_not_block_the_next(scene: MakeScene, breakable_database: str) -> None:
    """Rule 5: a killed daemon's backend, busy for minutes still, is ended by the next one's claim within seconds."""
    with slow_scene(scene, breakable_database, FOR_MINUTES, {"kafka": {"group_instance_id": "one"}}) as events:
        events.catches_up()
        turn(breakable_database, slow=True)
        events.stream.produce(2_000)
        wait_until(lambda: copying(breakable_database), 20, "a slow COPY")
        events.run.kill()
        turn(breakable_database, slow=False)
        assert copying(breakable_database)
        began = time.monotonic()
        events.run.start()
        events.run.wait_ready(40)
        wait_until(lambda: events.written() > 0, 40, "rows of the next run")
        tell("first new row", began)
        events.check(again=True)


def test_a_zombie_inside_copy_is_ended_and_joins_again(scene: MakeScene, breakable_database: str) -> None:
    """Rule 5, P2: a member stopped inside COPY holds its successor up for seconds; awake, it joins again."""
    with slow_scene(scene, breakable_database, FOR_MINUTES) as events:
        first = events.run
        events.catches_up()
        turn(breakable_database, slow=True)
        events.stream.produce(2_000)
        wait_until(lambda: copying(breakable_database), 20, "a slow COPY")
        os.kill(first.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        turn(breakable_database, slow=False)
        try:
            second = events.start(wait=False)
            second.wait_ready(60)
            wait_until(lambda: events.written() > 0, 40, "rows of the second")
            tell("first row of the successor", began)
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
        events.run = first
        wait_until(lambda: len(events.partitions()) == 1, 60, "a partition for the first again")
        before = events.written()
        events.resume()
        wait_until(lambda: events.written() > before, RECOVERED_WITHIN, "rows of the first again")
        events.pause()
        events.run = second
        assert first.stop() == 0
        events.check(again=True)


def test_connections_that_hear_nothing_for_a_while(scene: MakeScene, proxy: Proxy, breakable_database: str) -> None:
    """P4: what was lost while no byte passed is not waited for: the daemon finds out by itself and writes it again."""
    with through(proxy, scene(breakable_database)) as events:
        proxy.deaf()
        events.waits("ostgres")
        proxy.hear()
        events.recovers()
        events.dsn = breakable_database
        events.check()


def test_connections_that_a_router_forgot(scene: MakeScene, proxy: Proxy, breakable_database: str) -> None:
    """P4, rule 5: connections deaf for good are given up, and their backends, which hold the checkpoint, are ended."""
    with through(proxy, scene(breakable_database)) as events:
        with locked(breakable_database, "events"):  # so that a transaction is open, and no COMMIT, when it is forgotten
            wait_until(lambda: blocked(breakable_database), SEEN_WITHIN, "a write to wait for the lock")
            proxy.strand()
        wait_until(lambda: "a connection is deaf" in events.run.logs(), SEEN_WITHIN, "the deaf connection to be found")
        events.goes_on(SEEN_WITHIN)
        events.dsn = breakable_database
        events.check(again=True)


def through(proxy: Proxy, scene: Scene) -> Scene:
    """Let a scene's daemon reach its database through a proxy; COMMIT of some rows takes a while."""
    slow_commits(scene.dsn, "events")
    scene.dsn = make_conninfo(scene.dsn, host="127.0.0.1", port=proxy.port)
    return scene
