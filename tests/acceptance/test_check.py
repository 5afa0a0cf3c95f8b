"""`consumerd check`: what holds, what does not, and the line that mends it; nothing is changed by looking."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from psycopg.conninfo import make_conninfo

from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import consumerd, merged, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

OK, WRONG, NOT_REACHED, CONFIG = 0, 1, 75, 78
TIMEOUT = 60
STEPS = ["config", "Kafka", "Postgres", "schema", "topics", "ACLs", "dead letters", "table", "checkpoint"]


class Bench:
    """A topic, a table and a handler between them, which `check` looks at."""

    def __init__(self, kafka: KafkaServer, database: str, topic: str, folder: Path) -> None:
        self.kafka, self.database, self.topic, self.folder = kafka, database, topic, folder
        self.config: dict[str, Any] = {"kafka": {"bootstrap_servers": kafka.bootstrap}, "postgres": {"dsn": database}}
        self.handler: dict[str, Any] = {
            "topics": [topic],
            "group_id": f"{topic}.group",
            "table": {"name": "parts", "write": "append"},
            "dead_letter": {"topic": f"{topic}.dlq", "create": True},
        }

    def look(self, handler: Mapping[str, Any] | None = None, *arguments: str) -> tuple[int, dict[str, tuple[Any, str]]]:
        """Run `check`; return its exit status, and what it says of each step of the handler and of the whole."""
        write_config(self.folder, self.config, {"parts": merged(self.handler, handler or {})})
        done = consumerd("check", "-o", "json", *arguments, cwd=self.folder)
        assert "" == done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        return done.returncode, {each["what"]: (each["holds"], each["detail"]) for each in found}

    def wrong(self, what: str, handler: Mapping[str, Any] | None = None) -> str:
        """Run `check`, of which one step must not hold; return its sentence."""
        code, found = self.look(handler)
        assert (WRONG, [what]) == (code, [step for step, (holds, _) in found.items() if not holds])
        return found[what][1]


@pytest.fixture
def bench(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Bench:
    """Set up topic and table."""
    execute(database, "CREATE TABLE parts (id bigint NOT NULL, name text)")
    return Bench(kafka, database, topic(2), tmp_path)


def test_all_holds(bench: Bench) -> None:
    """Each step is told, in the order of the start, and the exit status is 0; nothing is made by looking."""
    admin = AdminClient({"bootstrap.servers": bench.kafka.bootstrap})
    before = set(admin.list_topics(timeout=TIMEOUT).topics)
    code, found = bench.look()
    assert (OK, STEPS, {True}) == (code, list(found), {holds for holds, _ in found.values()})
    assert "id, name" in found["table"][1]
    assert "0 partitions go on, 2 begin at earliest" == found["checkpoint"][1]
    assert before == set(admin.list_topics(timeout=TIMEOUT).topics)
    assert [] == execute(bench.database, "SELECT 1 FROM pg_namespace WHERE nspname = 'consumerd'")


def test_a_table_for_people(bench: Bench) -> None:
    """Without -o there is a line for each step: handler, step, whether it holds, and what was found."""
    write_config(bench.folder, bench.config, {"parts": bench.handler | {"topics": ["absent-one"]}})
    done = consumerd("check", cwd=bench.folder)
    assert (WRONG, "") == (done.returncode, done.stderr)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["parts", "topics", "WRONG", "topic", "absent-one", "does", "not", "exist;"] in [line[:8] for line in lines]
    assert ["Postgres", "ok"] in [line[:2] for line in lines]


def test_the_files_alone(bench: Bench) -> None:
    """--offline reaches for no server; a mistake in a file is a sentence and status 78."""
    bench.config["kafka"]["bootstrap_servers"] = "127.0.0.1:1"
    code, found = bench.look(None, "--offline")
    assert (OK, ["config"]) == (code, list(found))
    write_config(bench.folder, bench.config, {"parts": bench.handler | {"topix": 1}})
    done = consumerd("check", "--offline", cwd=bench.folder)
    assert CONFIG == done.returncode
    assert "parts.toml:" in done.stderr
    assert 'did you mean "topics"' in done.stderr


def test_brokers_that_are_not_reached(bench: Bench) -> None:
    """A wrong address of the brokers is status 75 and names it; the database is looked at all the same."""
    bench.config["kafka"]["bootstrap_servers"] = "127.0.0.1:1"
    code, found = bench.look()
    assert (NOT_REACHED, None) == (code, found["Kafka"][0])
    assert "127.0.0.1:1" in found["Kafka"][1]
    assert "Connection refused" in found["Kafka"][1]
    assert found["table"][0] is True


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dbname": "absent"}, 'database "absent" does not exist'),
        ({"user": "nobody"}, 'role "nobody" does not exist'),
        ({"port": 1}, "Connection refused"),
    ],
)
def test_a_database_that_is_not_reached(bench: Bench, wrong: dict[str, Any], words: str) -> None:
    """A wrong database, role or address is status 75 and the server's sentence; the topics are looked at."""
    bench.config["postgres"]["dsn"] = make_conninfo(bench.database, **wrong)
    code, found = bench.look()
    assert (NOT_REACHED, None, True) == (code, found["Postgres"][0], found["topics"][0])
    assert words in found["Postgres"][1]


