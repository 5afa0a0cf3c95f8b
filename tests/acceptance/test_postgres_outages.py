"""P1, P2, P4: whatever Postgres does under a running stream is waited for, visibly; no row is lost or doubled."""

import os
import signal
import threading

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.acceptance.outage import RECOVERED_WITHIN, MakeScene, Scene
from tests.acceptance.stream import slow_commits
from tests.servers.postgres import PostgresServer
from tests.servers.process import wait_until
from tests.servers.sql import locked

AGAIN_AND_AGAIN = 25
"""Times that something is done to every session of the daemon, each 100 ms."""

LONG = 8.0
"""Seconds of an outage in which the waits between retries grow to what they grow to."""


@pytest.fixture
def breakable(scene: MakeScene, breakable_database: str) -> Scene:
    """Make a scene on the server that may be broken; COMMIT of some rows takes a while, and so may be hit."""
    made = scene(breakable_database)
    slow_commits(breakable_database, "events")
    return made


def test_stopped_in_order_and_started(breakable: Scene, breakable_postgres: PostgresServer) -> None:
    """P4: a server that is shut down is waited for, longer than the first retries take, and gone on with once back."""
    with breakable as events:
        breakable_postgres.stop()
        events.waits("onnection refused", "shutting down", "terminating connection")
        threading.Event().wait(LONG)
        breakable_postgres.start()
        events.recovers()
        events.check()


def test_killed_and_recovered(breakable: Scene, breakable_postgres: PostgresServer) -> None:
    """P1, P2: a crash of the whole server, or of its postmaster alone, amid COMMITs leaves each row once."""
    with breakable as events:
        for children in (True, False):
            breakable_postgres.kill(children=children)
            events.waits("onnection refused", "closed the connection", "onnection to Postgres was lost")
            breakable_postgres.start()
            events.recovers()
        events.check()


def test_a_killed_backend_restarts_the_server(breakable: Scene, breakable_postgres: PostgresServer) -> None:
    """P1, P2: SIGKILL to one backend, which ends all and starts crash recovery, is an outage and heals by itself."""
    with breakable as events:
        os.kill(a_session(breakable_postgres), signal.SIGKILL)
        wait_until(lambda: events.retries() > 0, 30, "a retry")
        events.goes_on()
        events.check()


def test_out_of_connections(breakable: Scene, breakable_postgres: PostgresServer) -> None:
    """P4: a server whose connections others hold is waited for, and joined as soon as there is one."""
    with breakable as events:
        held: list[psycopg.Connection] = []
        over = threading.Event()

        def hold() -> None:
            while not over.is_set():
                try:
                    held.append(psycopg.connect(breakable_postgres.dsn, autocommit=True))
                except psycopg.OperationalError:
                    held[0].execute(TERMINATE)
                    over.wait(0.02)

        thread = threading.Thread(target=hold, name="hold")
        thread.start()
        try:
            events.waits("too many clients", "remaining connection slots")
        finally:
            over.set()
            thread.join()
            for connection in held:
                connection.close()
        events.recovers()
        events.check()


def test_read_only(breakable: Scene, breakable_postgres: PostgresServer, breakable_database: str) -> None:
    """P4: a database made read-only is waited for with libpq's sentence, and nothing is dead-lettered for it."""
    with breakable as events, psycopg.connect(breakable_postgres.dsn, autocommit=True) as conn:
        name = sql.Identifier(str(conninfo_to_dict(breakable_database)["dbname"]))
        conn.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        conn.execute(TERMINATE)
        events.waits("read-only")
        conn.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
        events.recovers()
        events.check()


def test_a_table_lock_held(breakable: Scene, breakable_database: str) -> None:
    """P4: the table, or the checkpoint's, locked by another is an outage that names the lock and ends with it."""
    breakable.config = {"postgres": {"settings": {"lock_timeout": "300ms"}}}
    with breakable as events:
        for table in ("events", "consumerd.checkpoint"):
            with locked(breakable_database, table):
                events.waits("55P03")
            events.recovers()
        events.check()


def test_disturbed_again_and_again(breakable: Scene, breakable_postgres: PostgresServer) -> None:
    """P1, P2, rule 27: statements cancelled, or sessions ended, for seconds on end halt, lose and double nothing."""
    with breakable as events, psycopg.connect(breakable_postgres.dsn, autocommit=True) as conn:
        pause = threading.Event()
        for function in (b"pg_cancel_backend", b"pg_terminate_backend"):
            before = events.retries()
            for _ in range(AGAIN_AND_AGAIN):
                conn.execute(TERMINATE.replace(b"pg_terminate_backend", function))
                pause.wait(0.1)
            assert events.retries() > before
            assert events.run.get("/readyz")[0] == 200
            events.goes_on()
        events.check()


TERMINATE = b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'consumerd/events'"


def a_session(server: PostgresServer) -> int:
    """Return a backend of the daemon; waits until there is one."""
    found: list[int] = []

    def there() -> bool:
        rows = server.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'consumerd/events'")
        found.extend(pid for (pid,) in rows)
        return bool(found)

    wait_until(there, RECOVERED_WITHIN, "a session of the daemon")
    return found[0]
