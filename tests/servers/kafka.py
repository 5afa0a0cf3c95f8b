"""A real Kafka broker on loopback, without Docker.

The jars come through Maven (pom.xml beside this file) into a cache folder, once per machine; with them lies a
formatted, empty data folder that each broker copies, which saves the second that formatting takes. The quorum is a
static one of the broker alone, so that nothing in the data folder depends on a port.
"""

import base64
import functools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.servers.process import MissingPart, Process, free_port, wait_until

POM = Path(__file__).with_name("pom.xml")
JAVA = (
    "java",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)
TOOLS = {
    "kafka-acls": "org.apache.kafka.tools.AclCommand",
    "kafka-configs": "kafka.admin.ConfigCommand",
    "kafka-consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "kafka-topics": "org.apache.kafka.tools.TopicCommand",
}
"""Kafka's own commands, by the names that an operator types."""
CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qk"
FETCH_TIMEOUT = 600  # seconds: 50 MB over a slow line
START_TIMEOUT = 60  # seconds: it takes 3 to 5, a restart after SIGKILL a few more
STOP_TIMEOUT = 30  # seconds: it takes 1 or 2
TOPIC_TIMEOUT = 60  # seconds to make a topic and see its leaders
QUESTION_TIMEOUT = 2.0  # seconds that one question to the broker may take
MAX_MESSAGE_BYTES = 20 * 1024 * 1024  # tests send a value of 10 MB


