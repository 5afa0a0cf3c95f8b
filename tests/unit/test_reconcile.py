"""Where a member goes on when its checkpoint is elsewhere, and what it knows of it then."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from consumerd.breaker import Breaker
from consumerd.checkpoint import Lease, Stand
from consumerd.reconcile import Reconciler
from consumerd.types import Tally
from tests.unit.test_breaker import CONFIG, P, batch


def test_what_is_judged_again_is_counted_once() -> None:
    """Where Postgres went back the breaker counts what the checkpoint has, and forgets what comes again."""
    breaker = Breaker(CONFIG)
    breaker.judge(batch(90, 9), 0.0)
    delivered: dict[Any, Lease] = {}

    async def deliver(leases: dict[Any, Lease]) -> None:
        delivered.update(leases)

    member = SimpleNamespace(
        release=lambda _: None,
        breaker=breaker,
        assignment=SimpleNamespace(deliver=deliver),
        handler=SimpleNamespace(name="orders"),
    )
    lease = Lease(epoch=1, next_offset=90, max_offset=90)
    asyncio.run(Reconciler(cast("Any", member))._return_to(P, lease, Stand(1, 40, Tally(40, 4))))
    assert 40 == delivered[P].next_offset
    assert breaker.tally(P)[:2] == (40, 4)
