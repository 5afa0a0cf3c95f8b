"""How a member comes to halt, but for what its own tasks raise: by a log that is another one, and behind a gap."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from consumerd.errors import Halt, Outage
from consumerd.ways_on import Gap

if TYPE_CHECKING:
    from consumerd.member import Member
    from consumerd.types import Message, TopicPartition

log = logging.getLogger(__name__)


class Halting:
    """What has one member halt, once: `failure` is what ends its tasks."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._endings: set[asyncio.Task[None]] = set()
        """Write what lies before a gap, then halt."""

    def failed(self, error: BaseException) -> None:
        """Halt, by the task that waits for it."""
        if not self.failure.done():
            self.failure.set_exception(error)

    def is_another_log(self, partition: TopicPartition, message: Message) -> bool:
        """Halt when a message comes from an older leader than one that was written: that log is another one."""
        member = self._member
        lease, epoch = member.assignment.leases.get(partition), message.leader_epoch()
        if lease is None or lease.leader_epoch is None or epoch is None or epoch >= lease.leader_epoch:
            return False
        bootstrap, group = member.config.kafka.bootstrap_servers, member.handler.group_id
        sentence = (
            f"the log of {partition} is another one: offset {message.offset()} has leader epoch {epoch}, and what was "
            f"written before it had {lease.leader_epoch}: the topic was made again or its cluster restored; set "
            f"`group_id` to a new name to read it from its start; Kafka's own tool goes on in it as well: "
            f"kafka-consumer-groups --bootstrap-server {bootstrap} --group {shlex.quote(group)} "
            f"--reset-offsets --topic {partition} "
            f"--to-offset {message.offset()} --execute"
        )
        gap = Gap(partition=partition, position=lease.next_offset, target=message.offset())
        self.failed(Halt("topic", sentence, gap))
        return True

    def behind(self, partition: TopicPartition, halt: Halt) -> None:
        """Halt once everything before a gap is written: that may be gone from the log as well."""
        task = asyncio.create_task(self._behind(partition, halt), name=f"{self._member.handler.name}: gap")
        self._endings.add(task)
        task.add_done_callback(self._ended)

    async def _behind(self, partition: TopicPartition, halt: Halt) -> None:
        member = self._member
        await member.flush([partition], "drain", None)
        try:
            with suppress(Outage):
                await member.confirm_topics(time.monotonic())
        except Halt as another:
            self.failed(another)
        if partition in member.assignment.leases:
            self.failed(halt)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._endings.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed(error)


def first_halt(error: Exception) -> Halt:
    """Return the halt among errors that ended a handler's tasks; anything else is a defect of ours."""
    if isinstance(error, ExceptionGroup):
        halts = [first_halt(inner) for inner in error.exceptions]
        return next((halt for halt in halts if halt.reason != "bug"), halts[0])
    if isinstance(error, Halt):
        return error
    # Frames and classes alone: texts of exceptions hold values of rows.
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("a task of the handler failed", extra={"error": type(error).__qualname__, "frames": frames})
    return Halt("bug", f"a task failed with {type(error).__qualname__}: please report the frames in the log")
