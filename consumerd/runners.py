"""Where a transform is called: in a thread of the daemon, or in a process of its own.

Either answers one request at a time, beside the event loop. A call that outlasts its deadline is noticed by looking,
now and then, whether the record that is noted is still the same. Each look counts as the time between two, so a daemon
that was stopped for a while (or its machine) does not take that for a call's. A process is killed then; a thread cannot
be.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec

import consumerd
from consumerd.errors import Halt, Outage
from consumerd.transform import NONE, Answer, load
from consumerd.worker import CELL, LENGTH, Setup

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.transform import Request, Transform

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOKS: Final = 10
"""Looks at a call within its deadline."""
START_TIMEOUT: Final = 60.0
"""Seconds that the import of a transform's module may take."""
START_VISIBLE_AFTER: Final = 3.0
"""Seconds of an import after which the log says what is waited for."""
EXIT_TIMEOUT: Final = 5.0
"""Seconds for a process to end by itself once its socket is closed."""


class Lost(Exception):  # noqa: N818 - what has become of the call
    """A call did not come back: `at` is the index of its record, ALL for a call with all, NONE where there was none."""

    def __init__(self, at: int, error: str, how: str) -> None:
        super().__init__(how)
        self.at = at
        self.error = error
        """Class that tells of it in a letter."""


class Runner(Protocol):
    """One place where a transform is called."""

    async def start(self) -> None:
        """Import the function; raises Halt, and Outage where that may succeed another time."""

    async def answer(self, request: Request) -> Answer:
        """Call the function; raises Lost, after which it must be started again, Halt where it cannot be."""

    async def close(self) -> None:
        """Let go of it."""


class InThread:
    """A thread of the daemon's own, where the module is imported too: its objects never see another."""

    def __init__(self, function: str, folder: Path, timeout: float) -> None:
        self._function, self._folder, self._timeout = function, folder, timeout
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._transform: Transform
        self._noted = NONE

    async def start(self) -> None:
        """Import the function."""
        # A daemon thread: a call that never comes back must not keep the process from its end.
        threading.Thread(target=self._run, name=f"transform {self._function}", daemon=True).start()
        loaded = self._do(lambda: load(self._function, self._folder))
        try:
            self._transform = await _imported(loaded, self._function)
        except TimeoutError:
            raise _late_import(self._function) from None

    async def answer(self, request: Request) -> Answer:
        """Call the function."""
        self._noted = NONE
        answer = self._do(lambda: self._transform.answer(request, self._note))
        return await _watched(answer, self._timeout, lambda: self._noted)

    async def close(self) -> None:
        """End the thread once its call has come back."""
        self._tasks.put(None)

    def _note(self, index: int) -> None:
        self._noted = index

    def _do(self, task: Callable[[], Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._tasks.put((task, future))
        return future

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            task, future = entry
            result = error = None
            try:
                result = task()
            except BaseException as raised:  # noqa: BLE001 - whoever awaits it gets it
                error = raised
            with suppress(RuntimeError):  # the loop is closed
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)


class InProcess:
    """A process of its own, which can be ended with the call that it is in."""

    def __init__(self, function: str, folder: Path, timeout: float) -> None:
        self._setup, self._timeout = Setup(function, str(folder)), timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._noted: memoryview[int]

    async def start(self) -> None:
        """Start a process and have it import the function."""
        ours, theirs = socket.socketpair()
        with theirs, _memory() as cell:
            cell.truncate(CELL.size)
            self._noted = memoryview(mmap.mmap(cell.fileno(), CELL.size)).cast("q")
            self._process = _spawn(theirs.fileno(), cell.fileno())
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        try:
            answer = await _imported(asyncio.ensure_future(self._ask(self._setup)), self._setup.function)
        except TimeoutError:
            await self._end()
            raise _late_import(self._setup.function) from None
        except (OSError, EOFError) as error:
            code = await self._end()
            if code < 0:  # whoever did that (an operator, the kernel for want of memory) need not do it again
                what = f"the worker process that was to import {self._setup.function} {_how(code)}"
                raise Outage("transform", f"{what}; it is started again") from error
            raise Halt(
                "transform",
                f"the import of {self._setup.function} ended its process: {_how(code)}: a module must not do that",
            ) from error
        except BaseException:  # cancelled
            await self._end()
            raise
        if answer.halt is not None:
            await self._end()
            raise Halt("transform", answer.halt)

    async def answer(self, request: Request) -> Answer:
        """Call the function; a process that was lost is replaced first. Raises Outage where that cannot be now."""
        if self._process is None:
            try:
                await self.start()
            except OSError as error:
                raise Outage("transform", f"no worker process can be started: {error.strerror}") from error
        self._noted[0] = NONE
        try:
            return await _watched(asyncio.ensure_future(self._ask(request)), self._timeout, lambda: self._noted[0])
        except (OSError, EOFError) as error:
            at = self._noted[0]
            raise Lost(at, "ChildProcessError", f"the worker process {_how(await self._end())}") from error
        except BaseException:  # late, or cancelled: its answer would be taken for the next one's
            await self._end()
            raise

    async def close(self) -> None:
        """Let the process end by itself; kill one that does not."""
        if self._process is not None and self._writer is not None:
            self._writer.close()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, EXIT_TIMEOUT)
            await self._end()

    async def _ask(self, frame: Setup | Request) -> Answer:
        assert self._writer is not None  # noqa: S101 - it was started
        data = msgspec.msgpack.encode(frame)
        self._writer.write(LENGTH.pack(len(data)) + data)
        await self._writer.drain()
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        return msgspec.msgpack.decode(await self._reader.readexactly(length), type=Answer)

    async def _end(self) -> int:
        """Kill the process if it is there still; return its exit code, or the number of what killed it, below 0."""
        process, self._process = self._process, None
        if process is None:
            return -signal.SIGKILL
        if self._writer is not None:
            self._writer.close()
        with suppress(subprocess.TimeoutExpired):  # its socket is closed: it may be on its way
            await asyncio.to_thread(process.wait, 1.0)
        process.kill()
        return await asyncio.to_thread(process.wait)


