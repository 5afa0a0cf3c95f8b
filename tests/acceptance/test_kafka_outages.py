"""P4: whatever is wrong with the brokers is waited for, visibly; recovery is by itself, and within seconds."""

import itertools
import os
import re
import shlex
import subprocess
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from confluent_kafka.cimpl import NewTopic

from tests.acceptance.events import caught_up, handler, state, wait_for_halt
from tests.acceptance.stream import POISON_EVERY, Stream, letters, make_table, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaCluster, KafkaServer
from tests.servers.process import free_port, wait_until
from tests.servers.proxy import Proxy

TIMEOUT = 40  # seconds for anything that a test waits for
SEEN = 30  # seconds until an outage is to be seen: a silent broker is after 10 s, and so is the next try after 3 more
OUTAGE = 8.0
"""Seconds that a fault lasts at least: enough for backoffs to grow."""
RECOVERY = 8.0
"""Seconds from a fault's end to the first new row, at most: five are promised, the rest is for a busy machine."""
DEFAULT = 45.0
"""Seconds of a session where nothing else is configured."""
ASSIGNED = 'consumerd_partitions_assigned{handler="events"}'
AUTHORIZER = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}


@pytest.fixture(scope="module")
def broker(servers_folder: Path) -> Iterator[tuple[KafkaServer, Proxy]]:
    """Start a broker of this file's own, with access lists and a second listener behind a proxy."""
    folder = Path(tempfile.mkdtemp(prefix="kafka-outages-", dir=servers_folder))
    server = KafkaServer(folder, AUTHORIZER)
    proxy = Proxy(server.second_port)
    server.advertise(proxy.port)
    proxy.start()
    server.start()
    yield server, proxy
    proxy.close()
    server.close()


@pytest.fixture(scope="module")
def kafka(broker: tuple[KafkaServer, Proxy]) -> KafkaServer:
    """Give the broker."""
    return broker[0]


@pytest.fixture(scope="module")
def proxy(broker: tuple[KafkaServer, Proxy]) -> Proxy:
    """Give the proxy before the broker."""
    return broker[1]


@pytest.fixture
def admin(kafka: KafkaServer) -> AdminClient:
    """Make a client for what an operator does."""
    return AdminClient({"bootstrap.servers": kafka.bootstrap})


def events(topic: str, **more: object) -> dict[str, dict[str, object]]:
    """Return the handler of a topic."""
    return {"events": handler(topic, "events", write="append") | {"retry": {"max": "1s"}} | more}


def by(proxy: Proxy, **more: object) -> dict[str, Any]:
    """Return the configuration of a daemon that reaches the broker through the proxy."""
    return {"kafka": {"bootstrap_servers": f"127.0.0.1:{proxy.port}", **more}}


def count(dsn: str) -> int:
    """Count rows."""
    with psycopg.connect(dsn) as conn:
        return int(conn.execute("SELECT count(*) FROM events").fetchall()[0][0])


def recovers(fault: str, dsn: str, stream: Stream, within: float = RECOVERY) -> None:
    """Measure from now, when the broker answers again, to the first new row."""
    before = count(dsn)
    over = time.monotonic()
    stream.produce(100)
    wait_until(lambda: count(dsn) > before, 120, f"a row after {fault}")
    seconds = time.monotonic() - over
    print(f"{fault}: recovered in {seconds:.1f} s")  # noqa: T201 - the figure that the test is about
    assert seconds < within


def words(daemon: Daemon) -> str:
    """Return what a daemon says that it waits for."""
    return "; ".join(daemon.status()["handlers"]["events"]["waiting_for"].values())


def waiting_for(daemon: Daemon, source: str, sentence: str = "") -> bool:
    """Whether a daemon waits for this, and says so with these words in status and log."""
    said = daemon.status()["handlers"]["events"]["waiting_for"].get(source, "")
    return state(daemon) == "waiting" and sentence in said and f"waiting: {sentence}" in daemon.logs() and bool(said)


