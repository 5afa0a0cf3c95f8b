"""The daemon: starts every handler, stops them on a signal, and lives as long as that takes.

SIGTERM or SIGINT drains: what is gathered is written, committed, and each handler leaves its group, all within
`drain_timeout`. A second signal forces the exit; nothing is lost by that, because nothing unwritten was committed. With
`--until-end` it stops by itself, in the same way. SIGHUP, or a command, has it read the config again.
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
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from consumerd import __version__, left_over, loader, metrics, reload, ways_on
from consumerd import log as logs
from consumerd.control import Answer, Control, NoSocketError, Request
from consumerd.errors import ConfigError, ConsumerdError, Outage
from consumerd.http import HttpServer
from consumerd.members import Members
from consumerd.progress import total_lag
from consumerd.systemd import Service
from consumerd.topics import Topics
from consumerd.until_end import UntilEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from consumerd.config import Config
    from consumerd.member import Member
    from consumerd.reload import Reloaded

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

    def __init__(
        self,
        config: Config,
        names: Collection[str] = (),
        *,
        until_end: bool = False,
        exit_on_halt: bool = False,
        read: Callable[[], Config] | None = None,
    ) -> None:
        _check(config)
        self._read = read or partial(loader.load, config.path)
        """Reads the config again; raises ConfigError."""
        self._started = time.time()
        self._threads: ThreadPoolExecutor | None = None
        self._stop = asyncio.Event()
        self._signalled = False
        self._defect: BaseException | None = None
        """What ended a member that nothing but a halt may end."""
        self._members = Members(config, names, self._on_end)
        self._control = Control(config.daemon.control, config.path, self._command)
        self._service = Service(lambda: list(self._members))
        self._until_end = until_end
        self._exit_on_halt = exit_on_halt
        self._ended = not until_end
        """Whether all that is to be written before it stops by itself is written."""
        self._reloading: set[asyncio.Task[None]] = set()
        self._reload = _reloaded(None)

    async def run(self) -> int:
        """Run until a signal; return the exit code."""
        self._catch_signals()
        daemon = self._members.config.daemon
        http = HttpServer(daemon.listen_host, daemon.listen_port, self.status)
        try:
            await self._control.open()
        except NoSocketError as error:
            if "control" in daemon.model_fields_set:
                http.close()
                raise
            log.warning("%s", error)
        log.info("started", extra={"version": __version__, "listen": http.address, "handlers": len(self._members)})
        if not http.on_loopback:
            log.warning(
                "whoever reaches the port may read /metrics, /status and the page: they are not encrypted and ask for "
                "no password",
                extra={"listen": http.address},
            )
        self._make_room_for_calls()
        self._members.start()
        others = [
            asyncio.create_task(self._heartbeat(), name="heartbeat"),
            asyncio.create_task(self._service.run(), name="systemd"),
            asyncio.create_task(self._watch_left_over(), name="left over"),
        ]
        if self._until_end:
            others.append(asyncio.create_task(self._stop_at_the_end(), name="until end"))
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS)
        try:
            await self._until_stopped(others)
            return await self._drain() or (EXIT_OK if self._ended else EXIT_FAILED)
        finally:
            for task in others:
                task.cancel()
            http.close()

    async def reload(self) -> Reloaded:
        """Read the config again and do as it says; raises ConfigError, and goes on as before, when it is wrong."""
        try:
            async with self._members.changing:  # of two reloads at once the later one has read the later files
                with self._service.reloading():
                    config = await asyncio.to_thread(self._read)
                    _check(config)
                    reloaded = await reload.apply(self._members, config)
        except ConfigError as error:
            self._reload = _reloaded(error)
            log.error("the config is refused, the one before goes on", extra={"problems": error.problems})  # noqa: TRY400
            raise
        logs.set_up(config.log)
        self._make_room_for_calls()
        self._reload = _reloaded(None)
        log.info("reloaded", extra=asdict(reloaded))
        return reloaded

    async def _command(self, request: Request) -> Answer:
        """Do what was asked for at the control socket; raises ConsumerdError."""
        match request.command:
            case "pause":
                return Answer(ok=True, message=await self._members.pause(request.handler))
            case "resume":
                want = ways_on.wanted(
                    request.accept_gap, request.accept_new_topic, request.skip, breaker=request.breaker
                )
                return Answer(ok=True, message=await self._members.resume(request.handler, want))
            case "restart":
                return Answer(ok=True, message=await self._members.restart(request.handler))
            case "reload":
                reloaded = await self.reload()
                return Answer(ok=True, message=reloaded.sentence(), changed=asdict(reloaded))

    async def _watch_left_over(self) -> None:
        members = self._members
        await left_over.watch(lambda: members.config.postgres, lambda: [member.handler for member in members])

    def status(self) -> dict[str, Any]:
        """Return what /status shows; sets the gauges that are computed when somebody looks."""
        now = time.time()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": self._started,
            "now": now,
            "uptime_seconds": round(now - self._started, 1),
            "reload": self._reload,
            "handlers": {member.handler.name: _status(member) for member in self._members},
        }

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_signal(self, number: int) -> None:
        if self._signalled:
            log.error("a second signal: leaving at once")
            logging.shutdown()
            os._exit(EXIT_NOT_DRAINED)
        self._signalled = True
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        self._stop.set()

    def _on_hangup(self) -> None:
        """Reload, as SIGHUP asks; what is wrong with the config is in the log by then."""

        async def reload_once() -> None:
            with suppress(ConsumerdError):
                await self.reload()

        task = asyncio.create_task(reload_once(), name="reload")
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Take note of a member's end: a halt, or a defect, which takes the daemon with it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defect = error
            self._stop.set()
        elif self._exit_on_halt and all(member.progress.halted for member in self._members):
            log.error("every handler is halted: leaving, as --exit-on-halt says")
            self._ended = False
            self._stop.set()

    async def _until_stopped(self, others: list[asyncio.Task[None]]) -> None:
        """Wait for a signal, or whatever else ends the daemon."""
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        running: set[asyncio.Task[Any]] = {stop, *others}
        while not self._stop.is_set():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        if self._defect is not None:
            raise self._defect

    async def _stop_at_the_end(self) -> None:
        """Stop once each handler has written all that its topics held at the start, or cannot."""
        ended = await asyncio.gather(*(UntilEnd(member).reached() for member in self._members))
        self._ended = all(ended)
        if not self._stop.is_set():
            log.info("the end is reached: stopping" if self._ended else "the end cannot be reached: stopping")
        self._stop.set()

    async def _drain(self) -> int:
        """Drain all handlers side by side, under one deadline; what changes them just now is left."""
        self._service.stopping(self._members.config.daemon.drain_timeout)
        for task in self._reloading:
            task.cancel()
        await asyncio.gather(self._control.close(), *self._reloading, return_exceptions=True)
        if not await self._members.drain(self._members):
            log.error("not drained in time; what was not written is read again at the next start")
            return EXIT_NOT_DRAINED
        log.info("stopped")
        return EXIT_OK

    def _make_room_for_calls(self) -> None:
        """Have as many threads for blocking calls as the handlers may need; those under way end where they are."""
        threads = ThreadPoolExecutor(BASE_THREADS + THREADS_PER_HANDLER * len(self._members), "blocking")
        asyncio.get_running_loop().set_default_executor(threads)
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        self._threads = threads

    async def _heartbeat(self) -> None:
        """Log one line for each handler now and then: rate and lag."""
        while True:
            await asyncio.sleep(self._members.config.log.heartbeat)
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


def _check(config: Config) -> None:
    """Refuse a property that librdkafka does not know: a mistake of the configuration; raises ConfigError."""
    with suppress(Outage):  # a secret that is not there is waited for
        Topics(config.kafka)


def _reloaded(error: ConfigError | None) -> dict[str, Any]:
    """Take note of a reading of the config; return what /status shows of it."""
    now = time.time()
    metrics.config_last_reload_successful.set(error is None)
    if error is None:
        metrics.config_last_reload_success_timestamp.set(now)
    return {"at": now, "successful": error is None, "error": str(error) if error else None}
