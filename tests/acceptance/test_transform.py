"""A handler's own Python between message and row: each way a call may end, exactly once, and none hangs the daemon."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any, cast

import pytest
from confluent_kafka import Producer

from tests.acceptance.events import PACE, MakeEvents, caught_up, halt_of, kill_while_writing
from tests.acceptance.events import handler as of_events
from tests.acceptance.halts import TIMEOUT, expect_halt, handler
from tests.acceptance.stream import Stream, doubled, letters, rows, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

TABLE = "CREATE TABLE it (id bigint PRIMARY KEY, v text CHECK (v <> 'unwanted'))"
HEADERS = ("consumerd.reason", "__connect.errors.stage", "__connect.errors.exception.class.name")
KINDS = """\
import os, time
from consumerd.handler import Poison, Retry

def transform(record):
    id, kind, v = record["id"], record["kind"], record["v"]
    if kind == "rows":
        return [{"id": id + n, "v": v} for n in range(3)]
    if kind == "none":
        return None
    if kind == "poison":
        raise Poison("not this one")
    if kind == "raise":
        return {"id": int(v)}
    if kind == "misfit":
        return [{"id": id}, {"id": v}]
    if kind == "refused":
        return [{"id": id}, {"id": id + 1, "v": "unwanted"}, {"id": id + 2}]
    if kind == "origin":
        return {"id": record.offset, "v": f"{record.topic} {record.partition} {record.key} {record.headers}"}
    if kind == "wait" and not os.path.exists(v):
        raise Retry("the flag is not there")
    if kind == "sleep":
        time.sleep(float(v))
    while kind == "spin":
        pass
    return record
"""
MILLION = 10_000_000
TWO_ROWS = f"""\
def transform(record):
    n = record["n"] + {MILLION}
    other = {{"n": n, "grp": n % 1000, "amount": n / 4, "label": f"l{{n}}", "doc": {{"of": n, "list": [n, None, "ü"]}}}}
    return [record, other]
"""


def send(kafka: KafkaServer, topic: str, *records: tuple[str, str] | bytes | None, partition: int = 0) -> None:
    """Produce records of kinds, numbered by tens, each with a value; bytes and tombstones as they are."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number, record in enumerate(records):
        value = record
        if isinstance(record, tuple):
            value = json.dumps({"id": 1000 * partition + 10 * number, "kind": record[0], "v": record[1]}).encode()
        producer.produce(topic, value, b"k", partition=partition, headers=[("h", b"1")])  # type: ignore[arg-type]
    assert producer.flush(TIMEOUT) == 0


def transforming(topic: str, **transform: object) -> dict[str, Any]:
    """Return the handlers `it` and its module."""
    function = {"function": "kinds:transform", **transform}
    return {"it": handler(topic, "it", group_id=topic, transform=function), "kinds.py": KINDS}


def status(run: Daemon) -> dict[str, Any]:
    """Return the handler's part of /status."""
    return dict(run.status()["handlers"]["it"])


def stored(database: str) -> int:
    """Return the checkpoints' sum."""
    ((total,),) = execute(database, "SELECT coalesce(sum(next_offset), 0)::int FROM consumerd.checkpoint")
    return int(total)


