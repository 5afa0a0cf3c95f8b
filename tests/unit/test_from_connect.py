"""What a Kafka Connect JDBC sink's configuration becomes."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from consumerd.commands.from_connect import convert, parse, read, table_of
from consumerd.config import HandlerConfig
from consumerd.errors import ConfigError

AIVEN = {
    "connector.class": "io.aiven.connect.jdbc.JdbcSinkConnector",
    "topics": "orders",
    "connection.url": "jdbc:postgresql://db/warehouse",
    "connection.password": "hush",
    "table.name.format": "sales.orders",
    "value.converter.schemas.enable": "false",
    "errors.tolerance": "all",
    "errors.deadletterqueue.topic.name": "orders-dlq",
}
DEBEZIUM = {
    "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
    "topics.regex": "shop\\..*",
    "collection.name.format": "raw.${topic}",
    "insert.mode": "upsert",
    "primary.key.mode": "record_value",
    "primary.key.fields": "id",
    "value.converter.schemas.enable": False,
    "tasks.max": 2,
}
COLUMNS = ["id", "customer", "amount"]


def made(keys: dict[str, Any], **more: str) -> tuple[dict[str, Any], str]:
    """Convert a sink called `sink`; return the file as the daemon reads it, and its text."""
    converted = convert(parse(json.dumps({"name": "sink", "config": {**keys, **more}})), COLUMNS)
    data = tomllib.loads(converted.toml.replace("$$", "$"))
    model = {**data, "name": converted.name, "path": Path("/h/sink.toml")}
    HandlerConfig.model_validate(model, by_name=False, by_alias=True, context={"folder": Path("/h")})
    return data, converted.toml


def test_append() -> None:
    """Topics, table, letters; the group is the sink's; columns are the fields of their own names."""
    data, text = made(AIVEN)
    assert data == {
        "topics": ["orders"],
        "group_id": "connect-sink",
        "table": {"name": "sales.orders", "write": "append"},
        "dead_letter": {"topic": "orders-dlq", "create": True},
    }
    assert "# connection.url: dsn under [postgres] of consumerd.toml\n" in text
    assert "hush" not in text


def test_debezium() -> None:
    """Its names for the same keys; a pattern matches whole names; each topic has its own table."""
    data, text = made(DEBEZIUM)
    assert ["^(?:shop\\..*)$"] == data["topics"]
    assert {"name": "raw.${topic}", "write": "upsert", "key": ["id"]} == data["table"]
    assert {"action": "halt"} == data["poison"]
    assert "# tasks.max: one process for each core" in text


@pytest.mark.parametrize(
    ("more", "columns"),
    [
        ({"value.converter.schemas.enable": "true"}, {n: f"payload.{n}" for n in COLUMNS}),
        ({"fields.whitelist": "id, amount"}, {"id": "id", "amount": "amount"}),
        (
            {
                "transforms": "r",
                "transforms.r.type": "org.apache.kafka.connect.transforms.ReplaceField$Value",
                "transforms.r.renames": "client:customer,sum:amount",
            },
            {"id": "id", "customer": "client", "amount": "sum"},
        ),
        (
            {"pk.mode": "kafka", "fields.whitelist": "id"},
            {
                "__connect_topic": "@topic",
                "__connect_partition": "@partition",
                "__connect_offset": "@offset",
                "id": "id",
            },
        ),
        (
            {"pk.mode": "record_header", "pk.fields": "id", "fields.whitelist": "amount"},
            {"id": "@headers.id", "amount": "amount"},
        ),
    ],
)
def test_columns(more: dict[str, str], columns: dict[str, str]) -> None:
    """Envelopes, lists of fields, renames, and keys from elsewhere name the columns."""
    assert columns == made(AIVEN, **more)[0]["columns"]


def test_deletes() -> None:
    """A tombstone deletes by the record's key, text or JSON, with or without an envelope."""
    keys = {"insert.mode": "upsert", "pk.mode": "record_key", "pk.fields": "id", "delete.enabled": "true"}
    data, _ = made(AIVEN, **keys, **{"key.converter": "org.apache.kafka.connect.storage.StringConverter"})
    assert ("text", "delete", {"id": "@key"}) == (
        data["key_format"],
        data["table"]["tombstones"],
        data["table"]["tombstone_key"],
    )
    assert {"id": "@key", "customer": "customer", "amount": "amount"} == data["columns"]
    data, _ = made(AIVEN, **keys)
    assert {"id": "@key.payload.id"} == data["table"]["tombstone_key"]
    data, _ = made(AIVEN, **keys, **{"key.converter.schemas.enable": "false"})
    assert "@key.id" == data["columns"]["id"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"connector.class": "org.example.Sink"}, "connector.class is org.example.Sink"),
        ({"topics": ""}, "neither topics nor topics.regex"),
        ({"insert.mode": "update"}, "insert.mode update"),
        ({"insert.mode": "upsert"}, "without a key"),
        ({"value.converter": "io.confluent.connect.avro.AvroConverter"}, "consumerd reads JSON"),
        ({"table.name.format": "a_${source.ts}"}, "may have ${topic} in it"),
        ({"transforms": "f", "transforms.f.type": "x.Flatten$Value"}, "transforms.f (x.Flatten$Value)"),
        ({"delete.enabled": "true"}, "delete.enabled needs"),
        ({"pk.mode": "record_key"}, "pk.mode record_key without pk.fields"),
        ({"table.name.format": "${topic}", "value.converter.schemas.enable": "true"}, "name the columns in fields"),
    ],
)
def test_what_cannot_be_converted(more: dict[str, str], words: str) -> None:
    """What would write other rows than the sink did is a mistake, not a comment."""
    keys = parse(json.dumps({**AIVEN, **more}))
    with pytest.raises(ConfigError) as caught:
        convert(keys, COLUMNS if table_of(keys) else [])
    assert words in str(caught.value)


def test_files(tmp_path: Path) -> None:
    """Properties are read too; what is neither, or is not there, is a sentence."""
    assert {"name": "s", "topics": "a=b"} == parse("# a sink\nname = s\ntopics=a=b\n")
    for text, words in (("nonsense", "neither JSON nor properties"), ("[1]", "holds no object")):
        with pytest.raises(ConfigError, match=words):
            parse(text)
    with pytest.raises(ConfigError, match=r"sink.json cannot be read: No such file"):
        read(tmp_path / "sink.json")
