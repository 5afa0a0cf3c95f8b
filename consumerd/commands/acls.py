"""What the brokers allow this principal to do, and the `kafka-acls` line for what a handler needs besides.

Brokers without an authorizer allow everything, and say so.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient  # type: ignore[attr-defined]

from consumerd.brokers import client_config
from consumerd.errors import Halt, Outage
from consumerd.topics import CALL_TIMEOUT, meaning

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from concurrent.futures import Future

    from consumerd.config import HandlerConfig, KafkaConfig

READS = {AclOperation.READ, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS}
"""On a topic that is read; its settings say how large a letter may be."""
WRITES = {AclOperation.WRITE, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS}
"""On a dead-letter topic."""
JOINS = {AclOperation.READ}
"""On a group."""


def lacking(kafka: KafkaConfig, handler: HandlerConfig, topics: Iterable[str], *, letters_there: bool) -> list[str]:
    """Return a line to type for each thing that is not allowed; raises Outage, Halt. Blocking."""
    try:
        admin = AdminClient(client_config(kafka))
        lines = []
        for topic in topics:
            lines += _line(kafka, "topic", topic, READS - _on_topic(admin, topic))
        if handler.poison.action == "dead-letter":
            lines += _for_letters(kafka, admin, handler.dead_letter.topic, there=letters_there)
        lines += _line(kafka, "group", handler.group_id, JOINS - _on_group(admin, handler.group_id))
    except KafkaException as exception:
        raise meaning(exception.args[0], kafka.bootstrap_servers) from exception
    except TimeoutError:
        raise Outage("kafka", f"Kafka at {kafka.bootstrap_servers} does not answer") from None
    return lines


def _for_letters(kafka: KafkaConfig, admin: AdminClient, topic: str, *, there: bool) -> list[str]:
    if there:
        return _line(kafka, "topic", topic, WRITES - _on_topic(admin, topic))
    if AclOperation.CREATE in _of(admin.describe_cluster(include_authorized_operations=True)):
        return []
    return _line(kafka, "topic", topic, {*WRITES, AclOperation.CREATE})


def _on_topic(admin: AdminClient, topic: str) -> set[AclOperation]:
    futures = admin.describe_topics(TopicCollection([topic]), include_authorized_operations=True)
    return _of(futures[topic])


def _on_group(admin: AdminClient, group: str) -> set[AclOperation]:
    return _of(admin.describe_consumer_groups([group], include_authorized_operations=True)[group])


def _of(future: Future[Any]) -> set[AclOperation]:
    """Return the operations that an answer allows; none where even to ask is not allowed."""
    try:
        return set(future.result(CALL_TIMEOUT).authorized_operations or ())
    except KafkaException as exception:
        error = meaning(exception.args[0], "")
        if isinstance(error, Halt):
            return set()
        raise


def _line(kafka: KafkaConfig, kind: str, name: str, operations: Collection[AclOperation]) -> list[str]:
    if not operations:
        return []
    names = sorted(operation.name.title().replace("_", "") for operation in operations)
    wanted = " ".join(f"--operation {name}" for name in names)
    user = kafka.properties.get("sasl.username", "NAME")
    command = (
        f"kafka-acls --bootstrap-server {kafka.bootstrap_servers} --add --allow-principal {shlex.quote(f'User:{user}')}"
    )
    return [f"{command} {wanted} --{kind} {shlex.quote(name)}"]
