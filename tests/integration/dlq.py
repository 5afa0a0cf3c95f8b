"""Letters as a daemon would have written them, and commands on them, with no daemon."""

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from confluent_kafka import Producer

from consumerd import loader, postgres
from consumerd.accumulator import Batch
from consumerd.checkpoint import ensure_schema
from consumerd.commands.dlq.redrive import Report, redrive
from consumerd.commands.dlq.straight import Straight
from consumerd.commands.dlq.survey import Filter, Standing, survey
from consumerd.commands.dlq.to_topic import ToTopic
from consumerd.dead_letter import headers
from consumerd.errors import Refusal
from consumerd.letters import Letters, Status
from consumerd.types import TopicPartition
from tests.servers.daemon import merged, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.sql import execute

if TYPE_CHECKING:
    from consumerd.config import Config, HandlerConfig

TIMEOUT = 30
LONG_AGO = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
REFUSAL = Refusal(reason="type", stage="decode", error="msgspec.ValidationError", message="Expected `int`", column="n")
OPEN: tuple[Status, ...] = ("open", "failed")
RUN = "00000000-0000-0000-0000-00000000000"


@dataclass(frozen=True)
class Sent:
    """A message that failed."""

    at: int
    data: bytes | None
    name: bytes | None = b"key"
    own: tuple[tuple[str, bytes | None], ...] = (("trace", b"secret-header"),)

    def __len__(self) -> int:
        return len(self.data or b"")

    def topic(self) -> str:
        """Give some topic: a letter tells its batch's."""
        return "orders"

    def partition(self) -> int:
        """Give some partition."""
        return 0

    def key(self) -> bytes | None:
        """Give the key."""
        return self.name

    def value(self) -> bytes | None:
        """Give the value."""
        return self.data

    def offset(self) -> int:
        """Give the offset."""
        return self.at

    def leader_epoch(self) -> int | None:
        """Give none."""
        return None

    def timestamp(self) -> tuple[int, int]:
        """Give a time of long ago."""
        return 1, 1_600_000_000_123

    def headers(self) -> list[tuple[str, bytes | None]]:
        """Give its own headers."""
        return list(self.own)


class Dlq:
    """A handler `t` of the topic `source` into the table `t`, and its letters. Its checkpoint is behind all of them."""

    def __init__(self, kafka: KafkaServer, database: str, folder: Path, topic: str, letters: str) -> None:
        self.kafka, self.database, self.folder, self.topic, self.letters = kafka, database, folder, topic, letters
        self.producer = Producer({"bootstrap.servers": kafka.bootstrap})
        self.config: Config
        self.handler: HandlerConfig

    async def start(self, **keys: Any) -> None:  # noqa: ANN401 - TOML
        """Write the files, and make the schema with a checkpoint of partition 0 behind offset 999."""
        self.configure(**keys)
        conn = await postgres.connect(self.config.postgres, "test")
        await ensure_schema(conn, "consumerd")
        await conn.close()
        self.checkpoint(1000)

    def configure(self, **keys: Any) -> None:  # noqa: ANN401 - TOML
        """Write the files and read them."""
        defaults = {
            "topics": [self.topic],
            "table": {"name": "t", "write": "append"},
            "retry": {"initial": "10ms", "max": "20ms"},
            "dead_letter": {"topic": self.letters},
        }
        config = {"kafka": {"bootstrap_servers": self.kafka.bootstrap}, "postgres": {"dsn": self.database}}
        self.config = loader.load(write_config(self.folder, config, {"t": merged(defaults, keys)}))
        (self.handler,) = self.config.handlers

    def checkpoint(self, offset: int, partition: int = 0) -> None:
        """Set a checkpoint."""
        with psycopg.connect(self.database) as conn:
            conn.execute(
                "INSERT INTO consumerd.checkpoint (group_id, topic, partition, topic_id, next_offset, target, mode) "
                "VALUES ('consumerd.t', %s, %s, 'id', %s, 't', 'postgres') "
                "ON CONFLICT (group_id, topic, partition) DO UPDATE SET next_offset = excluded.next_offset",
                [self.topic, partition, offset],
            )

    def write(  # noqa: PLR0917 - what differs
        self,
        offset: int,
        value: object,
        refusal: Refusal = REFUSAL,
        failed_at: dt.datetime = LONG_AGO,
        topic_id: str | None = "id",
        partition: int = 0,
        epoch: int = 0,
    ) -> None:
        """Write a letter."""
        data = value if isinstance(value, bytes | None) else json.dumps(value).encode()
        message = Sent(offset, data)
        batch = Batch(
            partition=TopicPartition(self.topic, partition),
            first_offset=offset,
            next_offset=offset + 1,
            messages=[message],
            size=1,
            reason="age",
            gathered_since=0.0,
        )
        given: Any = dict(headers(self.handler, batch, message, refusal, topic_id=topic_id, epoch=epoch))
        given["consumerd.failed_at"] = failed_at.isoformat().encode()
        kept = [*message.own, *((name, value) for name, value in given.items() if name != "trace")]
        self.producer.produce(self.letters, data, message.name, headers=kept, timestamp=message.timestamp()[1])
        assert self.producer.flush(TIMEOUT) == 0

    def state(self, run: int = 0) -> Letters:
        """Return the rows as one run of a command has them."""
        guarded = self.handler.checkpoint == "postgres"
        return Letters("consumerd", self.handler.group_id, run=f"{RUN}{run}", who="ada@there", guarded=guarded)

    async def redrive(
        self, which: Filter | None = None, *, run: int = 0, execute: bool = True, into: str | None = None
    ) -> Report:
        """Redrive letters through the handler."""
        state = self.state(run)
        way = partial(Straight, self.config, self.handler, state, into=into, execute=execute)
        return await redrive(self.config, self.handler, state, which or Filter(statuses=frozenset(OPEN)), way)

    async def to_topic(self, topic: str | None = None, *, run: int = 0, which: Filter | None = None) -> Report:
        """Send letters to a topic."""
        state = self.state(run)
        way = partial(ToTopic, self.config, self.handler, state, topic=topic, execute=True)
        return await redrive(self.config, self.handler, state, which or Filter(statuses=frozenset(OPEN)), way)

    async def standings(self, which: Filter | None = None) -> list[Standing]:
        """Return how letters stand."""
        found, topic = await survey(self.config, self.handler, self.state())
        topic.close()
        return list(found.standings(which or Filter()))

    async def statuses(self) -> Mapping[int, tuple[str, int]]:
        """Return status and attempts of letters by their offsets."""
        return {each.offset: (each.status, each.attempts) for each in await self.standings()}

    def rows(self, table: str = "t") -> list[tuple[Any, ...]]:
        """Return a table's rows."""
        return execute(self.database, f"SELECT id, n FROM {table} ORDER BY id, n")
