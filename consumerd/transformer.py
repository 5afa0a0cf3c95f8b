"""The transform of one handler: has batches transformed, wherever the function is called.

A batch goes there in parts of some hundred messages, as many side by side as there are workers, and what came back
stays with the batch: another try of the write does not call the function again. Whatever ends early (the function
wants to try again later, a worker was lost, what came back is large) leaves the first part of a batch transformed.

A call that does not come back within its deadline, or ends its process, is made again for its record alone. When that
is lost as well the record is poison, but for the third in a row: then it is the function, and the handler halts. In a
thread the first call that does not come back is a halt, for nobody can end it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from consumerd import where
from consumerd.errors import Blocked, Halt, Outage, Poison, Refusal
from consumerd.formats import selection, values
from consumerd.runners import InProcess, InThread, Lost
from consumerd.transform import ALL, ANSWER_BYTES, NONE, Answer, Item, Request
from consumerd.types import TopicPartition
from consumerd.ways_on import Skip

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping, Sequence

    from consumerd.accumulator import Batch
    from consumerd.config import HandlerConfig
    from consumerd.runners import Runner
    from consumerd.transform import Outcome
    from consumerd.types import Message

log = logging.getLogger(__name__)

PART_MESSAGES: Final = 1000
"""Messages of one request, at most: a batch function has as many, and the interpreter is held for no longer."""
PART_BYTES: Final = 1 << 20
"""Bytes of values of one request, but for its first."""
LOST_IN_A_ROW: Final = 3
"""Records one after another whose calls did not come back, at which it is no record's fault."""


