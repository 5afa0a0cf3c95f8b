"""`consumerd lag`: how far each partition is behind, in messages and in time, whether or not the daemon runs.

Time lag is the age of the oldest message not yet written: of the first that there is at or after the checkpoint. It is
fetched, for only the message tells its time (a search by time finds an offset, not the time of one), and what follows a
checkpoint may be offsets that hold no message: markers of transactions, what compaction took.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import confluent_kafka as ck
import msgspec
from confluent_kafka import KafkaError, KafkaException

from consumerd import postgres
from consumerd.brokers import client_config
from consumerd.commands.group import Group, survey
from consumerd.commands.sample import GROUP
from consumerd.commands.tables import aligned
from consumerd.errors import Halt
from consumerd.topics import meaning
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from consumerd.commands.group import Standing
    from consumerd.config import Config, HandlerConfig, KafkaConfig

DEADLINE = 10.0
"""Seconds in which the brokers must have told the oldest messages of a handler."""
WAIT = 0.2
"""Seconds of one wait for them."""
FETCH_BYTES = 64 * 1024
"""Bytes of one partition in a fetch: one message is wanted. A larger one comes alone."""
FETCHED_BYTES = 8 * 1024 * 1024
"""Bytes of a fetch."""
AT_ONCE = 10_000
"""Messages of one `consume()`."""
UNKNOWN, UNASKED = -1, 0
"""In place of a timestamp: no broker told it, or nothing is left to be written."""
NOT_TOLD = f"no broker told its oldest message within {DEADLINE:g} s"
TAKEN_UP = "an operator set this offset; the next start takes it up"

_Told = dict[TopicPartition, "int | None"]
"""The timestamp (ms) of the oldest message of each partition that is behind; None: it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How far one partition is behind; None: not known. `checkpoint` None: it has none yet, and begins at `begins`."""

    handler: str
    topic: str
    partition: int
    checkpoint: int | None
    begins: int | None
    high_watermark: int | None
    lag_messages: int | None
    lag_seconds: float | None
    note: str = ""

    def line(self) -> str:
        """Return it as JSON."""
        return msgspec.json.encode(asdict(self)).decode()

    def exceeds(self, seconds: float) -> bool:
        """Whether it is further behind, or may be."""
        return self.lag_seconds is None or self.lag_seconds > seconds


def text(lags: Sequence[Lag]) -> str:
    """Return a table."""
    head = ["handler", "partition", "checkpoint", "end", "lag", "seconds", ""]
    rows = [
        [
            lag.handler,
            f"{lag.topic}:{lag.partition}",
            "-" if lag.checkpoint is None else str(lag.checkpoint),
            _or_unknown(lag.high_watermark),
            _or_unknown(lag.lag_messages),
            "?" if lag.lag_seconds is None else f"{lag.lag_seconds:.1f}",
            lag.note,
        ]
        for lag in lags
    ]
    return "\n".join(aligned([head, *rows]))


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)


async def lags_of_all(config: Config, handlers: Iterable[HandlerConfig]) -> tuple[list[Lag], list[str]]:
    """Return the lags of handlers, and a sentence for each of which there is none to tell; raises Outage."""
    lags, problems = [], []
    for handler in handlers:
        try:
            lags += await lags_of(config, handler)
        except Halt as halt:
            problems.append(f"{handler.name}: {halt}")
    return lags, problems


async def lags_of(config: Config, handler: HandlerConfig) -> list[Lag]:
    """Return the lag of each partition of a handler; raises Outage, Halt."""
    group = Group(config.kafka, handler.group_id)
    if handler.checkpoint == "kafka":
        standings = await survey(config, handler, group, None)
    else:
        conn = await postgres.connect(config.postgres, "consumerd/lag")
        try:
            standings = await survey(config, handler, group, conn)
        finally:
            await conn.close()
    begins = await _beginnings(handler, group, standings)
    behind = {
        standing.partition: max(at, bounds.low)
        for standing in standings
        if (bounds := standing.bounds)
        and (at := _at(standing, begins.get(standing.partition))) is not None
        and at < bounds.high
        if not standing.made_again
    }
    oldest = await asyncio.to_thread(_oldest, config.kafka, behind) if behind else {}
    now = time.time()
    told: _Told = {partition: oldest.get(partition, UNKNOWN) for partition in behind}
    return [_lag(handler.name, standing, begins.get(standing.partition), told, now) for standing in standings]


async def _beginnings(handler: HandlerConfig, group: Group, standings: Iterable[Standing]) -> dict[TopicPartition, int]:
    """Return where the partitions begin that have no checkpoint."""
    new = {each.partition: each.bounds for each in standings if each.position is None and each.bounds}
    late = {each.partition for each in standings if each.late}
    begins = {
        p: bounds.high if handler.start == "latest" and p not in late else bounds.low for p, bounds in new.items()
    }
    if isinstance(handler.start, datetime):
        asked = [partition for partition in new if partition not in late]
        found = await group.offsets_at(asked, int(handler.start.timestamp() * 1000))
        begins |= {p: new[p].high if offset is None else offset for p, offset in found.items()}
    return begins


def _at(standing: Standing, begins: int | None) -> int | None:
    return begins if standing.position is None else standing.position


def _lag(handler: str, standing: Standing, begins: int | None, told: _Told, now: float) -> Lag:
    partition, bounds = standing.partition, standing.bounds
    at = _at(standing, begins)
    lost = bounds is None or at is None or at > bounds.high or standing.made_again
    messages = None if lost or bounds is None or at is None else bounds.high - at
    timestamp = told.get(partition, UNASKED)
    seconds = None if lost or timestamp == UNKNOWN else 0.0
    if seconds is not None and timestamp is None:
        messages = 0  # what is left of the log holds no message
    elif seconds is not None and timestamp is not None and timestamp > 0:
        seconds = round(max(0.0, now - timestamp / 1000), 3)
    return Lag(
        handler=handler,
        topic=partition.topic,
        partition=partition.partition,
        checkpoint=standing.position,
        begins=begins,
        high_watermark=bounds.high if bounds else None,
        lag_messages=messages,
        lag_seconds=seconds,
        note=_note(standing, begins) if lost or seconds is not None else NOT_TOLD,
    )


def _note(standing: Standing, begins: int | None) -> str:
    """Say what the numbers do not."""
    at, bounds = standing.position, standing.bounds
    if bounds is None:
        return "it has no leader"
    if standing.made_again:
        return "the topic was deleted and made again: its checkpoint is of the old one"
    if at is None:
        return f"no checkpoint yet: begins at {begins}"
    if at < bounds.low:
        return f"offsets {at}..{bounds.low - 1} are gone from the log"
    if at > bounds.high:
        return "the checkpoint is beyond the log's end"
    return TAKEN_UP if standing.is_operators and standing.mode == "postgres" else ""


def _oldest(kafka: KafkaConfig, offsets: Mapping[TopicPartition, int]) -> dict[TopicPartition, int | None]:
    """Return the timestamp (ms) of the first message at or after each offset; None: none before the log's end.

    What is not told by the deadline is left out. Blocking; raises Outage, Halt.
    """
    settings: dict[str, Any] = {
        "isolation.level": "read_committed",
        **client_config(kafka),
        "group.id": GROUP,
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "earliest",  # what retention has just taken: then the first that is left
        "fetch.message.max.bytes": FETCH_BYTES,
        "fetch.max.bytes": FETCHED_BYTES,
        "message.max.bytes": FETCHED_BYTES,
        "fetch.queue.backoff.ms": 5,
    }
    found: dict[TopicPartition, int | None] = {}
    try:
        consumer = ck.Consumer(settings)
    except KafkaException as exception:
        raise meaning(exception.args[0], kafka.bootstrap_servers) from exception
    try:
        consumer.assign([ck.TopicPartition(*partition, offset) for partition, offset in offsets.items()])
        deadline = time.monotonic() + DEADLINE
        while len(found) < len(offsets) and time.monotonic() < deadline:
            new = _told(consumer.consume(AT_ONCE, WAIT), kafka, found)
            if new:
                consumer.pause([ck.TopicPartition(*partition) for partition in new])
        return found
    finally:
        consumer.close()


def _told(
    messages: Iterable[ck.Message], kafka: KafkaConfig, found: dict[TopicPartition, int | None]
) -> list[TopicPartition]:
    """Take note of the first message of each partition, or of its end; return whose is new."""
    new = []
    for message in messages:
        error = message.error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - the only name it has
            if error.code() in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED}:
                raise meaning(error, kafka.bootstrap_servers)
            continue  # of a broker that is away, or of a leader that moves: the deadline tells
        partition = TopicPartition(message.topic() or "", message.partition() or 0)
        if partition not in found:
            timestamp = None if error is not None else message.timestamp()[1]
            found[partition] = timestamp
            new.append(partition)
    return new
