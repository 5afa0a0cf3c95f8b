"""A redrive waits in outages, however long they are."""

from consumerd.commands.dlq.redrive import Waits
from consumerd.config import RetryConfig
from consumerd.errors import Outage


async def test_an_outage_of_any_length_is_waited_for() -> None:
    """P4: the wait that doubles with each try stays one after some thousand."""
    waits = Waits(RetryConfig(initial=0.0001, max=0.0002))
    for _ in range(1_100):
        await waits.out(Outage("postgres", "gone"))
    assert not waits.stop.is_set()