def test_topics_that_are_not_there(bench: Bench) -> None:
    """A missing topic comes with the line that makes it; a pattern that matches nothing is told as such."""
    said = bench.wrong("topics", {"topics": [f"{bench.topic}-absent"]})
    bench.kafka.typed(said.partition("make it: ")[2].partition(";")[0])
    assert OK == bench.look({"topics": [f"{bench.topic}-absent"]})[0]
    said = bench.wrong("topics", {"topics": ["^nothing-is-called-so.*"]})
    assert "no topic matches ^nothing-is-called-so.*" in said


def test_dead_letter_topics(bench: Bench) -> None:
    """One that is missing, compacted or too small comes with the line that mends it."""
    letters = bench.handler["dead_letter"]["topic"]
    said = bench.wrong("dead letters", {"dead_letter": {"create": False}})
    assert "dead_letter.create = true" in said
    too_many = bench.wrong("dead letters", {"dead_letter": {"replication": 5}})
    assert f"{letters} cannot be made: `dead_letter.replication` is 5, and there are 1 brokers" in too_many
    bench.kafka.typed(said.partition("make it: ")[2].partition(";")[0])
    assert OK == bench.look()[0]
    settings = "cleanup.policy=compact,max.message.bytes=1000"
    server = f"--bootstrap-server {bench.kafka.bootstrap}"
    bench.kafka.typed(f"kafka-configs {server} --alter --topic {letters} --add-config {settings}")
    said = bench.wrong("dead letters")
    assert "cleanup.policy is compact" in said
    assert "max.message.bytes is 1000" in said
    bench.kafka.typed(said.partition("type: ")[2])
    assert OK == bench.look()[0]


@pytest.mark.parametrize(
    ("handler", "mend"),
    [
        ({"columns": {"id": "id", "nmae": "name"}}, 'ALTER TABLE public.parts ADD COLUMN "nmae" text;'),
        (
            {"table": {"write": "upsert", "key": ["id"]}},
            'CREATE UNIQUE INDEX CONCURRENTLY ON public.parts ("id");',
        ),
        ({"columns": {"name": "name"}}, 'ALTER TABLE public.parts ALTER "id" DROP NOT NULL;'),
    ],
)
def test_tables_that_do_not_fit(bench: Bench, handler: dict[str, Any], mend: str) -> None:
    """What the table lacks for the handler comes with the SQL that mends it."""
    said = bench.wrong("table", handler)
    assert mend.replace(" text;", " ...;") in said
    execute(bench.database, mend)
    assert OK == bench.look(handler)[0]


def test_privileges(bench: Bench) -> None:
    """A role that may not write the table, nor make the schema, is told the grants for both."""
    role = f"loader_{bench.topic.rpartition('-')[2]}"
    execute(bench.database, f"CREATE ROLE {role} LOGIN")
    bench.config["postgres"]["dsn"] = make_conninfo(bench.database, user=role)
    try:
        code, found = bench.look()
        assert (WRONG, False, False) == (code, found["schema"][0], found["table"][0])
        assert "consumerd setup --sql" in found["schema"][1]
        execute(bench.database, found["table"][1].partition("type: ")[2])
        sql = consumerd("setup", "--sql", cwd=bench.folder).stdout
        execute(bench.database, sql)
        code, found = bench.look()
        assert (WRONG, False, True) == (code, found["schema"][0], found["table"][0])
        execute(bench.database, found["schema"][1].partition("type: ")[2])
        assert OK == bench.look()[0]
    finally:
        execute(bench.database, f"DROP OWNED BY {role}")
        execute(bench.database, f"DROP ROLE {role}")


def test_a_group_that_writes_elsewhere(bench: Bench, daemon: MakeDaemon) -> None:
    """A group with a checkpoint in another database, or of another table, is told, and nothing of it is moved."""
    producer = Producer({"bootstrap.servers": bench.kafka.bootstrap})
    for partition in (0, 1):
        producer.produce(bench.topic, b'{"id": 1}', partition=partition)
    assert producer.flush(TIMEOUT) == 0
    run = daemon({"parts": bench.handler}, {"postgres": {"dsn": bench.database}})
    wait_until(lambda: run.status()["handlers"]["parts"]["written"] == 2, TIMEOUT, "the rows")
    assert run.stop() == 0
    query = "SELECT topic, partition, next_offset, epoch FROM consumerd.checkpoint ORDER BY 2"
    before = execute(bench.database, query)
    code, found = bench.look()
    assert (OK, "2 partitions go on, 0 begin at earliest") == (code, found["checkpoint"][1])
    execute(bench.database, "CREATE TABLE others (id bigint)")
    said = bench.wrong("checkpoint", {"table": {"name": "others"}})
    assert "to public.parts, and is configured for public.others" in said
    said = bench.wrong("checkpoint", {"group_id": f"{bench.topic}.renamed"})
    assert f'Set `group_id = "{bench.topic}.group"`' in said
    assert before == execute(bench.database, query)
    execute(bench.database, "UPDATE consumerd.store SET store = gen_random_uuid()")
    assert "commits" in (said := bench.wrong("checkpoint"))
    assert "for another database" in said
    execute(bench.database, "DROP SCHEMA consumerd CASCADE")
    assert "for another database" in bench.wrong("checkpoint")


