"""What is sent, as a pure function of a seed: the record at (partition, sequence), and what must become of it.

One producer writes each partition, idempotently, so a record's sequence is its offset; the checker reads the log back
to see that it is. So the ledger of ten million records is the seed and one count for each partition. `grp` is the key
that upsert goes by: it belongs to one partition, so "the last record of a key" is decided by offsets alone.
"""

import random
from collections.abc import Callable

KEYS = 997
"""Keys of a partition; prime, so that they come in another order each round."""
STRIDE = 7919
POISON_SHARE = 0.015
"""Below the breaker's 5 %, and far enough that no 1,000 records reach that by chance."""
FATES = 65_537
"""Length of the table of fates; prime, so that partitions do not repeat each other."""
PARTITION_STRIDE = 104_729

TABLE = """
CREATE TABLE {name} (
    part integer NOT NULL, seq bigint NOT NULL, grp bigint NOT NULL, amount numeric(12, 2) CHECK (amount >= 0),
    label varchar(16) NOT NULL, at timestamptz, doc jsonb, arrived bigint GENERATED ALWAYS AS IDENTITY {constraint}
) {where}"""

WRONG_ROW = f"""
(grp, amount, label, at, doc) IS DISTINCT FROM (
    part * 1000 + seq * {STRIDE} % {KEYS}, seq % 1000000 + 0.25, 'l' || seq || 'é',
    timestamptz '2026-01-01Z' + seq % 86400000 * interval '1 ms',
    jsonb_build_object('of', seq, 'list', jsonb_build_array(part, NULL, 'ü')))"""
"""True for a row that is not its record's: the same function as `Records.fields`, in the database's own words."""

Fields = dict[str, bytes]


def _with(**replaced: bytes) -> Callable[[Fields], bytes | None]:
    return lambda good: _json(good | replaced)


def _without(name: str) -> Callable[[Fields], bytes | None]:
    return lambda good: _json({field: text for field, text in good.items() if field != name})


def _json(fields: Fields) -> bytes:
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), text) for name, text in fields.items()) + b"}"


POISON: dict[str, Callable[[Fields], bytes | None]] = {
    "not JSON": lambda good: _json(good)[:-9],
    "empty": lambda _: b"",
    "tombstone": lambda _: None,
    "wrong type": _with(grp=b'"many"'),
    "out of range": _with(grp=b"9223372036854775808"),
    "too many digits": _with(amount=b"12345678901.25"),
    "too long": _with(label=b'"far too long for a label"'),
    "not a time": _with(at=b'"yesterday"'),
    "null into NOT NULL": _with(label=b"null"),
    "missing NOT NULL": _without("grp"),
    "invalid UTF-8": _with(label=b'"\xff\xfe"'),
    "lone surrogate": _with(label=b'"\\ud800"'),
    # The rest is found by Postgres itself.
    "refused by CHECK": _with(amount=b"-1"),
    "NUL in text": _with(label=b'"\\u0000"'),
    "NUL in jsonb": _with(doc=b'"\\u0000"'),
    "lone surrogate in jsonb": _with(doc=b'"\\ud800"'),
    "invalid UTF-8 in jsonb": _with(doc=b'"\xff\xfe"'),
}
"""Each kind of poison, made from a good record's fields."""

_KINDS = list(POISON.values())


class Records:
    """The records of one seed. Sequences of a partition count from 0."""

    def __init__(self, seed: str) -> None:
        dice = random.Random(seed)
        self._fates = bytes(
            1 + dice.randrange(len(_KINDS)) if dice.random() < POISON_SHARE else 0 for _ in range(FATES)
        )

    def good(self, part: int, seq: int) -> bool:
        """Whether the record must become a row; else it must become a letter."""
        return not self._fate(part, seq)

    def key(self, part: int, seq: int) -> bytes:
        """Return the message's key, which names the record even where its value is unreadable."""
        return b"%d/%d" % (part, seq)

    def group(self, part: int, seq: int) -> int:
        """Return the record's key for upsert."""
        return part * 1000 + seq * STRIDE % KEYS

    def value(self, part: int, seq: int) -> bytes | None:
        """Return the message's value."""
        fate = self._fate(part, seq)
        return _KINDS[fate - 1](self.fields(part, seq)) if fate else _json(self.fields(part, seq))

    def fields(self, part: int, seq: int) -> Fields:
        """Return the fields of a good record, as JSON texts."""
        ms = seq % 86_400_000
        at = (ms // 3_600_000, ms // 60_000 % 60, ms // 1000 % 60, ms % 1000)
        return {
            "part": b"%d" % part,
            "seq": b"%d" % seq,
            "grp": b"%d" % self.group(part, seq),
            "amount": b"%d.25" % (seq % 1_000_000),
            "label": b'"l%d\xc3\xa9"' % seq,
            "at": b'"2026-01-01T%02d:%02d:%02d.%03dZ"' % at,
            "doc": b'{"of":%d,"list":[%d,null,"\xc3\xbc"]}' % (seq, part),
        }

    def last_of_each_key(self, part: int, end: int) -> dict[int, int]:
        """Return the sequence of each key's last good record below `end`."""
        last: dict[int, int] = {}
        for seq in range(end - 1, -1, -1):
            group = self.group(part, seq)
            if group not in last and self.good(part, seq):
                last[group] = seq
                if len(last) == KEYS:
                    break
        return last

    def _fate(self, part: int, seq: int) -> int:
        """Return 0 for a good record, else the number of its kind of poison."""
        return self._fates[(seq + part * PARTITION_STRIDE) % FATES]
