"""`consumerd check`: everything that `run` looks at before its first message, and what it would only meet later.

The steps are the daemon's own (`Member._start` and a claim); only what they would make or claim is looked at instead.
Nothing is written, no group is joined. A step that needs what another did not find is left out.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import confluent_kafka as ck
import msgspec
from confluent_kafka import KafkaException

from consumerd import brokers, postgres
from consumerd.checkpoint import Checkpoints, KafkaCheckpoints, schema_is_there
from consumerd.commands import acls
from consumerd.commands.tables import aligned
from consumerd.decide import Committed, decide, decide_by_kafka, decode_stamp
from consumerd.errors import ConfigError, Halt, Outage
from consumerd.live_table import LiveTables
from consumerd.topics import Topics, meaning
from consumerd.transformer import Transformer
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from psycopg import AsyncConnection

    from consumerd.brokers import Found
    from consumerd.config import Config, DeadLetterConfig, HandlerConfig
    from consumerd.live_table import LiveTable
    from consumerd.topics import Topic

T = TypeVar("T")

MAY_MAKE = "SELECT has_database_privilege(current_database(), 'CREATE'), current_database()::text, current_user::text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `holds` None: broker or database did not answer."""

    handler: str | None
    what: str
    holds: bool | None
    detail: str

    def line(self) -> str:
        """Return it as JSON."""
        return msgspec.json.encode(asdict(self)).decode()


def text(findings: list[Finding]) -> str:
    """Return a table of what holds and what does not."""
    words = {True: "ok", False: "WRONG", None: "NOT REACHED"}
    return "\n".join(aligned([[f.handler or "", f.what, words[f.holds], f.detail] for f in findings]))


