"""Kafka Connect with Debezium's JDBC sink: a standalone worker of the Kafka that the tests have cached anyway.

The sink wants records with a schema. JsonConverter is given one for all messages (`schema.content`, Kafka 4.2), which
spares each message an envelope. A field of type string must be a string in the message, so the document for the jsonb
column is sent as text: a topic of the same records in that form.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import msgspec

from tests.bench.peers.race import BUILD, Job, Peer, Unavailable
from tests.bench.stage import Shape
from tests.servers.kafka import FETCH_TIMEOUT, fetch
from tests.servers.process import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

POM = Path(__file__).with_name("debezium.xml")
TOPIC = "text"
TASKS = 2
BATCH = 10_000
JAVA = (
    "java",
    "-Xms256m",
    "-Xmx2g",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-Djava.awt.headless=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)
"""As Kafka's connect-standalone starts it."""
ELSEWHERE = (
    "org.apache.kafka,com.fasterxml.jackson.core,org.slf4j,"  # the worker has them
    "com.mysql,org.mariadb.jdbc,com.microsoft.sqlserver,com.oracle.database.jdbc"  # other databases' drivers
)
FIELDS = (
    {"field": "id", "type": "int64"},
    {"field": "ts", "type": "string", "name": "io.debezium.time.ZonedTimestamp", "version": 1},
    {"field": "n", "type": "int32", "optional": True},
    {"field": "name", "type": "string", "optional": True},
    {"field": "d", "type": "double", "optional": True},
    {
        "field": "o",
        "type": "string",
        "name": "io.debezium.data.Json",
        "version": 1,
        "optional": True,
        "parameters": {"__debezium.source.column.type": "JSONB"},
    },
)
WRITES = {"append": {"insert.mode": "insert"}, "upsert": {"insert.mode": "upsert", "use.reduction.buffer": "true"}}


@dataclass(frozen=True, kw_only=True)
class WithText(Shape):
    """The same records, the document as text."""

    def value(self, number: int) -> bytes:
        """Return a message."""
        record: dict[str, Any] = msgspec.json.decode(super().value(number))
        return msgspec.json.encode({**record, "o": msgspec.json.encode(record["o"]).decode()})


def debezium() -> Peer:
    """Return the peer."""
    return Peer(name="debezium", install=install, command=command, topic=TOPIC, env=dict(os.environ))


@functools.cache
def _plugins() -> Path:
    version = ET.parse(POM).getroot().findtext("properties/debezium.version")  # noqa: S314 - the file beside this one
    return BUILD / f"debezium-{version}"


def install() -> None:
    """Fetch worker and sink."""
    fetch()
    if _plugins().exists():
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        pom = Path(shutil.copy(POM, temporary))
        jars = Path(temporary) / "plugins"
        options = [f"-DoutputDirectory={jars / 'debezium-jdbc'}", f"-DexcludeGroupIds={ELSEWHERE}"]
        copy = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", *options]
        try:
            subprocess.run(copy, stdin=subprocess.DEVNULL, capture_output=True, timeout=FETCH_TIMEOUT, check=True)
        except (subprocess.SubprocessError, OSError):
            raise Unavailable("Maven did not get it") from None
        jars.rename(_plugins())


def command(job: Job) -> Sequence[str]:
    """Write the worker's and the sink's properties, and return how they are run."""
    worker = {
        "bootstrap.servers": job.bootstrap,
        "listeners": f"HTTP://127.0.0.1:{free_port()}",
        "offset.storage.file.filename": str(job.folder / "offsets"),
        "plugin.path": str(_plugins()),
        "connector.client.config.override.policy": "All",
        "key.converter": "org.apache.kafka.connect.converters.ByteArrayConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.schemas.enable": "true",
        "value.converter.schema.content": json.dumps({"type": "struct", "name": "record", "fields": FIELDS}),
    }
    at = dict(part.split("=") for part in job.dsn.split())
    sink = {
        "name": job.group,
        "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
        "topics": job.topic,
        "tasks.max": str(TASKS),
        "connection.url": f"jdbc:postgresql://{at['host']}:{at['port']}/{at['dbname']}",
        "connection.username": at["user"],
        "connection.password": "",
        "collection.name.format": job.table,
        "primary.key.mode": "record_value",
        "primary.key.fields": "id",
        "schema.evolution": "none",
        "batch.size": str(BATCH),
        "dialect.postgres.unnest.insert.enabled": "true",
        "consumer.override.auto.offset.reset": "earliest",
        "consumer.override.max.poll.records": str(BATCH),
        "consumer.override.max.partition.fetch.bytes": str(8 << 20),
        "consumer.override.fetch.max.bytes": str(64 << 20),
        **WRITES[job.write],
    }
    files = [
        _properties(job.folder / f"{name}.properties", what) for name, what in (("worker", worker), ("sink", sink))
    ]
    return [*JAVA, "-cp", f"{fetch()}/libs/*", "org.apache.kafka.connect.cli.ConnectStandalone", *files]


def _properties(path: Path, properties: Mapping[str, str]) -> str:
    path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
    return str(path)
