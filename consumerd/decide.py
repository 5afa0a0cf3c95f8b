"""Who wins at an assignment: the checkpoint (C), or the offset that Kafka has (K). A table of rules, as a function.

Our commits to Kafka carry a stamp in their metadata. An offset without our stamp was set by an operator, and wins; one
that Kafka lost (expired, or its group deleted) never resets anything. Pure.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from consumerd.errors import Halt
from consumerd.types import NO_TALLY
from consumerd.ways_on import OtherTopic

if TYPE_CHECKING:
    from consumerd.types import Tally, TopicPartition

LOG_START = -2
"""`next_offset` of a partition that appeared after its group had first seen the topic: it begins at its log's start,
whatever `start` says (with `latest`, a new partition's first messages were lost: seen). Kafka's own logical offset."""

Mode = Literal["postgres", "kafka"]
STAMP_VERSION = 1


class Stamp(msgspec.Struct, frozen=True, kw_only=True, rename={"version": "v"}):
    """The metadata of our Kafka commits."""

    version: int = STAMP_VERSION
    mode: str = "postgres"
    store: str
    group: str
    topic_id: str | None
    offset: int
    partitions: int | msgspec.UnsetType = msgspec.UNSET
    """How many partitions the topic had when the group first saw it, where no checkpoint in Postgres tells."""
    judged: tuple[int, int, float] | msgspec.UnsetType = msgspec.UNSET
    """Messages and refusals that the breaker has counted, and when (Unix time), where none in Postgres keeps them."""

    def encode(self) -> str:
        """Return the stamp as metadata."""
        return msgspec.json.encode(self).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A claimed checkpoint (C). `next_offset` None: the group has never been here."""

    epoch: int
    next_offset: int | None
    max_offset: int | None
    topic_id: str | None
    target: str
    leader_epoch: int | None = None
    tally: Tally = NO_TALLY


@dataclass(frozen=True, slots=True)
class Committed:
    """What Kafka has (K). `stamp` None: somebody else set the offset."""

    offset: int | None
    stamp: Stamp | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a partition goes on; start: by the configured `start`, or at its log's start when `late`."""

    kind: Literal["start", "resume", "adopt"]
    offset: int | None = None
    late: bool = False
    note: str | None = None


def decode_stamp(metadata: str | None) -> Stamp | None:
    """Return the stamp in a committed offset's metadata, if it is ours."""
    try:
        return msgspec.json.decode(metadata or "", type=Stamp)
    except (msgspec.DecodeError, RecursionError):
        return None


def decide(  # noqa: PLR0911 - one branch for each row of the table that it is
    partition: TopicPartition,
    stored: Stored,
    committed: Committed,
    *,
    store: str,
    group: str,
    topic_id: str | None,
    target: str,
) -> Decision:
    """Settle who wins at an assignment, the checkpoint (C) or Kafka's committed offset (K); raises Halt.

    An offset that Kafka lost (expired, or its group deleted) never resets anything; one without our stamp, or with a
    stamp for another offset, was set by an operator and becomes the checkpoint.
    """
    stamp, offset = committed.stamp, committed.offset
    if stamp is not None and stamp.mode != "postgres":
        stamp = None  # at least once came in between: what it committed is as good as an operator's offset
    require_ours(partition, stored, stamp, store=store, group=group, target=target)
    _same_topic(partition, stored.topic_id, topic_id, stored.next_offset)
    if stored.next_offset is None or stored.next_offset < 0:
        late = stored.next_offset == LOG_START
        if offset is None:
            return Decision(kind="start", late=late)
        if stamp is None:
            return Decision(kind="adopt", offset=offset, note=f"adopts the offset {offset} committed in Kafka")
        raise Halt(
            "checkpoint",
            f"group {group} committed {partition} up to {offset} from a checkpoint that this database does not "
            f"have: it was restored or emptied; restore {target} and its checkpoint together; or empty {target} "
            f"and set `group_id` to a new name, which reads the topic again",
        )
    here = stored.next_offset
    if offset is None:
        return Decision(kind="resume", offset=here, note="Kafka has no committed offset: the checkpoint stands")
    if stamp is None or stamp.offset != offset:
        if here == offset:
            return Decision(kind="adopt", offset=offset)
        what = f"skips {here}..{offset - 1}" if offset > here else f"repeats {offset}..{here - 1}"
        return Decision(kind="adopt", offset=offset, note=f"an operator set the offset to {offset}: {what}")
    if offset > here:
        note = f"Postgres went back: {here}..{offset - 1} had been written and is written again"
        return Decision(kind="resume", offset=here, note=note)
    return Decision(kind="resume", offset=here)


def require_ours(
    partition: TopicPartition, stored: Stored | None, stamp: Stamp | None, *, store: str, group: str, target: str
) -> None:
    """Halt when a checkpoint is another table's, or Kafka's offset another database's."""
    if stored is not None and stored.target != target:
        raise Halt(
            "checkpoint",
            f"group {group} wrote {partition} to {stored.target}, and is configured for {target} now: set `group_id` "
            f"to a new name to start over (it reads the topic again), or `table.name` back",
        )
    if stamp is not None and stamp.mode == "postgres" and (stamp.store != store or stamp.group != group):
        raise Halt(
            "checkpoint",
            f"group {group} commits {partition} for another database (store {stamp.store}, group {stamp.group}; this "
            f"one is store {store}): point `postgres.dsn` back at it, or set `group_id` to a new name",
        )


def set_by_operator(committed: Committed, mode: Mode) -> bool:
    """Whether Kafka's offset is none of ours in this mode, so that it becomes the checkpoint at the next start."""
    stamp = committed.stamp
    if committed.offset is None or stamp is None or stamp.mode != mode:
        return committed.offset is not None
    return mode == "postgres" and stamp.offset != committed.offset


def decide_by_kafka(
    partition: TopicPartition, committed: Committed, *, group: str, topic_id: str | None, bootstrap: str
) -> Decision:
    """Settle where a partition goes on without a checkpoint in Postgres (`checkpoint = "kafka"`); raises Halt."""
    stamp, offset = committed.stamp, committed.offset
    if offset is None:
        return Decision(kind="start")
    if stamp is None:
        return Decision(kind="adopt", offset=offset)
    if stamp.mode != "kafka":
        raise Halt(
            "checkpoint",
            f"group {group} has kept its checkpoint of {partition} in Postgres so far, and Kafka's offset may be "
            f'behind it: write checkpoint = "postgres" again; or, after a clean stop, when it is not, type '
            f"kafka-consumer-groups --bootstrap-server {bootstrap} --group {shlex.quote(group)} "
            f"--reset-offsets --to-current "
            f"--topic {partition.topic} --execute",
        )
    _same_topic(partition, stamp.topic_id, topic_id, offset)
    return Decision(kind="resume", offset=offset)


def _same_topic(partition: TopicPartition, ours: str | None, theirs: str | None, offset: int | None) -> None:
    """Halt when a checkpoint is of another topic of the same name."""
    if ours and theirs and ours != theirs:
        raise Halt(
            "topic",
            f"topic {partition.topic} was deleted and made again: its offsets mean other messages than the checkpoint "
            f"{offset} of {partition}; to keep the old checkpoints, set `group_id` to a new name",
            OtherTopic(topic=partition.topic, old=ours, new=theirs),
        )
