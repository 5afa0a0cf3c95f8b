"""The comparison at a segment's end: tables, letters and offsets with what was sent.

lost: a row that is not there often enough. doubled: one that is there too often. wrong: a row that is not its record's,
or of a record that must not be a row. out of order: a row that stands behind a later one of its partition, by the order
of insertion. A letter may be there more than once (a crash repeats it); it is identified by its source offset.
"""

import struct
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from confluent_kafka import TopicPartition

from tests.acceptance.stream import letters, source_of
from tests.chaos.ledger import Ledger
from tests.chaos.records import WRONG_ROW
from tests.chaos.stage import Stage
from tests.chaos.variant import group

COUNTS = ("lost", "doubled", "wrong", "out of order", "letters missing", "letters extra", "offsets wrong")
EXAMPLES = 5
"""Cases of each kind that are told."""
COPY_HEADER = 19
"""Bytes before the first row of a binary COPY."""
ROW = struct.Struct("!hiiiq")
"""A row of (integer, bigint) in it: the number of columns, then length and value of each."""
READ_TIMEOUT = 30.0
REPEATS_PER_FAULT = 2
"""At least once: a fault takes a partition from a member once, and once more when the group settles after it."""


@dataclass
class Verdict:
    """What was found; all counts 0 is a pass."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    repeats: int = 0
    """Times that a partition was repeated where that may be."""
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, count: str, times: int, example: str) -> None:
        """Note cases of a kind."""
        if times > 0:
            self.counts[count] += times
            if len(self.examples[count]) < EXAMPLES:
                self.examples[count].append(example)


def check(stage: Stage, ends: Mapping[int, int], faults: int) -> Verdict:
    """Compare everything; daemons and producer have ended, after so many faults."""
    verdict = Verdict()
    check_log(stage, ends)
    for handler in stage.variant.handlers:
        with stage.world.superuser(stage.database) as conn:
            found = conn.execute(f"SELECT part, seq FROM {handler} WHERE {WRONG_ROW}".encode()).fetchall()
        for part, seq in found:
            verdict.add("wrong", 1, f"{handler}: the row of {part}:{seq} is not its record's")
        check_letters(stage, handler, ends, verdict)
        check_offsets(stage, handler, ends, verdict)
    appended = _rows(stage, "append", "part, arrived")
    if stage.variant.mode == "kafka":
        limit = Repeats(rows=stage.variant.max_messages, times=REPEATS_PER_FAULT * faults)
        appended = {part: without_repeats(rows, part, limit, verdict) for part, rows in appended.items()}
    check_append(stage.ledgers["append"], appended, ends, verdict)
    if "upsert" in stage.variant.handlers:
        check_upsert(stage.ledgers["upsert"], _rows(stage, "upsert", "part, seq"), ends, verdict)
    return verdict


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What at least once may repeat of a partition: how many rows at a time, and how many times."""

    rows: int
    times: int


def without_repeats(rows: list[int], part: int, limit: Repeats, verdict: Verdict) -> list[int]:
    """Return the rows of a partition without those that were there already; more of these than may be are doubled.

    A repeat is a stretch of rows, in the order of insertion, that are all there already: at most one batch.
    """
    seen: set[int] = set()
    first: list[int] = []
    stretches: list[int] = []
    before, repeating = -1, False
    for seq in rows:
        if seq not in seen:
            seen.add(seq)
            first.append(seq)
            repeating = False
        elif repeating and seq > before:
            stretches[-1] += 1
        else:
            stretches.append(1)
            repeating = True
        before = seq
    verdict.repeats += len(stretches)
    verdict.add("doubled", max(0, len(stretches) - limit.times), f"append: {part} was repeated {len(stretches)} times")
    for length in stretches:
        verdict.add("doubled", length - limit.rows, f"append: {length} rows of {part} at once, a batch is {limit.rows}")
    return first


def check_log(stage: Stage, ends: Mapping[int, int]) -> None:
    """Make sure of the ledger's ground: each record lies in the log at the offset that is its sequence."""
    acknowledged = stage.producer.acknowledged()
    if list(ends.values()) != acknowledged:
        raise RuntimeError(f"the log ends at {ends}, the broker acknowledged {acknowledged}")
    consumer = stage.consumer("chaos-log")
    try:
        consumer.assign([TopicPartition(stage.topic, part, 0) for part in ends])
        left = sum(ends.values())
        while left:
            messages = consumer.consume(10_000, READ_TIMEOUT)
            if not messages:
                raise RuntimeError(f"the log ends early: {left} records are missing")
            for message in messages:
                part, offset = message.partition() or 0, message.offset() or 0
                if message.error() or message.key() != stage.records.key(part, offset):
                    raise RuntimeError(f"{part}:{offset} of the log holds {message.key()!r} {message.error()}")
            left -= len(messages)
    finally:
        consumer.close()