def workers(run: Daemon) -> set[int]:
    """Return the processes that call transforms for a daemon."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"consumerd.worker" in arguments and str(run.process.pid).encode() in arguments:
            found.add(int(process.name))
    return found


@pytest.mark.parametrize("processes", [0, 2])
def test_each_way_that_a_call_may_end(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, processes: int
) -> None:
    """Rows, several rows, none, and letters with their reason: each message is one of these, and never twice."""
    execute(database, TABLE)
    name = topic()
    run = daemon(transforming(name, workers=processes))
    kinds = ["row", "rows", "none", "poison", "raise", "misfit", "refused", "origin"]
    send(kafka, name, *((kind, "secret") for kind in kinds), b"{", None, ("row", "last"))
    wait_until(lambda: stored(database) == 11, TIMEOUT, "the end of the topic")
    expected = [(7, f"{name} 0 b'k' [('h', b'1')]"), (10, "secret"), (11, "secret"), (12, "secret"), (100, "last")]
    assert [(0, "secret"), *expected] == execute(database, "SELECT id, v FROM it ORDER BY id")
    found = letters_of(kafka, name)
    assert {
        3: ("transform", "TRANSFORMATION", "consumerd.handler.Poison"),
        4: ("transform", "TRANSFORMATION", "ValueError"),
        5: ("type", "VALUE_CONVERTER", "msgspec.ValidationError"),
        6: ("rejected", "TASK_PUT", "psycopg.errors.CheckViolation"),
        8: ("malformed", "VALUE_CONVERTER", "msgspec.DecodeError"),
    } == {offset: tuple(map(headers.get, HEADERS)) for offset, headers in found.items()}
    said = {offset: headers["__connect.errors.exception.message"] for offset, headers in found.items()}
    assert ("not this one", "ValueError at kinds.py:13") == (said[3], said[4])
    assert "secret" not in repr(found)
    assert "secret" not in run.logs()
    metrics = run.metrics()
    assert 1 == metrics['consumerd_messages_skipped_total{handler="it",reason="transform"}']
    assert (6, {"transform": 1, "tombstone": 1}) == (status(run)["written"], status(run)["skipped"])
    assert 5 == sum(status(run)["dead_lettered"].values())
    assert run.stop() == 0


def letters_of(kafka: KafkaServer, topic: str) -> dict[int, dict[str, str]]:
    """Return the headers of each letter of the handler, by its offset in the source."""
    found: dict[int, dict[str, str]] = {}
    for letter in letters(kafka.bootstrap, f"{topic}.dlq"):
        headers = cast("list[tuple[str, bytes | None]]", letter.headers() or [])
        found[source_of(letter)[1]] = {name: (value or b"").decode() for name, value in headers}
    return found


def test_a_retry_waits_visibly_and_holds_up_nobody_else(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, tmp_path: Path
) -> None:
    """Partitions whose record wants to be tried again wait with the function's own sentence; the other goes on."""
    execute(database, TABLE)
    name, flag = topic(4), tmp_path / "flag"
    handlers = transforming(name)
    handlers["it"]["max_connections"] = 2
    run = daemon(handlers, {"log": {"level": "info"}})
    sentence = "kinds:transform: the flag is not there"
    for partition in (0, 2, 3):  # each is taken for itself
        before = run.metrics()['consumerd_retries_total{cause="transform",handler="it"}']
        send(kafka, name, ("row", "a"), ("wait", str(flag)), ("row", "c"), partition=partition)
        wait_until(lambda: status(run)["waiting_for"].get("transform") == sentence, TIMEOUT, "the sentence")
        wait_until(
            lambda before=before: run.metrics()['consumerd_retries_total{cause="transform",handler="it"}'] > before + 1,  # type: ignore[misc]
            TIMEOUT,
            "tries",
        )
    send(kafka, name, ("row", "a"), ("row", "b"), partition=1)
    wait_until(
        lambda: execute(database, "SELECT id FROM it WHERE id BETWEEN 1000 AND 1999 OFFSET 1") != [],
        TIMEOUT,
        "the others",
    )
    assert "waiting" == status(run)["state"]
    assert run.metrics()['consumerd_retries_total{cause="transform",handler="it"}'] > 0
    flag.touch()
    wait_until(lambda: stored(database) == 11, TIMEOUT, "the end of the topic")
    wait_until(lambda: status(run)["state"] == "running", TIMEOUT, "the recovery")
    waited = [(1000 * partition + number,) for partition in (2, 3) for number in (0, 10, 20)]
    assert [(0,), (10,), (20,), (1000,), (1010,), *waited] == execute(database, "SELECT id FROM it ORDER BY id")
    assert {} == status(run)["dead_lettered"]
    assert run.stop() == 0


def streaming(stream: Stream, processes: int) -> dict[str, Any]:
    """Return a handler that makes two rows of each record, and its module."""
    transform = {"function": "two_rows:transform", "workers": processes}
    return {
        "events": of_events(stream.topic, "events", write="append") | {"transform": transform},
        "two_rows.py": TWO_ROWS,
    }


def check(stream: Stream, database: str, *, letters_once: bool = False) -> None:
    """Compare table and letters with what was sent: both rows of a good record once, of a bad one none."""
    numbers = rows(database, "events")
    assert {} == doubled(numbers)
    assert {each for number in stream.good() for each in (number, number + MILLION)} == set(numbers)
    sources = stream.lettered()
    assert stream.bad() == set(sources)
    assert not letters_once or len(sources) == len(stream.bad())


@pytest.mark.parametrize("processes", [0, 2])
def test_kills_lose_and_double_nothing(
    database: str, events: MakeEvents, daemon: MakeDaemon, dice: random.Random, processes: int
) -> None:
    """SIGKILL at random moments leaves both rows of each good record once, and no process behind."""
    stream = events(database, 3).stream
    run = daemon(streaming(stream, processes), {"kafka": {"group_instance_id": "one"}}, wait=False)
    with stream.flowing(PACE / 4):
        for _ in range(3):
            kill_while_writing(run, dice)
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), 120, "the end of the topic")
    assert processes == len(workers(run))
    run.kill()
    wait_until(lambda: workers(run) == set(), TIMEOUT, "the end of the daemon's processes")
    check(stream, database)


