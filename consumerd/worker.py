"""A process that calls a transform for a daemon: `python -m consumerd.worker PARENT SOCKET CELL`.

It is started anew (nothing is forked: librdkafka's threads would be missing in a fork), imports the function, says so,
and answers one request after the other until its socket is closed. Frames are a length and msgpack. Before each call
it notes the record in a cell of memory that the daemon reads: a call that does not come back, or ends the process, is
known by that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from consumerd.errors import Halt
from consumerd.transform import NONE, Answer, Request, load

if TYPE_CHECKING:
    from typing import BinaryIO

LENGTH: Final = struct.Struct("!Q")
"""What stands before each frame."""
CELL: Final = struct.Struct("q")
"""What the memory that both processes see holds: the index of the record of which a call is under way."""
PR_SET_PDEATHSIG: Final = 1
"""linux/prctl.h"""


class Setup(msgspec.Struct, frozen=True):
    """The first frame: what to import."""

    function: str
    folder: str


def main(parent: int, connection: int, cell: int) -> None:
    """Answer requests until the daemon closes the socket or is gone."""
    # Whoever stops the daemon, by the terminal or by systemd, stops its processes too: it needs them to drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked to watch it
        return
    noted = memoryview(mmap.mmap(cell, CELL.size)).cast("q")
    noted[0] = NONE
    with socket.socket(fileno=connection) as peer, peer.makefile("rb") as requests, peer.makefile("wb") as answers:
        setup = msgspec.msgpack.decode(_read(requests), type=Setup)
        try:
            transform = load(setup.function, Path(setup.folder))
        except Halt as halt:
            _write(answers, Answer([], halt=str(halt)))
            return
        _write(answers, Answer([]))
        decoder = msgspec.msgpack.Decoder(Request)
        while frame := _read(requests):
            _write(answers, transform.answer(decoder.decode(frame), lambda index: noted.__setitem__(0, index)))


def _read(stream: BinaryIO) -> bytes:
    """Return the next frame; nothing at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""


def _write(stream: BinaryIO, answer: Answer) -> None:
    frame = msgspec.msgpack.encode(answer)
    stream.write(LENGTH.pack(len(frame)) + frame)
    stream.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
