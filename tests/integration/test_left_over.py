"""What commands left unfinished, as gauges of the daemon."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from consumerd import left_over, loader, metrics, postgres
from consumerd.commands.replays import Replays
from consumerd.config import Config
from consumerd.letters import ensure_letters
from tests.servers.daemon import write_config
from tests.servers.sql import execute

GROUP = "consumerd.left"
LETTER = """\
INSERT INTO consumerd.letters
    (group_id, topic, partition, source_offset, status, attempts, epoch, failed_at, run, changed_by)
VALUES ('{}', 't', 0, {}, '{}', 2, 1, now(), gen_random_uuid(), 'somebody')"""
REPLAY = """\
INSERT INTO consumerd.replays (handler, group_id, range, target, seen_at, finished_at, failed)
VALUES ('left', 'consumerd.left', gen_random_uuid()::text, 't', now() - interval '{}', {}, {})"""
NOTHING = {"failed": 0, "interrupted": 0, "letters": 0}


def config(database: str, folder: Path) -> Config:
    """Return a daemon's config with the handler `left`."""
    handlers = {"left": {"topics": ["t"], "table": {"name": "t", "write": "append"}}}
    return loader.load(
        write_config(folder, {"kafka": {"bootstrap_servers": "x:1"}, "postgres": {"dsn": database}}, handlers)
    )


def gauges() -> dict[str, float]:
    """Return what the gauges say of the handler."""
    found: dict[str, Any] = {state: metrics.replays.labels("left", state)._value.get() for state in metrics.REPLAYS}
    return {**found, "letters": metrics.letters_failed_again.labels("left")._value.get()}


async def test_what_is_unfinished(database: str, tmp_path: Path) -> None:
    """Replays that failed, or were seen last a minute ago, and letters that failed again are counted by handler."""
    it = config(database, tmp_path)
    await left_over.look(it.postgres, it.handlers)
    assert gauges() == NOTHING
    conn = await postgres.connect(it.postgres, "test")
    await Replays(conn, "consumerd", GROUP).make()
    await ensure_letters(conn, "consumerd")
    await conn.close()
    await left_over.look(it.postgres, it.handlers)
    assert gauges() == NOTHING
    for row in [
        ("1 s", "NULL", "'it halted'"),
        ("1 h", "NULL", "NULL"),
        ("2 h", "NULL", "NULL"),
        ("1 s", "NULL", "NULL"),
        ("1 h", "now()", "NULL"),
    ]:
        execute(database, REPLAY.format(*row))
    for offset, status in enumerate(("failed", "redriven", "discarded", "failed", "failed")):
        execute(database, LETTER.format(GROUP, offset, status))
    execute(database, LETTER.format("another", 0, "failed"))
    await left_over.look(it.postgres, it.handlers)
    assert gauges() == {"failed": 1, "interrupted": 2, "letters": 3}


async def test_what_cannot_be_looked_at(database: str, tmp_path: Path) -> None:
    """A daemon that may not look, or finds something else there, goes on."""
    it = config(database, tmp_path)
    execute(database, "CREATE SCHEMA consumerd; CREATE TABLE consumerd.replays (nothing int)")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(left_over.watch(lambda: it.postgres, lambda: list(it.handlers)), 1)