class Check:
    """One look at everything; `findings` grows as it goes."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.findings: list[Finding] = []

    def files(self) -> None:
        """Note what the files say; they were loaded, so they hold."""
        config = self._config
        self._note(None, "config", holds=True, detail=f"{config.path}")
        for handler in config.handlers:
            what = f"{', '.join(handler.topics)} into {handler.table.name}, {handler.table.write}"
            self._note(handler.name, "config", holds=True, detail=f"{what}, as group {handler.group_id}")

    async def servers(self) -> None:
        """Look at the brokers and the database, for every handler."""
        config = self._config
        topics = Topics(config.kafka)
        kafka = config.kafka.bootstrap_servers
        reached = await self._step(None, "Kafka", topics.names(), lambda names: f"{kafka}: {len(names)} topics")
        conn = await self._step(
            None,
            "Postgres",
            postgres.connect(config.postgres, "consumerd/check"),
            lambda conn: f"{conn.info.host}:{conn.info.port}, database {conn.info.dbname}, role {conn.info.user}",
        )
        try:
            schema = None
            if conn is not None and any(handler.checkpoint == "postgres" for handler in config.handlers):
                name = config.postgres.schema_name
                schema = await self._step(
                    None,
                    "schema",
                    self._schema(conn, name),
                    lambda there: f"{name} is there" if there else f"{name} will be made by the first run",
                )
            for handler in config.handlers:
                await self._handler(handler, topics if reached is not None else None, conn, schema=bool(schema))
        finally:
            if conn is not None:
                await conn.close()

    async def _handler(
        self, handler: HandlerConfig, topics: Topics | None, conn: AsyncConnection[Any] | None, *, schema: bool
    ) -> None:
        name, found, allowed = handler.name, None, False
        if handler.transform is not None:
            await self._step(name, "transform", self._transform(handler), lambda told: told)
        if topics is not None:
            never = [each.dead_letter.topic for each in self._config.handlers]
            found = await self._step(name, "topics", topics.find(handler.topics, never), _told)
        if topics is not None and found:
            allowed = await self._acls(handler, topics, found)
            if handler.poison.action == "dead-letter":
                await self._step(
                    name,
                    "dead letters",
                    self._letters(handler.dead_letter, topics, found),
                    lambda told: told,
                )
        if conn is not None:
            tables = LiveTables(handler, partial(postgres.connect, self._config.postgres, "consumerd/check"))
            for topic in sorted(found or ()) if tables.by_topic else [handler.topics[0]]:
                await self._step(name, "table", self._table(tables.of(topic), conn), lambda told: told)
            ready = {topic: it for topic, it in (found or {}).items() if tables.of(topic).ready}
            if ready and allowed:  # without its ACL a group's offsets are waited for in vain
                looking = self._checkpoint(handler, ready, conn, tables, schema=schema)
                await self._step(name, "checkpoint", looking, lambda told: told)

    async def _letters(self, config: DeadLetterConfig, topics: Topics, found: Mapping[str, Topic]) -> str:
        _, there = await topics.look_at_dead_letter(config, found)
        if there:
            return f"{config.topic} is there"
        brokers = await topics.brokers()
        if config.replication > brokers:
            raise Halt(
                "dead_letter",
                f"{config.topic} cannot be made: `dead_letter.replication` is {config.replication}, and there are "
                f"{brokers} brokers; correct it",
            )
        return f"{config.topic} will be made by the first run"

    async def _transform(self, handler: HandlerConfig) -> str:
        transformer = Transformer(handler, handler.batch.max_bytes)
        try:
            await transformer.start()
        finally:
            await transformer.close()
        return f"{handler.transform.function} is there" if handler.transform else ""

    async def _acls(self, handler: HandlerConfig, topics: Topics, found: Mapping[str, Topic]) -> bool:
        """Look at what is allowed; tell whether it is enough."""
        if not self._config.kafka.admin:
            detail = "not looked at, nor whether a topic was made again: kafka.admin = false"
            self._note(handler.name, "ACLs", holds=True, detail=detail)
            return True

        async def look() -> bool:
            there = handler.dead_letter.topic in await topics.names()
            lines = await asyncio.to_thread(
                acls.lacking, self._config.kafka, handler, sorted(found), letters_there=there
            )
            if lines:
                raise Halt("kafka", f"the brokers do not allow all that is needed; type: {'; '.join(lines)}")
            return True

        return bool(await self._step(handler.name, "ACLs", look(), lambda _: "all that is needed is allowed"))

    async def _schema(self, conn: AsyncConnection[Any], name: str) -> bool:
        if await schema_is_there(conn, name):
            return True
        ((may, database, role),) = await postgres.call(conn, MAY_MAKE)
        if not may:
            raise Halt(
                "database",
                f"schema {name} is not there, and role {role} may not make it: let an owner of {database} run what "
                f"`consumerd setup --sql` prints",
            )
        return False

    async def _table(self, table: LiveTable, conn: AsyncConnection[Any]) -> str:
        await table.make_ready(conn)
        columns = ", ".join(column.name for column in table.mapping.encoder.columns)
        return f"{table.mapping.table.name} takes {columns}"

    async def _checkpoint(
        self,
        handler: HandlerConfig,
        found: Mapping[str, Topic],
        conn: AsyncConnection[Any],
        tables: LiveTables,
        *,
        schema: bool,
    ) -> str:
        """Settle where each partition would go on, as an assignment does; raises what it would halt with."""
        partitions = [TopicPartition(topic.name, n) for topic in found.values() for n in range(topic.partitions)]
        seen = await asyncio.to_thread(self._found, handler, partitions)
        group = handler.group_id
        by_kafka = handler.checkpoint == "kafka" or not schema
        checkpoints = (
            KafkaCheckpoints(group, tables.target)
            if by_kafka
            else Checkpoints(self._config.postgres.schema_name, group, tables.target)
        )
        stored, store = await checkpoints.look(conn, partitions, found), await checkpoints.store(conn)
        begins = 0
        for partition in partitions:
            at, topic_id = seen[partition], found[partition.topic].topic_id
            committed = Committed(at.committed, decode_stamp(at.metadata))
            if handler.checkpoint == "kafka":
                bootstrap = self._config.kafka.bootstrap_servers
                decision = decide_by_kafka(partition, committed, group=group, topic_id=topic_id, bootstrap=bootstrap)
            else:
                decision = decide(
                    partition,
                    stored[partition],
                    committed,
                    store=store,
                    group=group,
                    topic_id=topic_id,
                    target=tables.target(partition.topic),
                )
            begins += decision.offset is None
            self._require(partition, decision.offset, at, group)
        return f"{len(partitions) - begins} partitions go on, {begins} begin at {handler.start}"

    def _found(self, handler: HandlerConfig, partitions: list[TopicPartition]) -> dict[TopicPartition, Found]:
        """Return bounds and committed offsets; a consumer that subscribes to nothing is no member of its group."""
        settings = {**brokers.client_config(self._config.kafka), "group.id": handler.group_id}
        try:
            consumer = ck.Consumer({**settings, "enable.auto.commit": False})
        except KafkaException as exception:
            raise brokers.refused(exception) from exception
        try:
            return brokers.find(consumer, partitions)
        except KafkaException as exception:
            raise meaning(exception.args[0], self._config.kafka.bootstrap_servers) from exception
        finally:
            consumer.close()

    def _require(self, partition: TopicPartition, offset: int | None, at: Found, group: str) -> None:
        if at.bounds is None:
            raise Outage("kafka", f"Kafka: {partition} has no leader")
        low, high = at.bounds
        if offset is not None and not low <= offset <= high:
            bootstrap = self._config.kafka.bootstrap_servers
            raise brokers.gap(partition, offset, low=low, high=high, group=group, bootstrap=bootstrap)

    async def _step(self, handler: str | None, what: str, step: Awaitable[T], told: Callable[[T], str]) -> T | None:
        """Note what a step found; None when it does not hold."""
        try:
            result = await step
        except (Halt, ConfigError) as error:
            self._note(handler, what, holds=False, detail=str(error))
        except Outage as outage:
            self._note(handler, what, holds=None, detail=str(outage))
        else:
            self._note(handler, what, holds=True, detail=told(result))
            return result
        return None

    def _note(self, handler: str | None, what: str, *, holds: bool | None, detail: str) -> None:
        self.findings.append(Finding(handler=handler, what=what, holds=holds, detail=detail))


def _told(found: Mapping[str, Topic]) -> str:
    topics = ", ".join(f"{topic.name} ({topic.partitions})" for topic in found.values())
    return f"{topics} with so many partitions"
