"""`consumerd init --from-connect`: a handler's file from the configuration of a Kafka Connect JDBC sink.

Confluent's, Aiven's and Debezium's sinks are known, by `connector.class`. What would write other rows than the sink did
is a mistake, told at once; what has no counterpart is a comment in the file. The handler's group is the sink's, so it
goes on at the sink's offsets: an offset without a stamp of ours becomes the checkpoint (`consumerd.decide`). Pure.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from consumerd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CLASSES: Final = (
    "io.confluent.connect.jdbc.JdbcSinkConnector",
    "io.aiven.connect.jdbc.JdbcSinkConnector",
    "io.debezium.connector.jdbc.JdbcSinkConnector",
)
TEXT, JSON = "org.apache.kafka.connect.storage.StringConverter", "org.apache.kafka.connect.json.JsonConverter"
RENAMES: Final = "org.apache.kafka.connect.transforms.ReplaceField$Value"

OURS: Final[Mapping[str, str]] = {
    "collection.name.format": "table.name.format",
    "primary.key.mode": "pk.mode",
    "primary.key.fields": "pk.fields",
    "field.include.list": "fields.whitelist",
    "use.time.zone": "db.timezone",
    "connection.username": "connection.user",
    "flush.max.retries": "max.retries",
    "flush.retry.delay.ms": "retry.backoff.ms",
    "quote.identifiers": "quote.sql.identifiers",
    "schema.evolution": "auto.evolve",
}
"""Debezium's names for what the others have too."""

