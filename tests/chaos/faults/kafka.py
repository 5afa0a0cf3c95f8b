# ruff: noqa: D102 - the methods of a fault are described at Fault
"""Faults of the broker, and of the way to it."""

from tests.chaos.faults.base import Fault
from tests.chaos.stage import Stage


class BrokerStop(Fault):
    """SIGTERM to the broker."""

    kind, weight, lasts = "broker restarted", 1, (0.0, 3.0)
    holds = frozenset({"kafka"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka.stop()

    def end(self, stage: Stage) -> None:
        stage.world.kafka.start()


class BrokerKill(BrokerStop):
    """SIGKILL to the broker."""

    kind, weight, lasts = "broker killed", 1, (0.0, 3.0)

    def begin(self, stage: Stage) -> None:
        stage.world.kafka.kill()


class KafkaCut(Fault):
    """Every connection of the daemons to the broker reset."""

    kind, weight = "Kafka connections cut", 4
    holds = frozenset({"kafka proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka_proxy.cut()


class KafkaDeaf(Fault):
    """Connections to the broker that stay up and carry nothing, sometimes past the session's timeout."""

    kind, weight, lasts = "Kafka connections deaf", 2, (1.0, 9.0)
    holds = frozenset({"kafka proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka_proxy.deaf()

    def end(self, stage: Stage) -> None:
        stage.world.kafka_proxy.hear()
        stage.world.kafka_proxy.cut()


class KafkaSlow(Fault):
    """Each 64 KiB to and from the broker held back."""

    kind, weight, lasts = "Kafka connections slow", 2, (2.0, 8.0)
    holds = frozenset({"kafka proxy"})

    def begin(self, stage: Stage) -> None:
        stage.world.kafka_proxy.slow(self.dice.uniform(0.005, 0.05))

    def end(self, stage: Stage) -> None:
        stage.world.kafka_proxy.slow(0)


class Grow(Fault):
    """Partitions added to the topic."""

    kind, weight = "topic grown", 1
    holds = frozenset({"kafka"})

    def begin(self, stage: Stage) -> None:
        stage.grow(self.dice.randint(1, 3))
