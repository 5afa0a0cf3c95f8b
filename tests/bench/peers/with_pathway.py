"""Pathway, from a topic into a table: `python with_pathway.py BOOTSTRAP TOPIC GROUP DSN TABLE append|upsert`.

Its tables cannot have a column `id`: it is `key` here. Where it appends, the table has two columns more, `time` and
`diff`.
"""

import sys

import pathway as pw  # type: ignore[import-not-found]


class Message(pw.Schema):  # type: ignore[misc]
    """What is read of a message."""

    key: int
    ts: str
    n: int
    name: str
    d: float
    o: pw.Json


def main(bootstrap: str, topic: str, group: str, dsn: str, table: str, write: str) -> None:  # noqa: PLR0917 - argv
    """Carry the topic, for ever."""
    settings = {"bootstrap.servers": bootstrap, "group.id": group, "auto.offset.reset": "earliest"}
    read = pw.io.kafka.read(settings, topic, schema=Message, format="json", json_field_paths={"key": "/id"})
    rows = read.with_columns(ts=pw.this.ts.dt.strptime("%Y-%m-%dT%H:%M:%S.%fZ").dt.to_utc("UTC"))
    at = dict(part.split("=") for part in dsn.split())
    if write == "append":
        pw.io.postgres.write(rows, at, table)
    else:
        pw.io.postgres.write(rows, at, table, output_table_type="snapshot", primary_key=[rows.key])
    pw.run(monitoring_level=pw.MonitoringLevel.NONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
