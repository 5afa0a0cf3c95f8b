"""An event loop with a clock of its own: time passes only when nothing is left to do, and chance is a seed.

Everything runs in one thread. Each callback belongs to a process (a context variable that asyncio hands on), so that a
process can be frozen (its callbacks wait, as under SIGSTOP) or killed (they never run). Callbacks that are ready run in
asyncio's order or, shuffled, in any order.
"""

from __future__ import annotations

import asyncio
import heapq
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from random import Random

EPOCH = 1_700_000_000.0
"""Wall-clock seconds when virtual time is 0."""
MAX_STEPS = 100_000
"""Callbacks after which a seed is taken to go in circles."""


class Owner:
    """A process: what its callbacks belong to."""

    def __init__(self) -> None:
        self.frozen = False
        self.dead = False
        self.held: list[asyncio.Handle] = []


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)
NEUTRAL = Context()
"""Where servers run: no process's fate holds them up."""


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        """Return virtual seconds."""
        return self.now

    def time(self) -> float:
        """Return virtual seconds of the wall clock."""
        return EPOCH + self.now

    def sleep(self, seconds: float) -> None:
        """Wait no time: who sleeps on a thread is driven by timers here."""


CLOCK = Clock()


class Stuck(Exception):  # noqa: N818 - what happened
    """Nothing is left that could happen, or too much happened."""


class Task(asyncio.Task[Any]):
    """A task with a hash that is the same in each run: sets of tasks are gone through in its order."""

    number = 0

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class Loop(asyncio.BaseEventLoop):
    """The loop of one seed. `at_step` calls back once so many callbacks have run: between any two of them."""

    _ready: Any
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, rng: Random, *, shuffled: bool) -> None:
        super().__init__()
        self.rng = rng
        self.steps = 0
        self._shuffled = shuffled
        self._tasks = 0
        self._due = 0
        self._callback: Callable[[], None] | None = None
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]
        CLOCK.now = 0.0

    def time(self) -> float:
        """Return virtual seconds."""
        return CLOCK.now

    def at_step(self, steps: int, callback: Callable[[], None]) -> None:
        """Call back after so many callbacks."""
        self._due, self._callback = self.steps + steps, callback

    def run_in_executor(self, _: object, func: Callable[..., Any], *args: object) -> asyncio.Future[Any]:
        """Run a function a while later."""
        future = self.create_future()

        def run() -> None:
            if not future.done():
                future.set_result(func(*args))

        self.call_later(self.rng.random() * 0.1, run)
        return future

    def thaw(self, owner: Owner) -> None:
        """Let a frozen process go on."""
        owner.frozen = False
        self._ready.extend(owner.held)
        owner.held.clear()

    def _make_task(self, loop: Loop, coro: Generator[Any, None, Any], context: Context | None = None) -> Task:
        Task.number = self._tasks = self._tasks + 1  # asked for its hash while it is made
        task = Task(coro, loop=loop, context=context)
        task.number = self._tasks
        return task

    def _run_once(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Stuck(f"{MAX_STEPS} callbacks")
        if self._callback is not None and self.steps >= self._due:
            callback, self._callback = self._callback, None
            NEUTRAL.run(callback)
        handle = self._next()
        if handle is None:
            return
        owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
        if owner is not None and (owner.frozen or owner.dead):
            owner.held.append(handle)
        elif not handle._cancelled:
            handle._run()

    def _next(self) -> asyncio.Handle | None:
        ready, scheduled = self._ready, self._scheduled
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
            if not scheduled:
                if self._stopping:  # type: ignore[attr-defined]
                    return None
                raise Stuck("nothing is left that could happen")
            CLOCK.now = max(CLOCK.now, scheduled[0].when())
        while scheduled and scheduled[0].when() <= CLOCK.now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]
            ready.append(timer)
        if self._shuffled and len(ready) > 1:
            chosen = int(self.rng.random() * len(ready))
            ready[0], ready[chosen] = ready[chosen], ready[0]
        handle: asyncio.Handle = ready.popleft()
        return handle

    def _process_events(self, event_list: object) -> None:
        """Know no events of the system."""

    def _write_to_self(self) -> None:
        """Need no waking: there is one thread."""
