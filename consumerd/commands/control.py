"""`consumerd pause`, `resume`, `restart`, `reload`: one request to the daemon that runs."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import msgspec

from consumerd.control import Answer, Request
from consumerd.errors import ConsumerdError

if TYPE_CHECKING:
    from pathlib import Path


class NotReachedError(ConsumerdError):
    """No daemon answers; the message says what to do."""


CONNECT_TIMEOUT = 5.0
"""Seconds to connect. An answer is waited for as long as it takes: a restart drains first."""


def line(answer: Answer) -> str:
    """Return an answer as JSON."""
    return msgspec.json.encode(answer).decode()


def ask(path: Path, request: Request) -> Answer:
    """Send a request and return its answer; raises NotReachedError where no daemon listens."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(CONNECT_TIMEOUT)
            asking.connect(str(path))
            asking.settimeout(None)
            asking.sendall(msgspec.json.encode(request) + b"\n")
            with asking.makefile("rb") as stream:
                line = stream.readline()
    except PermissionError as error:
        raise NotReachedError(f"may not use {path} (daemon.control): be root, or in the group of its file") from error
    except OSError as error:
        raise NotReachedError(
            f"no daemon listens at {path} (daemon.control of {request.config}): {error.strerror or error}; start it "
            f"first: consumerd run -c {request.config}; a halted handler keeps it up",
        ) from error
    if not line:
        raise NotReachedError("the daemon ended before it answered")
    return msgspec.json.decode(line, type=Answer)
