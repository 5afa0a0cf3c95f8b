"""A TCP proxy on loopback that breaks connections on purpose.

It runs an event loop in a thread of its own, so that a test may block. ``stop`` refuses and resets, ``cut`` resets what
is open and keeps listening, ``deaf`` swallows every byte both ways while the connections stay up (a half-open peer),
``slow`` holds every chunk back for a while, ``strand`` swallows for good with those that are open, and hides from each
end that the other has closed.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

from tests.servers.process import free_port

CHUNK = 65_536  # bytes copied at once
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: close() sends RST
ORDER_TIMEOUT = 5  # seconds that the proxy's loop may take to do as told


class Proxy:
    """Carries ``127.0.0.1:port`` to ``127.0.0.1:target_port``. Starts stopped; ``close`` ends it for good."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.target_port = target_port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._deaf = False
        self._delay = 0.0
        self._stranded: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Listen, on the same port each time."""
        self._order(self._listen())

    def stop(self) -> None:
        """Refuse new connections and reset the open ones."""
        self._order(self._refuse())

    def cut(self) -> None:
        """Reset every open connection; new ones are welcome."""
        self._order(self._reset())

    def deaf(self) -> None:
        """Swallow every byte from now on, both ways."""
        self._deaf = True

    def hear(self) -> None:
        """Carry bytes again. What was swallowed stays lost: cut() the connections that missed it."""
        self._deaf = False

    def slow(self, seconds: float) -> None:
        """Hold back each chunk of up to 64 KiB, both ways, for so long; 0 ends it."""
        self._delay = seconds

    def strand(self) -> None:
        """Forget the open connections, as a restarted router does: neither end hears anything of the other again."""
        self._order(self._forget())

    def close(self) -> None:
        """Stop, and end the thread."""
        self.stop()
        self._order(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _order(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(ORDER_TIMEOUT)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    async def _reset(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):  # closed by its peer in this very turn
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            end.transport.abort()
        await asyncio.sleep(0)  # the loop closes them in its next turn

    async def _forget(self) -> None:
        self._stranded |= self._open

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, target_writer}
        copies = [
            asyncio.create_task(self._copy(reader, target_writer), name="proxy-there"),
            asyncio.create_task(self._copy(target_reader, writer), name="proxy-back"),
        ]
        self._open |= ends
        if self._server is not None:  # else it was stopped in between
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            if writer in self._stranded:
                await asyncio.wait(copies)  # until both ends have given up, each by itself
        for copy in copies:
            copy.cancel()
        for end in ends:
            end.close()
        self._open -= ends
        self._stranded -= ends

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(CHUNK):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if not self._deaf and writer not in self._stranded:
                    writer.write(chunk)
                    await writer.drain()
        except OSError:  # a reset: both ends are closed by _serve
            return
