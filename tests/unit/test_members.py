"""The members of all handlers are drained side by side, and none begins meanwhile."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumerd import members as module
from consumerd.members import Members


class Slow:
    """A member whose drain takes a while."""

    def __init__(self, name: str) -> None:
        self.handler, self.progress = SimpleNamespace(name=name), SimpleNamespace(halted=None)
        self.may_end, self.draining = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Stay."""
        await asyncio.Event().wait()

    async def drain(self, deadline: float) -> bool:  # noqa: ARG002 - as Member
        """Wait until it may end."""
        self.draining.set()
        await self.may_end.wait()
        return True


class Waiting(Slow):
    """A member that waits for its database, and joins its group once that is there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.database, self.joined = asyncio.Event(), False

    async def run(self) -> None:
        """Join, and stay."""
        await self.database.wait()
        self.joined = True
        await super().run()

    async def drain(self, deadline: float) -> bool:  # noqa: ARG002 - as Member
        """Have nothing to drain: it has not begun."""
        return True


async def test_a_member_that_has_not_begun_does_not_begin_while_others_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: it would join its group, and be ended without leaving it: its partitions would be nobody's."""
    slow, waiting = Slow("slow"), Waiting("waiting")
    made: dict[str, Any] = {"slow": slow, "waiting": waiting}
    monkeypatch.setattr(module, "Member", lambda _, handler, __: made[handler.name])
    handlers = [SimpleNamespace(name=name, transform=None) for name in made]
    config: Any = SimpleNamespace(handlers=handlers, daemon=SimpleNamespace(max_buffered=2, drain_timeout=30.0))
    members = Members(config, (), lambda _: None)
    members.start()
    await asyncio.sleep(0)
    drained = asyncio.create_task(members.drain(cast("Any", [slow, waiting])))
    await slow.draining.wait()
    waiting.database.set()
    slow.may_end.set()
    assert await drained
    assert not waiting.joined
