"""arroyo: batches, a step that copies them in a thread, then the commit of their offsets; append alone.

`python with_arroyo.py BOOTSTRAP TOPIC GROUP DSN TABLE append`. It has no sink for a database: the writing step is the
user's own, here a text COPY. Of its two ways to commit it is given the one that never commits what is not written.
"""

import functools
import sys
from collections.abc import Mapping
from typing import Any

import orjson
import psycopg
from arroyo.backends.kafka.configuration import (  # type: ignore[import-not-found]
    build_kafka_consumer_configuration,
)
from arroyo.backends.kafka.consumer import KafkaConsumer  # type: ignore[import-not-found]
from arroyo.processing.processor import StreamProcessor  # type: ignore[import-not-found]
from arroyo.processing.strategies import (  # type: ignore[import-not-found]
    BatchStep,
    CommitOffsets,
    RunTaskInThreads,
)
from arroyo.types import Topic  # type: ignore[import-not-found]

BATCH = 5_000
"""Messages of a batch. It was no faster with 20,000."""
BATCH_SECONDS = 0.5
PENDING = 2
"""Batches that may wait for the writing thread."""


class Factory:
    """Makes the steps anew at each assignment."""

    def __init__(self, dsn: str, table: str) -> None:
        self.conn = psycopg.connect(dsn)
        self.table = table

    def create_with_partitions(self, commit: Any, _partitions: Mapping[Any, int]) -> Any:  # noqa: ANN401 - arroyo's own
        """Return the first step."""
        write = functools.partial(copy, self.conn, self.table)
        return BatchStep(BATCH, BATCH_SECONDS, RunTaskInThreads(write, 1, PENDING, CommitOffsets(commit)))

    def shutdown(self) -> None:
        """Close the connection."""
        self.conn.close()


def copy(conn: psycopg.Connection[Any], table: str, batch: Any) -> None:  # noqa: ANN401 - arroyo's own
    """Write a batch in a transaction."""
    with conn.cursor() as cursor, cursor.copy(f"COPY {table} (id, ts, n, name, d, o) FROM STDIN") as rows:
        for value in batch.payload:
            r = orjson.loads(value.payload.value)
            rows.write_row((r["id"], r["ts"], r["n"], r["name"], r["d"], orjson.dumps(r["o"]).decode()))
    conn.commit()


def main(bootstrap: str, topic: str, group: str, dsn: str, table: str, _write: str) -> None:
    """Carry the topic, for ever."""
    config = build_kafka_consumer_configuration(
        {}, group, auto_offset_reset="earliest", bootstrap_servers=[bootstrap], enable_auto_commit=False
    )
    StreamProcessor(KafkaConsumer(config), Topic(topic), Factory(dsn, table)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
