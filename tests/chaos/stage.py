"""One segment while it runs: its topic, database, daemons and producer, and the locks that keep faults apart."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, TopicPartition

from tests.acceptance.stream import SLOW_COMMIT
from tests.chaos.fleet import SLOTS, Fleet
from tests.chaos.ledger import Ledger, Rewind
from tests.chaos.producer import MAX_PARTITIONS, Order, ProducerProcess
from tests.chaos.records import TABLE, Records
from tests.chaos.variant import Variant, group
from tests.chaos.world import LOADER, World
from tests.servers.process import wait_until

LOCKS = (*(f"daemon {n}" for n in range(SLOTS)), "kafka", "kafka proxy", "postgres", "postgres proxy")
"""Taken in this order, so that no two faults wait for each other."""
TOPIC_TIMEOUT = 60.0
RESET_TIMEOUT = 180.0
JOIN_TIMEOUT = 30.0
POLL = 0.2
BACKENDS_TIMEOUT = 60.0
QUESTION_TIMEOUT = 10.0


class Stage:
    """Made for one segment; `close` leaves nothing of it on the servers."""

    def __init__(self, world: World, folder: Path, *, variant: Variant, order: Order, package: Path | None) -> None:
        self.world = world
        self.folder = folder
        self.variant = variant
        name = self.topic = self.database = order.topic
        self.records = Records(order.seed)
        self.ledgers = {handler: Ledger(self.records) for handler in self.variant.handlers}
        self._locks = {lock: threading.Lock() for lock in LOCKS}
        world.kafka.make_topic(name, variant.partitions)
        self._make_tables()
        self.fleet = Fleet(
            folder,
            variant.daemons,
            variant.config(world.bootstrap, world.daemons_dsn(name)),
            variant.files(name),
            static=variant.protocol == "static",
            package=package,
        )
        self.producer = ProducerProcess(order, variant.partitions)

    def close(self) -> None:
        """End what runs, and remove what was made."""
        self.producer.close()
        self.fleet.close()
        self.world.kafka.start()
        self.world.postgres.start()
        topics = [self.topic, *(f"{group(self.topic, handler)}.dlq" for handler in self.variant.handlers)]
        admin = self.world.admin()
        there = admin.list_topics(timeout=QUESTION_TIMEOUT).topics
        for future in admin.delete_topics([topic for topic in topics if topic in there]).values():
            future.result(TOPIC_TIMEOUT)
        self.world.drop_database(self.database)

    @contextmanager
    def holding(self, names: "frozenset[str]") -> Iterator[None]:
        """Hold what a fault needs for itself."""
        with ExitStack() as stack:
            for name in LOCKS:
                if name in names:
                    stack.enter_context(self._locks[name])
            yield

    def grow(self, more: int) -> None:
        """Add partitions to the topic."""
        partitions = min(self.producer.partitions + more, MAX_PARTITIONS)
        if partitions > self.producer.partitions:
            self.world.kafka.tool(
                "kafka-topics",
                *("--bootstrap-server", self.world.kafka.bootstrap, "--alter", "--topic", self.topic),
                *("--partitions", str(partitions)),
            )
            self.producer.grow(partitions)

    def end_backends(self) -> None:
        """End what daemons that are gone have left in Postgres; a COMMIT on its way lands before that, or never."""
        query = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name LIKE 'consumerd/%%' AND datname = %s"
        )
        with self.world.superuser() as conn:
            wait_until(
                lambda: conn.execute(query, [self.database]).fetchone() == (0,), BACKENDS_TIMEOUT, "backends to end"
            )

    def rewind(self, handler: str, by: Mapping[int, int]) -> None:
        """Set a group's offsets back from where its checkpoints stand, as an operator does; no daemon runs."""
        stood = self.checkpoints(handler)
        before = self.committed(handler)
        to = {part: max(0, offset - by[part]) for part, offset in stood.items()}
        plan = self.folder / "reset.csv"
        plan.write_text("".join(f"{self.topic},{part},{offset}\n" for part, offset in to.items()), encoding="ascii")
        command = (
            *("--bootstrap-server", self.world.kafka.bootstrap, "--group", group(self.topic, handler)),
            *("--reset-offsets", "--from-file", str(plan), "--execute"),
        )
        answers: list[str] = []

        def done() -> bool:
            answers[:] = [self.world.kafka.tool("kafka-consumer-groups", *command)]
            return {part: found.offset for part, found in self.committed(handler).items() if part in to} == to

        # A killed member is in its group until its session has timed out, and the tool wants no members.
        try:
            wait_until(done, RESET_TIMEOUT, "the reset")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {answers}") from None
        for part, offset in to.items():
            adopted = bool(before[part].metadata)
            self.ledgers[handler].rewind(part, Rewind(stood[part], offset), before_was_adopted=adopted)

    def ends(self) -> dict[int, int]:
        """Return the end of each partition's log."""
        consumer = self.consumer("chaos")
        try:
            return {
                part: int(consumer.get_watermark_offsets(TopicPartition(self.topic, part), QUESTION_TIMEOUT)[1])
                for part in range(self.producer.partitions)
            }
        finally:
            consumer.close()

    def committed(self, handler: str) -> dict[int, TopicPartition]:
        """Return what Kafka has committed for a handler's group; offset below 0: nothing."""
        consumer = self.consumer(group(self.topic, handler))
        asked = [TopicPartition(self.topic, part) for part in range(self.producer.partitions)]
        found: list[TopicPartition] = []

        def answered() -> bool:
            with suppress(KafkaException):  # after a crash a broker may be no coordinator for minutes (seen)
                found[:] = consumer.committed(asked, timeout=QUESTION_TIMEOUT)
            return bool(found)

        try:
            wait_until(answered, RESET_TIMEOUT, "the group's offsets")
        finally:
            consumer.close()
        return {entry.partition: entry for entry in found}

    def lets_in(self) -> bool:
        """Whether the broker lets a member into a new group, which has nothing to do with the daemon."""
        consumer = self.consumer(f"{self.topic}.probe")
        consumer.subscribe([self.topic])
        until = time.monotonic() + JOIN_TIMEOUT
        try:
            while not consumer.assignment() and time.monotonic() < until:
                consumer.poll(POLL)
            return bool(consumer.assignment())
        finally:
            consumer.close()

    def checkpoints(self, handler: str) -> dict[int, int]:
        """Return the checkpoints of a handler's group, wherever they are; those that were never set are left out."""
        if self.variant.mode == "kafka":
            return {part: found.offset for part, found in self.committed(handler).items() if found.offset >= 0}
        query = "SELECT partition, next_offset FROM consumerd.checkpoint WHERE group_id = %s AND next_offset >= 0"
        with self.world.superuser(self.database) as conn:
            found: list[tuple[int, int]] = conn.execute(query, [group(self.topic, handler)]).fetchall()  # type: ignore[assignment]
        return dict(found)

    def consumer(self, group_id: str) -> Consumer:
        """Return a client that asks round the proxy."""
        return Consumer(
            {
                "bootstrap.servers": self.world.kafka.bootstrap,
                "group.id": group_id,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "log_level": 0,
            }
        )

    def _make_tables(self) -> None:
        self.world.make_database(self.database)
        with self.world.superuser(self.database) as conn:
            for name in self.variant.handlers:
                constraint, where = self.variant.constraint(name), self.variant.place(name)
                conn.execute(TABLE.format(name=name, constraint=constraint, where=where).encode())
                conn.execute(f"GRANT SELECT, INSERT, UPDATE ON {name} TO {LOADER}".encode())
                if self.variant.slow_commits:
                    conn.execute(SLOW_COMMIT.format(name=name, number="seq").encode())
