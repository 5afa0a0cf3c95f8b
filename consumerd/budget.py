"""What a handler's memory is divided into: the user sets one number, and everything else follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from consumerd.accumulator import Bounds
from consumerd.kafka import CONSUME_BYTES

if TYPE_CHECKING:
    from consumerd.config import HandlerConfig

LIBRDKAFKA_SHARE = 0.125
"""Share of a handler's memory for librdkafka's queue, which need not be large: it is read from at memory's speed."""
ENCODED_SHARE = 0.25
"""Share of a handler's memory for the rows of the batches in flight."""
BUFFER_SHARE = 0.5
"""Share of a handler's memory for the messages themselves. The rest is what the allocator holds between them: a tenth
was seen with messages of 100 kB."""
ROW_COPIES = 2
"""Times that the bytes of a batch in flight are there beside its messages: in its rows, and packed for COPY; once more
as the values that a transform returned."""
ROW_OVERHEAD = 600
"""Bytes of the objects that a row of some columns is made of (measured: 60 to 100 for each column)."""
GATHERING_SHARE = 0.5
"""Share of the handler's `max_age`, which lasts to the commit, for gathering; the rest is for the brokers' and the
write's own time. Who takes a batch for its age is free: it costs a transaction more, and nobody's turn."""
BATCHES_PER_CONNECTION = 3
"""Full batches to hold for each connection: the one being written, the next, and one more: partitions come by turns.
With one, connections had nothing to write a third of the time (seen); a fourth is memory for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The parts of one handler's memory, in bytes, and what follows from them."""

    queue: int
    """For librdkafka's queue."""
    buffered: int
    """For messages received and not yet written."""
    full: int
    """Of these, where consuming stops: what is under way then has room still."""
    batch: Bounds
    """Of a batch: less than those configured where the rows of all connections would not fit."""
    enough: int
    """Messages that keep every connection busy."""


def divide(memory: int, handler: HandlerConfig, queue: int | None = None) -> Budget:
    """Return the parts of a handler's memory; `queue` where librdkafka's has its size already, whatever that is."""
    total = memory
    if queue is not None:
        memory = int((total - queue) / (1 - LIBRDKAFKA_SHARE))
    buffered = int(memory * BUFFER_SHARE)
    batch, connections = handler.batch, handler.max_connections
    rows = int(memory * ENCODED_SHARE) // connections  # the objects; their bytes may have half of it
    bounds = Bounds(
        max_messages=max(1, min(batch.max_messages, rows // ROW_OVERHEAD)),
        max_bytes=max(1, min(batch.max_bytes, rows // 2 // (ROW_COPIES + (handler.transform is not None)))),
        max_age=batch.max_age * GATHERING_SHARE,
    )
    return Budget(
        queue=int(memory * LIBRDKAFKA_SHARE) if queue is None else queue,
        buffered=buffered,
        full=buffered - min(2 * CONSUME_BYTES, buffered // 8),  # what comes is there twice, once packed
        batch=bounds,
        enough=BATCHES_PER_CONNECTION * connections * bounds.max_messages,
    )
