"""What a halt's message tells to type is found in it, to be copied."""

import pytest

from consumerd.brokers import gap
from consumerd.errors import Halt
from consumerd.types import TopicPartition

RESET = "kafka-consumer-groups --bootstrap-server b:1 --group g --reset-offsets --topic t:0"


@pytest.mark.parametrize(
    ("message", "commands"),
    [
        ("table t does not exist; create it, or correct `table.name`; then restart consumerd", []),
        (
            "gone; to go on after it: consumerd resume a --accept-gap t:0 --accept-gap t:1; or consumerd reload",
            ["consumerd resume a --accept-gap t:0 --accept-gap t:1", "consumerd reload"],
        ),
        ("let an owner run what `consumerd setup --sql` prints", ["consumerd setup --sql"]),
        (f"type {RESET} --execute, and restart", [f"{RESET} --execute"]),
        ("set it forward again with kafka-consumer-groups --reset-offsets, then restart", []),
        (
            "type: kafka-configs --bootstrap-server b:1 --alter --topic t --add-config a=1,b=2 (as a whole)",
            ["kafka-configs --bootstrap-server b:1 --alter --topic t --add-config a=1,b=2"],
        ),
        (
            'may not; type: GRANT INSERT, SELECT ON public.t TO "a;b"; or: ALTER TABLE t ADD COLUMN "c" ...; then',
            ['GRANT INSERT, SELECT ON public.t TO "a;b";', 'ALTER TABLE t ADD COLUMN "c" ...;'],
        ),
    ],
)
def test_commands(message: str, commands: list[str]) -> None:
    """Ours, those of Kafka's tools that are whole, and SQL; what is only spoken of is none."""
    assert Halt("gap", message).commands == commands


def test_a_gap_names_its_command() -> None:
    """The command of a halt that is raised is found whole, up to its last word."""
    halt = gap(TopicPartition("t", 0), 4, low=10, high=20, group="g", bootstrap="b:1")
    assert halt.commands == [f"{RESET} --execute --to-offset 10"]
