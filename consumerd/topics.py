"""What the brokers know of topics: which exist, their ids and settings; and the dead-letter topic's fitness.

Blocking calls of librdkafka, run in threads of the event loop's pool. With `kafka.admin = false` (librdkafka's mock
cluster answers no admin calls) topic ids are unknown and the dead-letter topic's settings are not looked at.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic  # type: ignore[attr-defined]

from consumerd import tls
from consumerd.brokers import client_config
from consumerd.errors import ConfigError, Halt, Outage
from consumerd.types import TopicPartition
from consumerd.ways_on import OtherTopic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from consumerd.config import DeadLetterConfig, KafkaConfig
    from consumerd.ways_on import Way

T = TypeVar("T")

CALL_TIMEOUT = 5.0
"""Seconds for one call."""

WATCH_INTERVAL = 1.0
"""Seconds between two looks at the topics' ids."""
MISSED_AFTER = 10.0
"""Seconds for which a topic must be unknown to be gone: a broker that starts may not know its topics yet."""

FRESH = 0.1
"""Seconds for which a look at the topics' ids holds."""
CONFIRM_TIMEOUT = 1.0
"""Seconds for such a look: a write waits for it."""

PASSING = {
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.NOT_CONTROLLER,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.THROTTLING_QUOTA_EXCEEDED,
}
"""What brokers answer that cannot do it now (Kafka's table of error codes); `KafkaError.retriable()` is True for none.
"""
OF_THE_TOPIC = {
    KafkaError.INVALID_REPLICATION_FACTOR,
    KafkaError.INVALID_PARTITIONS,
    KafkaError.INVALID_CONFIG,
    KafkaError.POLICY_VIOLATION,
}
"""What brokers answer that do not make a topic as it is asked for."""
LETTERS = ".dlq"
"""How the name of a dead-letter topic ends unless it was configured otherwise: those of another daemon, which are not
known here, would be read by one that matches all, and its letters by that one."""
INTERNAL = {"__consumer_offsets", "__transaction_state", "__share_group_state"}
"""Kafka's own topics."""
LOOK_FOR_TOPICS = 10.0
"""Seconds between two looks for topics that a pattern matches, unless topic.metadata.refresh.interval.ms says other."""
LEAST_LOOK = 100
"""Milliseconds of it at least."""
LETTERS_EXPIRE = (
    "letters keep their original timestamps, so old ones expire at once, unless message.timestamp.type is LogAppendTime"
)
LETTER_HEADROOM = 64 * 1024
"""Bytes by which a letter may be larger than its message: the headers that say why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A topic as the brokers know it; `topic_id` None: not asked for."""

    name: str
    partitions: int
    topic_id: str | None
    matched: bool = False
    """It was found by a pattern, not named."""
    late: bool = False
    """It appeared while the handler ran."""


class TopicGone(Halt):
    """Topics are not there any more, or are others of the same name."""

    def __init__(self, topics: list[str], message: str, *ways: Way) -> None:
        super().__init__("topic", message, *ways)
        self.topics = topics


