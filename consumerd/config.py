"""TOML to typed config: every key, its type, its default and its rule, in one place.

Pure: parsed TOML goes in, a frozen model or pydantic's list of mistakes comes out; no file, clock or environment is
touched (`loader.py` reads files, finds line numbers and words the mistakes). A model is what TOML may hold and nothing
else, so an unknown key is an error. A rule of ours is a `ValueError` whose text is the sentence the user reads, going
on from the key's name. A sentence never repeats a string value: it might be a password.

TOML is validated with a context, `{"folder": Path}`, where relative paths start. Without one, that is built in Python
(`BatchConfig(max_age=0.5)`), durations and sizes may be plain seconds and bytes; TOML must write the unit.
"""

import re
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from consumerd.credentials import Secret, parse_dsn, parse_password, parse_property, scalar_text

__all__ = ["UNSET", "BatchConfig", "ColumnConfig", "Config", "DaemonConfig", "DeadLetterConfig", "HandlerConfig"]
__all__ += ["KafkaConfig", "LogConfig", "PoisonConfig", "PostgresConfig", "Property", "RetryConfig", "Secret"]
__all__ += ["TableConfig", "Unset"]

Property = str | Secret
"""A librdkafka property as text (numbers and true/false included), or the way to a secret."""

MAX_SECONDS = 365 * 86_400.0
"""The longest duration. Lock and queue timeouts overflow somewhere above; nobody waits a year."""
MAX_IDENTIFIER_BYTES = 63
"""Postgres cuts longer names off silently (NAMEDATALEN - 1)."""
MAX_PORT = 65_535

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_BYTES: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_TOPIC_RULE = "must be a Kafka topic name: 1 to 249 of A-Z a-z 0-9 . _ -"


