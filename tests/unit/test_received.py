"""What the Kafka thread has delivered is gathered as it came, but for what an operator has passed over."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from consumerd.accumulator import Accumulator
from consumerd.config import HandlerConfig, TableConfig
from consumerd.kafka import Chunk
from consumerd.member import Member
from consumerd.packed import Packed
from consumerd.types import TopicPartition
from consumerd.ways_on import Accepted

A = TopicPartition("orders", 0)


class Sent:
    """A message."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def offset(self) -> int:
        """Return where it stands."""
        return self._offset

    def leader_epoch(self) -> None:
        """Have none."""

    def __len__(self) -> int:
        return 1

    def key(self) -> None:
        """Have none."""

    def headers(self) -> None:
        """Have none."""


async def test_what_came_packed_stays_so_after_a_message_was_passed_over(monkeypatch: Any) -> None:  # noqa: ANN401
    """Only the chunk that holds the message is packed again; the others cost nothing for it."""
    handler = HandlerConfig.model_validate(
        {"name": "h", "path": Path("h.toml"), "topics": ("orders",), "table": TableConfig(name="t", write="append")}
    )
    config: Any = SimpleNamespace(path=Path("consumerd.toml"), kafka=None, handlers=(handler,))
    member = Member(config, handler, 1 << 24, Accepted(skips={A: {3}}))
    member.assignment = cast("Any", SimpleNamespace(leases={}))
    member._positions[A] = 0
    added: list[tuple[int, Packed]] = []
    monkeypatch.setattr(Accumulator, "add", lambda _, __, of, ___, ____, packed: added.append((len(of), packed)))
    first, second, third = Packed(messages=2), Packed(messages=2), Packed(messages=2)
    for at, packed in enumerate((first, second, third)):
        member.received([Chunk(A, cast("Any", [Sent(2 * at), Sent(2 * at + 1)]), 2, packed)])
    assert [2, 1, 2] == [count for count, _ in added]
    assert [True, False, True] == [
        packed is came for (_, packed), came in zip(added, (first, second, third), strict=True)
    ]
