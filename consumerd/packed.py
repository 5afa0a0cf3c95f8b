"""Messages as rows, packed for COPY: pieces that come with chunks, and are parted and joined as batches are. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consumerd.errors import Refusal, SkipReason

PACKED_OVERHEAD = 200
"""Bytes of a piece of packed rows beside them (measured: 175)."""
JOINED = 1000
"""Messages up to which pieces are joined: a trickle comes as one message each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """What consecutive messages of one partition are as rows, ready for COPY. One for no mapping holds nothing."""

    mapping: object = None
    """What it was made by (`live_table.Mapping`): by another it is made again."""
    messages: int
    rows: int = 0
    data: bytes = b""
    refused: dict[int, Refusal] = field(default_factory=dict)
    """Position among the messages of each that is no row, and why."""
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    """How many messages are neither row nor refused."""
    extra: int = 0
    """Rows beyond one for each message that has any: only a transform makes them."""

    @property
    def memory(self) -> int:
        """Bytes that it takes."""
        return len(self.data) + PACKED_OVERHEAD if self.data else 0


def joined(pieces: list[Packed]) -> list[Packed]:
    """Join neighbours that were made by the same mapping, as long as they are small together."""
    groups: list[list[Packed]] = []
    messages = 0
    for piece in pieces:
        messages += piece.messages
        if not groups or groups[-1][0].mapping is not piece.mapping or messages > JOINED:
            groups.append([])
            messages = piece.messages
        groups[-1].append(piece)
    return [group[0] if len(group) == 1 else _as_one(group) for group in groups]


def _as_one(pieces: list[Packed]) -> Packed:
    refused: dict[int, Refusal] = {}
    skipped: Counter[SkipReason] = Counter()
    start = 0
    for piece in pieces:
        refused |= {start + position: why for position, why in piece.refused.items()}
        skipped += piece.skipped
        start += piece.messages
    rows, data = sum(piece.rows for piece in pieces), b"".join(piece.data for piece in pieces)
    return Packed(mapping=pieces[0].mapping, messages=start, rows=rows, data=data, refused=refused, skipped=skipped)


def parted(pieces: list[Packed], count: int) -> tuple[list[Packed], list[Packed]]:
    """Part the pieces of the first `count` messages from the others; one in the middle loses its rows."""
    kept: list[Packed] = []
    rest: list[Packed] = []
    start = 0
    for piece in pieces:
        before = min(max(count - start, 0), piece.messages)
        whole = before in {0, piece.messages}
        if before:
            kept.append(piece if whole else Packed(messages=before))
        if before < piece.messages:
            rest.append(piece if whole else Packed(messages=piece.messages - before))
        start += piece.messages
    return kept, rest
