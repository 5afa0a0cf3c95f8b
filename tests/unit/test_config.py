"""The models of consumerd.toml and of a handler's file, key by key."""

from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel, ValidationError

from consumerd.config import (
    BatchConfig,
    ColumnConfig,
    Config,
    DaemonConfig,
    HandlerConfig,
    KafkaConfig,
    LogConfig,
    PostgresConfig,
    RetryConfig,
    TableConfig,
)
from consumerd.credentials import Secret
from consumerd.scalars import UNSET

Model = TypeVar("Model", bound=BaseModel)

HANDLER: dict[str, Any] = {
    "name": "orders",
    "path": Path("/etc/consumerd/handlers/orders.toml"),
    "topics": ["orders"],
    "table": {"name": "sales.orders", "write": "append"},
}


def from_toml(model: type[Model], data: dict[str, Any]) -> Model:
    """Validate as the loader does."""
    return model.model_validate(data, by_name=False, by_alias=True, context={"folder": Path("/etc/consumerd")})


def handler(**keys: object) -> HandlerConfig:
    """Make a handler of the smallest file and these keys."""
    return from_toml(HandlerConfig, {**HANDLER, **keys})


def mistakes(model: type[BaseModel], data: dict[str, Any]) -> dict[str, str]:
    """Give the key and the sentence of each of our rules that this data breaks."""
    with pytest.raises(ValidationError) as caught:
        from_toml(model, data)
    return {".".join(map(str, e["loc"])): e["msg"].removeprefix("Value error, ") for e in caught.value.errors()}


def test_handler_defaults() -> None:
    """A handler of topics and table has the defaults of interface.md."""
    it = handler()
    assert (it.topics, it.group_id, it.start, it.format, it.checkpoint) == (
        ("orders",),
        "consumerd.orders",
        "earliest",
        "json",
        "postgres",
    )
    assert (it.max_connections, it.columns) == (4, None)
    assert it.table == TableConfig(name="sales.orders", write="append", key=())
    assert (it.batch.max_messages, it.batch.max_bytes, it.batch.max_age) == (20_000, 8 * 1024 * 1024, 0.5)
    assert (it.retry.initial, it.retry.max) == (0.1, 2.0)
    assert (it.poison.max_ratio, it.poison.window, it.poison.min_messages) == (0.05, 60.0, 1000)
    letters = it.dead_letter
    assert (letters.topic, letters.create, letters.retention_ms) == ("consumerd.orders.dlq", False, -1)
    assert (letters.partitions, letters.replication) == (1, 1)


def test_daemon_defaults() -> None:
    """consumerd.toml needs two keys; the rest has the defaults of interface.md."""
    it = from_toml(
        Config, {"path": Path("/x"), "kafka": {"bootstrap_servers": "b:9092"}, "postgres": {"dsn": "host=db"}}
    )
    assert it.kafka == KafkaConfig(bootstrap_servers="b:9092", group_instance_id=None, admin=True, properties={})
    assert (it.postgres.password, it.postgres.schema_name, it.postgres.settings) == (None, "consumerd", {})
    assert (it.daemon.handlers, it.daemon.listen) == (Path("/etc/consumerd/handlers"), "127.0.0.1:9464")
    assert (it.daemon.drain_timeout, it.daemon.max_buffered) == (30.0, 512 * 1024 * 1024)
    assert (it.log.level, it.log.format, it.log.heartbeat) == ("info", "auto", 60.0)
    assert it.handlers == ()


