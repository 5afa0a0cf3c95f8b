"""What `consumerd tune` recommends of what it measured."""

import tomllib
from pathlib import Path

import pytest

from consumerd.commands.tune import MIB, Measured, Tuned
from consumerd.config import HandlerConfig

HANDLER = HandlerConfig.model_validate(
    {
        "name": "events",
        "path": Path("events.toml"),
        "topics": ["events"],
        "table": {"name": "events", "write": "append"},
    }
)


def tuned(*rates: float, size: int = MIB) -> Tuned:
    """Return measurements of sizes 1000, 2000 and so on."""
    measured = [
        Measured(messages=1000 * number, rate=rate, seconds=0.01, memory=2 * size, size=size)
        for number, rate in enumerate(rates, 1)
    ]
    return Tuned(handler=HANDLER, measured=measured, said=["Said."])


@pytest.mark.parametrize(
    ("rates", "best"),
    [((100, 200, 300), 3000), ((94.9, 100, 90), 2000), ((95, 100, 99), 1000), ((100,), 1000), ((100, 50, 104), 1000)],
)
def test_the_smallest_size_within_five_percent_of_the_best(rates: tuple[float, ...], best: int) -> None:
    """Rows come sooner in smaller batches, so a larger one must be worth it."""
    assert best == tuned(*rates).best.messages


def test_it_is_written_as_toml() -> None:
    """What is printed last goes into the handler's file; max_bytes too, where it would cut such batches."""
    text = tuned(100, 200).text()
    assert {"batch": {"max_messages": 2000}} == tomllib.loads(text.partition("# events.toml")[2])
    text = tuned(100, 200, size=9 * MIB + 1).text()
    assert {"batch": {"max_messages": 2000, "max_bytes": "10MiB"}} == tomllib.loads(text.partition("# events.toml")[2])
