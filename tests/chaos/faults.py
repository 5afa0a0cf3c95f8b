# ruff: noqa: ARG002, ARG003, D102 - the methods of a fault are described at Fault, and not each needs all it gets
"""The kinds of fault. Each begins, lasts, and ends, and leaves everything as it was; faults of different kinds overlap.

A fault holds the locks of what it takes away, so that nobody else starts it meanwhile. One that works through Postgres
or Kafka waits until they are there.
"""

import random
import time
from contextlib import suppress
from typing import ClassVar

import psycopg

from tests.chaos.fleet import SLOTS
from tests.chaos.stage import LOCKS, Stage
from tests.chaos.variant import Variant
from tests.chaos.world import LOADER, SESSION_TIMEOUT_MS

OURS = "application_name LIKE 'consumerd/%' AND datname = current_database()"
MIB = 1 << 20
REWIND = 3000
"""Most offsets by which a partition is set back."""


class Fault:
    """One fault of a schedule; `lasts` is its shortest and longest time in seconds."""

    kind: ClassVar[str]
    weight: ClassVar[int]
    lasts: ClassVar[tuple[float, float]] = (0.0, 0.0)
    holds: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, dice: random.Random, variant: Variant) -> None:
        self.seconds = dice.uniform(*self.lasts)
        self.slot = dice.randrange(variant.daemons)
        self.dice = random.Random(dice.random())

    @classmethod
    def fits(cls, variant: Variant) -> bool:
        """Whether it can happen in this setting."""
        return True

    def locks(self) -> frozenset[str]:
        """Return what it needs for itself."""
        return self.holds

    def begin(self, stage: Stage) -> None:
        """Do it."""

    def end(self, stage: Stage) -> None:
        """Undo it."""

    def __str__(self) -> str:
        """As a schedule tells it."""
        return f"{self.kind} for {self.seconds:.1f} s"


class _OfDaemon(Fault):
    def locks(self) -> frozenset[str]:
        return frozenset({f"daemon {self.slot}"})

    def __str__(self) -> str:
        return f"{self.kind} of {self.slot} for {self.seconds:.1f} s"


class Kill(_OfDaemon):
    """SIGKILL, and started again."""

    kind, weight, lasts = "daemon killed", 8, (0.0, 2.0)

    def begin(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].kill()

    def end(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].start()


class Pause(_OfDaemon):
    """SIGSTOP until its session has timed out: then it is a zombie, and hears of it only after its next write."""

    kind, weight, lasts = "daemon stopped past its session", 4, (SESSION_TIMEOUT_MS / 1000 + 1, 10.0)

    def begin(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].pause()

    def end(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].go_on()


class Hang(Pause):
    """SIGSTOP for less than that."""

    kind, weight, lasts = "daemon stopped for a moment", 2, (0.2, 3.0)


class Terminate(_OfDaemon):
    """SIGTERM, and started again after a while: it leaves its groups and joins them."""

    kind, weight, lasts = "daemon restarted", 5, (0.0, 5.0)

    def begin(self, stage: Stage) -> None:
        status = stage.fleet.slots[self.slot].stop()
        stage.fleet.note_exit(self.slot, status)

    def end(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].start()


class Join(_OfDaemon):
    """One more daemon for a while."""

    kind, weight, lasts = "daemon joins and leaves", 4, (4.0, 15.0)

    def __init__(self, dice: random.Random, variant: Variant) -> None:
        super().__init__(dice, variant)
        self.slot = dice.randrange(variant.daemons, SLOTS)

    def begin(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].start()

    def end(self, stage: Stage) -> None:
        status = stage.fleet.slots[self.slot].stop()
        stage.fleet.note_exit(self.slot, status)


class Rewind(Fault):
    """An operator's reset: all daemons stopped, offsets set back with Kafka's own tool, started again."""

    kind, weight, lasts = "offsets set back", 1, (0.0, 1.0)
    holds = frozenset(LOCKS)

    @classmethod
    def fits(cls, variant: Variant) -> bool:
        return variant.mode == "postgres"

    def begin(self, stage: Stage) -> None:
        self._stopped = [slot for slot in stage.fleet.slots if slot.wanted]
        for slot in self._stopped:
            slot.stop()
        stage.wait_for_backends()
        for handler in stage.variant.handlers:
            if handler == "upsert" or not stage.variant.primary_key:
                stage.rewind(handler, {part: self.dice.randint(0, REWIND) for part in range(stage.producer.partitions)})

    def end(self, stage: Stage) -> None:
        for slot in self._stopped:
            slot.start()


class BrokerStop(Fault):
    """SIGTERM to the broker."""

    kind, weight, lasts = "broker restarted", 1, (0.0, 3.0)
    holds = frozenset({"kafka"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka.stop()

    def end(self, stage: Stage) -> None:
        stage.world.kafka.start()


class BrokerKill(BrokerStop):
    """SIGKILL to the broker."""

    kind, weight, lasts = "broker killed", 1, (0.0, 3.0)

    def begin(self, stage: Stage) -> None:
        stage.world.kafka.kill()


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
        stage.world.postgres_proxy.cut()


class PostgresSlow(Fault):
    """Each 64 KiB to and from Postgres held back."""

    kind, weight, lasts = "Postgres connections slow", 2, (2.0, 8.0)
    holds = frozenset({"postgres proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.postgres_proxy.slow(self.dice.uniform(0.005, 0.1))

    def end(self, stage: Stage) -> None:
        stage.world.postgres_proxy.slow(0)


class KafkaCut(Fault):
    """Every connection of the daemons to the broker reset."""

    kind, weight = "Kafka connections cut", 4
    holds = frozenset({"kafka proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka_proxy.cut()


class KafkaDeaf(Fault):
    """Connections to the broker that stay up and carry nothing, sometimes past the session's timeout."""

    kind, weight, lasts = "Kafka connections deaf", 2, (1.0, 9.0)
    holds = frozenset({"kafka proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka_proxy.deaf()

    def end(self, stage: Stage) -> None:
        stage.world.kafka_proxy.hear()
        stage.world.kafka_proxy.cut()


class KafkaSlow(Fault):
    """Each 64 KiB to and from the broker held back."""

    kind, weight, lasts = "Kafka connections slow", 2, (2.0, 8.0)
    holds = frozenset({"kafka proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka_proxy.slow(self.dice.uniform(0.005, 0.05))

    def end(self, stage: Stage) -> None:
        stage.world.kafka_proxy.slow(0)


class Grow(Fault):
    """Partitions added to the topic."""

    kind, weight = "topic grown", 1
    holds = frozenset({"kafka"})

    def begin(self, stage: Stage) -> None:
        stage.grow(self.dice.randint(1, 3))


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
    """Some keys of the upsert table locked by somebody."""

    kind, weight, lasts = "rows locked", 3, (0.3, 4.0)
    statement = "SELECT FROM {table} WHERE grp % 1000 < 50 FOR UPDATE"
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


KINDS: dict[str, type[Fault]] = {
    fault.kind: fault
    for fault in (
        *(Kill, Pause, Hang, Terminate, Join, Rewind),
        *(BrokerStop, BrokerKill, KafkaCut, KafkaDeaf, KafkaSlow, Grow),
        *(PostgresStop, PostgresKill, PostgresCut, PostgresDeaf, PostgresSlow),
        *(TableLock, RowLock, Backlog, Cancel, TerminateBackends, NoConnections, ReadOnly, DiskFull),
    )
}
