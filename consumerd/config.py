"""TOML to typed config: every key, its type, its default and its rule, in one place.

Pure: parsed TOML goes in, a frozen model or pydantic's list of mistakes comes out; no file, clock or environment is
touched (`loader.py` reads files, finds line numbers and words the mistakes). A model is what TOML may hold and nothing
else, so an unknown key is an error. A rule of ours is a `ValueError` whose text is the sentence the user reads, going
on from the key's name. A sentence never repeats a string value: it might be a password.

TOML is validated with a context, `{"folder": Path}`, where relative paths start. Without one, that is built in Python
(`BatchConfig(max_age=0.5)`), durations and sizes may be plain seconds and bytes; TOML must write the unit.

Over 400 lines, because every key is here, each with the docstring that docs/configuration.md is made of.
"""

from datetime import datetime
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

from consumerd import paths, where
from consumerd.credentials import Secret, parse_dsn, parse_password
from consumerd.paths import KeyFormat, Source, Unit
from consumerd.scalars import (
    NO_REPEATS,
    TOPIC_PLACE,
    UNSET,
    Count,
    Duration,
    Identifier,
    KeySource,
    Property,
    Size,
    Text,
    Topic,
    Unset,
    absolute,
    between,
    folder,
    is_function,
    is_table,
    is_topic,
    listen_address,
    must,
    parse_named_property,
    parse_setting,
    start_of,
    table_parts,
    topic_or_pattern,
    with_names,
)

ALWAYS_THERE: Final = ("@topic", "@partition", "@offset", "@value")
"""Sources that each message has."""


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
    properties: Annotated[
        dict[str, Annotated[Property, PlainValidator(parse_named_property)]], BeforeValidator(with_names)
    ] = {}
    """Any property of librdkafka, its name in quotes, for all clients; but those that the daemon owns, which are
    refused by name. A secret is `{ credential = NAME }`, `{ file = PATH }` or `{ env = NAME }`."""


class PostgresConfig(_Section):
    """How to reach the database, and where the daemon keeps its own tables."""

    dsn: Annotated[str | Secret, PlainValidator(lambda value, info: parse_dsn(value, folder(info)))]
    """A connection string of libpq without a password, as a URL or as `key=value`; services and `.pgpass` work. Or
    the way to one: `{ credential = NAME }`, `{ file = PATH }`, `{ env = NAME }`."""
    password: Annotated[Secret | None, PlainValidator(lambda value, info: parse_password(value, folder(info)))] = None
    """The way to the password: `{ credential = NAME }`, `{ file = PATH }` or `{ env = NAME }`, read again at each
    connect."""
    schema_name: Annotated[Identifier, must(lambda name: "%" not in name, "must be a name without %")] = Field(
        default="consumerd", validation_alias="schema"
    )
    """The schema where the daemon keeps its checkpoints."""
    settings: Annotated[dict[str, Annotated[str, PlainValidator(parse_setting)]], BeforeValidator(with_names)] = {}
    """Settings of the sessions: `statement_timeout`, `lock_timeout`, `role`, and so on."""


class DaemonConfig(_Section):
    """What belongs to the process. `drain_timeout` is in seconds, `max_buffered` in bytes."""

    handlers: Annotated[Path, BeforeValidator(absolute)] = Field(default=Path("handlers"), validate_default=True)
    """The folder of the handlers' files; a relative path starts at this file's folder."""
    listen: Annotated[str, AfterValidator(listen_address)] = "127.0.0.1:9464"
    """Where the page for people, `/metrics`, `/healthz`, `/readyz` and `/status` are; port 0 takes a free one, which
    the log tells."""
    control: Annotated[Path, BeforeValidator(absolute)] = Path("/run/consumerd/control.sock")
    """The Unix socket, mode 0660, where `pause`, `resume`, `restart` and `reload` reach the daemon; a relative path
    starts at this file's folder. Where the default's folder is not there the daemon runs without."""
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
    format: Literal["auto", "text", "json", "journal"] = "auto"
    """The lines' form; `auto` is text on a terminal, `journal` where systemd has connected standard error to its
    journal, and JSON elsewhere. In the journal each field of a line is one of the entry's: HANDLER, TOPIC, PARTITION,
    OFFSET, and so on."""
    heartbeat: Duration = 60.0
    """Time between two lines that tell how each handler does."""


Named = tuple[str, ...] | str | None
"""One column, several, or none."""


