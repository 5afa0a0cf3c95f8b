"""Redriving letters: which are taken, what becomes of each, and that none is written twice."""

import asyncio
import datetime as dt
import os
import signal
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from consumerd import checkpoint, letters
from consumerd.commands.dlq.discard import discard
from consumerd.commands.dlq.redrive import Report, Waits, batch_of
from consumerd.commands.dlq.straight import Straight
from consumerd.commands.dlq.survey import Filter, chosen, source, survey
from consumerd.errors import Halt
from tests.conftest import MakeTopic
from tests.integration.dlq import LONG_AGO, OPEN, Dlq
from tests.servers.kafka import KafkaServer
from tests.servers.sql import execute

LATER = LONG_AGO + dt.timedelta(seconds=1)
TABLE = "CREATE TABLE t (id bigint, n bigint)"
UPSERT = {"name": "t", "write": "upsert", "key": ["id"]}
DYING = """\
CREATE TABLE dying ();
CREATE FUNCTION dies() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
    IF to_regclass(''dying'') IS NOT NULL THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NEW; END';
CREATE TRIGGER dies AFTER INSERT ON t FOR EACH ROW WHEN (NEW.id = 5) EXECUTE FUNCTION dies()"""


@pytest.fixture
def dlq(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Dlq:
    """Make a table, a topic and a dead-letter topic."""
    execute(database, TABLE)
    letters_topic = topic(prefix="letters", config={"retention.ms": "-1"})
    return Dlq(kafka, database, tmp_path, topic(2, config={"retention.ms": "-1"}), letters_topic)


def row(number: int) -> dict[str, int]:
    """Return a value that fits the table."""
    return {"id": number, "n": number}


async def test_two_at_once(dlq: Dlq) -> None:
    """P2: of two redrives at the same time one finds the letters taken: each row is there once."""
    await dlq.start()
    for number in range(20):
        dlq.write(number, row(number) if number % 2 else {"id": "no"})
    reports = await asyncio.gather(dlq.redrive(run=1), dlq.redrive(run=2))
    assert [(number, number) for number in range(1, 20, 2)] == dlq.rows()
    assert (10, 10, 20) == tuple(
        sum(counts) for counts in zip(*((r.redriven, r.failed.total(), r.taken) for r in reports), strict=True)
    )
    assert {("redriven", 2), ("failed", 2)} == set((await dlq.statuses()).values())


async def test_letters_of_one_message_are_one(dlq: Dlq) -> None:
    """P2: a message whose letter was written twice, before a redrive, is one letter and one row."""
    await dlq.start()
    for number in (0, 1, 0, 1):
        dlq.write(number, row(number), failed_at=LATER if number else LONG_AGO)
    dlq.write(0, row(0), failed_at=LATER)
    assert 2 == (await dlq.redrive()).redriven
    assert 0 == (await dlq.redrive()).wanted
    assert [(0, 0), (1, 1)] == dlq.rows()


async def test_a_letter_written_after_its_redrive(dlq: Dlq) -> None:
    """P1: offsets were set back and the message failed again: its new letter is open, with the attempts counted on."""
    await dlq.start()
    dlq.write(0, row(0))
    await dlq.redrive()
    execute(dlq.database, "TRUNCATE t")
    dlq.write(0, row(0), epoch=1)
    assert {0: ("open", 2)} == await dlq.statuses()
    assert 1 == (await dlq.redrive(run=1)).redriven
    assert [(0, 0)] == dlq.rows()
    assert {0: ("redriven", 3)} == await dlq.statuses()


async def test_a_late_letter_of_a_member_that_was_stopped(dlq: Dlq) -> None:
    """P2: what a zombie still writes, after the redrive, under an epoch that is over, is no new letter."""
    await dlq.start()
    execute(dlq.database, "UPDATE consumerd.checkpoint SET epoch = 3")
    dlq.write(0, row(0), epoch=1)
    await dlq.redrive()
    dlq.write(0, row(0), epoch=2, failed_at=LATER)
    assert {0: ("redriven", 2)} == await dlq.statuses()
    assert 0 == (await dlq.redrive(run=1)).wanted
    assert [(0, 0)] == dlq.rows()


async def test_what_the_handler_reads_again_is_left_to_it(dlq: Dlq) -> None:
    """P2: a letter whose message is not behind the checkpoint (a crash between both) is not redriven."""
    await dlq.start()
    dlq.write(0, row(0))
    dlq.write(1, row(1))
    dlq.checkpoint(1)
    report = await dlq.redrive()
    assert (1, 1) == (report.redriven, report.unsettled)
    dlq.checkpoint(2)
    report = await dlq.redrive()
    assert (1, 0) == (report.redriven, report.unsettled)
    assert [(0, 0), (1, 1)] == dlq.rows()


async def test_the_checkpoint_is_looked_at_by_the_write(dlq: Dlq) -> None:
    """P2: offsets that are set back after the letters were read are noticed by the transaction."""
    await dlq.start()
    dlq.write(0, row(0))
    found, topic = await survey(dlq.config, dlq.handler, dlq.state())
    wanted = {(each.place, each.offset): each for each in found.standings(Filter())}
    ((letter, _),) = chosen(topic, dlq.handler.group_id, wanted)()
    topic.close()
    dlq.checkpoint(0)
    report, waits = Report(), Waits(dlq.handler.retry)
    way = Straight(dlq.config, dlq.handler, dlq.state(), waits, into=None, execute=True)
    await way.start({dlq.topic})
    await way.settle(batch_of([letter]), report)
    assert (0, 1) == (report.redriven, report.taken)
    dlq.checkpoint(1)
    for _ in range(2):  # the second as after a COMMIT that was not answered
        await way.settle(batch_of([letter]), report)
    await way.close()
    assert (2, 1) == (report.redriven, report.taken)
    assert [(0, 0)] == dlq.rows()


async def test_a_topic_that_was_made_again(dlq: Dlq) -> None:
    """P1: offset 0 of a topic, and of the one that was made in its place, are two letters, neither read again."""
    await dlq.start()
    for offset, topic_id in [(0, "before"), (5, "before"), (0, "id"), (5, "id")]:
        dlq.write(offset, row(offset), topic_id=topic_id)
    dlq.checkpoint(1)  # of the new topic: of the old one nothing is ever read again
    report = await dlq.redrive()
    assert (3, 1) == (report.redriven, report.unsettled)
    assert [(0, 0), (0, 0), (5, 5)] == dlq.rows()


async def test_a_table_that_is_altered_meanwhile(dlq: Dlq) -> None:
    """P4: what fits the table as it is when it is written is a row, though it did not fit when the table was read."""
    await dlq.start()
    for number, value in enumerate(("a", "b")):
        dlq.write(number, {"id": number, "n": value})
    waits, report, state = Waits(dlq.handler.retry), Report(), dlq.state()
    way = Straight(dlq.config, dlq.handler, state, waits, into=None, execute=True)
    await way.start({dlq.topic})
    found, topic = await survey(dlq.config, dlq.handler, state)
    wanted = {(each.place, each.offset): each for each in found.standings(Filter())}
    first, second = (letter for letter, _ in chosen(topic, dlq.handler.group_id, wanted)())
    topic.close()
    await way.settle(batch_of([first]), report)
    execute(dlq.database, "ALTER TABLE t ALTER n TYPE text")
    await way.settle(batch_of([second]), report)
    await way.close()
    assert [(1, "b")] == dlq.rows()
    assert {0: ("failed", 2), 1: ("redriven", 2)} == await dlq.statuses()


async def test_an_upsert_without_a_guard_is_refused(dlq: Dlq) -> None:
    """An older letter must not undo a newer row: without `version`, or where tombstones delete, another table it is."""
    execute(dlq.database, "CREATE UNIQUE INDEX ON t (id); CREATE TABLE other (LIKE t INCLUDING ALL)")
    await dlq.start(table=UPSERT)
    dlq.write(0, row(0))
    for into in (None, "t", "public.t"):
        with pytest.raises(Halt, match="the upsert into t has no `version`: one could undo a newer row"):
            await dlq.redrive(into=into)
    deletes = {"version": "n", "tombstones": "delete", "tombstone_key": {"id": "@key"}}
    dlq.configure(table=UPSERT | deletes, key_format="json")
    with pytest.raises(Halt, match='the upsert into t has tombstones = "delete"'):
        await dlq.redrive()
    dlq.configure(table=UPSERT)
    assert 1 == (await dlq.redrive(into="other")).redriven
    assert ([], [(0, 0)]) == (dlq.rows(), dlq.rows("other"))


async def test_an_upsert_with_a_version(dlq: Dlq) -> None:
    """A letter of a lower version leaves the newer row as it is, and is redriven all the same."""
    execute(dlq.database, "CREATE UNIQUE INDEX ON t (id); INSERT INTO t VALUES (1, 5), (2, 5)")
    await dlq.start(table=UPSERT | {"version": "n"})
    for offset, (number, version) in enumerate([(1, 4), (2, 6), (3, 1)]):
        dlq.write(offset, {"id": number, "n": version})
    assert 3 == (await dlq.redrive()).redriven
    assert [(1, 5), (2, 6), (3, 1)] == dlq.rows()


async def test_what_the_handler_skips(dlq: Dlq) -> None:
    """`where`, tombstones and existing rows are passed over as the handler does, and their letters are done with."""
    execute(dlq.database, "CREATE UNIQUE INDEX ON t (id); INSERT INTO t VALUES (1, 0)")
    await dlq.start(where="n < 5", table={"name": "t", "write": "skip-existing"})
    for offset, value in enumerate([row(0), row(1), row(7), None]):
        dlq.write(offset, value)
    report = await dlq.redrive()
    assert (4, 1, {"exists": 1, "where": 1, "tombstone": 1}) == (report.redriven, report.rows, report.skipped)
    assert [(0, 0), (1, 0)] == dlq.rows()


async def test_a_transform(dlq: Dlq) -> None:
    """A letter goes through the handler's transform: several rows, or one more failure, all or none."""
    execute(dlq.database, "ALTER TABLE t ADD CHECK (n <> 13)")
    (dlq.folder / "handlers").mkdir()
    (dlq.folder / "handlers" / "t.py").write_text(
        "def f(r):\n    return [{'id': r.offset, 'n': n} for n in r['all']]\n"
    )
    await dlq.start(transform={"function": "t:f"})
    for offset, numbers in enumerate([[1, 2], [3, 13], 5]):
        dlq.write(offset, {"all": numbers})
    report = await dlq.redrive()
    assert (1, 2) == (report.redriven, report.rows)
    assert {("rejected", "psycopg.errors.CheckViolation"): 1, ("transform", "TypeError"): 1} == report.failed
    assert [(0, 1), (0, 2)] == dlq.rows()


async def test_poison_action_halt(dlq: Dlq) -> None:
    """A handler that passes no poison over stops at the first letter that fails again, and those before it are rows."""
    await dlq.start(poison={"action": "halt"})
    for number in range(5):
        dlq.write(number, row(number) if number != 2 else {"id": "no"})
    report = await dlq.redrive()
    assert (2, 1, 2) == (report.redriven, report.failed.total(), report.left)
    assert report.stopped is not None
    assert f"{dlq.topic}:0@2 failed again: Expected `int | null`, got `str`" in report.stopped
    assert [(0, 0), (1, 1)] == dlq.rows()


async def test_a_dry_run(dlq: Dlq) -> None:
    """It says what would be redriven and what would fail again, Postgres's refusals included, and changes nothing."""
    execute(dlq.database, "ALTER TABLE t ADD CHECK (n <> 13)")
    await dlq.start()
    for number in (1, 13, 2):
        dlq.write(number, row(number))
    report = await dlq.redrive(execute=False)
    assert (2, 2) == (report.redriven, report.rows)
    assert {("rejected", "psycopg.errors.CheckViolation"): 1} == report.failed
    assert [] == dlq.rows()
    assert [] == execute(dlq.database, "SELECT 1 FROM pg_class WHERE relname = 'letters'")


async def test_filters(dlq: Dlq) -> None:
    """Reason, class of error, time and source choose letters; what was redriven by parts is whole, and none twice."""
    await dlq.start()
    dlq.checkpoint(100, partition=1)
    for number in range(6):
        dlq.write(number, row(number), failed_at=LONG_AGO + dt.timedelta(minutes=number), partition=number // 4)
    some = dlq.topic
    for which, offsets in [
        (Filter(sources=(source(f"{some}:0@1-2"), source(f"{some}:1@4"))), [1, 2, 4]),
        (Filter(sources=(source(f"{some}:1"),)), [4, 5]),
        (Filter(sources=(source("other"),)), []),
        (Filter(start=LONG_AGO + dt.timedelta(minutes=3), end=LONG_AGO + dt.timedelta(minutes=4)), [3]),
        (Filter(reasons=frozenset({"range"})), []),
        (Filter(errors=frozenset({"ValidationError"})), list(range(6))),
        (Filter(errors=frozenset({"msgspec.ValidationError"}), reasons=frozenset({"type"})), list(range(6))),
    ]:
        assert offsets == [each.offset for each in await dlq.standings(which)]
    assert 3 == (await dlq.redrive(Filter(sources=(source(f"{some}:0@1-2"), source(f"{some}:1@4"))))).redriven
    assert 3 == (await dlq.redrive()).redriven
    assert [(number, number) for number in range(6)] == dlq.rows()


async def test_an_outage_is_waited_for_and_a_signal_ends_it(dlq: Dlq, caplog: pytest.LogCaptureFixture) -> None:
    """P4: a connection that is lost again and again fails no letter; SIGINT ends the run, and another finishes it."""
    execute(dlq.database, DYING)
    await dlq.start()
    for number in range(10):
        dlq.write(number, row(number))

    async def waiting(reports: int) -> None:
        async with asyncio.timeout(30):
            while sum("waiting" in record.message for record in caplog.records) < reports:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    run = asyncio.create_task(dlq.redrive())
    await waiting(1)
    os.kill(os.getpid(), signal.SIGINT)
    report = await run
    assert (0, 10, "stopped by a signal; the same command goes on") == (report.redriven, report.left, report.stopped)
    run = asyncio.create_task(dlq.redrive(run=1))
    await waiting(2)
    execute(dlq.database, "DROP TABLE dying")
    assert 10 == (await run).redriven
    assert [(number, number) for number in range(10)] == dlq.rows()


async def test_discarded(dlq: Dlq) -> None:
    """A discarded letter is not redriven, its row says by whom; one that was redriven is not discarded."""
    await dlq.start()
    for number in range(3):
        dlq.write(number, row(number))
    await dlq.redrive(Filter(sources=(source(f"{dlq.topic}:0@2"),)))
    only = Filter(sources=(source(f"{dlq.topic}:0@0"),))
    wanted, moved = await discard(dlq.config, dlq.handler, dlq.state(), only, execute=False)
    assert (1, 0, ("open", 1)) == (len(wanted), moved, (await dlq.statuses())[0])
    both = Filter(statuses=frozenset(OPEN))
    wanted, moved = await discard(dlq.config, dlq.handler, dlq.state(), both, execute=True)
    assert (2, 2) == (len(wanted), moved)
    assert {0: ("discarded", 1), 1: ("discarded", 1), 2: ("redriven", 2)} == await dlq.statuses()
    assert [("ada@there",)] == execute(dlq.database, "SELECT DISTINCT changed_by FROM consumerd.letters")
    assert 0 == (await dlq.redrive()).wanted
    assert [(2, 2)] == dlq.rows()


async def test_at_least_once(dlq: Dlq) -> None:
    """A handler that keeps no checkpoint in Postgres has its letters' states there all the same."""
    dlq.configure(checkpoint="kafka")
    dlq.write(0, row(0))
    assert 1 == (await dlq.redrive()).redriven
    assert {0: ("redriven", 2)} == await dlq.statuses()
    assert [(0, 0)] == dlq.rows()
    dlq.write(0, row(0), failed_at=LATER)
    assert {0: ("open", 2)} == await dlq.statuses()


async def test_a_role_with_the_grants_alone(dlq: Dlq) -> None:
    """A role that may not make the table is told who may, and needs no more than the printed grants."""
    await dlq.start()
    dlq.write(0, row(0))
    role = f"loader_{dlq.topic.rpartition('-')[2]}"
    execute(dlq.database, f"CREATE ROLE {role} LOGIN; GRANT INSERT ON t TO {role}")
    owner, names = dlq.database, {"schema": sql.SQL("consumerd"), "role": sql.SQL(role)}
    try:
        execute(owner, sql.SQL(checkpoint.GRANTS).format(**names).as_string())
        dlq.database = make_conninfo(owner, user=role)
        dlq.configure()
        with pytest.raises(Halt, match=r"cannot make table consumerd.letters: .*`consumerd setup --sql`"):
            await dlq.redrive()
        dlq.database = owner
        execute(owner, sql.SQL(letters.LETTERS + letters.GRANTS).format(**names).as_string())
        assert 1 == (await dlq.redrive()).redriven
        assert {0: ("redriven", 2)} == await dlq.statuses()
        assert [(0, 0)] == dlq.rows()
    finally:
        execute(owner, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_no_checkpoint_is_behind_nothing(dlq: Dlq) -> None:
    """P2: where the database has no checkpoints (another one, or emptied) the handler reads all again: none goes."""
    dlq.configure()
    dlq.write(0, row(0))
    report = await dlq.redrive()
    assert (0, 1) == (report.wanted, report.unsettled)