def faults(kafka: KafkaServer, proxy: Proxy) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Return how each fault begins and ends; at the end the broker answers."""
    return {
        "stopped": (kafka.stop, kafka.start),
        "killed": (kafka.kill, kafka.start),
        "frozen": (kafka.freeze, kafka.thaw),
        "deaf": (proxy.deaf, proxy.hear),
        "cut off": (proxy.stop, proxy.start),
    }


@pytest.mark.parametrize(
    ("fault", "session"),
    [
        ("killed", DEFAULT),
        ("frozen", DEFAULT),
        ("stopped", 12.0),
        ("killed", 12.0),
        ("frozen", 6.0),
        ("deaf", 6.0),
        ("cut off", 6.0),
    ],
)
def test_a_broker_that_is_gone_is_waited_for(
    proxy: Proxy, kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, *, fault: str, session: float
) -> None:
    """P4: a broker gone for less or for more than a session is an outage that is seen, and that ends within seconds."""
    properties = {"session.timeout.ms": int(session * 1000)}
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    run = daemon(events(stream.topic), by(proxy, properties=properties))
    lasts = OUTAGE if session == DEFAULT else max(OUTAGE, session + 2)
    # A session of six seconds is over before a silent connection is given up; the broker then waits for who it was.
    within = RECOVERY + (session if fault == "frozen" and session != DEFAULT else 0)
    ready = 200 if fault not in {"frozen", "deaf"} else None  # what silence does depends on when it began
    is_waited_for(fault, run, stream, faults(kafka, proxy)[fault], lasts=lasts, within=within, ready=ready)
    stream.check(database)


@pytest.mark.parametrize("member", ["static", "consumer protocol"])
def test_a_member_with_an_id_of_its_own_is_back_as_soon(
    proxy: Proxy, kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, *, member: str
) -> None:
    """P4: a static member, and one of KIP-848, recover as quickly from an outage longer than a session.

    A static member knows by then that it is out of its group.
    """
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    static = by(proxy, group_instance_id="one")
    run = daemon(events(stream.topic), static if member == "static" else kip_848(database, proxy.port))
    is_waited_for("killed", run, stream, faults(kafka, proxy)["killed"], ready=503 if member == "static" else None)
    stream.check(database)


def is_waited_for(
    fault: str,
    run: Daemon,
    stream: Stream,
    ends: tuple[Callable[[], None], Callable[[], None]],
    *,
    lasts: float = OUTAGE,
    within: float = RECOVERY,
    ready: int | None = None,
) -> None:
    """Have a fault begin, last some seconds and end; the daemon says that it waits, recovers, and stops in order.

    `ready` is what /readyz answers at the fault's end.
    """
    dsn = tomllib.loads(run.config.read_text(encoding="utf-8"))["postgres"]["dsn"]
    begin, end = ends
    stream.produce(1_000)
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the first rows")
    began = time.monotonic()
    begin()
    try:
        wait_until(lambda: waiting_for(run, "kafka"), SEEN, f"state `waiting`: {fault}")
        print(f"{fault}: seen after {time.monotonic() - began:.1f} s: {words(run)}")  # noqa: T201
        assert run.get("/healthz")[0] == 200
        time.sleep(max(0, began + lasts - time.monotonic()))
        assert ready in {None, run.get("/readyz")[0]}
    finally:
        end()
    recovers(fault, dsn, stream, within)
    stream.produce(1_000)
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
    wait_until(lambda: state(run) == "running", TIMEOUT, "the state `running`")
    assert run.stop() == 0


def test_a_member_cut_off_from_the_broker_alone_writes_nothing(
    proxy: Proxy, kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P2: a member that does not hear of its loss, and still reaches Postgres, waits, and is a member again after.

    In KIP-848 the broker alone says who is dead: whoever it cannot reach holds its partitions on.
    """
    good = (number for number in itertools.count() if number % POISON_EVERY)  # a letter would wait for the broker
    stream = Stream(kafka.bootstrap, topic(2), 2, _next=good)
    make_table(database, "events")
    slow = events(stream.topic, batch={"max_age": "15s"})
    first = daemon(slow, kip_848(database, proxy.port))
    stream.produce(400)
    wait_until(lambda: first.status()["handlers"]["events"]["consumed"] == 400, TIMEOUT, "a batch to gather")
    proxy.deaf()
    try:
        second = daemon(events(stream.topic), kip_848(database, kafka.port))
        wait_until(lambda: caught_up(second, {"events": stream}), TIMEOUT, "all rows, by the second")
        wait_until(lambda: first.status()["handlers"]["events"]["state"] == "waiting", TIMEOUT, "the first, waiting")
    finally:
        proxy.hear()
        proxy.cut()
    wait_until(lambda: first.metrics()[ASSIGNED] == second.metrics()[ASSIGNED] == 1, TIMEOUT, "two that share")
    stream.produce(400)
    assert [first.stop(), second.stop()] == [0, 0]
    second.start()
    second.wait_ready()
    wait_until(lambda: caught_up(second, {"events": stream}), TIMEOUT, "the end of the topic")
    stream.check(database)


