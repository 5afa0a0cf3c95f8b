# ruff: noqa: ARG002, D102 - the methods of a fault are described at Fault, and not each needs all it gets
"""Faults of Postgres, of the way to it, and of what else is at work there."""

import time
from contextlib import suppress
from typing import ClassVar

import psycopg

from tests.chaos.faults.base import Fault
from tests.chaos.stage import Stage
from tests.chaos.variant import Variant
from tests.chaos.world import LOADER

OURS = "application_name LIKE 'consumerd/%' AND datname = current_database()"
MIB = 1 << 20


class PostgresStop(Fault):
    """A fast shutdown."""

    kind, weight, lasts = "Postgres restarted", 2, (0.0, 4.0)
    holds = frozenset({"postgres"})

    def begin(self, stage: Stage) -> None:
        stage.world.postgres.stop()

    def end(self, stage: Stage) -> None:
        stage.world.postgres.start()


class PostgresKill(PostgresStop):
    """SIGKILL to Postgres and all its backends."""

    kind, weight, lasts = "Postgres killed", 2, (0.0, 4.0)

    def begin(self, stage: Stage) -> None:
        stage.world.postgres.kill()


class PostgresCut(Fault):
    """Every connection of the daemons to Postgres reset."""

    kind, weight = "Postgres connections cut", 6
    holds = frozenset({"postgres proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.postgres_proxy.cut()


class PostgresDeaf(Fault):
    """Connections to Postgres that stay up and carry nothing."""

    kind, weight, lasts = "Postgres connections deaf", 2, (1.0, 6.0)
    holds = frozenset({"postgres proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.postgres_proxy.deaf()

    def end(self, stage: Stage) -> None:
        stage.world.postgres_proxy.hear()
        if self.dice.random() < 1 / 2:  # else the daemons find out by themselves
            stage.world.postgres_proxy.cut()


class PostgresForgotten(Fault):
    """Open connections to Postgres forgotten, as by a router: neither end ever hears of the other again."""

    kind, weight = "Postgres connections forgotten", 2
    holds = frozenset({"postgres proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.postgres_proxy.strand()


class PostgresSlow(Fault):
    """Each 64 KiB to and from Postgres held back."""

    kind, weight, lasts = "Postgres connections slow", 2, (2.0, 8.0)
    holds = frozenset({"postgres proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.postgres_proxy.slow(self.dice.uniform(0.005, 0.1))

    def end(self, stage: Stage) -> None:
        stage.world.postgres_proxy.slow(0)


class TableLock(Fault):
    """A table locked by somebody, past `lock_timeout` or not."""

    kind, weight, lasts = "table locked", 3, (0.3, 4.0)
    statement: ClassVar[str] = "LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"
    table: ClassVar[tuple[str, ...]] = ()

    def begin(self, stage: Stage) -> None:
        known = ("upsert", "consumerd.checkpoint") if stage.variant.mode == "postgres" else ()
        table = self.dice.choice(self.table or ("append", *known))
        self._conn = stage.world.superuser(stage.database)
        with suppress(psycopg.Error):
            self._conn.execute("BEGIN")
            self._conn.execute(self.statement.format(table=table).encode())

    def end(self, stage: Stage) -> None:
        self._conn.close()


class RowLock(TableLock):
    """Some keys of the upsert table locked by somebody, few enough to pass for poison."""

    kind, weight, lasts = "rows locked", 2, (0.3, 15.0)
    statement = "SELECT FROM {table} WHERE grp % 1000 < 5 FOR UPDATE"
    table = ("upsert",)

    @classmethod
    def fits(cls, variant: Variant) -> bool:
        return "upsert" in variant.handlers


class Backlog(TableLock):
    """All tables locked for long: the topic runs ahead, and memory must not."""

    kind, weight, lasts = "nothing written for long", 1, (15.0, 25.0)

    def begin(self, stage: Stage) -> None:
        self._conn = stage.world.superuser(stage.database)
        with suppress(psycopg.Error):
            self._conn.execute("BEGIN")
            self._conn.execute(f"LOCK TABLE {', '.join(stage.variant.handlers)} IN EXCLUSIVE MODE".encode())


class Cancel(Fault):
    """pg_cancel_backend for each backend of the daemons, a few times."""

    kind, weight, lasts = "statements cancelled", 4, (0.0, 0.0)
    function: ClassVar[str] = "pg_cancel_backend"

    def begin(self, stage: Stage) -> None:
        with suppress(psycopg.Error), stage.world.superuser(stage.database) as conn:
            for _ in range(self.dice.randint(1, 5)):
                conn.execute(f"SELECT {self.function}(pid) FROM pg_stat_activity WHERE {OURS}".encode())
                time.sleep(self.dice.uniform(0, 0.1))


class TerminateBackends(Cancel):
    """pg_terminate_backend likewise."""

    kind, weight = "backends terminated", 4
    function = "pg_terminate_backend"


class NoConnections(Fault):
    """All connections that the daemons' role may have are held by somebody; theirs are terminated."""

    kind, weight, lasts = "out of connections", 2, (1.0, 5.0)
    holds = frozenset({"postgres"})

    def begin(self, stage: Stage) -> None:
        self._held: list[psycopg.Connection[tuple[object, ...]]] = []
        dsn = f"{stage.world.postgres.dsn} user={LOADER} application_name=holds"
        deadline = time.monotonic() + 5
        with stage.world.superuser(stage.database) as conn:
            while time.monotonic() < deadline:
                try:
                    self._held.append(psycopg.connect(dsn, connect_timeout=5))
                except psycopg.OperationalError:
                    ours = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}"
                    if not conn.execute(ours.encode()).fetchall():
                        return

    def end(self, stage: Stage) -> None:
        for conn in self._held:
            conn.close()


class ReadOnly(Fault):
    """The database read-only by default, as a demoted primary looks; sessions terminated."""

    kind, weight, lasts = "database read-only", 2, (0.5, 4.0)

    def begin(self, stage: Stage) -> None:
        self._alter(stage, "SET default_transaction_read_only = on")

    def end(self, stage: Stage) -> None:
        self._alter(stage, "RESET default_transaction_read_only")

    def _alter(self, stage: Stage, change: str) -> None:
        with stage.world.superuser() as conn:
            conn.execute(f'ALTER DATABASE "{stage.database}" {change}'.encode())
        with suppress(psycopg.Error), stage.world.superuser(stage.database) as conn:
            conn.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}".encode())


class DiskFull(Fault):
    """The disk under the append table filled with junk. Postgres does not crash meanwhile: replay would need room."""

    kind, weight, lasts = "disk full", 2, (1.0, 5.0)
    holds = frozenset({"postgres"})

    @classmethod
    def fits(cls, variant: Variant) -> bool:
        return variant.small_disk

    def begin(self, stage: Stage) -> None:
        if stage.world.disk is None:
            raise RuntimeError("there is no small disk")
        self._junk = stage.world.disk / "junk"
        with self._junk.open("wb", buffering=0) as junk, suppress(OSError):
            while True:
                junk.write(bytes(MIB))

    def end(self, stage: Stage) -> None:
        self._junk.unlink()