def test_models_do_not_change() -> None:
    """A config is frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        handler().max_connections = 5


@pytest.mark.parametrize(
    ("text", "expected"), [("500ms", 0.5), ("5s", 5), ("1m", 60), ("2h", 7200), ("1d", 86400), ("365d", 31536000)]
)
def test_durations(text: str, expected: float) -> None:
    """Each unit of interface.md, in seconds."""
    assert from_toml(LogConfig, {"heartbeat": text}).heartbeat == expected


@pytest.mark.parametrize("value", ["5", "5 s", "0.5s", "-5s", "5S", "5sec", "1h30m", "", "s", "\u0665s", True, [5]])
def test_other_durations_are_refused(value: object) -> None:
    """Nothing but a whole number and a unit is a duration."""
    assert mistakes(LogConfig, {"heartbeat": value}) == {
        "heartbeat": 'must be a whole number and a unit (ms s m h d): write "5s"'
    }


@pytest.mark.parametrize("value", [5, 0.5])
def test_duration_of_a_number_alone_is_refused(value: float) -> None:
    """A number alone has no unit."""
    assert mistakes(LogConfig, {"heartbeat": value}) == {
        "heartbeat": 'a number alone has no unit: write "5s" (units: ms s m h d)'
    }


@pytest.mark.parametrize("value", ["0s", "366d"])
def test_durations_have_bounds(value: str) -> None:
    """No duration is zero or longer than a year."""
    assert mistakes(LogConfig, {"heartbeat": value}) == {"heartbeat": "must be more than 0 and at most 365d"}


@pytest.mark.parametrize(("text", "expected"), [("1KiB", 1024), ("8MiB", 8 << 20), ("2GiB", 2 << 30)])
def test_sizes(text: str, expected: int) -> None:
    """Each unit of interface.md, in bytes."""
    assert from_toml(BatchConfig, {"max_bytes": text}).max_bytes == expected


@pytest.mark.parametrize("value", ["512", "8MB", "8M", "8mib", "1.5MiB", "8 MiB", "-1MiB", 512, True])
def test_other_sizes_are_refused(value: object) -> None:
    """Nothing but KiB, MiB and GiB is a size."""
    assert mistakes(BatchConfig, {"max_bytes": value}) == {
        "max_bytes": 'must be a whole number with KiB, MiB or GiB: write "8MiB"'
    }


def test_size_is_not_zero() -> None:
    """No bound is zero bytes."""
    assert mistakes(BatchConfig, {"max_bytes": "0MiB"}) == {"max_bytes": "must be more than 0"}


def test_python_writes_plain_seconds_and_bytes() -> None:
    """Built in Python, a duration is seconds and a size is bytes."""
    it = BatchConfig(max_age=0.25, max_bytes=100)
    assert (it.max_age, it.max_bytes) == (0.25, 100)


@pytest.mark.parametrize(
    ("section", "key", "good", "bad"),
    [
        (None, "max_connections", [1, 64], [0, 65]),
        ("batch", "max_messages", [1, 1_000_000], [0, 1_000_001]),
        ("poison", "max_ratio", [0.001, 1, 1.0], [0, -0.1, 1.01, float("nan")]),
        ("poison", "min_messages", [1], [0]),
        ("dead_letter", "retention_ms", [-1, 0], [-2]),
        ("dead_letter", "partitions", [1], [0]),
        ("dead_letter", "replication", [1], [0]),
    ],
)
def test_ranges(section: str | None, key: str, good: list[float], bad: list[float]) -> None:
    """A number's bounds are allowed, and the next beyond is refused with the range."""
    place = f"{section}.{key}" if section else key
    for value in good:
        it = handler(**({section: {key: value}} if section else {key: value}))
        assert getattr(getattr(it, section) if section else it, key) == value
    for value in bad:
        found = mistakes(HandlerConfig, {**HANDLER, **({section: {key: value}} if section else {key: value})})
        assert list(found) == [place]
        assert found[place].startswith("must be ")


@pytest.mark.parametrize(
    ("host", "port", "listen"),
    [("127.0.0.1", 9464, "127.0.0.1:9464"), ("::1", 0, "[::1]:0"), ("localhost", 65535, "localhost:65535")],
)
def test_listen(host: str, port: int, listen: str) -> None:
    """An address is taken apart, IPv6 without its brackets."""
    it = from_toml(DaemonConfig, {"listen": listen})
    assert (it.listen_host, it.listen_port) == (host, port)