class KafkaServer:
    """One broker, its own controller. The data outlives stop() and kill(); start() brings it back on the same port."""

    def __init__(self, folder: Path, properties: Mapping[str, str] | None = None, *, node: int = 1) -> None:
        """Prepare a broker in ``folder``; ``properties`` are added to its server.properties, or replace lines there."""
        self.folder = folder
        self.node = node
        self.port = free_port()
        self.second_port = free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        controller = f"127.0.0.1:{free_port()}"
        self.voter = f"{node}@{controller}"
        self.log = folder / "kafka.log"
        self._process: Process | None = None
        self._properties = _properties(folder / "data", node, self.bootstrap, controller) | dict(properties or {})

    def configure(self, properties: Mapping[str, str]) -> None:
        """Set properties that hold from the next start on."""
        self._properties |= properties

    def advertise(self, port: int) -> None:
        """Listen on ``second_port`` too, and name ``port``, a proxy's, to the clients that come that way."""
        self._listen("PROXIED", "PLAINTEXT", self.second_port, port)

    def listen(self, name: str, protocol: str, properties: Mapping[str, str]) -> str:
        """Listen on one more port from the next start on, with properties of that listener; return its address."""
        port = free_port()
        self._listen(name, protocol, port, port)
        self.configure({f"listener.name.{name.lower()}.{key}": value for key, value in properties.items()})
        return f"127.0.0.1:{port}"

    def _listen(self, name: str, protocol: str, port: int, advertised: int) -> None:
        more = {
            "listeners": f"{name}://127.0.0.1:{port}",
            "advertised.listeners": f"{name}://127.0.0.1:{advertised}",
            "listener.security.protocol.map": f"{name}:{protocol}",
        }
        self.configure({key: f"{self._properties[key]},{value}" for key, value in more.items()})

    @property
    def running(self) -> bool:
        """Whether the broker's process is there."""
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """The broker's process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, and return when it answers a client and coordinates groups. Does nothing to one that runs."""
        if not self.running:
            self.launch()
            self.wait_ready()

    def launch(self) -> None:
        """Start the process alone; wait_ready() waits until it answers."""
        cache = fetch()
        data = self.folder / "data"
        if not data.exists():
            shutil.copytree(cache / "template", data)
            _name_node(data / "meta.properties", self.node)
        properties = _write_properties(self.folder / "server.properties", self._properties)
        self._process = Process([*JAVA, "-cp", f"{cache}/libs/*", "kafka.Kafka", str(properties)], self.log)

    def wait_ready(self) -> None:
        """Wait until it answers a client and coordinates groups."""
        assert self._process is not None
        what = f"Kafka on {self.bootstrap}"
        self._process.wait_ready(self._listens, START_TIMEOUT, what)
        client = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "consumerd-tests-warm-up", "log_level": 0})
        try:
            self._process.wait_ready(functools.partial(_answers, client), START_TIMEOUT, what)
        finally:
            client.close()

    def stop(self) -> None:
        """Shut down in order."""
        if self._process is not None:
            self._process.stop(STOP_TIMEOUT)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def freeze(self) -> None:
        """SIGSTOP: its connections stay up, and nobody answers on them."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its data; the log stays."""
        self.kill()
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def make_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Make a topic, and return when each of its partitions has a leader."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        new = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
        admin.create_topics([new], operation_timeout=TOPIC_TIMEOUT)[name].result()

        def led() -> bool:
            seen = admin.list_topics(name, timeout=TOPIC_TIMEOUT).topics[name].partitions
            return len(seen) == partitions and all(partition.leader >= 0 for partition in seen.values())

        wait_until(led, TOPIC_TIMEOUT, f"leaders of {name}")

    def tool(self, name: str, *arguments: str) -> str:
        """Run one of Kafka's own commands by its name, or its class, and return what it printed."""
        command = [*JAVA, "-cp", f"{fetch()}/libs/*", TOOLS.get(name, name), *arguments]
        return _run(command, QUESTION_TIMEOUT * 30)

    def typed(self, line: str) -> str:
        """Run the line that an operator is told to type and return what it printed."""
        return self.tool(*shlex.split(line))

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.running:
            os.kill(self._process.pid, number)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class KafkaCluster:
    """Brokers that are one cluster, each a voter of its quorum. A topic has as many replicas as there are brokers."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        """Prepare brokers in folders below ``folder``; writes want all replicas but one in sync."""
        properties = {
            "default.replication.factor": str(size),
            "offsets.topic.replication.factor": str(size),
            "min.insync.replicas": str(size - 1),
        }
        self.servers = []
        for node in range(1, size + 1):
            (folder / str(node)).mkdir(parents=True)
            self.servers.append(KafkaServer(folder / str(node), properties, node=node))
        voters = ",".join(server.voter for server in self.servers)
        for server in self.servers:
            server.configure({"controller.quorum.voters": voters})
        self.bootstrap = ",".join(server.bootstrap for server in self.servers)

    def start(self) -> None:
        """Start those that do not run, and return when all of them answer."""
        for server in self.servers:
            if not server.running:
                server.launch()
        for server in self.servers:
            server.wait_ready()

    def close(self) -> None:
        """Kill them and remove their data."""
        for server in self.servers:
            server.close()


def _answers(client: Consumer) -> bool:
    """Whether the broker serves metadata and has loaded its group coordinator.

    The first join of a group on a fresh broker otherwise meets "coordinator load in progress" and waits 3 s. The
    question is a consumer's, because AdminClient.list_consumer_group_offsets() ends the process with a segmentation
    fault when nobody coordinates the group yet (librdkafka issue 5040, seen with 2.16.0).
    """
    try:
        client.list_topics(timeout=QUESTION_TIMEOUT)
        client.committed([TopicPartition("warm-up", 0)], timeout=QUESTION_TIMEOUT)
    except KafkaException:
        return False
    return True


@functools.cache
def fetch() -> Path:
    """Return the cache folder with ``libs`` and ``template``, filled at the first call on this machine."""
    version = ET.parse(POM).getroot().findtext("properties/kafka.version")  # noqa: S314 - the file beside this one
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consumerd"
    cache = base / f"kafka-{version}"
    if shutil.which("java") is None:
        raise MissingPart(
            "The tests need Java 17 or newer, for a real Kafka: install it (Debian: apt-get install default-jre)."
        )
    if cache.exists():
        return cache
    if shutil.which("mvn") is None:
        raise MissingPart("The tests need Maven, once, to fetch Kafka: install it (Debian: apt-get install maven).")
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix="fetching-") as temporary:
        fetched = Path(temporary) / "kafka"
        _fetch_into(fetched)
        try:
            fetched.rename(cache)  # whole or not at all
        except OSError:
            if not cache.exists():  # otherwise another run was first, with the same jars
                raise
    return cache


def _fetch_into(folder: Path) -> None:
    libs = folder / "libs"
    libs.mkdir(parents=True)
    (folder / "target").mkdir()
    pom = Path(shutil.copy(POM, folder / "target"))  # Maven puts its own files beside the pom
    _run(
        ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={libs}"], FETCH_TIMEOUT
    )
    made = _properties(folder / "template", 1, "127.0.0.1:1", "127.0.0.1:2")
    properties = _write_properties(folder / "target" / "server.properties", made)
    formatting = ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties)]
    _run([*JAVA, "-cp", f"{libs}/*", *formatting], FETCH_TIMEOUT)
    shutil.rmtree(folder / "target")


def _run(command: list[str], timeout: float) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=True
        )
    except subprocess.CalledProcessError as error:
        if "UnsupportedClassVersionError" in error.stderr:
            raise MissingPart("The java in PATH is too old: Kafka 4 needs Java 17 or newer.") from None
        raise RuntimeError(f"{' '.join(command)}\n{error.stdout}{error.stderr}") from None
    return done.stdout


def _name_node(path: Path, node: int) -> None:
    """Make a copy of the template another node's: an id of its own for node and folder."""
    lines = path.read_text(encoding="utf-8").splitlines()
    own = {"node.id": str(node), "directory.id": base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")}
    _write_properties(path, dict(line.split("=", 1) for line in lines if not line.startswith("#")) | own)


def _properties(data: Path, node: int, address: str, controller: str) -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": str(node),
        "listeners": f"PLAINTEXT://{address},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{address}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.quorum.voters": f"{node}@{controller}",
        "log.dirs": str(data),
        "message.max.bytes": str(MAX_MESSAGE_BYTES),
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": "0",
        # KIP-848 has the broker say when a member is dead: 45 s and a heartbeat each 5 s by default.
        "group.consumer.min.session.timeout.ms": "1000",
        "group.consumer.session.timeout.ms": "6000",
        "group.consumer.min.heartbeat.interval.ms": "500",
        "group.consumer.heartbeat.interval.ms": "1000",
        # A broker that was killed is let in again when its old session has run out (9 s by default).
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        # One broker, and a quick start: one copy and one partition of each internal topic, a small cleaner.
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "log.cleaner.dedupe.buffer.size": "2097152",
    }


def _write_properties(path: Path, properties: Mapping[str, str]) -> Path:
    path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
    return path