def _memory() -> IO[bytes]:
    """Return what two processes can map; no file where it can be helped: a container's disk may be read-only."""
    return os.fdopen(os.memfd_create("consumerd"), "r+b") if sys.platform == "linux" else tempfile.TemporaryFile()


def _spawn(connection: int, cell: int) -> subprocess.Popen[bytes]:
    """Start a worker: this Python and this package, wherever they are."""
    package = str(Path(consumerd.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(  # noqa: S603 - this Python
        [sys.executable, "-P", "-m", "consumerd.worker", str(os.getpid()), str(connection), str(cell)],
        pass_fds=(connection, cell),
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


async def _watched(answer: asyncio.Future[Answer], limit: float, noted: Callable[[], int]) -> Answer:
    """Wait for an answer; raises Lost when one of its calls lasts for longer than the deadline."""
    at, looks = noted(), 0
    try:
        while not (await asyncio.wait([answer], timeout=limit / LOOKS))[0]:
            if noted() != at:
                at, looks = noted(), 0
                continue
            looks += 1
            if looks >= LOOKS and at != NONE:
                raise Lost(at, "TimeoutError", f"did not return within {limit:g} s")
    finally:
        answer.cancel()
    return answer.result()


async def _imported(importing: asyncio.Future[T], function: str) -> T:
    """Wait for an import, and say what is waited for where it takes long; raises TimeoutError."""
    visible = min(START_VISIBLE_AFTER, START_TIMEOUT)
    try:
        if not (await asyncio.wait([importing], timeout=visible))[0]:
            extra = {"function": function, "seconds_at_most": START_TIMEOUT}
            log.warning("the import of a transform's module takes long: waiting for it", extra=extra)
        return await asyncio.wait_for(importing, START_TIMEOUT - visible)
    finally:
        importing.cancel()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _late_import(function: str) -> Halt:
    module = function.partition(":")[0]
    return Halt("transform", f"the import of module {module} takes longer than {START_TIMEOUT:g} s")


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:  # noqa: ANN401 - any task's
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