def check_append(ledger: Ledger, rows: Mapping[int, list[int]], ends: Mapping[int, int], verdict: Verdict) -> None:
    """Compare the append table's rows, in the order of insertion, with the ledger."""
    for part in sorted(ends.keys() | rows.keys()):
        expected = ledger.rows(part, ends.get(part, 0))
        found = rows.get(part, [])
        if found == expected:
            continue
        there, must = Counter(found), Counter(expected)
        for seq, times in (must - there).items():
            verdict.add("lost", times, f"append: {part}:{seq}")
        for seq, times in (there - must).items():
            known = seq in must
            verdict.add("doubled" if known else "wrong", times, f"append: {part}:{seq}, {there[seq]} of {must[seq]}")
        behind = descents(found)
        verdict.add("out of order", len(behind) - len(descents(expected)), f"append: {part}:{behind[:EXAMPLES]}")


def descents(rows: list[int]) -> list[int]:
    """Return each row that stands behind a later one."""
    return [after for before, after in pairwise(rows) if after < before]


def check_upsert(ledger: Ledger, rows: Mapping[int, list[int]], ends: Mapping[int, int], verdict: Verdict) -> None:
    """Compare the upsert table with the last good record of each key."""
    group_of = ledger.records.group
    for part in sorted(ends.keys() | rows.keys()):
        last = ledger.records.last_of_each_key(part, ends.get(part, 0))
        found = {group_of(part, seq): seq for seq in rows.get(part, [])}
        for key in last.keys() - found.keys():
            verdict.add("lost", 1, f"upsert: key {key}, last {part}:{last[key]}")
        for key, seq in found.items():
            if last.get(key) != seq:
                verdict.add("wrong", 1, f"upsert: key {key} has {part}:{seq}, last {part}:{last.get(key)}")


def check_letters(stage: Stage, handler: str, ends: Mapping[int, int], verdict: Verdict) -> None:
    """Compare the dead-letter topic with the poison that was sent, byte for byte."""
    ledger = stage.ledgers[handler]
    must = {(part, offset) for part, end in ends.items() for offset in ledger.letters(part, end)}
    found = set()
    for letter in letters(stage.world.kafka.bootstrap, f"{group(stage.topic, handler)}.dlq"):
        part, offset = source = source_of(letter)
        found.add(source)
        if source not in must:
            verdict.add("letters extra", 1, f"{handler}: {part}:{offset} is a good record")
        elif (letter.key(), letter.value()) != (ledger.records.key(part, offset), ledger.records.value(part, offset)):
            verdict.add("letters extra", 1, f"{handler}: the letter of {part}:{offset} is not what was sent")
    for part, offset in sorted(must - found):
        verdict.add("letters missing", 1, f"{handler}: {part}:{offset}")


def check_offsets(stage: Stage, handler: str, ends: Mapping[int, int], verdict: Verdict) -> None:
    """Compare checkpoints and Kafka's committed offsets with the logs' ends."""
    committed = stage.committed(handler)
    checkpoints = stage.checkpoints(handler)
    for part, end in ends.items():
        if checkpoints.get(part) != end:
            verdict.add("offsets wrong", 1, f"{handler}: checkpoint of {part} is {checkpoints.get(part)}, end {end}")
        if committed[part].offset != end:
            verdict.add("offsets wrong", 1, f"{handler}: committed of {part} is {committed[part].offset}, end {end}")


def _rows(stage: Stage, table: str, order: str) -> dict[int, list[int]]:
    """Read (part, seq) of a table in some order, as a binary COPY: half a million rows in a second."""
    rows: defaultdict[int, list[int]] = defaultdict(list)
    query = f"COPY (SELECT part, seq FROM {table} ORDER BY {order}) TO STDOUT (FORMAT binary)"
    with stage.world.superuser(stage.database) as conn, conn.cursor() as cursor, cursor.copy(query.encode()) as copy:
        data = b"".join(copy)
    end = len(data) - 2  # the trailer
    for _, _, part, _, seq in ROW.iter_unpack(memoryview(data)[COPY_HEADER:end]):
        rows[part].append(seq)
    return dict(rows)