@pytest.mark.parametrize("listen", ["9464", ":9464", "localhost", "localhost:", "a:65536", "a:-1", "::1:80", "[::1:80"])
def test_other_listens_are_refused(listen: str) -> None:
    """What is no host and port is refused with an example."""
    assert '"127.0.0.1:9464"' in mistakes(DaemonConfig, {"listen": listen})["listen"]


def test_handlers_folder_starts_at_the_config() -> None:
    """The folder is relative to the config file, or absolute."""
    assert from_toml(DaemonConfig, {"handlers": "h"}).handlers == Path("/etc/consumerd/h")
    assert from_toml(DaemonConfig, {"handlers": "/h"}).handlers == Path("/h")


def test_group_id_names_the_dead_letter_topic() -> None:
    """The dead-letter topic follows the group id, or is written."""
    assert handler(group_id="g").dead_letter.topic == "g.dlq"
    assert handler(group_id="g", dead_letter={"create": True}).dead_letter.topic == "g.dlq"
    assert handler(dead_letter={"topic": "t"}).dead_letter.topic == "t"


@pytest.mark.parametrize("topic", ["a b", "", ".", "..", "ä", "x" * 250, "a/b", "orders\n"])
def test_illegal_topics_are_refused(topic: str) -> None:
    """Topics and the dead-letter topic are legal names of Kafka."""
    found = mistakes(HandlerConfig, {**HANDLER, "topics": [topic], "dead_letter": {"topic": topic}})
    assert found == {
        "topics.0": "must be a Kafka topic name: 1 to 249 of A-Z a-z 0-9 . _ -; a pattern starts with ^",
        "dead_letter.topic": "must be a Kafka topic name: 1 to 249 of A-Z a-z 0-9 . _ -",
    }


def test_topics_and_patterns() -> None:
    """Names, patterns and a single string are taken as they are."""
    assert handler(topics=["a.b-c_D", "x" * 249, r"^orders\..*$"]).topics == ("a.b-c_D", "x" * 249, r"^orders\..*$")
    assert handler(topics="orders").topics == ("orders",)


@pytest.mark.parametrize(
    ("topics", "key", "sentence"),
    [
        (["^("], "topics.0", "is not a regular expression: missing ), unterminated subpattern at position 1"),
        ([], "topics", 'must not be empty: write topics = ["orders"]'),
        (["a", "a"], "topics", "names the same twice"),
    ],
)
def test_useless_topics_are_refused(topics: list[str], key: str, sentence: str) -> None:
    """A pattern compiles, and topics are some and differ."""
    assert mistakes(HandlerConfig, {**HANDLER, "topics": topics}) == {key: sentence}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("latest", "latest"),
        (datetime(2026, 1, 31, tzinfo=UTC), datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T00:00:00Z", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T00:00:00+01:00", datetime(2026, 1, 31, tzinfo=timezone(timedelta(hours=1)))),
    ],
)
def test_start(value: object, expected: object) -> None:
    """A handler starts at an end of the topic or at a time, bare or in quotes."""
    assert handler(start=value).start == expected


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("newest", "must be"),
        (5, "must be"),
        (date(2026, 1, 31), "must be"),
        (datetime(2026, 1, 31), "a time needs its zone"),  # noqa: DTZ001 (what is refused)
        ("2026-01-31T00:00:00", "a time needs its zone"),
        ("1960-01-01T00:00:00Z", "must not be before 1970"),
        ("0001-01-01T00:00:00+01:00", "must not be before 1970"),
    ],
)
def test_other_starts_are_refused(value: object, word: str) -> None:
    """A start is no other word, no time without its zone, and none that Kafka cannot count."""
    assert mistakes(HandlerConfig, {**HANDLER, "start": value})["start"].startswith(word)