def kip_848(dsn: str, port: int) -> str:
    """Return a configuration without the properties of the session, which KIP-848 refuses."""
    return f"""
[kafka]
bootstrap_servers = "127.0.0.1:{port}"
properties = {{ "group.protocol" = "consumer" }}
[postgres]
dsn = "{dsn}"
[daemon]
listen = "127.0.0.1:{free_port()}"
"""


def test_a_protocol_that_the_broker_has_not_halts(database: str, tmp_path: Path, daemon: MakeDaemon) -> None:
    """P7: a fatal error of librdkafka that no new consumer mends halts the handler and says what to change."""
    server = KafkaServer(tmp_path)
    server.configure({"group.coordinator.rebalance.protocols": "classic"})
    server.start()
    try:
        make_table(database, "events")
        run = daemon(events(made_topic(server.bootstrap)), kip_848(database, server.port), wait=False)
        assert "the brokers do not support what [kafka.properties] asks for" in wait_for_halt(run)
    finally:
        server.close()


def test_a_brokers_full_disk_is_waited_for(database: str, tmp_path: Path, daemon: MakeDaemon) -> None:
    """P4: a broker that dies of a full disk takes nothing with it; with space made and a restart all goes on."""
    if os.geteuid() != 0:
        pytest.skip("mounts a small disk: needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)], check=True)
    server = KafkaServer(disk)
    try:
        server.start()
        stream = Stream(server.bootstrap, made_topic(server.bootstrap), 2)
        make_table(database, "events")
        run = daemon(events(stream.topic), {"kafka": {"bootstrap_servers": server.bootstrap}})
        stream.produce(1_000)
        wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the first rows")
        ballast = disk / "ballast"
        with suppress(OSError), ballast.open("wb") as filling:
            while True:
                filling.write(bytes(4096))
                filling.flush()
        meanwhile = threading.Thread(target=stream.produce, args=[100])
        meanwhile.start()
        wait_until(lambda: not server.running, TIMEOUT, "the broker's end")
        wait_until(lambda: waiting_for(run, "kafka"), TIMEOUT, "the state `waiting`")
        print(words(run))  # noqa: T201
        ballast.unlink()
        server.start()
        recovers("disk full", database, stream)
        meanwhile.join()
        wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
        assert run.stop() == 0
        stream.check(database)
    finally:
        server.close()
        subprocess.run(["umount", str(disk)], check=True)


def made_topic(bootstrap: str, replicas: int = 1) -> str:
    """Make a topic of two partitions."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic("events", 2, replicas)])["events"].result(TIMEOUT)
    return "events"


def elected(cluster: KafkaCluster, without: KafkaServer) -> None:
    """Wait until the others have noticed a broker's death: it takes the cluster's timeouts, and is the fault's end."""
    others = [server.bootstrap for server in cluster.servers if server is not without]
    admin = AdminClient({"bootstrap.servers": ",".join(others)})

    def led() -> bool:
        topics = admin.list_topics(timeout=TIMEOUT).topics.values()
        return all(part.leader not in {-1, without.node} for found in topics for part in found.partitions.values())

    began = time.monotonic()
    wait_until(led, TIMEOUT, "new leaders")
    print(f"new leaders after {time.monotonic() - began:.1f} s")  # noqa: T201


def test_a_cluster_goes_on_without_one_broker_and_waits_without_two(
    database: str, servers_folder: Path, daemon: MakeDaemon
) -> None:
    """P4: of three brokers one may go; without two letters and commits wait, and all goes on when they are back."""
    cluster = KafkaCluster(servers_folder / "cluster")
    try:
        cluster.start()
        stream = Stream(cluster.bootstrap, made_topic(cluster.bootstrap, 3), 2)
        make_table(database, "events")
        letters_too = {"create": True, "replication": 3}
        properties = {"session.timeout.ms": int(DEFAULT * 1000)}  # longer than a cluster takes to elect leaders
        config = {"kafka": {"bootstrap_servers": cluster.bootstrap, "properties": properties}}
        run = daemon(events(stream.topic, dead_letter=letters_too), config)
        stream.produce(1_000)
        wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the first rows")
        cluster.servers[0].kill()
        elected(cluster, without=cluster.servers[0])
        recovers("one of three killed", database, stream)
        stream.produce(1_000)
        wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end, with two")
        with psycopg.connect(database) as conn:
            conn.execute("LOCK TABLE events")
            stream.produce(1_000)
            cluster.servers[1].kill()
        wait_until(lambda: state(run) == "waiting", SEEN, "the state `waiting`")
        print(words(run))  # noqa: T201
        cluster.start()
        recovers("two of three killed", database, stream)
        wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
        wait_until(lambda: state(run) == "running", TIMEOUT, "the state `running`")
        assert run.stop() == 0
        stream.check(database)
    finally:
        cluster.close()


def test_a_dead_letter_topic_deleted_in_mid_run_is_waited_for(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P1, P4: without its dead-letter topic the daemon waits; the command it names ends that, and no letter is lost."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    quick = {"kafka": {"properties": {"topic.metadata.propagation.max.ms": 3_000}}}  # 30 s until a topic counts as gone
    run = daemon(events(stream.topic), quick)
    stream.produce(500)
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the first rows")
    gone = f"{stream.topic}.dlq"
    before = {source_of(letter) for letter in letters(kafka.bootstrap, gone)}
    assert before == stream.bad()
    admin.delete_topics([gone])[gone].result(TIMEOUT)
    stream.produce(500)
    wait_until(
        lambda: waiting_for(run, "dead_letter", f"dead-letter topic {gone} is gone"), TIMEOUT, "the state `waiting`"
    )
    print(words(run))  # noqa: T201
    command = re.findall(r"make it again: kafka-topics ([^;]*)", words(run))[0]
    kafka.tool("org.apache.kafka.tools.TopicCommand", *shlex.split(command))
    recovers("dead-letter topic deleted", database, stream)
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
    assert state(run) == "running"
    assert run.stop() == 0
    assert {source_of(letter) for letter in letters(kafka.bootstrap, gone)} == stream.bad() - before


@pytest.mark.parametrize("operation", ["READ", "WRITE"])
def test_a_privilege_revoked_in_mid_run_halts_and_granted_goes_on(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon, *, operation: str
) -> None:
    """P6: without READ on the topic or WRITE on the dead-letter topic it halts, skips nothing, and names the grant."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    make_table(database, "events")
    run = daemon(events(stream.topic))
    stream.produce(500)
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the first rows")
    denied = stream.topic if operation == "READ" else f"{stream.topic}.dlq"
    everything = acl(denied, AclOperation.ALL, AclPermissionType.ALLOW)
    nothing = acl(denied, AclOperation[operation], AclPermissionType.DENY)
    for future in admin.create_acls([everything, nothing]).values():
        future.result(TIMEOUT)
    stream.produce(500)
    wait_until(lambda: state(run) == "halted", TIMEOUT, "the halt")
    sentence = run.status()["handlers"]["events"]["halt"]["message"]
    print(sentence)  # noqa: T201
    assert denied in sentence
    assert f"grant this principal {operation} on" in sentence
    (future,) = admin.delete_acls([acl_filter(nothing)]).values()
    assert len(future.result(TIMEOUT)) == 1
    run.stop()
    run.start()
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
    assert run.stop() == 0
    stream.check(database)


def acl(topic: str, operation: AclOperation, permission: AclPermissionType) -> AclBinding:
    """Return an entry of a topic's access list."""
    literal = ResourcePatternType.LITERAL
    return AclBinding(ResourceType.TOPIC, topic, literal, "User:ANONYMOUS", "*", operation, permission)


def acl_filter(entry: AclBinding) -> AclBindingFilter:
    """Return a filter that matches one entry."""
    kind = entry.resource_pattern_type
    return AclBindingFilter(
        entry.restype, entry.name, kind, entry.principal, entry.host, entry.operation, entry.permission_type
    )
