"""A consumer as an engineer writes it in an afternoon: consume, decode, COPY, commit.

`python forty_lines.py BOOTSTRAP TOPIC GROUP DSN TABLE append|upsert`
"""

import sys
from collections.abc import Iterable
from typing import Any

import orjson
import psycopg
from confluent_kafka import Consumer, KafkaException

BATCH = 10_000
COLUMNS = "id, ts, n, name, d, o"
NEWEST = "ts = excluded.ts, n = excluded.n, name = excluded.name, d = excluded.d, o = excluded.o"


def copy(cursor: psycopg.Cursor[Any], table: str, records: Iterable[dict[str, Any]]) -> None:
    """Write rows by a text COPY."""
    with cursor.copy(f"COPY {table} ({COLUMNS}) FROM STDIN") as rows:
        for r in records:
            rows.write_row((r["id"], r["ts"], r["n"], r["name"], r["d"], orjson.dumps(r["o"]).decode()))


def main(bootstrap: str, topic: str, group: str, dsn: str, table: str, write: str) -> None:  # noqa: PLR0917 - argv
    """Carry the topic, for ever."""
    settings = {"bootstrap.servers": bootstrap, "group.id": group, "auto.offset.reset": "earliest"}
    consumer = Consumer({**settings, "enable.auto.commit": False})
    consumer.subscribe([topic])
    with psycopg.connect(dsn) as conn, conn.cursor() as cursor:
        cursor.execute(f"CREATE TEMPORARY TABLE staging (LIKE {table}) ON COMMIT DELETE ROWS")
        while True:
            records = []
            for message in consumer.consume(BATCH, timeout=0.5):
                if error := message.error():
                    raise KafkaException(error)
                records.append(orjson.loads(message.value() or b""))
            if write == "append":
                copy(cursor, table, records)
            else:
                copy(cursor, "staging", {r["id"]: r for r in records}.values())
                merge = f"INSERT INTO {table} SELECT * FROM staging ON CONFLICT (id) DO UPDATE SET {NEWEST}"
                cursor.execute(merge)
            conn.commit()
            if records:
                consumer.commit(asynchronous=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
