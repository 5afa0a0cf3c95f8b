"""The servers of a run: broker and Postgres, each behind a proxy that daemons go through, and a small disk.

The checker and the producer go round the proxies. The disk is a tmpfs with a tablespace on it; where mounting is not
allowed there is none, and no fault fills it.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
from confluent_kafka.admin import AdminClient
from psycopg import sql

from tests.servers.kafka import KafkaServer
from tests.servers.postgres import SYSTEM_USER, PostgresServer
from tests.servers.process import wait_until
from tests.servers.proxy import Proxy

SESSION_TIMEOUT_MS = 6000
LOADER = "loader"
"""The daemons' role: no superuser, so that it runs out of connections before the checker does."""
TABLESPACE = "small_disk"
DISK_MIB = 1024
THREADS = 128
"""More than faults that are under way or wait for a lock at one time."""
LOOK = 0.1
REACHABLE_TIMEOUT = 120.0
"""Seconds in which a server that a fault took away comes back."""


class World:
    """Everything that outlives a segment.

    `threads` do what faults do: the kernel ends a server when the thread that started it ends (`lifeline.py`), so
    these end only with the servers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.threads = ThreadPoolExecutor(THREADS, "fault")
        seconds = str(SESSION_TIMEOUT_MS)
        self.kafka = KafkaServer(
            _made(folder / "kafka"),
            {
                "group.consumer.session.timeout.ms": seconds,
                "group.consumer.min.session.timeout.ms": seconds,
                "group.consumer.heartbeat.interval.ms": "1000",
                "group.consumer.min.heartbeat.interval.ms": "1000",
                # Kafka 4.3.1 fails to load its coordinator once groups of the consumer protocol were compacted (seen:
                # "Failed to load metadata from __consumer_offsets", with every start, and nobody can join).
                "log.cleaner.min.compaction.lag.ms": "86400000",
            },
        )
        self.kafka_proxy = Proxy(self.kafka.second_port)
        self.kafka.advertise(self.kafka_proxy.port)
        self.postgres = PostgresServer(
            _made(folder / "postgres"),
            {"max_connections": "100", "superuser_reserved_connections": "12", "max_wal_size": "4GB"},
        )
        self.postgres_proxy = Proxy(self.postgres.port)
        self.bootstrap = f"127.0.0.1:{self.kafka_proxy.port}"
        """Where daemons find the broker."""
        self.disk: Path | None = None

    def start(self) -> None:
        """Start all of it."""
        self.kafka.start()
        self.postgres.start()
        self.kafka_proxy.start()
        self.postgres_proxy.start()
        with self.superuser() as conn:
            conn.execute(f"CREATE ROLE {LOADER} LOGIN")
        self.disk = self._mount()

    def close(self) -> None:
        """End it, and leave no mount behind."""
        self.postgres.close()
        self.kafka.close()
        self.kafka_proxy.close()
        self.postgres_proxy.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        if self.disk is not None:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=False)

    def admin(self) -> AdminClient:
        """Return an admin client that goes round the proxy."""
        return AdminClient({"bootstrap.servers": self.kafka.bootstrap, "log_level": 0})

    def superuser(self, database: str = "postgres") -> "psycopg.Connection[tuple[object, ...]]":
        """Connect as the checker, which has connections of its own; waits while Postgres is away."""
        found: list[psycopg.Connection[tuple[object, ...]]] = []
        errors: list[str] = []

        def connected() -> bool:
            try:
                dsn = f"{self.postgres.dsn} dbname={database}"
                found.append(psycopg.connect(dsn, autocommit=True, application_name="chaos", connect_timeout=5))
            except psycopg.OperationalError as error:
                errors[:] = [str(error)]
                time.sleep(LOOK)
                return False
            return True

        try:
            wait_until(connected, REACHABLE_TIMEOUT, "Postgres")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {errors}") from None
        return found[0]

    def daemons_dsn(self, database: str) -> str:
        """Return how daemons connect."""
        return f"host=127.0.0.1 port={self.postgres_proxy.port} user={LOADER} dbname={database}"

    def make_database(self, name: str) -> None:
        """Make a database that belongs to the daemons' role."""
        with self.superuser() as conn:
            conn.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(LOADER)))

    def drop_database(self, name: str) -> None:
        """Drop it with whatever is connected."""
        with self.superuser() as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _mount(self) -> Path | None:
        disk = _made(self.folder / "disk")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        disk.chmod(0o711)
        space = _made(disk / "tablespace")
        shutil.chown(space, SYSTEM_USER)
        with self.superuser() as conn:
            conn.execute(f"CREATE TABLESPACE {TABLESPACE} LOCATION '{space}'".encode())
        return disk


def end_in_order() -> None:
    """Have SIGTERM end this process as Ctrl-C does: with what it started, and its mount."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def make_folder() -> Path:
    """Make a folder for servers that Postgres's system user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="consumerd-chaos-"))
    folder.chmod(0o711)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
