"""A daemon under a running stream while its database breaks: what the operator sees, and how soon it is over."""

import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tests.acceptance.stream import Stream, doubled, letters, rows, source_of
from tests.acceptance.test_exactly_once import caught_up, handler
from tests.conftest import MakeDaemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

if TYPE_CHECKING:
    from tests.servers.daemon import Daemon

PACE = 400.0
"""Messages/s while something breaks."""
PARTITIONS = 2
SEEN_WITHIN = 30
"""Seconds in which an outage must be seen from outside: `lock_timeout` and `connect_timeout` are 10 s."""
RECOVERED_WITHIN = 20
"""Seconds from an outage's end to the first new row. The goal is 5."""


class Scene:
    """A handler `events` that appends a stream to a table; entered, both run."""

    def __init__(
        self,
        kafka: KafkaServer,
        topic: str,
        make: MakeDaemon,
        dsn: str,
        *,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        **keys: Mapping[str, Any],
    ) -> None:
        """Prepare; `config` and `keys` are added to the daemon's and the handler's tables."""
        self.kafka = kafka
        self.stream = Stream(kafka.bootstrap, topic, PARTITIONS)
        self.dsn = dsn
        """Where the rows are looked for; after a failover another server's."""
        config = config or {}
        self._config = {**config, "postgres": {"dsn": dsn, **config.get("postgres", {})}}
        self.handlers = {"events": handler(topic, "events", write="append") | keys}
        self._make = make
        self.run: Daemon
        self._seen = 0
        self._over = threading.Event()
        self._producer = threading.Thread()

    def __enter__(self) -> Self:
        """Start the daemon and the stream, and wait for rows."""
        self.run = self._make(self.handlers, self._config)
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
        self._over.set()
        if self._producer.is_alive():
            self._producer.join()

    def resume(self) -> None:
        """Let the stream flow."""
        self._over.clear()
        self._producer = threading.Thread(target=self._produce, name="stream", daemon=True)
        self._producer.start()

    def catches_up(self) -> None:
        """End the stream and wait until the checkpoints stand at its end."""
        self.pause()
        wait_until(lambda: caught_up(self.run, {"events": self.stream}), 60, "the end of the topic")

    def status(self) -> dict[str, Any]:
        """Return the handler's part of /status."""
        return dict(self.run.status()["handlers"]["events"])

    def written(self) -> int:
        """Return how many rows this process has committed."""
        return int(self.status()["written"])

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
        wait_until(lambda: self.status()["state"] == "running", SEEN_WITHIN, "the state `running`")
        assert self.metric("halts_total", "events") == 0
        assert again or self.retries() > 0
        numbers = rows(self.dsn, "events")
        assert doubled(numbers) == {}
        assert set(numbers) == self.stream.good()
        sources = [source_of(letter) for letter in letters(self.kafka.bootstrap, f"{self.stream.topic}.dlq")]
        assert set(sources) == self.stream.bad()
        assert again or len(sources) == len(self.stream.bad())

    def _produce(self) -> None:
        while not self._over.is_set():
            self.stream.produce(40, per_second=PACE)


def tell(what: str, since: float) -> None:
    """Print what was measured; pytest shows it with -rP."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    print(f"measured: {test}: {what} after {time.monotonic() - since:.1f} s")  # noqa: T201 - for whoever measures