class Topics:
    """Admin calls with one client."""

    def __init__(self, kafka: KafkaConfig) -> None:
        self._kafka = kafka
        self._confirming = asyncio.Lock()
        self._confirmed = -math.inf
        self._missing: dict[str, float] = {}
        """Since when topics are not known to the brokers."""
        self._astray = False
        """The last look at the ids was not answered."""
        self._said = ""
        """What the client said last of a connection that failed: why, where the answer only says that it did."""
        try:
            settings: dict[str, Any] = {**client_config(kafka), "error_cb": self._on_error}
            self._admin = AdminClient(settings)
        except KafkaException as error:
            raise ConfigError(f"[kafka.properties], or -X: {error.args[0].str()}") from error

    async def names(self) -> set[str]:
        """Return all topics that this principal may see."""
        return set(await self._call(self._partitions))

    async def brokers(self) -> int:
        """Return how many brokers there are now."""
        return await self._call(lambda: len(self._admin.list_topics(timeout=CALL_TIMEOUT).brokers))

    async def find(self, patterns: Iterable[str], never: Iterable[str]) -> dict[str, Topic]:
        """Return the topics that are named, or match a pattern (`^...`); raises Halt when a named one is missing.

        `never` are the dead-letter topics of all handlers: no pattern takes them, nor any `*.dlq`, nor Kafka's own.
        """
        there = await self._call(self._partitions)
        named = {name for name in patterns if not name.startswith("^")}
        missing = sorted(named - there.keys())
        if missing:
            if self._kafka.admin:
                await self._call(self._ids, missing)  # of one that this principal may not see brokers say so here
            raise Halt(
                "topic",
                f"topic {', '.join(missing)} does not exist; make it: kafka-topics --create --topic {missing[0]} "
                f"--partitions 6 --bootstrap-server {self._kafka.bootstrap_servers}; or correct `topics`",
            )
        matched = _matched(there, patterns, never) - named
        if not named and not matched:
            raise Halt("topic", f"no topic matches {', '.join(patterns)}: correct `topics`, or make the topic")
        ids = await self._known(named | matched)
        return {
            name: Topic(name=name, partitions=there[name], topic_id=ids.get(name), matched=name in matched)
            for name in sorted(named | matched)
        }

    async def appeared(
        self, patterns: Iterable[str], never: Iterable[str], known: Mapping[str, Topic]
    ) -> dict[str, Topic]:
        """Return the topics that match a pattern by now, besides those that are known."""
        there = await self._call(self._partitions)
        new = _matched(there, patterns, never) - known.keys()
        ids = await self._known(new) if new else {}
        return {
            name: Topic(name=name, partitions=there[name], topic_id=ids.get(name), matched=True, late=True)
            for name in sorted(new)
        }

    async def partitions(self, topics: Iterable[str]) -> set[TopicPartition]:
        """Return the partitions that topics have now."""
        there = await self._call(self._partitions)
        return {TopicPartition(name, number) for name in topics for number in range(there.get(name, 0))}

    @property
    def look_interval(self) -> float | None:
        """Seconds between two looks for topics that have appeared; None: never."""
        given = self._kafka.properties.get("topic.metadata.refresh.interval.ms")
        if not isinstance(given, str):
            return LOOK_FOR_TOPICS
        return max(int(given), LEAST_LOOK) / 1000 if int(given) > 0 else None

    async def _known(self, names: Iterable[str]) -> dict[str, str]:
        """Return the ids of topics, as far as they are asked for."""
        names = sorted(names)
        ids = await self._call(self._ids, names) if self._kafka.admin else {}
        if self._kafka.admin and len(ids) < len(names):
            raise Outage("kafka", f"Kafka at {self._kafka.bootstrap_servers}: brokers do not agree on topics yet")
        return ids

    async def watch(self, topics: Mapping[str, Topic]) -> TopicGone | None:
        """Look now and then whether topics are the same ones; return the halt for one that is gone, or another."""
        while self._kafka.admin:
            await asyncio.sleep(WATCH_INTERVAL)
            now = time.monotonic()
            try:
                await self.confirm(topics, now)
            except Outage:  # the consumer meets the same, and tells
                self._missing.clear()
            except TopicGone as halt:
                return halt
            gone = [name for name, since in self._missing.items() if now - since >= MISSED_AFTER]
            if gone:
                return missing(gone, topics)
        return None

    async def confirm(self, topics: Mapping[str, Topic], arrived: float) -> None:
        """Make sure, for messages that arrived at a (monotonic) time, that they are of the topics that were found.

        Kafka tells nobody of a topic that was deleted and made again: the old position goes on in the new log, and
        what lies below it there is skipped. A look that began before the messages came tells of them, too, if it was
        not more than `FRESH` before: to make a topic again and to read it takes longer. Raises Halt for another topic,
        Outage when no broker answers. A topic that is gone is still the old one.
        """
        if not self._kafka.admin or arrived <= self._confirmed + FRESH:
            return
        async with self._confirming:
            if arrived <= self._confirmed + FRESH:
                return
            began, ids = await self._look(list(topics))
            for name, topic in topics.items():
                if topic.topic_id is not None and ids.get(name, topic.topic_id) != topic.topic_id:
                    raise TopicGone(
                        [name],
                        f"topic {name} was deleted and made again: its offsets mean other messages than the "
                        f"checkpoint; nothing of the new topic was written; to keep the old checkpoints, set "
                        f"`group_id` to a new name",
                        OtherTopic(topic=name, old=topic.topic_id, new=ids[name]),
                    )
            self._missing = {name: self._missing.get(name, began) for name in topics if name not in ids}
            self._confirmed = began

    async def _look(self, names: list[str]) -> tuple[float, dict[str, str]]:
        """Return the ids of topics, and when they were asked for; raises Outage.

        librdkafka asks the broker that it takes for the controller, waits for that one alone, and tries to connect to
        it without a pause (seen: a core kept busy). Any broker tells who it is now, so once a look was not answered
        each begins with that question: one begun when the cluster has noticed a broker's death is answered at once.
        """
        if not self._astray:
            began = time.monotonic()
            with suppress(Outage):
                return began, await self._call(self._ids, names, CONFIRM_TIMEOUT)
            self._astray = True
        await self._call(self._partitions)  # of all: to ask an AdminClient for one topic may make it (seen)
        began = time.monotonic()
        ids = await self._call(self._ids, names, CONFIRM_TIMEOUT)
        self._astray = False
        return began, ids

    async def ensure_dead_letter(self, config: DeadLetterConfig, sources: Iterable[str]) -> int | None:
        """Make the dead-letter topic if that is asked for, and refuse one that would lose letters; raises Halt.

        Return the bytes that its largest letter may have, if the brokers tell.
        """
        largest, there = await self.look_at_dead_letter(config, sources)
        if not there:
            await self._call(self._create, config, largest)
        return largest

    async def look_at_dead_letter(self, config: DeadLetterConfig, sources: Iterable[str]) -> tuple[int | None, bool]:
        """Return the bytes of the largest letter, if the brokers tell, and whether the topic is there; raises Halt.

        One that is not there is a mistake unless it is to be made.
        """
        there = await self._call(self._partitions)
        largest = await self._largest_message(sources) if self._kafka.admin else None
        if config.topic not in there:
            command = (
                f"kafka-topics --create --topic {config.topic} --config retention.ms=-1 --config "
                f"max.message.bytes={largest or 'N'} --bootstrap-server {self._kafka.bootstrap_servers}"
            )
            if not config.create:
                raise Halt(
                    "dead_letter",
                    f"dead-letter topic {config.topic} does not exist; make it: {command}; or set "
                    f"`dead_letter.create = true`",
                )
        elif largest is not None:
            _check(config.topic, await self._call(self._settings, config.topic), largest, self._kafka.bootstrap_servers)
        return largest, config.topic in there

    async def oldest(self, names: Iterable[str]) -> dict[str, float]:
        """Return the age in ms that a message's own timestamp may have in topics, beyond which brokers delete it."""
        ages = {}
        for name in names if self._kafka.admin else ():
            settings = await self._call(self._settings, name)
            if settings["message.timestamp.type"] != "LogAppendTime" and "delete" in settings["cleanup.policy"]:
                ages[name] = float(settings["retention.ms"])
        return {name: age for name, age in ages.items() if age >= 0}

    async def _largest_message(self, sources: Iterable[str]) -> int:
        settings = [await self._call(self._settings, source) for source in sources]
        return max(int(setting["max.message.bytes"]) for setting in settings) + LETTER_HEADROOM

    async def _call(self, function: Callable[..., T], *values: object) -> T:
        try:
            return await asyncio.to_thread(function, *values)
        except TimeoutError:
            why = await asyncio.to_thread(self._why)
            raise Outage("kafka", f"Kafka at {self._kafka.bootstrap_servers} does not answer{why}") from None
        except KafkaException as exception:
            error = meaning(exception.args[0], self._kafka.bootstrap_servers)
            if not isinstance(error, Outage):
                raise error from exception
            raise Outage("kafka", f"{error}{await asyncio.to_thread(self._why)}") from exception

    def _why(self) -> str:
        self._admin.poll(0)  # serves `_on_error`
        said, self._said = self._said, ""
        plain = {name: value for name, value in self._kafka.properties.items() if isinstance(value, str)}
        if certificate := tls.broker(said, plain):
            return f" ({certificate})"
        return f" ({said}): correct [kafka] if it is not merely down" if said else ""

    def _on_error(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 - the only name it has
            self._said = error.str()

    def _partitions(self) -> dict[str, int]:
        metadata = self._admin.list_topics(timeout=CALL_TIMEOUT)
        return {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}

    def _ids(self, names: list[str], timeout: float = CALL_TIMEOUT) -> dict[str, str]:
        futures = self._admin.describe_topics(TopicCollection(names), request_timeout=timeout)
        ids = {}
        for name, future in futures.items():
            try:
                ids[name] = str(future.result(timeout).topic_id)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
        return ids

    def _settings(self, topic: str) -> dict[str, str]:
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        (future,) = self._admin.describe_configs([resource], request_timeout=CALL_TIMEOUT).values()
        return {name: entry.value for name, entry in future.result(CALL_TIMEOUT).items()}

    def _create(self, config: DeadLetterConfig, largest: int | None) -> None:
        settings = {"cleanup.policy": "delete", "retention.ms": str(config.retention_ms)}
        if config.retention_ms >= 0:
            settings["message.timestamp.type"] = "LogAppendTime"
        if largest is not None:
            settings["max.message.bytes"] = str(largest)
        topic = NewTopic(config.topic, config.partitions, config.replication, config=settings)
        (future,) = self._admin.create_topics([topic], request_timeout=CALL_TIMEOUT).values()
        try:
            future.result(CALL_TIMEOUT)
        except KafkaException as error:
            refused = error.args[0]
            if refused.code() in OF_THE_TOPIC:
                raise Halt(
                    "dead_letter",
                    f"dead-letter topic {config.topic} cannot be made: {refused.str()}; correct [dead_letter], which "
                    f"asks for partitions = {config.partitions} and replication = {config.replication}",
                ) from error
            if refused.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


def meaning(error: KafkaError, bootstrap: str) -> Outage | Halt:
    """Return what an error of a call means to us: brokers that cannot do it now, or may never."""
    sentence = f"Kafka at {bootstrap}: {error.str()}"
    if error.code() in PASSING or error.code() < 0:  # librdkafka's own codes: no answer came from a broker
        return Outage("kafka", sentence)
    return Halt("kafka", f"{sentence}; grant it to this principal or correct the configuration")


def _matched(there: Iterable[str], patterns: Iterable[str], never: Iterable[str]) -> set[str]:
    """Return the topics that a pattern takes."""
    matching = [re.compile(pattern) for pattern in patterns if pattern.startswith("^")]
    passed_over = {*never, *INTERNAL}
    return {
        name
        for name in there
        if name not in passed_over and not name.endswith(LETTERS) and any(p.search(name) for p in matching)
    }


def missing(gone: list[str], topics: Mapping[str, Topic]) -> TopicGone:
    """Return the halt for topics that are gone, with the way on."""
    if all(topics[name].matched for name in gone):
        way = "restart to go on without it"
    else:
        way = (
            "make it again and set `group_id` to a new name, or restart, which then names the command that reads it "
            "from its start; or take it out of `topics`"
        )
    return TopicGone(gone, f"topic {', '.join(gone)} is gone from the brokers: {way}")


def _check(topic: str, settings: Mapping[str, str], largest: int, bootstrap: str) -> None:
    """Refuse a dead-letter topic that drops letters: all that is wrong with it in one sentence."""
    wrong = []
    if settings["cleanup.policy"] != "delete":
        wrong.append(("cleanup.policy", "delete", "a compacted topic keeps one letter for each key"))
    if settings["retention.ms"] != "-1" and settings["message.timestamp.type"] != "LogAppendTime":
        wrong.append(("retention.ms", "-1", LETTERS_EXPIRE))
    if int(settings["max.message.bytes"]) < largest:
        wrong.append(("max.message.bytes", str(largest), "the largest messages would not fit with their headers"))
    if wrong:
        reasons = "; ".join(f"{name} is {settings[name]}: {why}" for name, _, why in wrong)
        change = ",".join(f"{name}={value}" for name, value, _ in wrong)
        raise Halt(
            "dead_letter",
            f"dead-letter topic {topic} would lose letters: {reasons}; type: kafka-configs --bootstrap-server "
            f"{bootstrap} --alter --topic {topic} --add-config {change}",
        )
