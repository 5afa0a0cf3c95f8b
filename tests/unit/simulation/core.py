"""The daemon's core with its servers, its clock and its chance replaced, and one seed run through it."""

from __future__ import annotations

import asyncio
import logging
import struct
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import tenacity.wait

from consumerd import kafka, live_table, member, metrics, postgres, progress, reconcile, watch, writer
from consumerd.catalog import Column, Table
from consumerd.checkpoint import Checkpoints
from consumerd.encode import Encoder
from tests.unit.simulation import broker, database, world
from tests.unit.simulation.loop import CLOCK, OWNER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from consumerd.config import PostgresConfig


ROW = struct.Struct(">qq")


class Sink:
    """Writes rows as they are."""

    async def prepare(self, conn: Any) -> None:  # noqa: ANN401
        """Need nothing."""

    async def forget(self, conn: Any) -> None:  # noqa: ANN401
        """Have nothing to take back."""

    def pack(self, rows: Sequence[tuple[Any, ...]], data: Any) -> Any:  # noqa: ANN401
        """Write rows one behind the other."""
        for row in rows:
            data.packed += ROW.pack(*row)
        data.rows += len(rows)
        return data

    async def write(self, conn: Any, data: Any) -> int:  # noqa: ANN401
        """Copy rows into the simulated table."""
        await conn.execute(database.COPY, list(ROW.iter_unpack(data.packed)))
        return 0


class TextCheckpoints(Checkpoints):
    """The checkpoints, whose statements stay text that the simulated database knows."""

    def _sql(self, text: Any) -> Any:  # noqa: ANN401
        return text


def _column(name: str) -> Column:
    return Column(name=name, oid=20, typmod=-1, type_name="bigint", not_null=True, automatic=False)


TABLE = Table(
    name="orders",
    identifier="orders",
    columns=(_column("partition"), _column("at")),
    unique=(),
    fingerprint=database.FINGERPRINT,
)
ENCODER = Encoder(TABLE, world.HANDLERS["postgres"])


async def _connect(config: PostgresConfig, name: str) -> database.Connection:
    process: world.Process = OWNER.get()  # type: ignore[assignment]
    return await process.world.database.connect(process)


async def _load(*_: object) -> Table:
    return TABLE


async def _nothing(*_: object) -> None:
    pass


class _Metric:
    """A metric that counts nothing: seeds share one process, and its registry."""

    def labels(self, *_: object) -> _Metric:
        """Return itself."""
        return self

    inc = set = observe = remove = labels


METRICS = SimpleNamespace(
    **{name: _Metric() for name, value in vars(metrics).items() if hasattr(value, "labels")},
    STATES=(),
    declare=lambda _: None,
    declare_partition=lambda *_: None,
    forget_partition=lambda *_: None,
)


@contextmanager
def simulated() -> Iterator[None]:
    """Replace what the core reaches its servers by."""
    replaced = [
        *((module, "time", CLOCK) for module in (member, writer, postgres, progress, watch, kafka)),
        *((module, "metrics", METRICS) for module in (member, progress, reconcile)),
        (tenacity.wait, "random", world.CHANCE),
        (member, "ConsumerThread", broker.Thread),
        (member, "Checkpoints", TextCheckpoints),
        (member, "DeadLetters", world.Letters),
        (member, "Topics", world.Topics),
        (live_table, "catalog", SimpleNamespace(load=_load)),
        (live_table, "Encoder", lambda *_: ENCODER),
        (live_table, "Append", lambda *_: Sink()),
        (member, "ensure_schema", _nothing),
        (TextCheckpoints, "store", _store),
        (asyncio, "run_coroutine_threadsafe", lambda answer, _: answer),
        (postgres, "connect", _connect),
        (postgres, "cut", _cut),
        (postgres, "together", lambda _, statements: database.Together(tuple(statements))),
        (watch, "cut", _cut),
        (watch, "_unsent", lambda _: 0),
        (watch, "_hung_up", lambda conn: conn.was_cut or conn.backend.gone),
        (writer, "fingerprint_query", lambda _: database.FINGERPRINT),
    ]
    patches = [patch.object(target, name, value) for target, name, value in replaced]
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
        logging.disable(level)


def _cut(conn: database.Connection) -> None:
    conn.cut()


async def _store(*_: object) -> str:
    return "store"


def run(seed: int, kind: str, mode: str = "postgres", *, traced: bool = False) -> world.World:
    """Run one seed; to be called within `simulated`."""
    one = world.World(seed, kind, mode=mode, traced=traced)
    one.run()
    return one
