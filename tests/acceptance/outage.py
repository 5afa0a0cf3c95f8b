"""A daemon under a running stream while its database breaks: what the operator sees, and how soon it is over."""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from tests.acceptance.events import TIMEOUT, Events
from tests.servers.process import wait_until

PACE = 400.0
"""Messages/s while something breaks."""
SEEN_WITHIN = 30
"""Seconds in which an outage must be seen from outside: `lock_timeout` and `connect_timeout` are 10 s."""
RECOVERED_WITHIN = 20
"""Seconds from an outage's end to the first new row. The goal is 5."""


@dataclass
class Scene(Events):
    """A daemon and its stream; entered, both run. `dsn` is where rows are looked for: after a failover elsewhere."""

    config: Mapping[str, Mapping[str, Any]] | None = None
    """What is added to the daemon's."""
    _seen: int = 0
    _flow: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Start the daemon and the stream, and wait for rows."""
        self.start(self.config)
        self.resume()
        wait_until(lambda: self.written() > 0, SEEN_WITHIN, "the first rows")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the stream."""
        self.pause()

    def pause(self) -> None:
        """Let the stream rest."""
        self._flow.close()

    def resume(self) -> None:
        """Let the stream flow."""
        self._flow.enter_context(self.stream.flowing(PACE))

    def catches_up(self, timeout: float = TIMEOUT) -> None:
        """End the stream and wait until the checkpoints stand at its end."""
        self.pause()
        super().catches_up(timeout)

    def metric(self, name: str, label: str) -> float:
        """Return the sum of the handler's samples of a metric that carry a label."""
        samples = self.run.metrics().items()
        return sum(value for sample, value in samples if sample.startswith(f"consumerd_{name}{{") and label in sample)

    def retries(self) -> float:
        """Return how often Postgres was tried again."""
        return self.metric("retries_total", 'cause="postgres"')

    def waits(self, *words: str) -> None:
        """Wait until everything that an operator may look at tells of the outage, and the process is well."""

        def told() -> bool:
            status = self.status()
            sentence = status["waiting_for"].get("postgres", "")
            return status["state"] == "waiting" and any(word in sentence for word in words)

        wait_until(told, SEEN_WITHIN, f"the state `waiting`, for {' or '.join(words)}")
        wait_until(lambda: self.metric("handler_state", 'state="waiting"') == 1, SEEN_WITHIN, "the state's gauge")
        wait_until(lambda: self.metric("lag_messages", "events") > 0, SEEN_WITHIN, "the lag")
        lines = [line for line in self.run.logs().splitlines() if '"waiting: ' in line]
        assert any(word in line for line in lines for word in words)
        assert (200, 200) == (self.run.get("/healthz")[0], self.run.get("/readyz")[0])
        self._seen = self.written()

    def recovers(self, within: float = RECOVERED_WITHIN) -> None:
        """Wait for the first row since waits(); called at the outage's end."""
        began = time.monotonic()
        wait_until(lambda: self.written() > self._seen, within, "the first new row")
        tell("first new row", began)

    def goes_on(self, within: float = RECOVERED_WITHIN) -> None:
        """Wait for a row newer than this moment."""
        self._seen = self.written()
        self.recovers(within)

    def check(self, *, again: bool = False) -> None:
        """Compare table and letters with what was sent, once all of it is written and the handler runs, unhalted.

        Letters are sent once, unless messages had to be read `again`, perhaps by another process.
        """
        self.catches_up()
        wait_until(lambda: self.state() == "running", SEEN_WITHIN, "the state `running`")
        assert self.metric("halts_total", "events") == 0
        # A COMMIT that landed and was not answered for a while is found in the checkpoint, and not tried again.
        assert again or self.retries() > 0 or "a connection is deaf" in self.run.logs()
        self.stream.check(self.dsn, letters_once=not again)


class MakeScene(Protocol):
    """What the ``scene`` fixture gives."""

    def __call__(self, dsn: str, config: Mapping[str, Mapping[str, Any]] | None = None, **keys: object) -> Scene:
        """Make a scene; ``config`` and ``keys`` are added to the daemon's and the handler's tables."""


def tell(what: str, since: float) -> None:
    """Print what was measured; pytest shows it with -rP."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    print(f"measured: {test}: {what} after {time.monotonic() - since:.1f} s")  # noqa: T201 - for whoever measures
