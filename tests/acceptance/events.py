"""A stream on its way into the table `events` by the handler `events`, and what a test looks at and does there."""

import random
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import psycopg
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.acceptance.stream import Stream
from tests.conftest import MakeDaemon
from tests.servers.daemon import Daemon, merged
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

PACE = 4000.0
"""Messages/s while the daemon is stopped, killed or cut off."""
TIMEOUT = 60  # seconds to reach the end of a topic, or a halt


def handler(topic: str, table: str, **table_keys: object) -> dict[str, object]:
    """Return a handler of small, quick batches, so that a kill finds one in flight."""
    return {
        "topics": [topic],
        "group_id": topic,
        "table": {"name": table, **table_keys},
        "batch": {"max_age": "30ms", "max_messages": 500},
        "dead_letter": {"create": True},
    }


@dataclass
class Events:
    """A handler `events` that appends a stream to the table `events`; `keys` are added to the handler's."""

    stream: Stream
    dsn: str
    make: MakeDaemon
    keys: dict[str, object]
    run: Daemon = field(init=False, repr=False)
    """The daemon that was started last."""

    def start(self, config: Mapping[str, Any] | str | None = None, *, wait: bool = True) -> Daemon:
        """Start a daemon; each call makes one more. What `config` does not say is the test's; one of text is whole."""
        handlers = {"events": handler(self.stream.topic, "events", write="append") | self.keys}
        if not isinstance(config, str):
            config = merged({"postgres": {"dsn": self.dsn}}, config or {})
        self.run = self.make(handlers, config, wait=wait)
        return self.run

    def start_again(self) -> None:
        """Start the daemon that has ended."""
        self.run.start()
        self.run.wait_ready()

    def catches_up(self, timeout: float = TIMEOUT) -> None:
        """Wait until the checkpoints stand at the stream's end."""
        wait_until(lambda: caught_up(self.run, {"events": self.stream}), timeout, "the end of the topic")

    def status(self) -> dict[str, Any]:
        """Return the handler's part of /status."""
        return dict(self.run.status()["handlers"]["events"])

    def state(self) -> str:
        """Return the handler's state."""
        return state(self.run)

    def written(self) -> int:
        """Return how many rows this process has committed."""
        return int(self.status()["written"])

    def partitions(self) -> list[int]:
        """Return the partitions that the daemon holds."""
        return held(self.run)


class MakeEvents(Protocol):
    """What the ``events`` fixture gives."""

    def __call__(self, dsn: str, partitions: int = 2, **keys: object) -> Events:
        """Make a topic and the table; ``keys`` are added to the handler's."""


def state(daemon: Daemon, name: str = "events") -> str:
    """Return the state of a handler."""
    return str(daemon.status()["handlers"][name]["state"])


def held(daemon: Daemon, name: str = "events") -> list[int]:
    """Return the partitions that a handler holds."""
    return [each["partition"] for each in daemon.status()["handlers"][name]["partitions"]]


def halt_of(daemon: Daemon, name: str = "events") -> str:
    """Return the sentence of a halt; nothing while there is none."""
    with suppress(OSError, KeyError):  # it may not listen, or know its handlers, yet
        halt = daemon.status()["handlers"][name]["halt"]
        return str(halt["message"]) if halt else ""
    return ""


def wait_for_halt(daemon: Daemon, name: str = "events") -> str:
    """Wait for a halt and return its sentence."""
    wait_until(lambda: halt_of(daemon, name) != "", TIMEOUT, f"the halt of {name}")
    return halt_of(daemon, name)


def caught_up(daemon: Daemon, streams: Mapping[str, Stream]) -> bool:
    """Whether the checkpoint of each handler stands at the end of its topic."""
    handlers = daemon.status()["handlers"]
    return all(
        {p["partition"]: p["checkpoint"] for p in handlers[name]["partitions"]} == stream.ends()
        for name, stream in streams.items()
    )


def kill_while_writing(daemon: Daemon, dice: random.Random) -> None:
    """SIGKILL at some moment once each handler has written, and start again."""
    daemon.wait_ready()
    written = lambda: all(each["written"] for each in daemon.status()["handlers"].values())  # noqa: E731
    wait_until(written, TIMEOUT, "rows of this run")
    kill(daemon, dice)


def kill(daemon: Daemon, dice: random.Random) -> None:
    """SIGKILL within a second, and start again."""
    threading.Event().wait(dice.uniform(0.0, 1.0))
    daemon.kill()
    daemon.start()


def committed(stream: Stream) -> dict[int, int]:
    """Return the offsets that Kafka has for a stream's group."""
    return {found.partition: found.offset for found in commits(stream)}


def commits(stream: Stream) -> list[TopicPartition]:
    """Return what Kafka has for a stream's group, stamps included."""
    consumer = Consumer({"bootstrap.servers": stream.bootstrap, "group.id": stream.topic})
    try:
        asked = [TopicPartition(stream.topic, partition) for partition in range(stream.partitions)]
        return consumer.committed(asked, timeout=10)
    finally:
        consumer.close()


def commit(stream: Stream, offsets: Mapping[int, int], metadata: str = "") -> None:
    """Commit for a stream's group what another consumer, or a tool, would."""
    consumer = Consumer({"bootstrap.servers": stream.bootstrap, "group.id": stream.topic})
    places = [TopicPartition(stream.topic, *place, metadata=metadata) for place in offsets.items()]
    consumer.commit(offsets=places, asynchronous=False)
    consumer.close()


def members(kafka: KafkaServer, group: str) -> int:
    """Return how many members a group has."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    (described,) = admin.describe_consumer_groups([group], request_timeout=TIMEOUT).values()
    return len(described.result().members)


def checkpoints(dsn: str, stream: Stream) -> dict[int, int]:
    """Return the checkpoints of a stream's group."""
    with psycopg.connect(dsn) as conn:
        found = conn.execute(
            "SELECT partition, next_offset FROM consumerd.checkpoint WHERE group_id = %s", [stream.topic]
        ).fetchall()
    return dict(found)