class Transformer:
    """What calls one handler's transform."""

    def __init__(self, handler: HandlerConfig, most_bytes: int) -> None:
        config = handler.transform
        assert config is not None  # noqa: S101 - the caller's promise
        self._handler, self._config = handler, config
        self.most_bytes = most_bytes
        """Bytes of what comes back for one batch, about."""
        place = InProcess if config.workers else InThread
        self._runners: list[Runner] = [
            place(config.function, handler.path.parent, config.timeout) for _ in range(max(1, config.workers))
        ]
        self._idle: asyncio.Queue[Runner] = asyncio.Queue()
        self._lost_in_a_row = 0
        self._bytes_each = 0.0
        """What came back for a message lately."""
        test = None if handler.where is None else where.parse(handler.where)
        self._select = None if test is None else selection.selector(test, handler.key_format)
        self._selects_by_fields = test is not None and bool(where.fields(test))

    async def start(self) -> None:
        """Import the function, everywhere it is to be called; raises Halt with what to mend, and Outage.

        After either it is to be closed.
        """
        first, *others = self._runners
        await first.start()  # whose mistakes are the others' too
        ends = await asyncio.gather(*(runner.start() for runner in others), return_exceptions=True)
        for error in filter(None, ends):
            raise error
        for runner in self._runners:
            self._idle.put_nowait(runner)

    async def close(self) -> None:
        """Let go of threads and processes."""
        await asyncio.gather(*(runner.close() for runner in self._runners))

    async def complete(self, batch: Batch) -> int:
        """Transform what is not transformed of a batch, and return the bytes of what came back.

        A batch whose values would take too much memory is left with its first part transformed. Raises Blocked, with
        the first part transformed, when the function wants to try again later; Halt for a mistake of the function.
        """
        size = sum(map(size_of, batch.outcomes))
        ahead: dict[int, Outcome] = {}
        """What came back of later parts than one whose answer ended early, by position in the batch."""
        while len(batch.outcomes) < len(batch.messages) and size <= self.most_bytes:
            at = len(batch.outcomes)
            room = self.most_bytes - size
            parts = self._parts(batch.messages[at:], room)
            most = min(ANSWER_BYTES, room // len(parts))
            starts = [at + sum(map(len, parts[:number])) for number in range(len(parts))]
            settled = [self._settled(part, start, ahead) for part, start in zip(parts, starts, strict=True)]
            requests = [_request(batch.partition, *each, most) for each in zip(parts, settled, strict=True)]
            answers = await _all([self._answer(request) for request in requests])
            before = size
            for part, start, known, answer in zip(parts, starts, settled, answers, strict=True):
                came = _merged(len(part), known, answer.outcomes)
                size += sum(size_of(each) for position, each in enumerate(came, start) if position not in ahead)
                if start > len(batch.outcomes):
                    ahead |= enumerate(came, start)
                    continue
                batch.outcomes += came
                if answer.retry is not None:
                    raise Blocked("transform", f"{self._config.function}: {answer.retry}")
            self._bytes_each = (size - before) / max(1, sum(len(answer.outcomes) for answer in answers))
        return sum(map(size_of, batch.outcomes))

    def _parts(self, messages: Sequence[Message], room: int) -> list[list[Message]]:
        """Cut the next messages into a part for each worker, none of more than has room when it comes back."""
        workers = len(self._runners)
        fit = int(room / workers / max(1.0, self._bytes_each))
        most = min(PART_MESSAGES, -(-len(messages) // workers), max(1, fit))
        parts: list[list[Message]] = [[]]
        size = 0
        for message in messages:
            if len(parts[-1]) == most or (parts[-1] and size + len(message) > PART_BYTES):
                if len(parts) == workers:
                    break
                parts.append([])
                size = 0
            parts[-1].append(message)
            size += len(message)
        return parts

    def _settled(self, messages: Sequence[Message], start: int, ahead: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """Return what becomes of messages without a call, by position: not selected, without a value, or known."""
        settled: dict[int, Outcome] = {}
        for position, message in enumerate(messages):
            if start + position in ahead:
                settled[position] = ahead[start + position]
                continue
            value = message.value()
            try:
                if self._select is not None and (value or not self._selects_by_fields) and not self._select((message,)):
                    settled[position] = "where"
                elif not value:
                    settled[position] = None
            except (ValueError, RecursionError, Poison) as error:
                settled[position] = values.refusal(error)
        return settled

    async def _answer(self, request: Request, *, again: bool = False) -> Answer:
        """Return what becomes of the first messages of a request, at least of one; raises Halt."""
        if not request.items:
            return Answer([])
        try:
            runner = await self._idle.get()
            try:
                answer = await runner.answer(request)
            finally:
                self._idle.put_nowait(runner)
        except Outage as outage:  # a process could not be started
            return Answer([], retry=str(outage))
        except Lost as lost:
            return await self._after(lost, request, again=again)
        if answer.halt is not None:
            raise Halt("transform", f"{self._config.function}: {answer.halt}")
        if answer.outcomes:
            self._lost_in_a_row = 0
        return answer

    async def _after(self, lost: Lost, request: Request, *, again: bool) -> Answer:
        """Go on after a call that did not come back."""
        at = max(lost.at, 0)
        where = f"{request.topic}:{request.partition} offset {request.items[at].offset}"
        if not self._config.workers:
            partition, offset = TopicPartition(request.topic, request.partition), request.items[at].offset
            raise Halt(
                "transform",
                f"{self._config.function} {lost} for {where}, and its thread cannot be ended: mend it, or raise "
                f"`timeout` under [transform] in {self._handler.path}; with `workers` = 1 or more such a call is ended",
                *([Skip(partition=partition, first=offset, end=offset + 1)] if lost.at >= 0 else []),
            )
        extra = {"handler": self._handler.name, "function": self._config.function, "how": str(lost), "at": where}
        log.warning("a call of the transform did not come back", extra=extra)
        if lost.at == NONE:
            return Answer([], retry=str(lost))
        if lost.at == ALL:
            return await self._answer(msgspec.structs.replace(request, alone=True))
        if lost.at > 0:  # those before it; it is the next one's first
            return await self._answer(msgspec.structs.replace(request, items=request.items[: lost.at]))
        if not again:
            return await self._answer(msgspec.structs.replace(request, items=request.items[:1]), again=True)
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= LOST_IN_A_ROW:
            raise Halt(
                "transform",
                f"{self._config.function} {lost} for {LOST_IN_A_ROW} messages one after another, the last of them "
                f"{where}: mend it, or raise `timeout` under [transform] in {self._handler.path}",
            )
        message = f"{self._config.function} {lost}, and so again when it was tried alone"
        return Answer([Refusal(reason="transform", stage="transform", error=lost.error, message=message)])


async def _all(calls: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Return all answers.

    Where one call is a halt the others end with it: they would go on in new processes when theirs are closed.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def size_of(outcome: Outcome) -> int:
    """Return the bytes of the values that were returned for a message."""
    return sum(map(len, outcome)) if isinstance(outcome, tuple) else 0


def _request(
    partition: TopicPartition, messages: Sequence[Message], settled: Mapping[int, Outcome], most_bytes: int
) -> Request:
    """Return the request for those of some messages that are to be transformed."""
    items = []
    for position, message in enumerate(messages):
        if position not in settled:
            kind, timestamp = message.timestamp()
            at = timestamp if kind else None  # 0: not available
            items.append(Item(message.value() or b"", message.offset(), at, message.key(), message.headers() or []))
    return Request(partition.topic, partition.partition, items, most_bytes=most_bytes)


def _merged(count: int, settled: Mapping[int, Outcome], outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Put outcomes between those that were settled; end where they end."""
    rest = iter(outcomes)
    merged: list[Outcome] = []
    for position in range(count):
        if position in settled:
            merged.append(settled[position])
            continue
        outcome = next(rest, None)
        if outcome is None:
            break
        merged.append(outcome)
    return merged