@pytest.mark.parametrize(
    "name",
    ["orders", "sales.orders", "Sales.Order Lines", 'raw."ev.Alpha"', '"s.x"."t.y"', '"a ""b"" c.d"', '" "', "x" * 63],
)
def test_table_names(name: str) -> None:
    """A table is named with or without its schema; what stands in double quotes may hold dots."""
    assert TableConfig(name=name, write="append").name == name


@pytest.mark.parametrize(
    ("name", "by_topic", "table"),
    [
        ("orders", False, "orders"),
        ("Sales.Orders", False, "Sales.Orders"),
        ("${topic}", True, '"Orders.v1-eu"'),
        ("raw.${topic}", True, 'raw."Orders.v1-eu"'),
        ('raw."${topic}"', True, 'raw."Orders.v1-eu"'),
        ("raw.t_${topic}_x", True, 'raw."t_Orders.v1-eu_x"'),
        ("${topic}.events", True, '"Orders.v1-eu".events'),
        ('"ev.raw"."${topic}.x"', True, '"ev.raw"."Orders.v1-eu.x"'),
    ],
)
def test_the_table_of_a_topic(name: str, by_topic: bool, table: str) -> None:
    """`${topic}` is the topic's whole name; the part that holds it is quoted, the other is as psql takes it."""
    it = TableConfig(name=name, write="append")
    assert (it.by_topic, it.of("Orders.v1-eu")) == (by_topic, table)


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", ".a", "a.b.c", " ", "x" * 64, "a\0", '"a', 'a"b', '""', '"a"b', f'"{"x" * 64}"', '"a"."b"."c"'],
)
def test_other_table_names_are_refused(name: str) -> None:
    """No part of a table's name is empty or too long for Postgres."""
    assert mistakes(TableConfig, {"name": name, "write": "append"}) == {"name": 'must be "table" or "schema.table"'}


@pytest.mark.parametrize(
    ("write", "key", "sentence"),
    [
        ("upsert", [], 'is missing, and upsert needs it: write key = ["order_id"]'),
        ("append", ["id"], 'append has no key: take it out, or write = "upsert"'),
        ("upsert", ["a", "a"], "names the same twice"),
    ],
)
def test_key_goes_with_upsert(write: str, key: list[str], sentence: str) -> None:
    """An upsert has a key and an append has none."""
    assert mistakes(TableConfig, {"name": "t", "write": write, "key": key}) == {"key": sentence}


def test_upsert_without_the_word_key() -> None:
    """An upsert that leaves `key` out is refused too."""
    assert list(mistakes(TableConfig, {"name": "t", "write": "upsert"})) == ["key"]
    assert from_toml(TableConfig, {"name": "t", "write": "upsert", "key": ["a", "b"]}).key == ("a", "b")


def test_key_is_among_the_columns() -> None:
    """A key that no column writes is a mistake of the file."""
    table = {"name": "t", "write": "upsert", "key": ["id", "day"]}
    found = mistakes(HandlerConfig, {**HANDLER, "table": table, "columns": {"id": "id"}})
    assert found == {"columns": "lacks day, which table.key names"}
    assert handler(table=table).columns is None


def test_columns() -> None:
    """A string is short for `from`; a default is there or not, also a false one."""
    columns = handler(columns={"a": "x.y", "b": {"from": "z", "default": 0}}).columns
    assert columns == {"a": ColumnConfig(source="x.y"), "b": ColumnConfig(source="z", default=0)}
    assert columns is not None
    assert (columns["a"].default, columns["a"].has_default) == (UNSET, False)
    assert (columns["b"].default, columns["b"].has_default) == (0, True)


@pytest.mark.parametrize("path", ["", ".", "a..b", ".a", "a."])
def test_path_has_no_empty_part(path: str) -> None:
    """A source has a name between all dots."""
    assert mistakes(ColumnConfig, {"from": path}) == {"from": 'must be a path such as "customer.name"'}


