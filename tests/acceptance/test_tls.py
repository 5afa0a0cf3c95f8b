"""TLS to brokers and to Postgres, by an authority of the tests' own, and SASL: what holds, and what mistakes say."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from psycopg.conninfo import make_conninfo

from tests.acceptance.halts import TIMEOUT, expect_rows, handler, send
from tests.conftest import MakeDaemon
from tests.servers.certificates import Authority
from tests.servers.daemon import consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer, with_tls
from tests.servers.sql import execute

OK, NOT_REACHED = 0, 75
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
HERE = "IP:127.0.0.1"
CERTIFICATES = {"good": (HERE, 2), "elsewhere": ("DNS:elsewhere.example", 2), "expired": (HERE, -1)}
"""Host and days of each certificate."""
MISTAKES = {
    "authority": ("good", "is not signed by an authority in ", "ssl.ca.location", "sslrootcert in postgres.dsn"),
    "elsewhere": ("elsewhere", "is for another host", "kafka.bootstrap_servers", "does not match host name"),
    "expired": ("expired", "has expired: have a new one issued", "that server", "that server"),
}
"""By what is wrong: the certificate, the sentence, and what to mend, for Kafka and for Postgres."""


@dataclass
class Guarded:
    """A broker and a Postgres that speak TLS, with a topic and a table in them."""

    kafka: KafkaServer
    brokers: dict[str, str]
    """Addresses of the broker, each with a certificate of its own; `sasl` asks for a password, too."""
    postgres: PostgresServer
    folder: Path
    ca: Path
    other: Path
    """What trusts somebody else."""

    def certify(self, name: str) -> None:
        """Give Postgres a certificate."""
        shutil.copyfile(self.folder / f"{name}.pem", self.postgres.folder / "server.pem")
        self.postgres.execute("SELECT pg_reload_conf()")

    def config(self, kafka: str, trust: tuple[Path, Path], **properties: object) -> dict[str, Any]:
        """Return what connects to a broker's address and to Postgres by these authorities."""
        tls = {"security.protocol": "SSL", "ssl.ca.location": str(trust[0]), **properties}
        dsn = make_conninfo(self.postgres.dsn, sslmode="verify-full", sslrootcert=str(trust[1]))
        return {"kafka": {"bootstrap_servers": self.brokers[kafka], "properties": tls}, "postgres": {"dsn": dsn}}


@pytest.fixture(scope="module")
def guarded(servers_folder: Path) -> Iterator[Guarded]:
    """Start both, one of each for all tests of the module."""
    if (binaries := with_tls()) is None:
        pytest.skip("The tests of TLS need a Postgres that speaks it: apt-get install postgresql.")
    folder = servers_folder / "tls"
    folder.mkdir()
    folder.chmod(0o711)
    authority, other = Authority(folder / "ca"), Authority(folder / "other")
    (folder / "kafka").mkdir()
    kafka = KafkaServer(folder / "kafka", {"sasl.enabled.mechanisms": "SCRAM-SHA-512"})
    brokers = {}
    for name, (host, days) in CERTIFICATES.items():
        brokers[name] = kafka.listen(name.upper(), "SSL", keystore(authority.issue(name, host, days)))
    scram = keystore(authority.folder / "good.pem") | {"scram-sha-512.sasl.jaas.config": SCRAM}
    brokers["sasl"] = kafka.listen("SASL", "SASL_SSL", scram)
    (folder / "postgres").mkdir()
    postgres = PostgresServer(folder / "postgres", binaries=binaries)
    postgres.certified(authority.folder / "good.pem")
    kafka.launch()
    postgres.start()
    kafka.wait_ready()
    kafka.make_topic("rows")
    postgres.execute("CREATE TABLE t (id bigint, n integer)")
    yield Guarded(kafka, brokers, postgres, authority.folder, authority.ca, other.ca)
    kafka.close()
    postgres.close()


def keystore(pem: Path) -> dict[str, str]:
    """Return what has a listener of the broker use a certificate."""
    return {"ssl.keystore.type": "PEM", "ssl.keystore.location": str(pem)}


def set_password(kafka: KafkaServer, password: str) -> None:
    """Set the password of `loader`, and return when it is known."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion("loader", scram, password.encode())
    admin.alter_user_scram_credentials([change])["loader"].result(TIMEOUT)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_certificate_that_is_refused(guarded: Guarded, daemon: MakeDaemon, tmp_path: Path, mistake: str) -> None:
    """What is wrong with it is told with the way on, by `check` and by a daemon that waits, for each server."""
    certificate, sentence, mend_kafka, mend_postgres = MISTAKES[mistake]
    wrong = guarded.other if mistake == "authority" else guarded.ca
    guarded.certify(certificate)
    handlers = {"t": handler("rows", "t", group_id=f"tls-{mistake}")}
    runs = {
        "kafka": daemon(handlers, guarded.config(certificate, (wrong, guarded.ca)), wait=False),
        "postgres": daemon(handlers, guarded.config("good", (guarded.ca, wrong)), wait=False),
    }
    told: dict[str, str] = {}
    for name, run in runs.items():
        run.process.wait_ready(lambda run=run: "waiting: " in run.logs(), TIMEOUT, "consumerd")  # type: ignore[misc]
        status = run.status()["handlers"]["t"]
        assert "waiting" == status["state"], status
        told[name] = status["waiting_for"][name]
    write_config(tmp_path, guarded.config(certificate, (wrong, wrong)), handlers)
    checked = consumerd("check", cwd=tmp_path)
    guarded.certify("good")
    assert NOT_REACHED == checked.returncode
    lines = {line.split()[0]: line for line in checked.stdout.splitlines() if "NOT REACHED" in line}
    for text in (told["kafka"], lines["Kafka"]):
        assert (True, True) == (sentence in text, mend_kafka in text), text
    for text in (told["postgres"], lines["Postgres"]):
        assert mend_postgres in text, text
        assert sentence in text or mistake == "elsewhere", text


def test_a_password_over_tls(guarded: Guarded, daemon: MakeDaemon, tmp_path: Path) -> None:
    """Rows come through TLS and SASL; a wrong password is told; one that was rotated holds from the next client on."""
    password = tmp_path / "kafka_password"
    password.write_text("first")
    password.chmod(0o600)
    set_password(guarded.kafka, "first")
    send(guarded.kafka, "rows")
    sasl = {"sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "loader", "sasl.password": {"file": str(password)}}
    config = guarded.config("sasl", (guarded.ca, guarded.ca), **{"security.protocol": "SASL_SSL"}, **sasl)
    run = daemon({"t": handler("rows", "t", group_id="tls-sasl")}, config)
    expect_rows(guarded.postgres.dsn, "t")
    encrypted = (
        "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name ~ 'consumerd'"
    )
    assert [(True,)] == execute(guarded.postgres.dsn, encrypted)
    set_password(guarded.kafka, "second")
    done = consumerd("check", cwd=run.config.parent)
    assert NOT_REACHED == done.returncode
    assert "invalid credentials with SASL mechanism SCRAM-SHA-512" in done.stdout
    send(guarded.kafka, "rows", range(10, 20))
    expect_rows(guarded.postgres.dsn, "t", range(20))  # its connections are there still
    password.write_text("second")
    assert 0 == run.stop()
    run.start()
    run.wait_ready()
    send(guarded.kafka, "rows", range(20, 30))
    expect_rows(guarded.postgres.dsn, "t", range(30))
    assert 0 == run.stop()
