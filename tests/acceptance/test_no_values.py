"""No value of a row is in a log, a metric, a status, a header or an error, whatever is wrong with it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from confluent_kafka import Producer

from tests.acceptance.halts import TIMEOUT, handler
from tests.acceptance.stream import letters
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

SECRETS = {
    "t": "sesame-7f3a",
    "code": "sesame-c0de",
    "doc": {"pin": "sesame-d0c5"},
    "amount": 867530912.25,
    "at": "2031-07-19T03:14:15.926535Z",
    "raw": "c2VzYW1lLWJ5dGVz",
    "tags": ["sesame-1a95"],
    "mail": "sesame@d0ma.in",
    "mood": "sesame",
}
"""A value for each column, which nothing else looks like."""
NEEDLES = ("sesame", "8675309", "03:14:15", "03:14", "c2VzYW1l", "736573616d65", "d0ma.in")
"""Each of them, and what Postgres or Python may have made of it."""
TABLE = """\
CREATE DOMAIN mail AS text CONSTRAINT is_mail CHECK (VALUE LIKE '%@%');
CREATE TYPE mood AS ENUM ('good', 'sesame');
CREATE TABLE known (id bigint PRIMARY KEY);
INSERT INTO known VALUES (1);
CREATE TABLE vault (
    id bigint, t text UNIQUE, code varchar(20) NOT NULL, doc jsonb, amount numeric(12, 2) CHECK (amount > 0),
    at timestamptz, raw bytea, tags text[], mail mail, mood mood, of bigint REFERENCES known,
    late bigint REFERENCES known DEFERRABLE INITIALLY DEFERRED, how text,
    EXCLUDE (code WITH =)
);
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE WARNING 'a warning of %', NEW.t;
    IF NEW.how IS NOT NULL AND (NEW.how LIKE '%late') = (TG_NAME = 'late') THEN
        RAISE EXCEPTION '% is refused', NEW.t USING
            DETAIL = NEW.code, HINT = NEW.t, ERRCODE = left(NEW.how, 5),
            COLUMN = NEW.t, CONSTRAINT = NEW.code, TABLE = NEW.t, SCHEMA = NEW.t, DATATYPE = NEW.t;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER tell BEFORE INSERT ON vault FOR EACH ROW EXECUTE FUNCTION tell();
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON vault DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION tell();
"""
TRANSFORM = """\
from consumerd.handler import Poison

class Own(Exception):
    pass

def transform(record):
    t = record["t"]
    match record["id"] % 5:
        case 0:
            int(t)
        case 1:
            {}[t]
        case 2:
            try:
                int(t)
            except ValueError as error:
                error.add_note(t)
                raise Own(t, record) from error
        case 3:
            return {"id": t, **{t: t}}
        case 4:
            assert not t, t
"""
RAISED = ("P0001", "22023", "23505", "23514", "P0001-late", "23514-late")
"""SQLSTATEs that speak of a row."""
STOPPING = {
    "halted": "XX000",
    "forbidden": "42501",
    "gone": "42P01",
    "full": "53100",
    "slow": "57014",
    "late": "XX000-late",
}
"""Handlers, and the SQLSTATE that each one's trigger raises: some halt, some wait for better times."""

COMMANDS = (
    "check",
    "status",
    "dlq list vault",
    "dlq show vault -n 100",
    "dlq redrive vault",
    "replay vault --into vault",
)
TYPED = """\
import sys
from contextlib import suppress
from consumerd.cli import app

for line in sys.argv[1:]:
    print("$", line, flush=True)
    with suppress(SystemExit):
        app([*line.split(), "--log-level", "debug"])
"""


def good(number: int, **other: object) -> dict[str, Any]:
    """Return a message that the table takes, but for what is given."""
    unique = {"t": f"sesame-{number}", "code": f"sesame-{number}"}
    return {"id": number, **SECRETS, **unique, **other}


def bad() -> Iterator[bytes]:
    """Return messages that fail, each in a way of its own."""
    sesame = SECRETS["t"]
    wrong: list[dict[str, object]] = [
        {"id": sesame},
        {"t": [sesame]},
        {"t": f"{sesame}\0"},
        {"code": f"{sesame}{sesame}{sesame}"},
        {"code": None},
        {"doc": f"{sesame}\0"},
        {"amount": 867530912867530912},
        {"amount": -867530912.25},
        {"amount": sesame},
        {"amount": "8675309e8675309"},
        {"at": "2031-07-19T03:14:15.926535"},
        {"at": f"{SECRETS['at']} {sesame}"},
        {"at": 8675309},
        {"raw": sesame},
        {"tags": sesame},
        {"tags": [8675309]},
        {"mail": "sesame"},
        {"mail": 8675309},
        {"mood": "sesame-mood"},
        {"of": 8675309},
        {"late": 8675309},
        {"t": "sesame-0"},
        {"code": "sesame-0"},
        {"unknown": sesame},
    ]
    wrong += [{"how": how} for how in RAISED]
    for number, other in enumerate(wrong, 100):
        yield json.dumps(good(number, **other)).encode()
    yield json.dumps(good(99)).encode()[:-1]
    yield b'{"id": 98, "t": "sesame-\xff"}'
    yield b'"sesame"'


