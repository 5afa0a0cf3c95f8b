"""The control socket: what an operator asks of a daemon that runs.

A Unix socket, whose file's mode says who may. A request is a line of JSON, and so is its answer; commands are answered
when they are done, one after the other. Served on the event loop, so a client has a deadline for each line, and a line
and their number have a bound.

A socket that a dead daemon left is replaced; one that somebody listens at is not. A lock on its folder is held from
the look to the listening, so of two daemons that start at once one sees the other.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from consumerd.errors import ConfigError, ConsumerdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

MODE = 0o660
LONGEST_LINE = 64 * 1024
"""Bytes of a request."""
CLIENT_TIMEOUT = 10.0
"""Seconds for a client to send a line, or to take one."""
MOST_CLIENTS = 16
"""Connections at a time."""

Command = Literal["pause", "resume", "restart", "reload"]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request. `config` is the file that the client takes for the daemon's: it must be."""

    command: Command
    config: str
    handler: str = ""
    accept_gap: list[str] = []
    accept_new_topic: list[str] = []
    skip: list[str] = []
    breaker: bool = False


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of it. `code` is the exit status for a command; `changed` what a reload has changed."""

    ok: bool
    message: str
    code: int = 0
    changed: dict[str, Any] = {}


class NoSocketError(ConsumerdError):
    """There is no socket to listen at; the message says what to do."""


class Control:
    """Listens until it is closed; `run` does what a request asks for."""

    def __init__(self, path: Path, config: Path, run: Callable[[Request], Awaitable[Answer]]) -> None:
        self._path = path
        self._config = config
        self._run = run
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._file: tuple[int, int] | None = None

    async def open(self) -> None:
        """Listen; raises NoSocketError."""
        try:
            with _alone_in(self._path.parent):
                listening = _bind(self._path)
                status = self._path.stat()
                self._file = status.st_dev, status.st_ino
        except OSError as error:
            raise NoSocketError(
                f"no control socket at {self._path} (daemon.control): {error.strerror or error}; without it pause, "
                f"resume, restart and reload are not there; make its folder writable for this user, or set "
                f"daemon.control to another path"
            ) from error
        self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=LONGEST_LINE)

    async def close(self) -> None:
        """Stop listening, leave what is being done, and remove the socket, unless it is another's by now."""
        if self._server is None:
            return
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with suppress(OSError):
            status = self._path.stat()
            if (status.st_dev, status.st_ino) == self._file:
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - streams serve each client in a task
        self._clients.add(task)
        try:
            if len(self._clients) > MOST_CLIENTS:
                await _send(writer, _refused(f"more than {MOST_CLIENTS} connections: try again"))
                return
            while line := await _line(reader):
                await _send(writer, await self._answer(line))
        except ValueError:
            with suppress(OSError, TimeoutError):
                await _send(writer, _refused(f"a request is a line of at most {LONGEST_LINE} bytes"))
        except (OSError, TimeoutError) as error:
            log.debug("a client of the control socket is gone", extra={"error": type(error).__qualname__})
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = msgspec.json.decode(line, type=Request)
        except msgspec.DecodeError as error:
            return _refused(f"not a request: {error}")
        if not _is_same(request.config, self._config):
            return _refused(
                f"the daemon that listens at {self._path} runs {self._config}, not {request.config}: name its file "
                f"with -c, or give each daemon a daemon.control of its own"
            )
        log.info("control", extra={"request": msgspec.to_builtins(request)})
        try:
            return await self._run(request)
        except ConfigError as error:
            return Answer(ok=False, message=str(error), code=78)
        except ConsumerdError as error:
            return _refused(str(error))
        except Exception as error:  # noqa: BLE001 - the root of a command; the daemon and its handlers go on
            # Frames and classes alone: texts of exceptions may hold values of rows.
            frames = "".join(traceback.format_tb(error.__traceback__))
            extra = {"error": type(error).__qualname__, "frames": frames}
            log.error("a command failed", extra=extra)  # noqa: TRY400
            return _refused(f"the command failed with {type(error).__qualname__}: please report the frames in the log")


def _is_same(named: str, ours: Path) -> bool:
    return os.path.realpath(named) == os.path.realpath(ours)


def _refused(sentence: str) -> Answer:
    return Answer(ok=False, message=sentence, code=1)


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Return the next line; nothing at the end. Raises ValueError for one that is too long, TimeoutError."""
    async with asyncio.timeout(CLIENT_TIMEOUT):
        line = await reader.readline()
    return line if line.endswith(b"\n") else b""


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(msgspec.json.encode(answer) + b"\n")
    async with asyncio.timeout(CLIENT_TIMEOUT):
        await writer.drain()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bind(path: Path) -> socket.socket:
    """Return a socket that listens at a path. Nobody can connect before it does, so its mode is right by then."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_room(path)
        listening.bind(str(path))
        path.chmod(MODE)
        listening.listen()
        listening.settimeout(0)
    except BaseException:
        listening.close()
        raise
    return listening


def _make_room(path: Path) -> None:
    """Remove the socket of a daemon that is gone; raises NoSocketError where somebody listens, OSError."""
    if not path.exists():
        return
    if not path.is_socket():
        raise NoSocketError(f"{path} (daemon.control) is there and is no socket: remove it, or set another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(CLIENT_TIMEOUT)
        try:
            asking.connect(str(path))
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            path.unlink()
        else:
            raise NoSocketError(
                f"another daemon listens at {path} (daemon.control): give each daemon a daemon.control of its own"
            )
