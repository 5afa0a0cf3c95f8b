"""The members of all handlers: each is started, drained, replaced by a fresh one, paused and resumed here alone.

Whatever changes them does so one at a time (`changing`). A member that is replaced is drained and has left its group
before the fresh one joins. What it had counted, a pause, and what it was told to pass over go on in that one.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from consumerd import metrics, ways_on
from consumerd.errors import ConsumerdError
from consumerd.member import Member
from consumerd.ways_on import Accepted, OtherTopic

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from consumerd.config import Config, HandlerConfig
    from consumerd.ways_on import Wanted

VISIBLE_AFTER = 15.0
"""Seconds for a fresh member to join or to halt, before the operator is told that it has done neither yet."""
WRITES_WITHIN = 2.0
"""Seconds more in which one that had halted shows whether it halts again."""
LOOK_AGAIN_AFTER = 0.05
"""Seconds between two looks at that."""


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition is true, or for so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - a member's state has no event
                await asyncio.sleep(LOOK_AGAIN_AFTER)


class Code:
    """The files of transforms as they were when they were imported."""

    def __init__(self) -> None:
        self._imported: dict[Path, tuple[int, int]] = {}

    def note(self, handler: HandlerConfig) -> None:
        """Note what a member imports: in this process once for all, in processes of its own each time."""
        for file, state in _files(handler).items():
            if handler.transform is not None and handler.transform.workers:
                self._imported[file] = state
            else:
                self._imported.setdefault(file, state)

    def changed(self, handler: HandlerConfig) -> list[Path]:
        """Return the files that are not as they were."""
        return [file for file, state in _files(handler).items() if self._imported.get(file, state) != state]


def _files(handler: HandlerConfig) -> dict[Path, tuple[int, int]]:
    """Return the module of a handler's transform, if it is a file beside the handler, and when it was changed."""
    if handler.transform is None:
        return {}
    file = handler.path.parent.joinpath(*handler.transform.function.partition(":")[0].split("."))
    beside = (file.with_name(f"{file.name}.py"), file / "__init__.py")
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in beside if path.is_file()}