_DATABASE = "under [postgres] of consumerd.toml"
_TRIED = "outages are tried again for ever, visibly, and nothing is dead-lettered for them"
_TABLE = "the table is yours to make and to alter; the daemon follows it while it runs"
REMARKS: Final[Mapping[str, str]] = {
    "auto.create": _TABLE,
    "auto.evolve": _TABLE,
    "batch.size": "[batch] max_messages; its default is 20,000, and batches grow by themselves under backlog",
    "connection.password": f"password = {{ credential = NAME }} {_DATABASE}",
    "connection.url": f"dsn {_DATABASE}",
    "connection.user": f"dsn {_DATABASE}",
    "db.timezone": "a timestamp without a zone is UTC",
    "errors.retry.timeout": _TRIED,
    "max.retries": _TRIED,
    "retry.backoff.ms": "initial and max under [retry]",
    "tasks.max": "one process for each core in place of tasks, in the same group",
}
"""Keys that say nothing of the handler, and what is to be known instead."""
NEEDLESS: Final = re.compile(
    r"connector\.class|dialect\.name|quote\.sql\.identifiers|(key|value|header)\.converter.*|errors\.log\..*|"
    r"errors\.deadletterqueue\.(context|topic\.replication).*|(predicates|transforms)\..*|consumer\.override\..*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A handler's file, and its name."""

    name: str
    toml: str


@dataclass(slots=True)
class _Sink:
    """A sink's keys, what was not asked for yet, and what it does that a handler cannot."""

    keys: Mapping[str, str]
    left: set[str] = field(default_factory=set)
    mistakes: list[str] = field(default_factory=list)

    def get(self, key: str, default: str = "") -> str:
        self.left.discard(key)
        return self.keys.get(key, default)

    def listed(self, key: str) -> list[str]:
        return [item.strip() for item in self.get(key).split(",") if item.strip()]

    def converter(self, which: str) -> str:
        """Return the class of a converter; the sink has it from its worker, of which we know nothing, or by itself."""
        return self.get(f"{which}.converter", JSON)

    def inside(self, which: str) -> str:
        """Return what leads to a field: JSON with its schema stands in an envelope."""
        enveloped = self.get(f"{which}.converter.schemas.enable", "true") == "true"
        return "payload." if enveloped and self.converter(which) == JSON else ""


def read(file: Path) -> dict[str, str]:
    """Return a sink's keys from its file; raises ConfigError."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{file} cannot be read: {why}") from error


def parse(text: str) -> dict[str, str]:
    """Return a sink's keys from its JSON, `{"name": ..., "config": {...}}` or flat, or from properties."""
    try:
        whole: Any = json.loads(text)
    except ValueError:
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        whole = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
        if not lines or any("=" not in line for line in lines):
            raise ConfigError("the sink's file is neither JSON nor properties (key=value)") from None
    if not isinstance(whole, dict):
        raise ConfigError("the sink's file holds no object: it is what Connect answers at /connectors/NAME")
    inner = whole.get("config")
    keys = {"name": whole.get("name", ""), **inner} if isinstance(inner, dict) else whole
    return {OURS.get(key, key): value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}


def table_of(keys: Mapping[str, str]) -> str | None:
    """Return the sink's one table; None where each topic has its own."""
    name = keys.get("table.name.format", "${topic}")
    return None if "${" in name else name


def convert(keys: Mapping[str, str], columns: Sequence[str]) -> Converted:
    """Return the handler that does what a sink does, whose one table has these columns; raises ConfigError.

    `keys` are what `read` returns.
    """
    kind = keys.get("connector.class", "")
    if kind not in CLASSES:
        raise ConfigError(f"connector.class is {kind or 'missing'}: known are {', '.join(CLASSES)}")
    sink = _Sink(keys, set(keys))
    name = sink.get("name") or "sink"
    top = _top(sink, name)
    key = _key(sink)
    table = _table(sink, key)
    mapped = _columns(sink, key, columns)
    poison = _poison(sink)
    if sink.mistakes:
        raise ConfigError(*sink.mistakes)
    sections = [
        _opening(sink, name),
        *top,
        "",
        "[table]",
        *table,
        *(["", "[columns]"] if mapped else []),
        *(f"{_bare(column)} = {_quoted(source)}" for column, source in mapped.items()),
        "",
        *poison,
    ]
    return Converted(
        name=re.sub(r"[^a-z0-9_-]+", "_", name.lower()).strip("_") or "sink", toml="\n".join(sections) + "\n"
    )


def _opening(sink: _Sink, name: str) -> str:
    lines = [
        f"Made by `consumerd init --from-connect` from the sink {name}. Delete the connector before the first run: the",
        "handler is of its group, and goes on at its offsets. docs/from-kafka-connect.md",
    ]
    for key in sorted(sink.left):
        if remark := REMARKS.get(key):
            lines.append(f"{key}: {remark}")
        elif not NEEDLESS.fullmatch(key):
            lines.append(f"{key} has no counterpart")
    return "\n".join(f"# {line}" for line in lines)


def _top(sink: _Sink, name: str) -> list[str]:
    topics = sink.listed("topics")
    if pattern := sink.get("topics.regex"):
        topics = [f"^(?:{pattern})$"]
    if not topics:
        sink.mistakes.append("the sink has neither topics nor topics.regex")
    if sink.converter("value") != JSON:
        sink.mistakes.append(f"value.converter {sink.converter('value')}: consumerd reads JSON")
    group = sink.get("consumer.override.group.id") or f"connect-{name}"
    lines = [f"topics = {_list(topics)}", f"group_id = {_quoted(group)}"]
    if (start := sink.get("consumer.override.auto.offset.reset")) in {"earliest", "latest"}:
        lines.append(f"start = {_quoted(start)}")
    if sink.keys.get("pk.mode") == "record_key":
        lines.append(f'key_format = "{"text" if sink.converter("key") == TEXT else "json"}"')
    return lines


def _key(sink: _Sink) -> dict[str, str]:
    """Return the columns of the key, and where they come from."""
    mode, names = sink.get("pk.mode", "none"), sink.listed("pk.fields")
    if mode == "kafka":
        names = names or ["__connect_topic", "__connect_partition", "__connect_offset"]
        return dict(zip(names, ("@topic", "@partition", "@offset"), strict=False))
    if mode == "record_header":
        return {name: f"@headers.{name}" for name in names}
    if mode == "record_key":
        converter = sink.converter("key")
        if converter not in {JSON, TEXT}:
            sink.mistakes.append(f"key.converter {converter}: consumerd reads JSON and text")
        if not names:
            sink.mistakes.append("pk.mode record_key without pk.fields: name the key's columns there")
        if converter == TEXT:
            return dict.fromkeys(names[:1], "@key")
        return {name: f"@key.{sink.inside('key')}{name}" for name in names}
    return {name: f"{sink.inside('value')}{name}" for name in names}


def _table(sink: _Sink, key: Mapping[str, str]) -> list[str]:
    name = sink.get("table.name.format", "${topic}")
    if set(re.findall(r"\$\{(\w+)", name)) - {"topic"}:
        sink.mistakes.append(f"table.name.format {name}: a table's name may have ${{topic}} in it, and nothing else")
    mode = sink.get("insert.mode", "insert")
    if mode not in {"insert", "upsert"}:
        sink.mistakes.append(f"insert.mode {mode}: consumerd has append, skip-existing and upsert")
    lines = [f"name = {_quoted(name)}", f'write = "{"upsert" if mode == "upsert" else "append"}"']
    if mode == "upsert":
        if not key:
            sink.mistakes.append("insert.mode upsert without a key: name its columns in pk.fields")
        lines.append(f"key = {_list(key)}")
    if sink.get("delete.enabled", "false") == "true":
        if mode != "upsert" or sink.keys.get("pk.mode") != "record_key":
            sink.mistakes.append("delete.enabled needs insert.mode upsert and pk.mode record_key")
        sources = ", ".join(f"{_bare(column)} = {_quoted(source)}" for column, source in key.items())
        lines += ['tombstones = "delete"', f"tombstone_key = {{ {sources} }}"]
    return lines


def _columns(sink: _Sink, key: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    """Return each column's source; nothing where each is the field of its own name."""
    renamed: dict[str, str] = {}
    for alias in sink.listed("transforms"):
        kind = sink.get(f"transforms.{alias}.type")
        others = {f"transforms.{alias}.{what}" for what in ("include", "exclude", "whitelist", "blacklist")}
        if kind != RENAMES or others & sink.keys.keys():
            sink.mistakes.append(f"transforms.{alias} ({kind}): write it as [columns], `where` or a [transform]")
        for pair in sink.listed(f"transforms.{alias}.renames"):
            old, _, new = pair.partition(":")
            renamed[new] = old
    wanted = sink.listed("fields.whitelist")
    inside = sink.inside("value")
    found = {name: inside + renamed.get(name, name) for name in [*key, *(wanted or columns)]} | dict(key)
    plain = not inside and all(name == source for name, source in (found | renamed).items())
    if plain and not wanted:
        return {}
    if not wanted and not columns:
        sink.mistakes.append(
            "each topic has a table of its own, and columns that are not the fields of their own names: name the "
            "columns in fields.whitelist"
        )
    return found


def _poison(sink: _Sink) -> list[str]:
    letters = sink.get("errors.deadletterqueue.topic.name")
    if sink.get("errors.tolerance", "none") != "all":
        return ["[poison]", 'action = "halt"    # as errors.tolerance = none; "dead-letter" lets the stream go on']
    if letters:
        return ["[dead_letter]", f"topic = {_quoted(letters)}", "create = true"]
    return ["[poison]", 'action = "skip"    # as errors.tolerance = all', "max_ratio = 1.0"]


def _list(items: Sequence[str] | Mapping[str, str]) -> str:
    return f"[{', '.join(_quoted(item) for item in items)}]"


def _quoted(text: str) -> str:
    """Write a string as TOML does; a dollar that is no place for the topic is doubled."""
    return json.dumps(re.sub(r"\$(?!\{topic\})", "$$", text), ensure_ascii=False)


def _bare(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
