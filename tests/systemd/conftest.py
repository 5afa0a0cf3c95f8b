"""Fixtures: one booted machine, a broker and a Postgres beside it, and docs/install.md as what is typed there."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.servers.daemon import REPOSITORY
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import free_port, wait_until
from tests.servers.sql import execute
from tests.systemd.machine import Machine, missing

TIMEOUT = 60  # seconds for whatever a test waits for
RELEASE = ("consumerd", "systemd", "pyproject.toml", "requirements.txt", "README.md")
"""What of the repository an installation needs."""
QUICK = """\
[Service]
WatchdogSec=4
RestartSec=100ms
"""
"""A drop-in: what takes a minute in earnest takes seconds here."""
PAGE = (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")


@dataclass
class Site:
    """The machine, its servers, and what was sent."""

    machine: Machine
    kafka: KafkaServer
    postgres: PostgresServer
    password: str = "the password"
    sent: dict[str, int] = field(default_factory=dict)
    listen: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    """Where the first daemon is: the page's port may be another's on this machine."""

    def __post_init__(self) -> None:
        """Make the topics and tables that the page's handlers name, and the page's role."""
        self.producer = Producer({"bootstrap.servers": self.kafka.bootstrap, "log_level": 0})
        for name in ("page_views", "clicks"):
            self.kafka.make_topic(name, partitions=2)
            self.sent[name] = 0
        self.postgres.execute(f"CREATE ROLE loader LOGIN PASSWORD '{self.password}'")
        self.postgres.execute("CREATE DATABASE warehouse OWNER loader")
        self.dsn = self.postgres.dsn.replace("dbname=postgres", "dbname=warehouse")
        for name in self.sent:
            execute(self.dsn, f"CREATE TABLE {name} (id bigint, visitor text)")
            execute(self.dsn, f"ALTER TABLE {name} OWNER TO loader")

    def type(self, section: str, *, part: str = "") -> str:
        """Type what the page says in a section, with this site's addresses; `part` chooses the blocks that hold it."""
        blocks = [block for block in typed(section) if part in block]
        assert blocks, f"docs/install.md has no such block in {section}: {part}"
        here = {
            "kafka.example:9092": self.kafka.bootstrap,
            "db.example": f"127.0.0.1:{self.postgres.port}",
            "127.0.0.1:9465": f"127.0.0.1:{free_port()}",
        }
        said = ""
        for block in blocks:
            for name, address in here.items():
                block = block.replace(name, address)  # noqa: PLW2901 - the block as it is typed here
            said += self.machine.sh(block)
        return said

    def send(self, count: int, topic: str = "page_views") -> None:
        """Send messages, each with the next number."""
        for number in range(self.sent[topic], self.sent[topic] + count):
            value = json.dumps({"id": number, "visitor": "Ada"})
            self.producer.produce(topic, value, partition=number % 2)
        assert self.producer.flush(TIMEOUT) == 0
        self.sent[topic] += count

    def written(self, table: str = "page_views") -> list[int]:
        """Return the numbers in a table."""
        return [number for (number,) in execute(self.dsn, f"SELECT id FROM {table} ORDER BY id")]

    def lands(self, table: str = "page_views") -> None:
        """Wait until all that was sent is there, and see that nothing is there twice."""
        wait_until(lambda: len(self.written(table)) >= self.sent[table], TIMEOUT, f"the rows of {table}")
        assert list(range(self.sent[table])) == self.written(table)

    def status(self, unit: str = "consumerd") -> str:
        """Return what a unit says of itself."""
        return self.machine.show(unit, "StatusText")

    def says(self, what: str, unit: str = "consumerd") -> None:
        """Wait until a unit's status holds a phrase."""
        wait_until(
            lambda: what in self.status(unit), TIMEOUT, f"{what} in the status of {unit}, not {self.status(unit)}"
        )

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Return entries of the journal."""
        lines = self.machine.sh(f"journalctl --output=json --no-pager {' '.join(matches)}").splitlines()
        return [json.loads(line) for line in lines]

    def restarts(self, unit: str = "consumerd") -> int:
        """Return how often systemd has started a unit again."""
        return int(self.machine.show(unit, "NRestarts"))


@pytest.fixture(scope="module")
def site(kafka: KafkaServer, servers_folder: Path) -> Iterator[Site]:
    """Boot the machine, with a Postgres whose roles have passwords."""
    if sentence := missing():
        pytest.skip(sentence)
    folder = servers_folder / "passwords"
    folder.mkdir()
    rules = servers_folder / "pg_hba.conf"
    rules.write_text("host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    postgres = PostgresServer(folder, {"hba_file": str(rules)})
    machine = Machine(servers_folder / "machine")
    try:
        postgres.start()
        machine.boot()
        release(machine.root / "root" / "release")
        for unit in ("consumerd", "consumerd@"):
            drop_in = machine.root / "etc" / "systemd" / "system" / f"{unit}.service.d" / "quick.conf"
            drop_in.parent.mkdir(parents=True)
            drop_in.write_text(QUICK)
        yield Site(machine, kafka, postgres)
    finally:
        machine.close()
        postgres.close()


def typed(section: str) -> list[str]:
    """Return the blocks of commands in a section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def release(folder: Path, version: str | None = None) -> None:
    """Put a release into a folder; with a version of its own if one is given."""
    folder.mkdir(parents=True)
    for name in RELEASE:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    if version:
        for name in ("pyproject.toml", "consumerd/__init__.py"):
            file = folder / name
            file.write_text(re.sub(r'(?m)^((?:__)?version(?:__)? = )".*"$', rf'\1"{version}"', file.read_text()))