@pytest.mark.parametrize("default", ["x", 1, 1.5, True, False])
def test_default_is_a_scalar(default: object) -> None:
    """Every scalar of TOML is a default, unchanged in type."""
    found = from_toml(ColumnConfig, {"from": "a", "default": default}).default
    assert (type(found), found) == (type(default), default)


@pytest.mark.parametrize("default", [[1], {"a": 1}, date(2026, 1, 1), None])
def test_other_defaults_are_refused(default: object) -> None:
    """Lists, tables and dates are no default."""
    assert mistakes(ColumnConfig, {"from": "a", "default": default}) == {
        "default": "must be a string, a number, true or false"
    }


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"from": "a", "unit": "h"}, {"unit": "Input should be 's', 'ms', 'us' or 'ns'"}),
        ({"from": "@ofset"}, {"from": "there is no @ofset"}),
        ({"from": "a[300]"}, {"from": "an index is a number from 0 to 255"}),
        ({"from": "@topic", "default": "x"}, {"": "@topic is always there: take the default out"}),
        ({"from": "@value", "unit": "ms"}, {"": "@value has no unit: take it out"}),
        ({"from": "@timestamp", "unit": "ms"}, {"": "@timestamp has no unit: take it out"}),
    ],
)
def test_source_with_what_does_not_go_with_it(column: dict[str, object], told: dict[str, str]) -> None:
    """A source that is none, and a unit or a default beside one that cannot have it, are mistakes of the file."""
    found = mistakes(ColumnConfig, column)
    assert {key: sentence[: len(told[key])] for key, sentence in found.items()} == told


@pytest.mark.parametrize("source", ["a[0].b", '["a.b"]', "@key", "@key.a", "@headers.x", "@timestamp"])
def test_source_with_a_default(source: str) -> None:
    """What may be absent may have a default."""
    assert from_toml(ColumnConfig, {"from": source, "default": 1}).has_default


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"columns": {"a": "@key.id"}},
            {"columns": 'a reads @key.id: write key_format = "json" at the top of the file'},
        ),
        ({"where": "kind = "}, {"where": "cannot be read at character 8"}),
        ({"where": "@key == 'x'"}, {"where": "@key is bytes"}),
        ({"where": "@key.id == 5", "key_format": "text"}, {"where": '@key.id needs key_format = "json"'}),
        ({"key_format": "string"}, {"key_format": "Input should be"}),
        (
            {"columns": {"a": "@key"}, "decode": {"unknown_fields": "dead-letter"}},
            {"decode": 'unknown_fields = "dead-letter" needs a column that reads a field: none does'},
        ),
        ({"decode": {"unknown_fields": "refuse"}}, {"decode.unknown_fields": "Input should be"}),
    ],
)
def test_mapping_that_cannot_be(more: dict[str, object], told: dict[str, str]) -> None:
    """What cannot be read of a message is a mistake of the file."""
    found = mistakes(HandlerConfig, {**HANDLER, **more})
    assert {key: sentence[: len(told[key])] for key, sentence in found.items()} == told


def test_mapping_that_can_be() -> None:
    """The same with the key's format that it needs."""
    more = {"key_format": "json", "where": "@key.id == 5 and kind == 'x'", "columns": {"a": "@key.id", "b": "c"}}
    it = handler(**more, decode={"unknown_fields": "dead-letter"})
    assert (it.key_format, it.where, it.decode.unknown_fields) == (
        "json",
        "@key.id == 5 and kind == 'x'",
        "dead-letter",
    )
    assert (handler().key_format, handler().where, handler().decode.unknown_fields) == ("bytes", None, "ignore")


def test_no_columns_at_all_are_refused() -> None:
    """An empty [columns] would write nothing."""
    found = mistakes(HandlerConfig, {**HANDLER, "columns": {}})
    assert found == {"columns": "is empty: leave it out for every column of the table"}


