"""One number for memory is divided into all that a handler holds."""

from pathlib import Path

import pytest

from consumerd.budget import Budget, divide
from consumerd.config import HandlerConfig, TableConfig

MIB = 1 << 20


def of(memory: int, *, connections: int = 4, queue: int | None = None, **batch: float) -> Budget:
    """Divide for a handler with these bounds of a batch."""
    handler = HandlerConfig.model_validate(
        {
            "name": "h",
            "path": Path("h.toml"),
            "topics": ("t",),
            "table": TableConfig(name="t", write="append"),
            "max_connections": connections,
            "batch": batch,
        }
    )
    return divide(memory, handler, queue)


@pytest.mark.parametrize("memory", [1 * MIB, 64 * MIB, 512 * MIB, 16 << 30])
@pytest.mark.parametrize("connections", [1, 4, 64])
def test_within_the_bound(memory: int, connections: int) -> None:
    """Queue, messages, and the rows of every connection's batch fit into the memory together, however small it is."""
    budget = of(memory, connections=connections, max_messages=1_000_000, max_bytes=1 << 30)
    in_flight = connections * budget.batch.max_messages * 600
    assert budget.queue + budget.buffered + in_flight <= memory
    assert connections * budget.batch.max_bytes * 2 <= memory // 4
    assert 0 < budget.full < budget.buffered


@pytest.mark.parametrize("queue", [MIB, 8 * MIB, 32 * MIB])
def test_within_the_bound_beside_a_queue_of_another_size(queue: int) -> None:
    """A share that changes while the consumer is there leaves its queue as it is; all together fits still."""
    memory = 64 * MIB
    budget = of(memory, queue=queue, max_messages=1_000_000, max_bytes=1 << 30)
    in_flight = 4 * budget.batch.max_messages * 600
    assert budget.queue == queue
    assert queue + (budget.buffered + in_flight) * 7 // 6 <= memory  # what the allocator holds has its share, too
    assert of(memory, queue=memory // 8) == of(memory)


def test_bounds_are_kept() -> None:
    """Where memory allows, a batch has the bounds of the configuration, and is due at half of its age."""
    batch = of(512 * MIB, max_messages=7, max_bytes=900, max_age=3.0).batch
    assert (batch.max_messages, batch.max_bytes, batch.max_age) == (7, 900, 1.5)


def test_small_memory() -> None:
    """However little there is, a batch holds one message and consuming has room."""
    budget = of(1000, connections=64)
    assert (budget.batch.max_messages, budget.batch.max_bytes) == (1, 1)
    assert budget.full > 0


def test_enough_for_all_connections() -> None:
    """Three full batches for each connection keep them busy."""
    assert of(512 * MIB, connections=2, max_messages=100).enough == 600