def test_an_offset_outside_of_the_log(bench: Bench) -> None:
    """An offset that is not in the log is told before the daemon halts at it."""
    admin = AdminClient({"bootstrap.servers": bench.kafka.bootstrap})
    beyond = ConsumerGroupTopicPartitions(bench.handler["group_id"], [TopicPartition(bench.topic, 0, 7)])
    for answer in admin.alter_consumer_group_offsets([beyond]).values():
        answer.result(TIMEOUT)
    assert f"{bench.topic}:0: the position 7 is not in the log" in bench.wrong("checkpoint")


def test_a_checkpoint_that_does_not_fit(bench: Bench) -> None:
    """At least once into a table with a unique index is told; so is the offset of the other mode."""
    execute(bench.database, "CREATE UNIQUE INDEX ON parts (id)")
    assert 'write checkpoint = "postgres"' in bench.wrong("table", {"checkpoint": "kafka"})


@pytest.fixture
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """Start a broker that asks for a name and a password, and allows nothing that was not granted."""
    module = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    server = KafkaServer(
        tmp_path_factory.mktemp("guarded"),
        {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.proxied.plain.sasl.jaas.config": f'{module} user_loader="right";',
        },
    )
    server.advertise(server.second_port)
    names = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:SASL_PLAINTEXT"
    server.configure({"listener.security.protocol.map": names})
    server.start()
    yield server
    server.close()


def test_what_brokers_do_not_allow(
    guarded: KafkaServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong password is told as such; each ACL that is lacking comes with its line, and with all of them it holds."""
    guarded.make_topic("parts", 1)
    guarded.make_topic("parts.dlq", 1, {"retention.ms": "-1", "max.message.bytes": "22000000"})
    bench = Bench(guarded, database, "parts", tmp_path)
    execute(database, "CREATE TABLE parts (id bigint)")
    properties = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "loader"}
    properties["sasl.password"] = {"env": "KAFKA_PASSWORD"}  # type: ignore[assignment]
    bench.config["kafka"] = {"bootstrap_servers": f"127.0.0.1:{guarded.second_port}", "properties": properties}
    monkeypatch.setenv("KAFKA_PASSWORD", "wrong")
    code, found = bench.look()
    assert (NOT_REACHED, None) == (code, found["Kafka"][0])
    assert "Authentication failed" in found["Kafka"][1]
    monkeypatch.setenv("KAFKA_PASSWORD", "right")
    code, found = bench.look()
    assert (WRONG, False) == (code, found["topics"][0])
    assert "uthoriz" in found["topics"][1]
    guarded.typed(
        f"kafka-acls --bootstrap-server {guarded.bootstrap} --add --allow-principal User:loader --operation Read "
        f"--topic parts"
    )
    code, found = bench.look()
    assert (WRONG, False) == (code, found["ACLs"][0]), found
    lines = found["ACLs"][1].partition("type: ")[2].split("; ")
    assert 3 == len(lines)
    for line in lines:
        guarded.typed(line.replace(str(guarded.second_port), str(guarded.port)))  # as an operator who may
    code, found = bench.look()
    assert (OK, {True}) == (code, {holds for holds, _ in found.values()}), found


def test_without_letters_no_topic_of_theirs_is_asked_for(bench: Bench) -> None:
    """A handler whose poison is passed over, or halts it, runs without a dead-letter topic: so it holds."""
    code, found = bench.look({"poison": {"action": "skip"}, "dead_letter": {"create": False}})
    assert (OK, False) == (code, "dead letters" in found), found


def test_a_transform(bench: Bench) -> None:
    """A transform that cannot be imported would halt the run: it is told, and so is one that can."""
    transform = {"transform": {"function": "parts:transform"}}
    assert "there is no module parts: write" in bench.wrong("transform", transform)
    (bench.folder / "handlers" / "parts.py").write_text("def transform(record):\n    return record\n")
    code, found = bench.look(transform)
    assert (OK, (True, "parts:transform is there")) == (code, found["transform"])


def test_properties_of_which_no_consumer_can_be_made(bench: Bench) -> None:
    """What only a consumer refuses is a sentence, as `run` says it, and no traceback."""
    bench.config["kafka"]["properties"] = {"group.protocol": "consumer", "session.timeout.ms": "6000"}
    said = bench.wrong("checkpoint")
    assert said.startswith("librdkafka refuses [kafka.properties], or -X: ")
    assert "`session.timeout.ms` is not supported for `group.protocol=consumer`" in said
