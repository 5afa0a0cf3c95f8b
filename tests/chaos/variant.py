"""What differs from segment to segment, drawn from the segment's seed, and what daemons are told of it."""

import random
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tests.chaos.world import SESSION_TIMEOUT_MS, TABLESPACE

Mode = Literal["postgres", "kafka"]
Protocol = Literal["cooperative", "eager", "static", "consumer"]
PROTOCOLS: tuple[Protocol, ...] = ("cooperative", "eager", "static", "consumer")
MAX_BUFFERED_MIB = 64
LOCK_TIMEOUT = "1s"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One segment's setting."""

    mode: Mode
    protocol: Protocol
    daemons: int
    partitions: int
    primary_key: bool
    """Whether the append table has one; without it nothing but the checkpoint keeps a row from coming twice."""
    slow_commits: bool
    """Whether some COMMITs take long, so that many of them are cut or killed half-way."""
    small_disk: bool
    max_age_ms: int
    max_messages: int
    connections: int

    @property
    def handlers(self) -> tuple[str, ...]:
        """Return the handlers of each daemon; at least once there is no upsert."""
        return ("append", "upsert") if self.mode == "postgres" else ("append",)

    def told(self) -> dict[str, Any]:
        """Return it for a report."""
        return asdict(self)

    def config(self, bootstrap: str, dsn: str) -> dict[str, Any]:
        """Return consumerd.toml."""
        properties: dict[str, Any] = {"topic.metadata.refresh.interval.ms": 2000, "reconnect.backoff.max.ms": 1000}
        if self.protocol == "consumer":
            properties["group.protocol"] = "consumer"
        else:
            properties["session.timeout.ms"] = SESSION_TIMEOUT_MS
            properties["max.poll.interval.ms"] = 3 * SESSION_TIMEOUT_MS
        if self.protocol == "eager":
            properties["partition.assignment.strategy"] = "range"
        return {
            "kafka": {"bootstrap_servers": bootstrap, "properties": properties},
            "postgres": {"dsn": dsn, "settings": {"lock_timeout": LOCK_TIMEOUT}},
            "daemon": {"drain_timeout": "15s", "max_buffered": f"{MAX_BUFFERED_MIB}MiB"},
        }

    def files(self, topic: str) -> dict[str, dict[str, Any]]:
        """Return the handlers' files; they read the same topic, each as a group of its own."""
        return {
            name: {
                "topics": [topic],
                "group_id": group(topic, name),
                "checkpoint": self.mode,
                "max_connections": self.connections,
                "table": {"name": name, "write": name, "tombstones": "dead-letter"}
                | ({"key": ["grp"]} if name == "upsert" else {}),
                "columns": {column: column for column in ("part", "seq", "grp", "amount", "label", "at", "doc")},
                "batch": {"max_age": f"{self.max_age_ms}ms", "max_messages": self.max_messages},
                "retry": {"initial": "50ms", "max": "2s"},
                "dead_letter": {"create": True},
            }
            for name in self.handlers
        }

    def constraint(self, handler: str) -> str:
        """Return what a table's definition ends with."""
        if handler == "upsert":
            return ", UNIQUE (grp)"
        return ", PRIMARY KEY (part, seq)" if self.primary_key else ""

    def place(self, handler: str) -> str:
        """Return where a table lies."""
        return f"TABLESPACE {TABLESPACE}" if self.small_disk and handler == "append" else ""


def draw(
    dice: random.Random, *, mode: Mode, small_disk: bool, protocol: Protocol | None, daemons: int | None
) -> Variant:
    """Draw a segment's setting; what is given is not drawn."""
    drawn = dice.choice(PROTOCOLS)
    drawn_daemons = dice.randint(1, 4)
    return Variant(
        mode=mode,
        protocol=drawn if protocol is None else protocol,
        daemons=drawn_daemons if daemons is None else daemons,
        partitions=dice.randint(3, 12),
        primary_key=dice.random() < 1 / 3 and mode == "postgres",
        slow_commits=dice.random() < 1 / 2,
        small_disk=small_disk,
        max_age_ms=dice.randint(30, 200),
        max_messages=dice.choice((300, 1000, 5000)),
        connections=dice.randint(1, 4),
    )


def group(topic: str, handler: str) -> str:
    """Return a handler's consumer group."""
    return f"{topic}.{handler}"