def say(kafka: KafkaServer, topic: str, *values: bytes) -> int:
    """Send messages; a key and a header are values, too. Return how many."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for value in values:
        producer.produce(topic, value, b"sesame-key", headers=[("trace", b"sesame-header")])
    assert producer.flush(TIMEOUT) == 0
    return len(values)


def settled(run: Daemon, counts: Mapping[str, int]) -> bool:
    """Whether so many messages of each handler are rows or letters."""
    handlers = run.status()["handlers"]
    return all(
        handlers[name]["written"] + sum(handlers[name]["dead_lettered"].values()) == count
        for name, count in counts.items()
    )


def stopped(run: Daemon, names: Iterable[str]) -> bool:
    """Whether each of these handlers is halted, or waits."""
    handlers = run.status()["handlers"]
    return all(handlers[name]["state"] in {"halted", "waiting"} for name in names)


def ask(run: Daemon) -> str:
    """Type each command beside the daemon, in one process; return what they print, all on one stream."""
    done = subprocess.run(
        [sys.executable, "-c", TYPED, *COMMANDS],
        cwd=run.config.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    return done.stdout


def leaks(text: str) -> list[str]:
    """Return the lines that hold a value."""
    return [line[:1000] for line in text.splitlines() if any(needle in line for needle in NEEDLES)]


def test_no_value_gets_out(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Whatever fails, and wherever it is looked at, no column's value, no key and no header of a message is told."""
    execute(database, TABLE)
    names = ("vault", "inside", "beside", "all", "breaker", *STOPPING)
    topics = {name: topic(prefix=name) for name in names}
    all_good = {"poison": {"max_ratio": 1.0}}
    strict = {"decode": {"unknown_fields": "dead-letter"}}
    handlers: dict[str, Any] = {
        "vault": all_good | strict,
        "inside": all_good | {"transform": {"function": "moves:transform"}},
        "beside": all_good | {"transform": {"function": "moves:transform", "workers": 1}},
        "all": {"poison": {"action": "halt"}},
        "breaker": {"poison": {"max_ratio": 0.01, "min_messages": 1}},
        **dict.fromkeys(STOPPING, all_good),
    }
    made = {name: handler(topics[name], "vault", group_id=topics[name], **keys) for name, keys in handlers.items()}
    sent = say(kafka, topics["vault"], json.dumps(good(0)).encode(), *bad())
    moved = {
        name: say(kafka, topics[name], *(json.dumps(good(n)).encode() for n in range(5)))
        for name in ("inside", "beside")
    }
    for name, how in STOPPING.items():
        say(kafka, topics[name], json.dumps(good(1000, how=how)).encode())
    for name in ("all", "breaker"):
        say(kafka, topics[name], json.dumps(good(2000, amount="sesame")).encode())
    config = {"log": {"level": "debug", "heartbeat": "1s"}, "daemon": {"drain_timeout": "1s"}}
    run = daemon(made | {"moves.py": TRANSFORM}, config, wait=False)
    run.process.wait_ready(lambda: run.logs().count("started") > 0, TIMEOUT, "consumerd")
    wait_until(lambda: settled(run, {"vault": sent, **moved}), TIMEOUT, "rows and letters")
    wait_until(lambda: stopped(run, ("all", "breaker", *STOPPING)), TIMEOUT, "the halts")
    seen = {path: run.get(path)[1] for path in ("/status", "/metrics", "/readyz")}
    status = run.status()["handlers"]["vault"]
    assert 1 == status["written"], status
    for name in ("vault", *moved):
        ours: list[Any] = [
            pair for letter in letters(kafka.bootstrap, f"{topics[name]}.dlq") for pair in letter.headers() or []
        ]
        seen[f"headers of {name}"] = "\n".join(f"{key}: {value!r}" for key, value in ours if key != "trace")
    seen["commands"] = ask(run)
    assert len(COMMANDS) == seen["commands"].count("$ ")
    assert "refused by Postgres" in seen["commands"]
    run.stop()
    seen["log"] = run.logs()
    assert [] == [where for where, text in seen.items() if not text]
    assert {} == {where: found for where, text in seen.items() if (found := leaks(text))}
