"""Secrets are read by reference and never written down."""

import time
from pathlib import Path

import pytest

from consumerd.credentials import (
    OWNED_PROPERTIES,
    Secret,
    dsn_password_key,
    looks_secret,
    parse_dsn,
    parse_password,
    parse_property,
    parse_secret,
)
from consumerd.errors import ConfigError


def test_env_secret_is_read_afresh() -> None:
    """A secret from the environment is what the environment holds at the time of the call."""
    environ = {"PW": "one"}
    secret = Secret(env="PW")
    assert secret.read(environ=environ) == "one"
    environ["PW"] = "two"
    assert secret.read(environ=environ) == "two"


def test_file_secret_is_read_afresh(tmp_path: Path) -> None:
    """A rotated file is seen by the next read."""
    path = tmp_path / "pw"
    secret = Secret(file=path)
    path.write_text("one\n")
    assert secret.read() == "one"
    path.write_text("two\n")
    assert secret.read() == "two"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), (" a ", " a "), ("a\r", "a\r"), ("ä\n", "ä")],
)
def test_one_trailing_newline_is_stripped(tmp_path: Path, content: str, expected: str) -> None:
    """One newline at the end is an editor's; all other white space belongs to the secret."""
    (tmp_path / "pw").write_bytes(content.encode())
    assert Secret(file=tmp_path / "pw").read() == expected


def test_systemd_credential_wins(tmp_path: Path) -> None:
    """A credential in systemd's folder is taken before one of the same name in /etc."""
    systemd, etc = tmp_path / "systemd", tmp_path / "etc"
    for folder in (systemd, etc):
        folder.mkdir()
        (folder / "pw").write_text(folder.name)
    secret = Secret(credential="pw")
    assert secret.read(environ={"CREDENTIALS_DIRECTORY": str(systemd)}, folder=etc) == "systemd"


@pytest.mark.parametrize("systemd", [True, False])
def test_etc_credential_is_the_fallback(tmp_path: Path, systemd: bool) -> None:
    """Where systemd hands over no such credential, /etc/consumerd/credentials has it."""
    (tmp_path / "pw").write_text("etc")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "none")} if systemd else {}
    assert Secret(credential="pw").read(environ=environ, folder=tmp_path) == "etc"


def test_missing_credential_names_all_places(tmp_path: Path) -> None:
    """The error of a missing credential names each file that was tried."""
    with pytest.raises(ConfigError) as caught:
        Secret(credential="pw").read(environ={"CREDENTIALS_DIRECTORY": "/run/c"}, folder=tmp_path)
    assert str(caught.value) == f"secret {{ credential = pw }}: there is no file /run/c/pw or {tmp_path}/pw"


@pytest.mark.parametrize(("environ", "state"), [({}, "is not set"), ({"PW": ""}, "is empty")])
def test_absent_variable_is_an_error(environ: dict[str, str], state: str) -> None:
    """An unset or empty variable is named, and no empty password is used."""
    with pytest.raises(ConfigError) as caught:
        Secret(env="PW").read(environ=environ)
    assert str(caught.value) == f"secret {{ env = PW }}: the environment variable {state}"


@pytest.mark.parametrize(("content", "state"), [(b"\n", "is empty"), (b"hunter\xff", "is not UTF-8 text")])
def test_useless_file_is_an_error(tmp_path: Path, content: bytes, state: str) -> None:
    """An empty or binary file is named, without its content."""
    path = tmp_path / "pw"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Secret(file=path).read()
    assert str(caught.value) == f"secret {{ file = {path} }}: {path} {state}"
    assert caught.value.__cause__ is None


def test_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    """What cannot be read is told with the system's reason."""
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory$"):
        Secret(file=tmp_path).read()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../pw", "a\0b"])
def test_credential_name_stays_in_its_folder(name: str) -> None:
    """A credential is a plain file name."""
    with pytest.raises(ValueError, match="plain file name"):
        Secret(credential=name)


