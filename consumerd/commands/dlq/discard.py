"""`consumerd dlq discard`: letters that nobody wants redriven. Nothing is deleted from the topic."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from consumerd import postgres
from consumerd.commands.dlq.survey import survey
from consumerd.letters import Change, ensure_letters

if TYPE_CHECKING:
    from consumerd.commands.dlq.survey import Filter, Standing
    from consumerd.config import Config, HandlerConfig
    from consumerd.letters import Letters

AT_ONCE = 10_000
"""Letters of one transaction."""


async def discard(
    config: Config, handler: HandlerConfig, letters: Letters, which: Filter, *, execute: bool
) -> tuple[list[Standing], int]:
    """Return the letters that a filter takes, and how many of them are discarded now; raises Outage, Halt."""
    found, topic = await survey(config, handler, letters)
    topic.close()
    wanted = list(found.standings(which))
    if not execute or not wanted:
        return wanted, 0
    moved = 0
    conn = await postgres.connect(config.postgres, f"consumerd/dlq-{handler.name}")
    try:
        await ensure_letters(conn, config.postgres.schema_name)
        rest = iter(wanted)
        while some := list(islice(rest, AT_ONCE)):
            changes = [
                Change(
                    place=letter.place,
                    offset=letter.offset,
                    was="open" if letter.state is None else letter.state.status,
                    tried=letter.attempts,
                    status="discarded",
                    epoch=letter.noted.epoch,
                    failed_at=letter.failed_at,
                )
                for letter in some
            ]
            async with postgres.transaction(conn, letters.move(changes, None)) as answers:
                moved += len(answers[0])
    finally:
        await conn.close()
    return wanted, moved
