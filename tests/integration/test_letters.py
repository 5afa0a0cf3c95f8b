"""The producer of letters, with no broker behind it."""

import asyncio
from pathlib import Path

import pytest

from consumerd.accumulator import Batch
from consumerd.config import HandlerConfig, KafkaConfig
from consumerd.dead_letter import DeadLetters
from consumerd.encode import TOMBSTONE
from consumerd.errors import Outage
from consumerd.types import TopicPartition
from tests.servers.process import free_port
from tests.unit.test_accumulator import Fake

HANDLER = {
    "name": "events",
    "path": Path("events.toml"),
    "topics": ["events"],
    "table": {"name": "events", "write": "append"},
}


async def test_a_stop_while_a_letter_is_under_way_is_no_defect() -> None:
    """P4: a producer that is closed under a letter which no broker has taken is an outage, not a halt."""
    letters = DeadLetters(
        KafkaConfig(bootstrap_servers=f"127.0.0.1:{free_port()}"), HandlerConfig.model_validate(HANDLER)
    )
    batch = Batch(
        partition=TopicPartition("events", 0),
        first_offset=0,
        next_offset=1,
        messages=[Fake(0)],
        size=1,
        reason="age",
        gathered_since=0.0,
        refused={0: TOMBSTONE},
    )
    sending = asyncio.create_task(letters.send(batch, 1))
    while not batch.on_their_way:  # noqa: ASYNC110 - it is set on a thread
        await asyncio.sleep(0.01)
    await asyncio.to_thread(letters.close)
    with pytest.raises(Outage):
        await sending
