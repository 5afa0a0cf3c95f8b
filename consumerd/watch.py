"""Watches over connections that wait for Postgres: a deaf one is cut, a zombie that blocks a claim is ended.

One that ended while it was idle is found by its socket: so an idle daemon, too, learns of a failover.

A connection whose peer no longer hears it, or whose answer was lost on the way, waits for ever: TCP's own timers see
nothing when something in between acknowledges the bytes. To measure the time of a statement would end slow ones, which
then never come to an end. So the server itself is asked, over a fresh connection: a backend that works is left alone,
one that is gone or that waits for us, while we wait for it, is not heard any more.

A member that was stopped inside a transaction (SIGSTOP, a frozen machine) holds its checkpoints' row locks, and no
timeout of the server ends it while it is in COPY; only terminating its backend does (seen). Whoever was assigned its
partitions may do that, for it is of the same role and of the same handler.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import select
import struct
import termios
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psycopg

from consumerd.errors import ConsumerdError
from consumerd.postgres import busy_since, call, cut, pooled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg import AsyncConnection

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two looks."""
PATIENCE = 2.0
"""Seconds that a connection has waited before the server is asked about it."""
ASK_TIMEOUT = 5.0
"""Seconds for the server's answer."""
CLAIM_PATIENCE = 5.0
"""Seconds that a claim has waited before what blocks it is ended: a revoke has five seconds."""

_STATE = """\
SELECT a.pid, a.state, a.wait_event, a.state_change::text, c.bytes_processed
FROM pg_catalog.pg_stat_activity a LEFT JOIN pg_catalog.pg_stat_progress_copy c USING (pid)
WHERE a.pid = ANY (%(pids)s)"""

_END_DEAF = """\
SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
WHERE a.pid = %(pid)s AND a.state_change::text = %(since)s AND a.usename = session_user
  AND a.application_name = pg_catalog.current_setting('application_name')"""

_END_BLOCKERS = """\
SELECT a.pid, pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
WHERE a.pid = ANY (pg_catalog.pg_blocking_pids(%(pid)s)) AND a.pid <> ALL (%(ours)s)
  AND a.usename = session_user AND a.application_name = pg_catalog.current_setting('application_name')"""


@dataclass(slots=True)
class _Waiting:
    """One connection: whether it is a claim's, and what the server said of it last, and during which wait."""

    pid: int
    claims: bool
    said: tuple[object, ...] | None = None


class Watch:
    """The connections of one handler; `connect` opens the one that asks, `lost` is called when an idle one ended."""

    def __init__(
        self, connect: Callable[[], Awaitable[AsyncConnection[Any]]], handler: str, lost: Callable[[], None]
    ) -> None:
        self._connect = connect
        self._handler = handler
        self._lost = lost
        self._connections: WeakKeyDictionary[AsyncConnection[Any], _Waiting] = WeakKeyDictionary()

    def add(self, conn: AsyncConnection[Any], *, claims: bool = False) -> None:
        """Watch over a connection until it is closed, unless a pooler is at its other end."""
        if conn not in pooled:
            self._connections[conn] = _Waiting(conn.info.backend_pid, claims)

    async def look(self) -> None:
        """Look at every connection once; to be called each `INTERVAL`. Raises Outage when Postgres cannot be asked."""
        for conn in list(self._connections):
            if conn not in busy_since and not conn.closed and _hung_up(conn):
                await conn.close()
                self._lost()
        patient = time.monotonic() - PATIENCE
        waiting = {conn: known for conn, known in self._connections.items() if busy_since.get(conn, patient) < patient}
        if waiting:
            asking = await self._connect()
            timer = asyncio.get_running_loop().call_later(ASK_TIMEOUT, cut, asking)  # nobody watches over this one
            try:
                await self._ask(asking, waiting)
            finally:
                timer.cancel()
                await asking.close()

    async def _ask(self, asking: AsyncConnection[Any], waiting: dict[AsyncConnection[Any], _Waiting]) -> None:
        pids = {known.pid: conn for conn, known in waiting.items()}
        states = {pid: state for pid, *state in await call(asking, _STATE, {"pids": list(pids)})}
        for pid, conn in pids.items():
            known = waiting[conn]
            waited = time.monotonic() - busy_since.get(conn, math.inf)
            said = (busy_since.get(conn), *states.get(pid, ()))
            if _not_heard(said[1:]) and said == known.said and not _unsent(conn):
                log.warning("a connection is deaf: closing it", extra={"handler": self._handler, "backend": pid})
                cut(conn)
                if len(said) > 1:  # it will not hear of that either, and may hold the checkpoint's lock for hours
                    await call(asking, _END_DEAF, {"pid": pid, "since": said[3]})
            elif known.claims and waited > CLAIM_PATIENCE:
                await self._end_blockers(asking, pid)
            known.said = said

    async def _end_blockers(self, asking: AsyncConnection[Any], pid: int) -> None:
        ours = [known.pid for known in self._connections.values()]
        for blocker, _ in await call(asking, _END_BLOCKERS, {"pid": pid, "ours": ours}):
            extra = {"handler": self._handler, "backend": blocker}
            log.warning("ended the transaction of a member that no longer holds its partitions", extra=extra)

    async def run(self, failed: Callable[[ConsumerdError], None], recovered: Callable[[], None]) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.look()
            except ConsumerdError as error:
                failed(error)
            else:
                recovered()


def _not_heard(said: tuple[object, ...]) -> bool:
    """Whether a backend is gone, or waits for its client; nothing at all is told of one that is gone."""
    if not said:
        return True
    state, wait_event, *_ = said
    return state in {"idle", "idle in transaction", "idle in transaction (aborted)"} or wait_event == "ClientRead"


def _hung_up(conn: AsyncConnection[Any]) -> bool:
    """Whether the server has ended a connection, or said something, while nothing was asked of it."""
    poll = select.poll()
    try:
        poll.register(conn.fileno(), select.POLLIN)
    except psycopg.Error:
        return True
    return bool(poll.poll(0))


def _unsent(conn: AsyncConnection[Any]) -> int:
    """Return the bytes that the peer has not acknowledged: TCP is at work, and has a timeout of its own (tcp(7))."""
    try:
        (count,) = struct.unpack("i", fcntl.ioctl(conn.fileno(), termios.TIOCOUTQ, bytes(4)))
    except (OSError, psycopg.Error):
        return 0
    return int(count)
