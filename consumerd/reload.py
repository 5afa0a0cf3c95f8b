"""A reload: handlers whose files say the same do not notice; the others are drained, and started as they say now.

What was drained has left its group before anything is started, so names may move from one handler to another. Each
handler's share of the memory follows their number: members that go on keep within a smaller one before anybody starts
on what they give up (P8), and one that cannot, for its table is locked, say, is drained and started anew.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from consumerd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from consumerd.config import Config, HandlerConfig
    from consumerd.member import Member
    from consumerd.members import Members

FIXED = ("listen", "control")
"""Keys of [daemon] that only another process takes up."""
SHARED = ("kafka", "postgres")
"""Tables that each handler is made with."""
SHRINK_TIMEOUT = 10.0
"""Seconds for members that go on to keep within a smaller share of the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What a reload has changed: names of handlers, and what takes more than a reload."""

    started: tuple[str, ...]
    started_anew: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    left_over: tuple[str, ...]

    def sentence(self) -> str:
        """Return it in words."""
        told = [
            f"{what.replace('_', ' ')}: {', '.join(names)}"
            for what, names in asdict(self).items()
            if names and what != "left_over"
        ]
        return "; ".join(["the config was read again", *told, *self.left_over])


async def apply(members: Members, new: Config) -> Reloaded:
    """Have the members be as a config says, for who holds `changing`; raises ConfigError where it leaves none."""
    wanted = {handler.name: handler for handler in members.wanted(new)}
    if not wanted:
        raise ConfigError(f"none of the handlers is left that --handler names: {', '.join(members.names)}")
    old, members.config = members.config, _with_fixed(new, members.config)
    running = {member.handler.name: member for member in members}
    kept = [member for name, member in running.items() if _is_same(member, wanted.get(name), old, new)]
    names = {member.handler.name for member in kept}
    await members.drain(member for name, member in running.items() if name not in names)
    share = new.daemon.max_buffered // len(wanted)
    crowded = await _resize(kept, members.config, share)
    await members.drain(crowded)
    names -= {member.handler.name for member in crowded}
    for name in running.keys() - wanted.keys():
        members.remove(name)
    for name in wanted.keys() - names:
        members.add(members.config, wanted[name], share)
    return Reloaded(
        started=_sorted(wanted.keys() - running.keys()),
        started_anew=_sorted((running.keys() & wanted.keys()) - names),
        removed=_sorted(running.keys() - wanted.keys()),
        unchanged=_sorted(names),
        left_over=tuple(_left_over(members, old, new)),
    )


def _is_same(member: Member, wanted: HandlerConfig | None, old: Config, new: Config) -> bool:
    """Whether a member may go on as it is. One that reads by a pattern what is a dead-letter topic now may not."""
    same = all(getattr(old, table) == getattr(new, table) for table in SHARED)
    letters = [handler.dead_letter.topic for handler in new.handlers]
    return same and member.handler == wanted and not member.reads(letters)


async def _resize(members: Iterable[Member], config: Config, share: int) -> list[Member]:
    """Give members another share of the memory; return those that do not come to keep within it."""
    members = list(members)
    deadline = time.monotonic() + SHRINK_TIMEOUT
    for member in members:
        member.config = config
    fits = await asyncio.gather(*(member.resize(share, deadline) for member in members))
    return [member for member, fit in zip(members, fits, strict=True) if not fit]


def _with_fixed(new: Config, old: Config) -> Config:
    """Return a config with what this process cannot change as it is."""
    fixed: dict[str, Any] = {key: getattr(old.daemon, key) for key in FIXED}
    return new.model_copy(update={"daemon": new.daemon.model_copy(update=fixed)})


def _left_over(members: Members, old: Config, new: Config) -> list[str]:
    """Say what the files hold that is not in use yet."""
    told = [
        f"daemon.{key} is taken up when the process is restarted"
        for key in FIXED
        if getattr(old.daemon, key) != getattr(new.daemon, key)
    ]
    for member in members:
        for file in members.code.changed(member.handler):
            again = f"consumerd restart {member.handler.name}"
            transform = member.handler.transform
            how = again if transform is not None and transform.workers else "a restart of the process"
            told.append(f"{file} has changed since it was imported: {how} takes it up")
    return told


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))
