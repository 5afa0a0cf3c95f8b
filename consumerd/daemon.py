"""The daemon: starts every handler, stops them on a signal, and lives as long as that takes.

SIGTERM or SIGINT drains: what is gathered is written, committed, and each handler leaves its group, all within
`drain_timeout`. A second signal forces the exit; nothing is lost by that, because nothing unwritten was committed. With
`--until-end` it stops by itself, in the same way.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from consumerd import __version__, metrics
from consumerd.errors import Outage
from consumerd.http import HttpServer
from consumerd.member import Member
from consumerd.progress import total_lag
from consumerd.topics import Topics
from consumerd.until_end import UntilEnd

if TYPE_CHECKING:
    from collections.abc import Collection

    from consumerd.config import Config

log = logging.getLogger(__name__)

GC_ALLOCATIONS = 100_000
"""Objects made between two looks for cyclic garbage, of which the path makes none. At the default of 700 a batch of
20,000 rows was looked through again and again: a third of the time to decode it, half of that to pack it."""

BASE_THREADS, THREADS_PER_HANDLER = 8, 3
"""For blocking calls to Kafka: one handler's letters, which may wait for long, take no thread from another's."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_NOT_DRAINED = 75


class Daemon:
    """One process: a member for each handler, or for those that are named."""

    def __init__(self, config: Config, names: Collection[str] = (), *, until_end: bool = False) -> None:
        with suppress(Outage):  # a secret that is not there is waited for
            Topics(config.kafka)  # a property that librdkafka does not know is a mistake of the configuration
        self._config = config
        self._started = time.time()
        metrics.config_last_reload_successful.set(1)
        metrics.config_last_reload_success_timestamp.set(self._started)
        self._stop = asyncio.Event()
        self._signalled = False
        handlers = [handler for handler in config.handlers if not names or handler.name in names]
        memory = config.daemon.max_buffered // len(handlers)
        self._members = [Member(config, handler, memory) for handler in handlers]
        self._until_end = until_end
        self._ended = not until_end
        """Whether all that is to be written before it stops by itself is written."""

    async def run(self) -> int:
        """Run until a signal; return the exit code."""
        self._catch_signals()
        daemon = self._config.daemon
        http = HttpServer(daemon.listen_host, daemon.listen_port, self.status)
        log.info("started", extra={"version": __version__, "listen": http.address, "handlers": len(self._members)})
        threads = ThreadPoolExecutor(BASE_THREADS + THREADS_PER_HANDLER * len(self._members), "blocking")
        asyncio.get_running_loop().set_default_executor(threads)
        tasks = [asyncio.create_task(m.run(), name=m.handler.name) for m in self._members]
        others = [asyncio.create_task(self._heartbeat(), name="heartbeat")]
        if self._until_end:
            others.append(asyncio.create_task(self._stop_at_the_end(), name="until end"))
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS)
        try:
            await self._until_stopped([*tasks, *others])
            return await self._drain(tasks) or (EXIT_OK if self._ended else EXIT_FAILED)
        finally:
            for task in others:
                task.cancel()
            http.close()

    def status(self) -> dict[str, Any]:
        """Return what /status shows; sets the gauges that are computed when somebody looks."""
        now = time.time()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": self._started,
            "now": now,
            "uptime_seconds": round(now - self._started, 1),
            "reload": {"at": self._started, "successful": True, "error": None},
            "handlers": {member.handler.name: _status(member) for member in self._members},
        }

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self._signalled:
            log.error("a second signal: leaving at once")
            logging.shutdown()
            os._exit(EXIT_NOT_DRAINED)
        self._signalled = True
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        self._stop.set()

    async def _until_stopped(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for a signal. A halted handler's task ends; one that ends by a defect takes the daemon with it."""
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        running: set[asyncio.Task[Any]] = {stop, *tasks}
        while not self._stop.is_set():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _stop_at_the_end(self) -> None:
        """Stop once each handler has written all that its topics held at the start, or cannot."""
        ended = await asyncio.gather(*(UntilEnd(member).reached() for member in self._members))
        self._ended = all(ended)
        if not self._stop.is_set():
            log.info("the end is reached: stopping" if self._ended else "the end cannot be reached: stopping")
        self._stop.set()

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> int:
        """Drain all handlers side by side, under one deadline."""
        deadline = time.monotonic() + self._config.daemon.drain_timeout
        drained = await asyncio.gather(*(member.drain(deadline) for member in self._members))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not all(drained):
            log.error("not drained in time; what was not written is read again at the next start")
            return EXIT_NOT_DRAINED
        log.info("stopped")
        return EXIT_OK

    async def _heartbeat(self) -> None:
        """Log one line for each handler now and then: rate and lag."""
        while True:
            await asyncio.sleep(self._config.log.heartbeat)
            for member in self._members:
                lag, seconds = total_lag(member.progress.lag(member.unwritten()).values())
                extra = {
                    "handler": member.handler.name,
                    "state": member.progress.state,
                    "rows_per_second": round(member.progress.rate()),
                    "written": member.progress.totals.written,
                    "dead_lettered": member.progress.totals.dead_lettered.total(),
                    "skipped": member.progress.totals.skipped.total(),
                    "lag_messages": lag,
                    "lag_seconds": round(seconds, 1),
                }
                log.info("heartbeat", extra=extra)


def _status(member: Member) -> dict[str, Any]:
    """Return a handler's part of /status; sets its gauges."""
    handler, name = member.handler, member.handler.name
    buffered, limit, paused = member.memory(), member.budget.buffered, member.paused()
    metrics.buffered_bytes.labels(name).set(buffered)
    metrics.buffer_limit_bytes.labels(name).set(limit)
    metrics.partitions_paused.labels(name).set(paused)
    return {
        "group_id": handler.group_id,
        "topics": list(handler.topics),
        "table": handler.table.name,
        "buffered_bytes": buffered,
        "buffer_limit_bytes": limit,
        "partitions_paused": paused,
        **member.progress.status(member.unwritten()),
    }
