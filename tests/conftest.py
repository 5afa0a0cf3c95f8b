"""Fixtures: real servers, started when the first test asks for one, and what a test makes in them."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.servers.daemon import Daemon, merged, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import MissingPart, free_port
from tests.servers.proxy import Proxy

SESSION_TIMEOUT_MS = 6_000  # a killed daemon's partitions come back after this; 45 s by default

pytest.register_assert_rewrite("tests.acceptance.stream", "tests.acceptance.outage")

_logs = pytest.StashKey[Path]()
Server = TypeVar("Server", KafkaServer, PostgresServer)

_daemons = pytest.StashKey[list[Daemon]]()


class Database(Protocol):
    """What the ``postgres`` fixture is, whoever runs it."""

    dsn: str


class GivenPostgres:
    """The server that CONSUMERD_TEST_DSN names. It is not ours to stop."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn


class MakeTopic(Protocol):
    """What the ``topic`` fixture gives."""

    def __call__(self, partitions: int = 1, *, prefix: str = "topic", config: Mapping[str, str] | None = None) -> str:
        """Make a topic with a name of its own and return the name."""


class MakeDaemon(Protocol):
    """What the ``daemon`` fixture gives."""

    def __call__(
        self,
        handlers: Mapping[str, Mapping[str, Any] | str],
        config: Mapping[str, Any] | str | None = None,
        *arguments: str,
        wait: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Daemon:
        """Write the files, start the daemon on them and (unless told not to) wait until it is ready.

        A ``config`` of tables is filled up with the test's broker, database and port; one of text is taken as it is.
        """


@pytest.fixture(scope="session")
def servers_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give the servers a folder that Postgres's system user can enter. Logs of a failed session stay in it."""
    folder = Path(tempfile.mkdtemp(prefix="consumerd-tests-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder / "postgres-template", ignore_errors=True)
    if request.session.testsfailed:
        request.config.stash[_logs] = folder
    else:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def kafka(servers_folder: Path) -> Iterator[KafkaServer]:
    """Start a real broker, shared by the session. A test that stops it starts it again."""
    yield from _running(lambda: KafkaServer(_made(servers_folder / "kafka")))


@pytest.fixture(scope="session")
def breakable_postgres(servers_folder: Path) -> Iterator[PostgresServer]:
    """Start a real Postgres that tests may stop and kill, and start again after."""
    yield from _running(lambda: PostgresServer(_made(servers_folder / "postgres")))


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Database:
    """Give the server that CONSUMERD_TEST_DSN names, else the same as ``breakable_postgres``."""
    if dsn := os.environ.get("CONSUMERD_TEST_DSN"):
        return GivenPostgres(dsn)
    server: PostgresServer = request.getfixturevalue("breakable_postgres")
    return server


@pytest.fixture
def database(postgres: Database) -> Iterator[str]:
    """Make an empty database for this test and give its DSN."""
    yield from _database(postgres)


@pytest.fixture
def breakable_database(breakable_postgres: PostgresServer) -> Iterator[str]:
    """Make an empty database on the server that this test may stop, and give its DSN."""
    yield from _database(breakable_postgres)


@pytest.fixture
def proxy(breakable_postgres: PostgresServer) -> Iterator[Proxy]:
    """Start a proxy before Postgres."""
    proxy = Proxy(breakable_postgres.port)
    proxy.start()
    yield proxy
    proxy.close()


@pytest.fixture
def topic(kafka: KafkaServer) -> MakeTopic:
    """Make topics."""
    kafka.start()  # a test that failed may have left it stopped

    def make(partitions: int = 1, *, prefix: str = "topic", config: Mapping[str, str] | None = None) -> str:
        name = f"{prefix}-{secrets.token_hex(4)}"
        kafka.make_topic(name, partitions, config)
        return name

    return make


@pytest.fixture
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeDaemon]:
    """Run daemons, each in a folder of its own. A test that names its own broker and DSN starts no shared server."""
    daemons = request.node.stash.setdefault(_daemons, [])

    def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {
            "kafka": {"properties": {"session.timeout.ms": SESSION_TIMEOUT_MS}},
            "postgres": {},
            "daemon": {"listen": f"127.0.0.1:{free_port()}"},
        }
        if "bootstrap_servers" not in given.get("kafka", {}):
            made["kafka"]["bootstrap_servers"] = request.getfixturevalue("kafka").bootstrap
        if "dsn" not in given.get("postgres", {}):
            made["postgres"]["dsn"] = request.getfixturevalue("database")
        return made

    def run(
        handlers: Mapping[str, Mapping[str, Any] | str],
        config: Mapping[str, Any] | str | None = None,
        *arguments: str,
        wait: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Daemon:
        whole = config if isinstance(config, str) else merged(defaults(config or {}), config or {})
        folder = tmp_path / f"daemon-{len(daemons)}"
        made = Daemon(write_config(folder, whole, handlers), *arguments, env=env)
        daemons.append(made)
        made.start()
        if wait:
            made.wait_ready()
        return made

    yield run
    for each in daemons:
        each.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of each daemon that a failed test ran."""
    report = yield
    if report.failed:
        daemons: list[Daemon] = item.stash.get(_daemons, [])
        for number, each in enumerate(daemons):
            report.sections.append((f"log of daemon {number}: {each.log}", each.logs()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the logs of a failed session's servers are."""
    if folder := config.stash.get(_logs, None):
        terminalreporter.write_line(f"Logs of the servers: {folder}")


def _running(make: Callable[[], Server]) -> Iterator[Server]:
    server = make()
    try:
        server.start()
        yield server
    except MissingPart as missing:
        pytest.exit(str(missing), returncode=pytest.ExitCode.TESTS_FAILED)
    finally:
        server.close()


def _database(server: Database) -> Iterator[str]:
    name = f"consumerd_test_{secrets.token_hex(4)}"
    _execute(server, sql.SQL("create database {}").format(sql.Identifier(name)))
    yield make_conninfo(server.dsn, dbname=name)
    _execute(server, sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _execute(server: Database, statement: sql.Composed) -> None:
    if isinstance(server, PostgresServer):
        server.start()  # a test that failed may have left it stopped
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(statement)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
