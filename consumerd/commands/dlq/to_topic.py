"""Letters back to a topic: the original messages, to be read again by whoever reads that topic.

A letter's row moves in a transaction that is open while its message is on the way, and is committed once all in-sync
replicas have it: of two redrives at once the second waits, and finds the letters taken. A crash, or a COMMIT that
fails, after the acknowledgement sends a message again: at least once. Back in its own topic a message goes to its own
partition. Our headers are off, but for `consumerd.attempt`: should it fail again, its letter counts on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import confluent_kafka as ck
from confluent_kafka import KafkaError, KafkaException

from consumerd import postgres
from consumerd.brokers import client_config
from consumerd.commands.dlq.redrive import Taken, after_taken, check_claim, claim
from consumerd.dead_letter import ACKNOWLEDGE_WAIT, MAX_MESSAGE_BYTES, OUR_PREFIX, VISIBLE_AFTER
from consumerd.errors import Halt, Outage
from consumerd.letters import ensure_letters
from consumerd.topics import Topics, meaning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch
    from consumerd.commands.dlq.redrive import Report, Waits
    from consumerd.commands.dlq.topic import Letter
    from consumerd.config import Config, HandlerConfig
    from consumerd.letters import Letters

WARNING = (
    "Whoever else reads {topic} sees these messages again, and each is the newest of its key then; a crash may send "
    "some twice."
)


class ToTopic:
    """Letters to one topic, or (None) each to the one that it came from."""

    def __init__(
        self,
        config: Config,
        handler: HandlerConfig,
        letters: Letters,
        waits: Waits,
        *,
        topic: str | None,
        execute: bool,
    ) -> None:
        self._config, self._topic, self._letters, self._waits = config, topic, letters, waits
        self._schema, self._execute = config.postgres.schema_name, execute
        self._connect = partial(postgres.connect, config.postgres, f"consumerd/dlq-{handler.name}")
        self._conn: AsyncConnection[Any] | None = None
        self._oldest: dict[str, float] = {}
        """Ages in ms beyond which topics keep no message."""
        self._sending = Sending(
            {
                **client_config(config.kafka),
                "acks": "all",
                "enable.idempotence": True,
                "message.timeout.ms": 0,
                "message.max.bytes": MAX_MESSAGE_BYTES,
                "partitioner": "murmur2_random",  # of another topic: as Kafka's own producer would
            }
        )

    async def start(self, topics: set[str]) -> None:
        """Look at what must be there, for letters of some topics; raises Outage, Halt."""
        letters = {each.dead_letter.topic for each in self._config.handlers}
        if self._topic in letters:
            raise Halt("topic", f"{self._topic} is a dead-letter topic: name another with --topic")
        admin = Topics(self._config.kafka)
        self._oldest = await admin.oldest(await admin.find([self._topic] if self._topic else topics, letters))
        if self._execute:
            await ensure_letters(await self._open(), self._schema)

    async def close(self) -> None:
        """Let go of connection and producer."""
        await self._abort()
        await asyncio.to_thread(self._sending.purge)

    async def settle(self, batch: Batch, report: Report) -> None:
        """Send letters and move their rows; raises Stopped, Halt."""
        left: Batch | None = batch
        while left is not None:
            try:
                left = await self._step(left, report)
            except Outage as outage:
                await self._abort()
                await self._waits.out(outage)
            else:
                self._waits.over()

    async def _step(self, batch: Batch, report: Report) -> Batch | None:
        """Send letters and move their rows; return those that are left."""
        topic = self._topic or batch.partition.topic
        self._refuse_expired(batch, topic)
        if not self._execute:
            report.note(batch, 0, Counter())
            return None
        messages = [_produced(letter, topic) for letter in cast("list[Letter]", batch.messages)]
        conn = await self._open()
        try:
            opening = claim(self._letters, batch, f"topic {topic}")
            async with postgres.transaction(conn, opening) as answers:
                check_claim(answers[0], batch)
                try:
                    await asyncio.to_thread(self._sending.send, messages)
                except KafkaException as error:
                    raise self._meaning(error.args[0], topic) from error
        except Taken as taken:
            left = await after_taken(conn, self._letters, batch, taken, report)
            if left is not batch:
                return left
        report.note(batch, 0, Counter())
        return None

    def _refuse_expired(self, batch: Batch, topic: str) -> None:
        """Halt before a message that brokers would delete at once, for its timestamp: it would be nowhere then."""
        since = time.time() * 1000 - self._oldest.get(topic, math.inf)
        for letter in batch.messages:
            kind, timestamp = letter.timestamp()
            if kind and timestamp < since:
                raise Halt(
                    "topic",
                    f"{batch.partition}@{letter.offset()} is older than topic {topic} keeps messages (retention.ms): a "
                    f"broker would delete it before it is read; redrive it straight, without --to-topic; or type: "
                    f"kafka-configs --bootstrap-server {self._config.kafka.bootstrap_servers} --alter --topic {topic} "
                    f"--add-config retention.ms=-1",
                )

    def _meaning(self, error: KafkaError, topic: str) -> Outage | Halt:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return Halt("kafka", f"a message is too large for topic {topic}: raise its max.message.bytes")
        return meaning(error, self._config.kafka.bootstrap_servers)

    async def _open(self) -> AsyncConnection[Any]:
        if self._conn is None or self._conn.closed:
            self._conn = await self._connect()
        return self._conn

    async def _abort(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await conn.close()


class Sending:
    """A producer that is asked for some messages at a time, and answers when all of them are acknowledged."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._producer: ck.Producer | None = None

    def send(self, messages: Sequence[dict[str, Any]]) -> None:
        """Send messages and wait, on a thread; raises Outage, or KafkaException for one that is refused.

        Some may have been taken when it raises.
        """
        producer = self._producer = self._producer or ck.Producer(self._settings)
        on_their_way, errors = len(messages), list[KafkaError]()

        def delivered(error: KafkaError | None, _: ck.Message) -> None:
            nonlocal on_their_way
            on_their_way -= 1
            if error is not None:
                errors.append(error)

        deadline = time.monotonic() + VISIBLE_AFTER
        for message in messages:
            self._produce(producer, message, delivered, deadline)
        while on_their_way and not errors:
            before = on_their_way
            producer.poll(ACKNOWLEDGE_WAIT)
            if on_their_way < before:
                deadline = time.monotonic() + VISIBLE_AFTER
            self._not_past(deadline)
        if errors:
            self.purge()
            raise KafkaException(errors[0])

    def purge(self) -> None:
        """Let go of what is not delivered."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(ACKNOWLEDGE_WAIT)
            self._producer = None

    def _produce(self, producer: ck.Producer, message: dict[str, Any], delivered: Any, deadline: float) -> None:  # noqa: ANN401
        while True:
            try:
                producer.produce(**message, on_delivery=delivered)
            except BufferError:
                producer.poll(ACKNOWLEDGE_WAIT)
                self._not_past(deadline)
            else:
                return

    def _not_past(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self.purge()
            raise Outage("kafka", "Kafka does not acknowledge")


def _produced(letter: Letter, topic: str) -> dict[str, Any]:
    """Return the original message as a producer takes it."""
    kind, timestamp = letter.timestamp()
    attempt = (f"{OUR_PREFIX}attempt", str(letter.tried).encode())
    message = {
        "topic": topic,
        "value": letter.value(),
        "key": letter.key(),
        "headers": [*letter.headers(), attempt],
        "timestamp": timestamp if kind else 0,
    }
    return message | ({"partition": letter.partition()} if topic == letter.topic() else {})