@pytest.mark.parametrize("ways", [{}, {"env": "A", "credential": "b"}])
def test_secret_has_one_way(ways: dict[str, str]) -> None:
    """A Secret built in Python has exactly one way too."""
    with pytest.raises(ValueError, match="exactly one of"):
        Secret(**ways)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", [{}, {"env": "A", "file": "b"}, {"vault": "x"}, {"env": 1}, {"env": ""}])
def test_secret_table_has_one_named_way(table: dict[str, object]) -> None:
    """A table with no way, two ways, an unknown way or no name is refused with the three forms."""
    with pytest.raises(ValueError, match=r"\{ credential = .* \{ file = .* \{ env = "):
        parse_secret(table, None)


def test_relative_secret_file_starts_at_the_config() -> None:
    """A secret's relative path starts where the config file is; an absolute one stays."""
    assert parse_secret({"file": "pw"}, Path("/etc/consumerd")) == Secret(file=Path("/etc/consumerd/pw"))
    assert parse_secret({"file": "/pw"}, Path("/etc/consumerd")) == Secret(file=Path("/pw"))


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "sasl.password",
        "ssl.key.password",
        "ssl.keystore.password",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.assertion.private.key.passphrase",
        "ssl.key.pem",
        "sslpassword",
        "oauth_client_secret",
        "my.token",
    ],
)
def test_secret_names(name: str) -> None:
    """Names whose values are secrets."""
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "passfile",
        "sasl.username",
        "ssl.key.location",
        "ssl.certificate.pem",
        "sasl.oauthbearer.token.endpoint.url",
        "sasl.oauthbearer.assertion.private.key.file",
        "client.secret.file",
    ],
)
def test_plain_names(name: str) -> None:
    """Names whose values are no secrets, or only the way to one."""
    assert not looks_secret(name)


@pytest.mark.parametrize(
    ("dsn", "key"),
    [
        ("postgresql://u:hunter2@db/x", "password"),
        ("postgres://u:hunter2@db", "password"),
        ("postgresql://u:hun@ter2@db/x", "password"),
        ("postgresql://u@db/x?sslmode=require&password=hunter2", "password"),
        ("postgresql://db?sslpassword=hunter2", "sslpassword"),
        ("host=db password=hunter2", "password"),
        ("host=db password = 'hunter 2'", "password"),
        ("host='d b' user=u  password=h", "password"),
        ("postgresql://u@db:5432/x", None),
        ("postgresql://db:5432,db2:5433/x?options=a@b:c", None),
        ("postgresql://u:@db/x", None),
        ("postgresql://", None),
        ("host=db password=", None),
        ("service=warehouse", None),
        ("host=db passfile=/x/.pgpass", None),
        ("options='-c a.b=password=1' host=x", None),
        ("", None),
    ],
)
def test_password_in_a_dsn(dsn: str, key: str | None) -> None:
    """Both of libpq's forms are searched for a password as libpq reads them."""
    assert dsn_password_key(dsn) == key


@pytest.mark.parametrize("dsn", ["postgresql://u:hunter2@db/x", "password=hunter2", "sslpassword=hunter2"])
def test_dsn_with_a_password_is_refused(dsn: str) -> None:
    """The refusal says what to write, and not the password."""
    with pytest.raises(ValueError, match=r"write (password|dsn) = \{") as caught:
        parse_dsn(dsn, None)
    assert "hunter2" not in str(caught.value)


def test_dsn_without_a_password_is_taken() -> None:
    """A plain DSN, an empty one (libpq's own variables) and the way to one are taken as they are."""
    assert parse_dsn("postgresql://u@db/x", None) == "postgresql://u@db/x"
    assert parse_dsn("host=db", None) == "host=db"
    assert parse_dsn("", None) == ""
    assert parse_dsn({"env": "DATABASE_URL"}, None) == Secret(env="DATABASE_URL")


