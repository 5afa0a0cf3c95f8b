"""What must be in the tables: each partition's records up to its end, and again where an operator set it back."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.records import Records


@dataclass(frozen=True)
class Rewind:
    """An offset that an operator set: where the checkpoint stood with all daemons stopped, and where it went."""

    stood: int
    to: int


class Ledger:
    """One group's view of the topic."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self._rewinds: defaultdict[int, list[Rewind]] = defaultdict(list)

    def rewind(self, part: int, rewind: Rewind, *, before_was_adopted: bool) -> None:
        """Note a reset. One before it that no daemon came to adopt never was."""
        earlier = self._rewinds[part]
        if earlier and not before_was_adopted and earlier[-1].stood == rewind.stood:
            earlier.pop()
        earlier.append(rewind)

    def spans(self, part: int, end: int) -> Iterator[range]:
        """Return the ranges of offsets that were to be written, in the order of writing."""
        start = 0
        for rewind in self._rewinds[part]:
            yield range(start, rewind.stood)
            start = rewind.to
        yield range(start, end)

    def rows(self, part: int, end: int) -> list[int]:
        """Return the sequence of rows of a partition, in the order of writing, each as often as it must be there."""
        good = self.records.good
        return [seq for span in self.spans(part, end) for seq in span if good(part, seq)]

    def letters(self, part: int, end: int) -> set[int]:
        """Return the offsets that must have a letter."""
        return {seq for seq in range(end) if not self.records.good(part, seq)}