class Unset(Enum):
    """The type of `UNSET`, which differs from every value that TOML can hold."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


def _must(holds: Callable[[Any], bool], sentence: str) -> AfterValidator:
    """Make a rule of a condition and the sentence for when it does not hold."""

    def check(value: object) -> object:
        if not holds(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def _between(low: int, high: int) -> AfterValidator:
    return _must(lambda number: low <= number <= high, f"must be from {low} to {high}")


def seconds(value: object, info: ValidationInfo) -> float:
    """Read a duration (`500ms 5s 1m 2h 1d`) into seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if info.context is not None:
            raise ValueError('a number alone has no unit: write "5s" (units: ms s m h d)')
        return float(value)
    match = re.fullmatch(r"([0-9]{1,15})(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be a whole number and a unit (ms s m h d): write "5s"')
    result = int(match[1]) * _SECONDS[match[2]]
    if not 0 < result <= MAX_SECONDS:
        raise ValueError("must be more than 0 and at most 365d")
    return result


def size(value: object, info: ValidationInfo) -> int:
    """Read a size (`512KiB 8MiB 1GiB`) into bytes."""
    if info.context is None and isinstance(value, int):
        return value
    match = re.fullmatch(r"([0-9]{1,9})(KiB|MiB|GiB)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be a whole number with KiB, MiB or GiB: write "8MiB"')
    if not int(match[1]):
        raise ValueError("must be more than 0")
    return int(match[1]) * _BYTES[match[2]]


def _folder(info: ValidationInfo) -> Path | None:
    """Give the folder where relative paths of TOML start: the config file's."""
    return info.context["folder"] if info.context else None


def _absolute(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("must be a string, in quotes")  # noqa: TRY004 (pydantic takes ValueError)
    return (_folder(info) or Path()) / value


def _property(value: tuple[str, object], info: ValidationInfo) -> Property:
    return parse_property(*value, _folder(info))


def _setting(value: tuple[str, object]) -> str:
    if value[0] == "application_name":
        raise ValueError("is set by the daemon: consumerd/<handler>")
    if value[0] == "client_encoding":
        raise ValueError("is always UTF8: JSON is, and so is what is written")
    return scalar_text(value[1], "must be a string, a number, true or false; a name with dots is written in quotes")


def _with_names(table: object) -> object:
    """Hand each value its name, so that one rule sees both and its error stands at that entry."""
    return {name: (name, value) for name, value in table.items()} if isinstance(table, dict) else table


def _listen(value: str) -> str:
    host, _, port = value.rpartition(":")
    good_host = host.startswith("[") == host.endswith("]") and (":" not in host or host.startswith("["))
    if not (host.strip("[]") and good_host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= MAX_PORT):
        raise ValueError(f'must be "HOST:PORT" with a port from 0 to {MAX_PORT}, such as "127.0.0.1:9464"')
    return value


def _topic_or_pattern(value: str) -> str:
    if not value.startswith("^"):
        if not is_topic(value):
            raise ValueError(f"{_TOPIC_RULE}; a pattern starts with ^")
        return value
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return value


def is_topic(value: str) -> bool:
    """Tell a legal topic name (Kafka's `Topic.validate`)."""
    return _TOPIC.fullmatch(value) is not None and value not in {".", ".."}


def _start(value: object) -> str | datetime:
    """Read where a handler begins without a checkpoint; TOML may write the time bare or in quotes."""
    if isinstance(value, str) and value in {"earliest", "latest"}:
        return value
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    if not isinstance(time, datetime):
        raise ValueError('must be "earliest", "latest" or a time such as 2026-01-31T00:00:00Z')  # noqa: TRY004
    if time.utcoffset() is None:
        raise ValueError("a time needs its zone: write 2026-01-31T00:00:00Z or …+01:00")
    return time


def _is_identifier(name: str) -> bool:
    return 0 < len(name.encode(errors="replace")) <= MAX_IDENTIFIER_BYTES and bool(name.strip()) and "\0" not in name


def _is_table(name: str) -> bool:
    parts = name.split(".")
    return len(parts) in {1, 2} and all(map(_is_identifier, parts))


_UNIQUE = _must(lambda names: len(set(names)) == len(names), "names the same twice")


Duration = Annotated[float, BeforeValidator(seconds)]
Size = Annotated[int, BeforeValidator(size)]
Text = Annotated[str, _must(lambda text: text.strip() and text.isprintable(), "must be one line of text, not empty")]
Topic = Annotated[str, _must(is_topic, _TOPIC_RULE)]
Identifier = Annotated[str, _must(_is_identifier, f"must be a name of 1 to {MAX_IDENTIFIER_BYTES} bytes")]
Count = Annotated[int, _must(lambda number: number > 0, "must be 1 or more")]


class _Section(BaseModel):
    """What every table of TOML has in common: exact types, no unknown keys, no change afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_by_name=True)


class KafkaConfig(_Section):
    """How to reach the brokers, for consumers, producers and admin calls."""

    bootstrap_servers: Text
    """The brokers to begin with, `host:port` and commas between them."""
    group_instance_id: Text | None = None
    """Static membership: a name that is this process's own in each group, `"${HOSTNAME}"` say. A restart within
    `session.timeout.ms` then takes its partitions up again at once, without a rebalance."""
    admin: bool = True
    """Whether the brokers answer admin calls, by which topics are told from their namesakes (the demo's broker does
    not)."""
    properties: Annotated[dict[str, Annotated[Property, PlainValidator(_property)]], BeforeValidator(_with_names)] = {}
    """Any property of librdkafka, its name in quotes, for all clients; but those that the daemon owns, which are
    refused by name. A secret is `{ credential = NAME }`, `{ file = PATH }` or `{ env = NAME }`."""


class PostgresConfig(_Section):
    """How to reach the database, and where the daemon keeps its own tables."""

    dsn: Annotated[str | Secret, PlainValidator(lambda value, info: parse_dsn(value, _folder(info)))]
    """A connection string of libpq without a password, as a URL or as `key=value`; services and `.pgpass` work. Or
    the way to one: `{ credential = NAME }`, `{ file = PATH }`, `{ env = NAME }`."""
    password: Annotated[Secret | None, PlainValidator(lambda value, info: parse_password(value, _folder(info)))] = None
    """The way to the password: `{ credential = NAME }`, `{ file = PATH }` or `{ env = NAME }`, read again at each
    connect."""
    schema_name: Identifier = Field(default="consumerd", validation_alias="schema")
    """The schema where the daemon keeps its checkpoints."""
    settings: Annotated[dict[str, Annotated[str, PlainValidator(_setting)]], BeforeValidator(_with_names)] = {}
    """Settings of the sessions: `statement_timeout`, `lock_timeout`, `role`, and so on."""


class DaemonConfig(_Section):
    """What belongs to the process. `drain_timeout` is in seconds, `max_buffered` in bytes."""

    handlers: Annotated[Path, BeforeValidator(_absolute)] = Field(default=Path("handlers"), validate_default=True)
    """The folder of the handlers' files; a relative path starts at this file's folder."""
    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:9464"
    """Where `/metrics`, `/healthz`, `/readyz` and `/status` are; port 0 takes a free one, which the log tells."""
    drain_timeout: Duration = 30.0
    """How long a stop may write what is gathered; after it the daemon leaves without, and nothing is lost."""
    max_buffered: Size = 512 << 20
    """The bound of what all handlers together have fetched, gathered and in flight; each has an equal share.
    docs/performance.md says what comes on top of it."""

    @property
    def listen_host(self) -> str:
        """The address, without the brackets of IPv6."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def listen_port(self) -> int:
        """The port; 0 takes a free one."""
        return int(self.listen.rpartition(":")[2])


class LogConfig(_Section):
    """What is logged. `heartbeat` is in seconds."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    format: Literal["auto", "text", "json"] = "auto"
    """The lines' form; `auto` is text on a terminal and JSON elsewhere."""
    heartbeat: Duration = 60.0
    """Time between two lines that tell how each handler does."""


class TableConfig(_Section):
    """Where rows go, and how."""

    name: Annotated[str, _must(_is_table, 'must be "table" or "schema.table"')]
    """The table, `table` or `schema.table`, resolved as psql does."""
    write: Literal["append", "upsert"]
    """What a message does: `append` adds a row, `upsert` adds or replaces the row of its key."""
    key: Annotated[tuple[Identifier, ...], Field(strict=False), _UNIQUE] = Field(default=(), validate_default=True)
    """The columns that tell rows apart, for upsert, which needs them; the table needs a unique index on them."""

    @field_validator("key")
    @classmethod
    def _key_goes_with_upsert(cls, key: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        write = info.data.get("write")
        if write == "upsert" and not key:
            raise ValueError('is missing, and upsert needs it: write key = ["order_id"]')
        if write == "append" and key:
            raise ValueError('append has no key: take it out, or write = "upsert"')
        return key


class ColumnConfig(_Section):
    """Where a column's value comes from: a dotted path into the message's value, and what stands in for nothing."""

    source: Annotated[str, _must(lambda path: all(path.split(".")), 'must be a path such as "customer.name"')] = Field(
        validation_alias="from"
    )
    """The path into the message's value, names with dots between them. A string in place of the table is the path."""
    default: Any = UNSET
    """What stands in for a value that is absent or null: a string, a number, true or false."""

    @property
    def has_default(self) -> bool:
        """Whether an absent value has a substitute."""
        return self.default is not UNSET

    @model_validator(mode="before")
    @classmethod
    def _string_is_source(cls, data: object) -> object:
        return {"from": data} if isinstance(data, str) else data

    @field_validator("default")
    @classmethod
    def _default_is_scalar(cls, default: object) -> object:
        if not isinstance(default, str | int | float | Unset):
            raise ValueError("must be a string, a number, true or false")  # noqa: TRY004 (pydantic takes ValueError)
        return default


class BatchConfig(_Section):
    """Upper bounds of a batch. `max_age` is in seconds."""

    max_messages: Annotated[int, _between(1, 1_000_000)] = 20_000
    """Messages of a batch, at most. Half of it is written once a connection is free."""
    max_bytes: Size = 8 << 20
    """Bytes of a batch's keys, values and headers, at most; a larger message goes alone."""
    max_age: Duration = 0.5
    """Time from a message's arrival to its row's commit while the database keeps up: it is written after half of it."""


class RetryConfig(_Section):
    """The waits between two tries of what an outage prevents, for as long as it lasts. In seconds."""

    initial: Duration = 0.1
    """The first wait, from which it grows."""
    max: Duration = 2.0
    """The longest wait."""

    @model_validator(mode="after")
    def _max_is_not_less(self) -> Self:
        if self.initial > self.max:
            raise ValueError(f"initial must not be more than max ({self.max:g} s)")
        return self


class PoisonConfig(_Section):
    """When a handler halts because too much of its stream is poison. `window` is in seconds."""

    max_ratio: Annotated[float, _must(lambda ratio: 0 < ratio <= 1, "must be more than 0 and at most 1")] = 0.05
    """The share of messages above which the handler halts."""
    window: Duration = 60.0
    """The time over which messages are counted."""
    min_messages: Count = 1000
    """Messages within the window from which on the share counts."""


class DeadLetterConfig(_Section):
    """Where poison goes, and how that topic is made if `create` is set."""

    topic: Topic
    """The dead-letter topic."""
    create: bool = False
    """Whether it is made at the start when it is missing, with what follows."""
    retention_ms: Annotated[int, _must(lambda number: number >= -1, "must be -1 (for ever) or more")] = -1
    """Milliseconds that its letters are kept; -1 for ever."""
    partitions: Count = 1
    """Its partitions."""
    replication: Count = 1
    """Its replicas."""


class HandlerConfig(_Section):
    """One file of the handlers folder. `name` and `path` are the file's; TOML may not hold them."""

    from_file: ClassVar[frozenset[str]] = frozenset({"name", "path"})

    name: Annotated[str, _must(is_topic, "is the file's name: rename the file to A-Z a-z 0-9 . _ - only")]
    path: Path
    topics: Annotated[
        tuple[Annotated[str, AfterValidator(_topic_or_pattern)], ...],
        BeforeValidator(lambda topics: [topics] if isinstance(topics, str) else topics),
        Field(strict=False),
        _must(len, 'must not be empty: write topics = ["orders"]'),
        _UNIQUE,
    ]
    """The topics, by name, or by a regular expression that begins with `^`; it never matches a dead-letter topic."""
    group_id: Text
    """The consumer group; `<handler>` is the name of the file."""
    start: Annotated[Literal["earliest", "latest"] | datetime, PlainValidator(_start)] = "earliest"
    """Where a partition begins that has no checkpoint: `earliest`, `latest`, or a time with its zone."""
    format: Literal["json"] = "json"
    """What a message's value is."""
    checkpoint: Literal["postgres", "kafka"] = "postgres"
    """Where the checkpoint is: `postgres`, in the rows' transaction, exactly once; `kafka`, append at least once."""
    max_connections: Annotated[int, _between(1, 64)] = 4
    """Connections of this handler that write side by side, each another partition's batch."""
    table: TableConfig
    columns: (
        Annotated[dict[Identifier, ColumnConfig], _must(len, "is empty: leave it out for every column of the table")]
        | None
    ) = None
    """Which columns are written, and where their values come from. Without it: each column from the field of its own
    name, generated and identity columns left to Postgres."""
    batch: BatchConfig = BatchConfig()
    retry: RetryConfig = RetryConfig()
    poison: PoisonConfig = PoisonConfig()
    dead_letter: DeadLetterConfig

    @model_validator(mode="before")
    @classmethod
    def _names_follow_the_file(cls, data: object) -> object:
        """Fill in the two defaults that depend on other keys: group_id, and the dead-letter topic from it."""
        if not isinstance(data, dict):
            return data
        group_id = data.get("group_id", f"consumerd.{data.get('name')}")
        letters = data.get("dead_letter", {})
        if isinstance(letters, dict):
            letters = {"topic": f"{group_id}.dlq", **letters}
        return {**data, "group_id": group_id, "dead_letter": letters}

    @field_validator("table")
    @classmethod
    def _upsert_needs_its_order(cls, table: TableConfig, info: ValidationInfo) -> TableConfig:
        if table.write == "upsert" and info.data.get("checkpoint") == "kafka":
            raise ValueError(
                'upsert goes with checkpoint = "postgres" alone: at least once, a late repeat would undo newer rows'
            )
        return table

    @field_validator("columns")
    @classmethod
    def _key_is_written(
        cls, columns: dict[str, ColumnConfig] | None, info: ValidationInfo
    ) -> dict[str, ColumnConfig] | None:
        table = info.data.get("table")
        absent = [name for name in table.key if name not in columns] if table and columns is not None else []
        if absent:
            raise ValueError(f"lacks {', '.join(absent)}, which table.key names")
        return columns


class Config(_Section):
    """consumerd.toml. `path` is the file's own, `handlers` the files of the folder; TOML may not hold them."""

    from_file: ClassVar[frozenset[str]] = frozenset({"path", "handlers"})

    path: Path
    kafka: KafkaConfig
    postgres: PostgresConfig
    daemon: DaemonConfig = Field(default_factory=dict, validate_default=True)
    log: LogConfig = LogConfig()
    handlers: tuple[HandlerConfig, ...] = ()