@pytest.mark.parametrize("retry", [{"initial": "31s"}, {"initial": "2s", "max": "1s"}, {"max": "50ms"}])
def test_retry_grows(retry: dict[str, str]) -> None:
    """The first wait is not longer than the longest, written or default."""
    assert mistakes(HandlerConfig, {**HANDLER, "retry": retry})["retry"].startswith("initial must not be more than max")
    assert from_toml(RetryConfig, {"initial": "1s", "max": "1s"}).max == 1.0


@pytest.mark.parametrize("group_id", ["", " ", "a\nb"])
def test_group_id_is_a_line(group_id: str) -> None:
    """A group id is some text on one line."""
    found = mistakes(HandlerConfig, {**HANDLER, "group_id": group_id, "dead_letter": {"topic": "t"}})
    assert found == {"group_id": "must be one line of text, not empty"}


def test_postgres() -> None:
    """TOML says `schema`; settings become text; references are Secrets."""
    it = from_toml(
        PostgresConfig,
        {
            "dsn": {"env": "URL"},
            "password": {"file": "pw"},
            "schema": "s",
            "settings": {"statement_timeout": "5s", "work_mem": 4096, "jit": False, "transaction_read_only": "off"},
        },
    )
    assert (it.dsn, it.password) == (Secret(env="URL"), Secret(file=Path("/etc/consumerd/pw")))
    assert it.schema_name == "s"
    read_only = {"transaction_read_only": "off"}
    assert it.settings == {"statement_timeout": "5s", "work_mem": "4096", "jit": "false", **read_only}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"application_name": "x"}, "is set by the daemon: consumerd/<handler>"),
        ({"default_transaction_read_only": "on"}, "would let nothing be written: take it out"),
        ({"default_transaction_read_only": True}, "would let nothing be written: take it out"),
        ({"Transaction_Read_Only": "Yes"}, "would let nothing be written: take it out"),
        ({"app": {"x": 1}}, "must be a string, a number, true or false; a name with dots is written in quotes"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], sentence: str) -> None:
    """The daemon's own setting and tables are refused."""
    found = mistakes(PostgresConfig, {"dsn": "host=x", "settings": settings})
    assert found == {f"settings.{next(iter(settings))}": sentence}


def test_properties_are_checked_one_by_one() -> None:
    """Each refused property is told at its own key, and good ones are text or Secrets."""
    properties = {"a": True, "sasl.password": {"env": "PW"}}
    it = from_toml(KafkaConfig, {"bootstrap_servers": "b", "properties": properties})
    assert it.properties == {"a": "true", "sasl.password": Secret(env="PW")}
    found = mistakes(KafkaConfig, {"bootstrap_servers": "b", "properties": {"group.id": "x", "sasl.password": "y"}})
    assert list(found) == ["properties.group.id", "properties.sasl.password"]


def test_name_of_a_handler_is_fit_for_a_group() -> None:
    """A file's name that Kafka could not take is refused with the way out."""
    found = mistakes(HandlerConfig, {**HANDLER, "name": "my orders", "group_id": "g"})
    assert found == {"name": "is the file's name: rename the file to A-Z a-z 0-9 . _ - only"}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (TableConfig, {"name": "t", "write": "append", "x": 1}),
        (ColumnConfig, {"source": "a", "from": "a"}),
        (PostgresConfig, {"dsn": "host=x", "schema_name": "s"}),
    ],
)
def test_unknown_keys_are_refused(model: type[BaseModel], data: dict[str, Any]) -> None:
    """A key that TOML has not is refused, our attributes' own names included."""
    with pytest.raises(ValidationError, match="Extra inputs"):
        from_toml(model, data)


def test_a_column_may_have_any_name() -> None:
    """A column's name is what Postgres takes: a single blank, too."""
    assert handler(columns={" ": "a"}).columns == {" ": ColumnConfig(source="a")}


def test_the_schema_of_the_daemon_has_no_percent_sign() -> None:
    """Its name stands in statements with values, where psycopg takes a percent sign for a placeholder."""
    assert mistakes(PostgresConfig, {"dsn": "host=x", "schema": "a%s"}) == {"schema": "must be a name without %"}
