"""Fixtures: what most tests of a daemon are made of, and chance that can be repeated."""

import random
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from tests.acceptance.events import Events, MakeEvents
from tests.acceptance.outage import MakeScene, Scene
from tests.acceptance.stream import Stream, make_table
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.sql import execute


@pytest.fixture
def dice() -> random.Random:
    """Give chance whose seed a failure shows."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to repeat a failure
    return random.Random(seed)


@pytest.fixture
def role(database: str) -> Iterator[str]:
    """Make a role that may do nothing, and forget it after."""
    name = f"consumerd_test_{secrets.token_hex(4)}"
    execute(database, f"CREATE ROLE {name}")
    yield name
    execute(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.fixture
def admin(kafka: KafkaServer) -> AdminClient:
    """Make a client for what an operator does."""
    return AdminClient({"bootstrap.servers": kafka.bootstrap})


@pytest.fixture
def events(kafka: KafkaServer, topic: MakeTopic, daemon: MakeDaemon) -> MakeEvents:
    """Make streams with their tables and handlers."""

    def make(dsn: str, partitions: int = 2, **keys: object) -> Events:
        make_table(dsn, "events")
        return Events(Stream(kafka.bootstrap, topic(partitions), partitions), dsn, daemon, keys)

    return make


@pytest.fixture
def scene(events: MakeEvents) -> MakeScene:
    """Make scenes with their tables."""

    def make(dsn: str, config: Mapping[str, Mapping[str, Any]] | None = None, **keys: object) -> Scene:
        made = events(dsn, 2, **keys)
        return Scene(made.stream, dsn, made.make, made.keys, config)

    return make
