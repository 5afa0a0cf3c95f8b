"""`pause`, `resume`, `restart` and `reload` beside a daemon that runs."""

import json
import os
import signal

from confluent_kafka.admin import AdminClient

from tests.acceptance.control import CONTROL, apart, command, done, refused
from tests.acceptance.events import held, state, wait_for_halt
from tests.acceptance.halts import TIMEOUT, expect_halt, expect_rows, landed, make_tables, send
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import blocked, execute, locked


def reloads(run: Daemon) -> tuple[float, float]:
    """Return whether the last reload was one, and when the last was that was."""
    metrics = run.metrics()
    return (
        metrics["consumerd_config_last_reload_successful"],
        metrics["consumerd_config_last_reload_success_timestamp_seconds"],
    )


def rebalances(run: Daemon, name: str) -> int:
    """Count the lines about a handler's partitions."""
    lines = [json.loads(line) for line in run.logs().splitlines()]
    return sum(line["message"] == "partitions changed" and line["handler"] == name for line in lines)


def test_a_paused_handler_stays_in_its_group_and_goes_on_exactly(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Nothing is read or written, through a rebalance too; its lag is told; then every message lands once."""
    name = topic(2)
    make_tables(database, "t", "other")
    handlers = {"t": apart(name, "t"), "other": apart(name, "other")}
    run = daemon(handlers, CONTROL)
    send(kafka, name)
    expect_rows(database, "t")
    assert "is not paused but running" in refused(run, "resume", "t")
    assert done(run, "pause", "t") == "t is paused, and what it had gathered is written\n"
    assert "is paused already" in refused(run, "pause", "t")
    assert "there is nothing to accept" in refused(run, "resume", "t", "--breaker")
    second = daemon({"t": handlers["t"]})
    wait_until(lambda: len(held(run, "t")) == 1, TIMEOUT, "a rebalance")
    second.stop()
    wait_until(lambda: len(held(run, "t")) == 2, TIMEOUT, "both partitions again")
    send(kafka, name, range(10, 20))
    expect_rows(database, "other", range(20))
    assert (state(run, "t"), len(landed(database, "t"))) == ("paused", 10)
    assert run.metrics()['consumerd_handler_state{handler="t",state="paused"}'] == 1
    assert run.get("/readyz")[0] == 200
    assert done(run, "resume", "t") == "t goes on\n"
    expect_rows(database, "t", range(20))
    assert state(run, "t") == "running"
    assert run.stop() == 0
    assert len(landed(database, "t")) == 20


def test_a_pause_lets_go_of_a_locked_table(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """What cannot be written in time is dropped, with its transaction and its memory, and is read again later."""
    name = topic()
    make_tables(database, "t")
    run = daemon({"t": apart(name, "t")}, CONTROL)
    with locked(database, "t"):
        send(kafka, name)
        wait_until(lambda: blocked(database), TIMEOUT, "a write that waits")
        assert "read again when it goes on" in done(run, "pause", "t")
        wait_until(lambda: not blocked(database), TIMEOUT, "nobody who waits for the table")
        assert run.metrics()['consumerd_buffered_bytes{handler="t"}'] == 0
    assert landed(database, "t") == []
    done(run, "restart", "t")
    assert state(run, "t") == "paused"
    done(run, "resume", "t")
    expect_rows(database, "t")


def test_a_restart_is_a_fresh_member_and_clears_no_cause(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A running one goes on where it was; a halted one halts again, until its cause is mended."""
    name = topic()
    make_tables(database, "t")
    run = daemon({"t": apart(name, "t"), "halted": apart(name, "absent")}, CONTROL, wait=False)
    sentence = expect_halt(run, "halted", "table absent does not exist", "consumerd restart halted")
    send(kafka, name)
    expect_rows(database, "t")
    assert "started anew and is running" in done(run, "restart", "t")
    send(kafka, name, range(10, 20))
    expect_rows(database, "t", range(20))
    status = run.status()["handlers"]["t"]
    assert (status["consumed"], status["written"]) == (20, 20)
    assert "nothing to pause" in refused(run, "pause", "halted")
    assert f"has halted again: {sentence}" in refused(run, "restart", "halted")
    make_tables(database, "absent")
    assert "started anew and is running" in done(run, "restart", "halted")
    expect_rows(database, "absent", range(20))
    assert "there is no handler nobody; there are: halted, t" in refused(run, "restart", "nobody")
    assert json.loads(command(run, "pause", "t", "-o", "json").stdout)["ok"] is True
    assert run.stop() == 0
    assert not (run.config.parent / "control.sock").exists()
    assert "no daemon listens at" in refused(run, "pause", "t", code=75)


def test_a_reload_changes_what_has_changed(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Handlers are started, started anew, and removed as their files say; one that is the same does not notice."""
    name = topic()
    make_tables(database, "same", "changed", "gone", "new", "newer", "halted")
    handlers = {each: apart(name, each) for each in ("same", "changed", "gone")} | {"halted": apart(name, "absent")}
    run = daemon(handlers, CONTROL, wait=False)
    wait_for_halt(run, "halted")
    send(kafka, name)
    for each in ("same", "changed", "gone"):
        expect_rows(database, each)
    before = rebalances(run, "same")
    limit = run.metrics()['consumerd_buffer_limit_bytes{handler="same"}']

    del handlers["gone"]
    (run.config.parent / "handlers" / "gone.toml").unlink()
    handlers["changed"]["columns"] = {"id": "id"}
    handlers["halted"] = apart(name, "halted")
    handlers |= {"new": apart(name, "new"), "newer": apart(name, "newer")}
    text = run.config.read_text(encoding="utf-8").replace("control.sock", "another.sock")
    write_config(run.config.parent, text, handlers)
    # The client finds the socket by the file, which names another by now.
    os.kill(run.process.pid, signal.SIGHUP)
    wait_until(lambda: set(run.status()["handlers"]) == set(handlers), TIMEOUT, "the new handlers")
    send(kafka, name, range(10, 20))
    for each in ("same", "new", "halted"):
        expect_rows(database, each, range(20))
    wait_until(lambda: len(landed(database, "changed")) == 20, TIMEOUT, "rows of changed")
    assert {row for row in landed(database, "changed") if row[1] is None} == {(n, None) for n in range(10, 20)}
    assert len(landed(database, "gone")) == 10
    assert rebalances(run, "same") == before
    assert run.metrics()['consumerd_buffer_limit_bytes{handler="same"}'] < limit
    assert not [sample for sample in run.metrics() if 'handler="gone"' in sample]
    (told,) = [json.loads(line) for line in run.logs().splitlines() if '"message":"reloaded"' in line]
    assert told["unchanged"] == ["same"]
    assert told["started_anew"] == ["changed", "halted"]
    assert (told["started"], told["removed"]) == (["new", "newer"], ["gone"])
    assert told["left_over"] == ["daemon.control is taken up when the process is restarted"]
    assert run.stop() == 0


def test_a_config_that_is_wrong_is_refused(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """All its mistakes are told, nothing changes, and the metrics say so until one is right; others may be paused."""
    name = topic()
    make_tables(database, "t")
    handlers = {"t": apart(name, "t")}
    run = daemon(handlers, CONTROL)
    right, at = reloads(run)
    assert right == 1
    wrong = run.config.parent / "handlers" / "wrong.toml"
    wrong.write_text('topic = ["a"]\n', encoding="utf-8")
    said = refused(run, "reload", code=78)
    assert 'wrong.toml:1: topic: unknown key; did you mean "topics"?' in said
    assert "table.name: is missing" in said
    assert reloads(run) == (0, at)
    assert list(run.status()["handlers"]) == ["t"]
    done(run, "pause", "t")
    done(run, "resume", "t")
    send(kafka, name)
    expect_rows(database, "t")
    wrong.unlink()
    assert done(run, "reload") == "the config was read again; unchanged: t\n"
    assert reloads(run) > (1, at)
    make_tables(database, *"abcdefgh")
    more = {each: apart(name, each) for each in "abcdefgh"}
    write_config(run.config.parent, run.config.read_text(encoding="utf-8"), more)
    # An eighth of the memory is in its consumer's queue, and its share is a ninth by now.
    assert "started anew: t" in done(run, "reload")
    share = run.metrics()['consumerd_buffer_limit_bytes{handler="t"}']
    assert run.metrics()['consumerd_buffer_limit_bytes{handler="a"}'] == share
    send(kafka, name, range(10, 20))
    for each in "ath":
        expect_rows(database, each, range(20))
    run.config.write_text(
        run.config.read_text(encoding="utf-8").replace("session.timeout.ms", "session.timeout.mz"), encoding="utf-8"
    )
    assert "session.timeout.mz" in refused(run, "reload", code=78)
    assert reloads(run)[0] == 0


def test_a_transforms_new_code_is_told(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Python is imported once: a reload says whose module has changed, and what takes it up."""
    name = topic()
    make_tables(database, "inside", "beside")
    code = "def transform(record):\n    return record\n"
    handlers = {
        "inside": apart(name, "inside", transform={"function": "mine:transform"}),
        "beside": apart(name, "beside", transform={"function": "theirs:transform", "workers": 1}),
    }
    run = daemon({**handlers, "mine.py": code, "theirs.py": code}, CONTROL)
    folder = run.config.parent / "handlers"
    for module in ("mine.py", "theirs.py"):
        (folder / module).write_text(code.replace("return record", "return record | {'n': -1}"), encoding="utf-8")
    said = done(run, "reload")
    assert f"{folder}/mine.py has changed since it was imported: a restart of the process takes it up" in said
    assert f"{folder}/theirs.py has changed since it was imported: consumerd restart beside takes it up" in said
    done(run, "restart", "beside")
    assert "theirs.py" not in done(run, "reload")
    send(kafka, name, [1])
    expect_rows(database, "inside", [1])
    wait_until(lambda: landed(database, "beside") == [(1, -1)], TIMEOUT, "the new code's row")


def test_a_halt_of_all_may_end_the_process(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """--exit-on-halt: status 1 once every handler is halted, and not before."""
    name = topic()
    make_tables(database, "t")
    run = daemon({"t": apart(name, "t"), "halted": apart(name, "absent")}, None, "--exit-on-halt", wait=False)
    wait_for_halt(run, "halted")
    send(kafka, name)
    expect_rows(database, "t")
    assert run.running
    execute(database, "DROP TABLE t")
    send(kafka, name)
    assert run.process.wait(TIMEOUT) == 1
    assert "every handler is halted: leaving" in run.logs()
