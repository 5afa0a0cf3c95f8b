"""The kinds of fault."""

from tests.chaos.faults.base import Fault
from tests.chaos.faults.daemons import Hang, Join, Kill, Pause, Rewind, Terminate
from tests.chaos.faults.kafka import BrokerKill, BrokerStop, Grow, KafkaCut, KafkaDeaf, KafkaSlow
from tests.chaos.faults.postgres import (
    Backlog,
    Cancel,
    DiskFull,
    NoConnections,
    PostgresCut,
    PostgresDeaf,
    PostgresForgotten,
    PostgresKill,
    PostgresSlow,
    PostgresStop,
    ReadOnly,
    RowLock,
    TableLock,
    TerminateBackends,
)

__all__ = ["KINDS", "Fault"]

KINDS: dict[str, type[Fault]] = {
    fault.kind: fault
    for fault in (
        *(Kill, Pause, Hang, Terminate, Join, Rewind),
        *(BrokerStop, BrokerKill, KafkaCut, KafkaDeaf, KafkaSlow, Grow),
        *(PostgresStop, PostgresKill, PostgresCut, PostgresDeaf, PostgresForgotten, PostgresSlow),
        *(TableLock, RowLock, Backlog, Cancel, TerminateBackends, NoConnections, ReadOnly, DiskFull),
    )
}