@pytest.mark.parametrize("value", ["db", 5, None])
def test_what_is_no_dsn_is_refused(value: object) -> None:
    """What libpq could not read is refused at start."""
    with pytest.raises(ValueError, match=r"^must be "):
        parse_dsn(value, None)


def test_password_is_never_plain() -> None:
    """A password is a reference; a string is refused with the line to write, not repeated."""
    assert parse_password({"credential": "pg"}, None) == Secret(credential="pg")
    with pytest.raises(ValueError, match=r'write password = \{ credential = "pg_password" \}') as caught:
        parse_password("hunter2", None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [name.replace("*", "min.messages") for name in OWNED_PROPERTIES] + ["error_cb", "stats_cb", "queued.x"]
)
def test_owned_property_is_refused_with_a_reason(name: str) -> None:
    """Each property that the daemon sets is refused, and the sentence goes on with why or what to write."""
    with pytest.raises(ValueError, match=r"^is the daemon's own property: \w+ "):
        parse_property(name, "1", None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("group.id", "group_id"),
        ("group.instance.id", "kafka.group_instance_id"),
        ("bootstrap.servers", "kafka.bootstrap_servers"),
        ("auto.offset.reset", "start"),
        ("fetch.min.bytes", "daemon.max_buffered"),
        ("max.partition.fetch.bytes", "daemon.max_buffered"),
        ("fetch.message.max.bytes", "daemon.max_buffered"),
        ("receive.message.max.bytes", "daemon.max_buffered"),
        ("queued.max.messages.kbytes", "daemon.max_buffered"),
    ],
)
def test_owned_property_names_the_key_in_its_place(name: str, hint: str) -> None:
    """Where a key of ours does it, the refusal names that key."""
    with pytest.raises(ValueError, match=rf"write {hint}\b"):
        parse_property(name, "1", None)


@pytest.mark.parametrize(
    "name",
    [
        "enable.auto.commit",
        "enable.auto.offset.store",
        "auto.commit.interval.ms",
        "acks",
        "request.required.acks",
        "enable.idempotence",
        "enable.partition.eof",
        "check.crcs",
        "message.max.bytes",
        "oauth_cb",
    ],
)
def test_properties_of_the_promises_are_owned(name: str) -> None:
    """What the promises rest on cannot be changed by a property."""
    with pytest.raises(ValueError, match="daemon's own property"):
        parse_property(name, "true", None)


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (False, "false"), (5, "5"), (0.5, "0.5"), ("x", "x")])
def test_property_is_text(value: object, text: str) -> None:
    """Scalars become the text that librdkafka reads."""
    assert parse_property("some.property", value, None) == text


def test_secret_property() -> None:
    """A property that is a secret is a reference; a plain string is refused with the line, not repeated."""
    assert parse_property("sasl.password", {"credential": "kafka"}, None) == Secret(credential="kafka")
    with pytest.raises(ValueError, match=r'write "sasl.password" = \{ credential = "sasl_password" \}') as caught:
        parse_property("sasl.password", "hunter2", None)
    assert "hunter2" not in str(caught.value)


def test_unquoted_property_name_is_explained() -> None:
    """TOML makes tables of an unquoted dotted name: the sentence says to quote it."""
    with pytest.raises(ValueError, match=r'in quotes: "security.protocol" = '):
        parse_property("security", {"protocol": "SASL_SSL"}, None)


@pytest.mark.parametrize("value", [[1], None])
def test_property_of_another_type_is_refused(value: object) -> None:
    """Lists and dates are no property."""
    with pytest.raises(ValueError, match=r"^must be a string, a number, true or false, or \{ credential"):
        parse_property("x", value, None)


def test_a_long_dsn_is_searched_at_once() -> None:
    """What is no connection string is told as that in a time that grows with its length, not with the square of it."""
    size, began = 50_000, time.process_time()
    for text in ("x" * size, "x " * size, " " * size, "x" + " " * size):
        assert dsn_password_key(text) is None
    assert dsn_password_key(f"{'x' * size} password=hunter2") == "password"
    assert time.process_time() - began < 2.0
