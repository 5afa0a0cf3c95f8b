"""Quix Streams with its PostgreSQL sink: `python with_quix.py BOOTSTRAP TOPIC GROUP DSN TABLE append|upsert`."""

import sys

from quixstreams import Application  # type: ignore[import-not-found]
from quixstreams.sinks.community.postgresql import PostgreSQLSink  # type: ignore[import-not-found]

COMMIT_EVERY = 5_000
"""Messages of a checkpoint, of all partitions together; the sink writes each partition's by statements of 100 rows."""
COMMIT_SECONDS = 0.5
POLL_SECONDS = 0.1


def main(bootstrap: str, topic: str, group: str, dsn: str, table: str, write: str) -> None:  # noqa: PLR0917 - argv
    """Carry the topic, for ever."""
    app = Application(
        bootstrap,
        consumer_group=group,
        auto_offset_reset="earliest",
        commit_every=COMMIT_EVERY,
        commit_interval=COMMIT_SECONDS,
        consumer_poll_timeout=POLL_SECONDS,
        loglevel="WARNING",
    )
    at = dict(part.split("=") for part in dsn.split())
    sink = PostgreSQLSink(
        host=at["host"],
        port=int(at["port"]),
        dbname=at["dbname"],
        user=at["user"],
        password="",
        table_name=table,
        schema_auto_update=False,
        include_metadata=False,
        primary_key_columns="id" if write == "upsert" else (),
        upsert_on_primary_key=write == "upsert",
    )
    app.dataframe(app.topic(topic, value_deserializer="json")).sink(sink)
    app.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