def test_a_killed_worker_is_replaced_and_a_stop_drains(database: str, events: MakeEvents, daemon: MakeDaemon) -> None:
    """Workers that are killed under load cost nothing but time; SIGTERM then writes what is gathered, and ends all."""
    stream = events(database, 2).stream
    run = daemon(streaming(stream, 2), {"kafka": {"group_instance_id": "one"}})
    with stream.flowing(PACE / 4):
        for times in range(1, 4):
            wait_until(lambda n=times: written(run) > 1_000 * n, TIMEOUT, "rows")  # type: ignore[misc]
            before = workers(run)
            os.kill(min(before), signal.SIGKILL)
            wait_until(lambda b=before: len(workers(run) - b) == 1, TIMEOUT, "another worker")  # type: ignore[misc]
        assert run.stop() == 0
    assert set() == workers(run)
    run.start()
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
    assert run.stop() == 0
    check(stream, database, letters_once=True)


def written(run: Daemon) -> int:
    """Return how many rows this process has committed."""
    return int(run.status()["handlers"]["events"]["written"])


def test_a_call_that_never_returns_halts_its_handler_or_ends_with_its_worker(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """In a thread it is a halt that names the message, and the daemon stops as ever; in a worker it is one letter."""
    execute(database, TABLE)
    name = topic()
    send(kafka, name, ("row", "a"), ("spin", "b"), ("row", "c"))
    run = daemon(transforming(name, timeout="500ms"))
    expect_halt(run, "it", f"kinds:transform did not return within 0.5 s for {name}:0 offset 1", "`workers`", "restart")
    assert 1 == run.metrics()['consumerd_halts_total{handler="it",reason="transform"}']
    assert run.stop() == 0
    assert 2 > stored(database)
    file = run.config.parent / "handlers" / "it.toml"
    file.write_text(file.read_text().replace('"timeout" = "500ms"', '"timeout" = "500ms"\n"workers" = 1'))
    run.start()
    run.wait_ready()
    wait_until(lambda: stored(database) == 3, TIMEOUT, "the end of the topic")
    assert [(0,), (20,)] == execute(database, "SELECT id FROM it ORDER BY id")
    ((offset, headers),) = letters_of(kafka, name).items()
    assert (1, "TimeoutError") == (offset, headers["__connect.errors.exception.class.name"])
    assert run.stop() == 0


def test_a_slow_call_does_not_cost_the_membership(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A call that lasts for longer than max.poll.interval.ms is waited for, and the member stays in its group."""
    execute(database, TABLE)
    name = topic()
    run = daemon(transforming(name, timeout="1m"), {"kafka": {"properties": {"max.poll.interval.ms": 6_000}}})
    before = run.metrics()['consumerd_rebalances_total{handler="it"}']
    send(kafka, name, ("sleep", "9"))
    wait_until(lambda: stored(database) == 1, TIMEOUT, "the row")
    assert [(0, "9")] == execute(database, "SELECT id, v FROM it")
    assert before == run.metrics()['consumerd_rebalances_total{handler="it"}']
    assert 0 == run.metrics()['consumerd_fenced_writes_total{handler="it"}']
    assert run.stop() == 0


def test_a_mistake_halts_its_handler_before_anything_is_consumed(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A missing module, a broken import and an unfit function are one sentence each; the other handlers run."""
    execute(database, TABLE)
    name = topic()
    send(kafka, name, ("row", "a"))
    functions = {
        "absent": ("nowhere:transform", "there is no module nowhere", "nowhere.py"),
        "broken": ("broken:transform", "module broken cannot be imported: NameError", "(broken.py:1)", "mend it"),
        "lacking": ("lacking:transform", "No module named 'no_such_library'", "install it"),
        "misspelt": ("kinds:trasnform", "no function trasnform; did you mean transform?"),
    }
    handlers: dict[str, Any] = transforming(name) | {"broken.py": "oops", "lacking.py": "import no_such_library"}
    for each, (function, *_) in functions.items():
        for processes in (0, 1):
            transform = {"function": function, "workers": processes}
            handlers[f"{each}{processes}"] = handler(name, "it", group_id=f"{each}{processes}", transform=transform)
    run = daemon(handlers, wait=False)
    wait_until(lambda: halt_of(run, "misspelt1") != "", TIMEOUT, "the daemon")
    for each, (_, *words) in functions.items():
        for processes in (0, 1):
            expect_halt(run, f"{each}{processes}", *words)
            assert 0 == run.status()["handlers"][f"{each}{processes}"]["consumed"]
    wait_until(lambda: stored(database) == 1, TIMEOUT, "the row of the sound one")
    assert [(name,)] == execute(database, "SELECT DISTINCT group_id FROM consumerd.checkpoint")
    assert run.stop() == 0