class Members:
    """One member for each handler, or for those that are named."""

    def __init__(self, config: Config, names: Collection[str], ended: Callable[[asyncio.Task[None]], None]) -> None:
        self.config = config
        self.names = names
        self.changing = asyncio.Lock()
        """Held by whoever changes the members."""
        self._ended = ended
        self._members: dict[str, Member] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.code = Code()
        handlers = self.wanted(config)
        for handler in handlers:
            self._members[handler.name] = Member(config, handler, config.daemon.max_buffered // len(handlers))
            self.code.note(handler)

    def __iter__(self) -> Iterator[Member]:
        """Go through the members."""
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        """Count them."""
        return len(self._members)

    def wanted(self, config: Config) -> list[HandlerConfig]:
        """Return the handlers of a config that are to run."""
        return [handler for handler in config.handlers if not self.names or handler.name in self.names]

    def start(self) -> None:
        """Start all."""
        for member in self:
            self._run(member)

    async def drain(self, members: Iterable[Member]) -> bool:
        """Drain members side by side, and end them; False when something was not written in time."""
        deadline = time.monotonic() + self.config.daemon.drain_timeout
        return all(await asyncio.gather(*(self._leave(member, deadline) for member in members)))

    def add(self, config: Config, handler: HandlerConfig, memory: int, accepted: Accepted | None = None) -> Member:
        """Start a member for a handler, in the place of the one that was drained."""
        before = self._members.get(handler.name)
        accepted = accepted or Accepted()
        if before is not None:
            for partition, offsets in before.accepted.left().items():
                if partition.topic not in accepted.topics:
                    accepted.skips.setdefault(partition, set()).update(offsets)
        member = self._members[handler.name] = Member(config, handler, memory, accepted)
        if before is not None:
            before.progress.forget()
            member.progress.totals = before.progress.totals
            if before.pause.on:
                member.pause.on = True
                member.progress.pause()
        self.code.note(handler)
        self._run(member)
        return member

    def remove(self, name: str) -> None:
        """Forget a member that was drained."""
        self._members.pop(name).progress.forget()
        metrics.forget(name)

    # What an operator asks for.

    async def pause(self, name: str) -> str:
        """Pause a handler; return what to tell."""
        async with self.changing:
            member = self._named(name)
            if member.progress.halted is not None:
                raise ConsumerdError(f"{name} is halted, there is nothing to pause: {member.progress.halted}")
            if member.pause.on:
                raise ConsumerdError(f"{name} is paused already")
            if await member.pause.begin():
                return f"{name} is paused, and what it had gathered is written"
            return f"{name} is paused; what it had gathered was not written in time, and is read again when it goes on"

    async def resume(self, name: str, want: Wanted) -> str:
        """End a pause, or go one of the ways on from a halt; return what to tell."""
        async with self.changing:
            member = self._named(name)
            halt = member.progress.halted
            if halt is None:
                if want:
                    raise ConsumerdError(
                        f"{name} is not halted but {member.progress.state}: there is nothing to accept"
                    )
                if not member.pause.on:
                    raise ConsumerdError(f"{name} is not paused but {member.progress.state}")
                member.pause.end()
                return f"{name} goes on"
            if not want:
                raise ConsumerdError(f"{name} is not paused but halted: {halt}")
            accepted = ways_on.accept(name, halt, want)
            member.pause.on = False
            return await self._replace(member, accepted)

    async def restart(self, name: str) -> str:
        """Replace a member by a fresh one; return what to tell."""
        async with self.changing:
            member = self._named(name)
            halt = member.progress.halted
            renewed = halt is not None and any(isinstance(way, OtherTopic) for way in halt.ways)
            if renewed and member.handler.checkpoint == "kafka":
                raise ConsumerdError(
                    f"{name} has halted, and Kafka has forgotten the offsets of the old topic: a restart would begin "
                    f"as `start` says, wherever that is: {halt}"
                )
            return await self._replace(member)

    def _named(self, name: str) -> Member:
        member = self._members.get(name)
        if member is None:
            raise ConsumerdError(f"there is no handler {name}; there are: {', '.join(sorted(self._members))}")
        return member

    async def _replace(self, member: Member, accepted: Accepted | None = None) -> str:
        name = member.handler.name
        drained = await self.drain([member])
        fresh = self.add(member.config, member.handler, member.share, accepted)
        late = "" if drained else "; what was not written in time is read again"
        await _until(lambda: fresh.progress.state not in {"starting", "waiting"}, VISIBLE_AFTER)
        if member.progress.halted is not None:  # it may halt again only when it writes
            await _until(lambda: bool(fresh.progress.halted or fresh.progress.last_commit), WRITES_WITHIN)
        if fresh.progress.halted is not None:
            raise ConsumerdError(f"{name} was started anew and has halted again: {fresh.progress.halted}")
        return f"{name} was started anew and is {fresh.progress.state}{late}"

    def _run(self, member: Member) -> None:
        task = asyncio.create_task(member.run(), name=member.handler.name)
        self._tasks[member.handler.name] = task
        task.add_done_callback(self._ended)

    async def _leave(self, member: Member, deadline: float) -> bool:
        """Drain a member and end it at once: one that has not begun must not join its group while others drain."""
        drained = await member.drain(deadline)
        await self._end(member, deadline)
        return drained

    async def _end(self, member: Member, deadline: float) -> None:
        """End a member's task; that of one that halts is leaving its group, and ends by itself."""
        task = self._tasks.get(member.handler.name)
        if task is None:
            return
        if member.progress.halted is not None:
            await asyncio.wait([task], timeout=max(1.0, deadline - time.monotonic()))
        task.cancel()
        await asyncio.wait([task])