class TableConfig(_Section):
    """Where rows go, and how."""

    name: Annotated[str, must(is_table, 'must be "table" or "schema.table"')]
    """The table, `table` or `schema.table`, resolved as psql does: a part with capitals or dots in it stands in double
    quotes. With `${topic}` in it each topic has a table of its
    own: the part between dots that holds it is quoted, so `raw.${topic}` is `raw."Orders.v1"` for `Orders.v1`."""
    write: Literal["append", "skip-existing", "upsert"]
    """What a message does: `append` adds a row, `skip-existing` adds it unless a unique index of the table finds it
    there already, `upsert` adds or replaces the row of its key."""
    key: Annotated[tuple[Identifier, ...], Field(strict=False), NO_REPEATS] = Field(default=(), validate_default=True)
    """The columns that tell rows apart, for upsert, which needs them; the table needs a unique index on them."""
    update: (
        Annotated[
            tuple[Identifier, ...],
            Field(strict=False),
            must(len, 'is empty: leave it out to update every column, or write = "skip-existing"'),
            NO_REPEATS,
        ]
        | None
    ) = None
    """The columns that upsert changes in a row that is there; the others are written when it is new, and then kept.
    Without it: all but the key."""
    version: Identifier | None = None
    """A column, for upsert: no row is replaced by one whose version is lower. An equal one replaces; null is lowest."""
    tombstones: Literal["delete", "ignore", "dead-letter"] = "ignore"
    """What a message without a value is: it deletes the row of its key (upsert alone), is passed over, or is poison."""
    tombstone_key: dict[Identifier, KeySource] = Field(default={}, validate_default=True)
    """Where a tombstone's key comes from, for `tombstones = "delete"`: for each column of `key` either `"@key"`, the
    message's whole key, or `"@key.PATH"`, a path into it; see `key_format`."""

    @property
    def by_topic(self) -> bool:
        """Whether each topic has a table of its own."""
        return TOPIC_PLACE in self.name

    def of(self, topic: str) -> str:
        """Return the name of a topic's table."""
        parts = [
            f'"{_unquoted(part).replace(TOPIC_PLACE, topic)}"' if TOPIC_PLACE in part else part
            for part in table_parts(self.name)
        ]
        return ".".join(parts)

    @field_validator("key")
    @classmethod
    def _key_goes_with_upsert(cls, key: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        write = info.data.get("write")
        if write == "upsert" and not key:
            raise ValueError('is missing, and upsert needs it: write key = ["order_id"]')
        if write == "append" and key:
            raise ValueError('append has no key: take it out, or write = "upsert"')
        if write == "skip-existing" and key:
            raise ValueError('skip-existing goes by every unique index of the table: take it out, or write = "upsert"')
        return key

    @field_validator("update", "version")
    @classmethod
    def _only_upsert_updates(cls, value: Named, info: ValidationInfo) -> Named:
        write, key = info.data.get("write"), info.data.get("key", ())
        if value is not None and write in {"append", "skip-existing"}:
            raise ValueError(f'{write} changes no row: take it out, or write = "upsert"')
        named = (value,) if isinstance(value, str) else value or ()
        if twice := [name for name in named if name in key]:
            raise ValueError(f"names {', '.join(twice)}, which is in table.key: a row's key does not change")
        return value

    @field_validator("version")
    @classmethod
    def _version_is_updated(cls, version: str | None, info: ValidationInfo) -> str | None:
        update = info.data.get("update")
        if version is not None and update is not None and version not in update:
            raise ValueError("is not in table.update: a row that is replaced must get the new version; add it there")
        return version

    @field_validator("tombstones")
    @classmethod
    def _only_upsert_deletes(cls, tombstones: str, info: ValidationInfo) -> str:
        write = info.data.get("write")
        if tombstones == "delete" and write in {"append", "skip-existing"}:
            raise ValueError(f'{write} deletes no row: write "ignore" or "dead-letter", or write = "upsert"')
        return tombstones

    @field_validator("tombstone_key")
    @classmethod
    def _names_the_whole_key(cls, sources: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        tombstones, key = info.data.get("tombstones"), info.data.get("key", ())
        if tombstones is not None and tombstones != "delete" and sources:
            raise ValueError('goes with tombstones = "delete" alone: take it out')
        if tombstones == "delete" and key and set(sources) != set(key):
            example = ", ".join(f'{name} = "@key{f".{name}" if len(key) > 1 else ""}"' for name in key)
            raise ValueError(f"must say where each column of table.key comes from: write {{ {example} }}")
        return sources


def _unquoted(part: str) -> str:
    return part[1:-1] if part.startswith('"') else part


class ColumnConfig(_Section):
    """Where a column's value comes from, and what stands in for nothing."""

    source: Annotated[str, AfterValidator(lambda text: paths.parse(text) and text)] = Field(validation_alias="from")
    """A path into the message's value, `customer.name`, `items[0].sku`, `["a.b"].c`; or `@topic`, `@partition`,
    `@offset`, `@timestamp`, `@key`, `@key.PATH` (into a JSON key), `@value` (all of it), `@headers.NAME`. A string in
    place of the table is its `from`."""
    unit: Unit | None = None
    """What a number counts since 1970 that goes into timestamptz, timestamp or date: `s`, `ms`, `us`, `ns`."""
    default: Any = UNSET
    """What stands in for a value that is absent: a string, a number, true or false. A null stays null."""

    @property
    def reads(self) -> Source:
        """What `from` says."""
        return paths.parse(self.source)

    @property
    def has_default(self) -> bool:
        """Whether an absent value has a substitute."""
        return self.default is not UNSET

    @model_validator(mode="before")
    @classmethod
    def _string_is_source(cls, data: object) -> object:
        if not isinstance(data, str | dict | ColumnConfig):
            raise ValueError("must be a path as a string, or a table { from = … }")  # noqa: TRY004 (pydantic's way)
        return {"from": data} if isinstance(data, str) else data

    @field_validator("default")
    @classmethod
    def _default_is_scalar(cls, default: object) -> object:
        if not isinstance(default, str | int | float | Unset):
            raise ValueError("must be a string, a number, true or false")  # noqa: TRY004 (pydantic takes ValueError)
        return default

    @model_validator(mode="after")
    def _source_goes_with_the_rest(self) -> Self:
        place = self.reads.place
        if place in ALWAYS_THERE and self.has_default:
            raise ValueError(f"{place} is always there: take the default out")
        if place in (*ALWAYS_THERE, "@timestamp") and self.unit is not None:
            raise ValueError(f"{place} has no unit: take it out")
        return self


class DecodeConfig(_Section):
    """How strictly a message's value is read."""

    unknown_fields: Literal["ignore", "dead-letter"] = "ignore"
    """What becomes of a message with a field that neither a column nor `where` names: `ignore` the field, or
    `dead-letter` the message."""


class BatchConfig(_Section):
    """Upper bounds of a batch. `max_age` is in seconds."""

    max_messages: Annotated[int, between(1, 1_000_000)] = 20_000
    """Messages of a batch, at most. Half of it is written once a connection is free."""
    max_bytes: Size = 8 << 20
    """Bytes of a batch's keys, values and headers, at most; a larger message goes alone."""
    max_age: Duration = 0.5
    """Time from a message's arrival to its row's commit while the database keeps up: it is written after half of it."""


class TransformConfig(_Section):
    """A Python function between a message and its row: docs/transforms.md. `timeout` is in seconds."""

    function: Annotated[
        str, must(is_function, 'must be "module:function": "orders:transform" for transform in orders.py')
    ]
    """The function: `"orders:transform"` is `transform` in `orders.py`, beside this file. It gets a record and returns
    a record, a list of records, or None; one whose name ends in `_batch` gets a list of records and returns a list."""
    workers: Annotated[int, between(0, 64)] = 0
    """Processes that call it; 0 calls it in a thread of the daemon, which is enough where it computes little."""
    timeout: Duration = 10.0
    """How long one call may last. A worker process is ended then, and a record that outlasts it twice is dead-lettered;
    a thread cannot be ended: the handler halts."""


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
    """What becomes of poison, and when a handler halts because too much of its stream is. `window` is in seconds."""

    action: Literal["dead-letter", "skip", "halt"] = "dead-letter"
    """What becomes of a message that cannot be a row: it goes to the dead-letter topic; it is passed over, counted and
    logged; or the handler halts before it."""
    max_ratio: Annotated[float, must(lambda ratio: 0 < ratio <= 1, "must be more than 0 and at most 1")] = 0.05
    """The share of messages above which the handler halts."""
    window: Duration = 60.0
    """The time over which messages are counted."""
    min_messages: Count = 1000
    """Messages within the window from which on the share counts."""
    error_text: bool = False
    """Whether a letter's `__connect.errors.exception.message`, and the log's line about poison, have the database's own
    words too (message and detail of its error), or the text of a transform's exception. These hold values of rows."""


class DeadLetterConfig(_Section):
    """Where poison goes, and how that topic is made if `create` is set."""

    topic: Topic
    """The dead-letter topic."""
    create: bool = False
    """Whether it is made at the start when it is missing, with what follows."""
    retention_ms: Annotated[int, must(lambda number: number >= -1, "must be -1 (for ever) or more")] = -1
    """Milliseconds that its letters are kept after they came; -1 for ever. With a number the topic is made with
    `message.timestamp.type=LogAppendTime`, for a letter has its message's own timestamp and might expire at once."""
    partitions: Count = 1
    """Its partitions."""
    replication: Count = 1
    """Its replicas."""


class HandlerConfig(_Section):
    """One file of the handlers folder. `name` and `path` are the file's; TOML may not hold them."""

    from_file: ClassVar[frozenset[str]] = frozenset({"name", "path"})

    name: Annotated[str, must(is_topic, "is the file's name: rename the file to A-Z a-z 0-9 . _ - only")]
    path: Path
    topics: Annotated[
        tuple[Annotated[str, AfterValidator(topic_or_pattern)], ...],
        BeforeValidator(lambda topics: [topics] if isinstance(topics, str) else topics),
        Field(strict=False),
        must(len, 'must not be empty: write topics = ["orders"]'),
        NO_REPEATS,
    ]
    """The topics, by name, or by a regular expression that begins with `^`; it never matches a dead-letter topic."""
    group_id: Text
    """The consumer group; `<handler>` is the name of the file."""
    start: Annotated[Literal["earliest", "latest"] | datetime, PlainValidator(start_of)] = "earliest"
    """Where a partition begins that has no checkpoint: `earliest`, `latest`, or a time with its zone."""
    format: Literal["json"] = "json"
    """What a message's value is."""
    key_format: KeyFormat = "bytes"
    """What a message's key is, for `@key`: `bytes`, `text` (UTF-8) or `json`."""
    where: Annotated[str, AfterValidator(lambda text: where.parse(text) and text)] | None = None
    """Which messages are taken, `kind == 'buy' and (amount > 5 or @headers.vip is not null)`; the others are skipped.
    docs/values.md has the rules."""
    checkpoint: Literal["postgres", "kafka"] = "postgres"
    """Where the checkpoint is: `postgres`, in the rows' transaction, exactly once; `kafka`, at least once."""
    max_connections: Annotated[int, between(1, 64)] = 4
    """Connections of this handler that write side by side, each another partition's batch."""
    table: TableConfig
    columns: (
        Annotated[dict[Identifier, ColumnConfig], must(len, "is empty: leave it out for every column of the table")]
        | None
    ) = None
    """Which columns are written, and where their values come from. Without it: each column from the field of its own
    name, generated and identity columns left to Postgres."""
    decode: DecodeConfig = DecodeConfig()
    transform: TransformConfig | None = None
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
            if table.version is None:
                raise ValueError(
                    'upsert without `version` goes with checkpoint = "postgres" alone: at least once, a late repeat '
                    "would undo newer rows"
                )
            if table.tombstones == "delete":
                raise ValueError(
                    'tombstones = "delete" goes with checkpoint = "postgres" alone: at least once, a late repeat would '
                    "bring back what was deleted"
                )
        return table

    @field_validator("table")
    @classmethod
    def _paths_need_json(cls, table: TableConfig, info: ValidationInfo) -> TableConfig:
        key_format = info.data.get("key_format")
        if key_format in {"bytes", "text"} and any(source != "@key" for source in table.tombstone_key.values()):
            raise ValueError('tombstone_key leads into the key, which needs key_format = "json"')
        return table

    @field_validator("columns")
    @classmethod
    def _key_is_written(
        cls, columns: dict[str, ColumnConfig] | None, info: ValidationInfo
    ) -> dict[str, ColumnConfig] | None:
        table = info.data.get("table")
        if table is None or columns is None:
            return columns
        version = (table.version,) if table.version else ()
        for key, names in (("key", table.key), ("update", table.update or ()), ("version", version)):
            if absent := [name for name in names if name not in columns]:
                raise ValueError(f"lacks {', '.join(absent)}, which table.{key} names")
        return columns

    @field_validator("columns")
    @classmethod
    def _keys_have_paths_in_json(
        cls, columns: dict[str, ColumnConfig] | None, info: ValidationInfo
    ) -> dict[str, ColumnConfig] | None:
        for name, column in (columns or {}).items():
            if column.reads.place == "@key" and column.reads.path and info.data.get("key_format", "json") != "json":
                raise ValueError(f'{name} reads {column.source}: write key_format = "json" at the top of the file')
        return columns

    @field_validator("where")
    @classmethod
    def _where_can_be(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and "key_format" in info.data:
            where.check(where.parse(text), info.data["key_format"])
        return text

    @field_validator("decode")
    @classmethod
    def _some_field_is_known(cls, decode: DecodeConfig, info: ValidationInfo) -> DecodeConfig:
        columns = info.data.get("columns") or {}
        reads_fields = any(column.reads.place == "field" for column in columns.values())
        if decode.unknown_fields == "dead-letter" and columns and not reads_fields:
            raise ValueError('unknown_fields = "dead-letter" needs a column that reads a field: none does')
        return decode


class Config(_Section):
    """consumerd.toml. `path` is the file's own, `handlers` the files of the folder; TOML may not hold them."""

    from_file: ClassVar[frozenset[str]] = frozenset({"path", "handlers"})

    path: Path
    kafka: KafkaConfig
    postgres: PostgresConfig
    daemon: DaemonConfig = Field(default_factory=dict, validate_default=True)
    log: LogConfig = LogConfig()
    handlers: tuple[HandlerConfig, ...] = ()
