"""How the daemon gets at its servers: secrets by reference, and what may stand in plain text beside them.

TOML holds only the way to a secret, `{ credential = NAME }`, `{ file = PATH }` or `{ env = NAME }`. The value is read
at each connect and kept nowhere, so a rotated password needs no restart, and no log line, traceback or `repr` of a
config can show one. The other half refuses passwords that are written down: `looks_secret` tells by a key's name,
`dsn_password_key` by libpq's two forms of connection string (PostgreSQL manual, 34.1.1). The same gate refuses the
Kafka properties that the daemon sets itself. The `parse_*` functions take one TOML value and raise ValueError with a
sentence that goes on from the key's name; no sentence repeats a value.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from consumerd import file_trust
from consumerd.errors import ConfigError

CREDENTIALS_FOLDER = Path("/etc/consumerd/credentials")
"""Where credentials are without systemd (which names its own in $CREDENTIALS_DIRECTORY)."""

SECRET_FORMS = '{ credential = "NAME" }, { file = "PATH" } or { env = "NAME" }'  # noqa: S105 (the forms, not a secret)

# Anywhere in a name: sasl.password, sasl.oauthbearer.client.secret, ssl.key.pem, …
_SECRET_NAME = re.compile(r"passw(or)?d|passphrase|secret|(^|[._])token$|key[._]pem$", re.IGNORECASE)
# … unless the value is only the way to it: sasl.oauthbearer.assertion.private.key.file, passfile.
_PLACE_NAME = re.compile(r"(file|location|path|url)$", re.IGNORECASE)
_URI_SCHEMES = ("postgresql://", "postgres://")
_URI = re.compile(r"postgres(?:ql)?://(?:(?P<user>[^/@]*)@)?[^?]*(?:\?(?P<query>.*))?", re.DOTALL)
# Names begin at their first letter and are not tried again from within: text without a "=" would take for ever.
_KEY_VALUE = re.compile(r"(?<!\w)(\w++)\s*+=\s*+('(?:[^'\\]|\\.)*+'|(?:[^\s\\]|\\.)*+)", re.DOTALL)


_IS_DERIVED = "the daemon sets fetch and queue sizes itself; write daemon.max_buffered"
_IS_OURS = "the daemon commits offsets itself, after the rows are written"
_IS_SAFETY = "dead letters must be acknowledged by all in-sync replicas, once each"
_IS_CALLBACK = "callbacks belong to the daemon"
OWNED_PROPERTIES: Final[Mapping[str, str]] = {
    "group.id": "write group_id in the handler's file",
    "group.instance.id": "write kafka.group_instance_id",
    "bootstrap.servers": "write kafka.bootstrap_servers",
    "metadata.broker.list": "write kafka.bootstrap_servers",  # librdkafka's alias of bootstrap.servers
    "auto.offset.reset": "write start in the handler's file",
    "enable.auto.commit": _IS_OURS,
    "enable.auto.offset.store": _IS_OURS,
    "auto.commit.interval.ms": _IS_OURS,
    "acks": _IS_SAFETY,
    "request.required.acks": _IS_SAFETY,
    "enable.idempotence": _IS_SAFETY,
    "message.max.bytes": "the daemon sets it, so that a letter as large as its message fits",
    "enable.partition.eof": "the daemon sets it",
    "check.crcs": "the daemon sets it, so that no damaged message becomes a row",
    "queued.*": _IS_DERIVED,
    "fetch.*": _IS_DERIVED,
    "max.partition.fetch.bytes": _IS_DERIVED,
    "receive.message.max.bytes": _IS_DERIVED,
    "*_cb": _IS_CALLBACK,
    "on_commit": _IS_CALLBACK,  # confluent_kafka's two callbacks without the suffix
    "on_delivery": _IS_CALLBACK,
}
"""Names and patterns of librdkafka properties that the daemon sets: why, or what to write instead (rules.md, 14)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """The way to a secret: exactly one of the three is set."""

    credential: str | None = None
    file: Path | None = None
    env: str | None = None

    def __post_init__(self) -> None:
        """Refuse no way or several, and a credential's name that would leave its folder."""
        if sum(way is not None for way in (self.credential, self.file, self.env)) != 1:
            raise ValueError(f"must be exactly one of {SECRET_FORMS}")
        name = self.credential
        if name is not None and (name in {"", ".", ".."} or "/" in name or "\0" in name):
            raise ValueError('the name of a credential is a plain file name, such as "pg_password"')
        if self.env == "" or self.file in {Path(), Path("/")}:
            raise ValueError(f"must name the secret: {SECRET_FORMS}")

    def read(self, *, environ: Mapping[str, str] = os.environ, folder: Path = CREDENTIALS_FOLDER) -> str:
        """Give the secret as it is now, without one trailing newline; ConfigError if there is none."""
        if self.env is not None:
            value = environ.get(self.env)
            if not value:
                state = "is not set" if value is None else "is empty"
                raise ConfigError(f"secret {{ env = {self.env} }}: the environment variable {state}")
            return _without_newline(value)
        if self.file is not None:
            return _read_first(f"secret {{ file = {self.file} }}", [self.file])
        name = self.credential or ""
        systemd = environ.get("CREDENTIALS_DIRECTORY")
        folders = [Path(systemd), folder] if systemd else [folder]
        what = f"secret {{ credential = {name} }}"
        return _read_first(what, [place / name for place in folders])


def parse_secret(value: Mapping[str, object], folder: Path | None) -> Secret:
    """Make a Secret of a TOML table; a relative file is taken from `folder`."""
    if len(value) != 1 or not value.keys() <= {"credential", "file", "env"}:
        raise ValueError(f"must be exactly one of {SECRET_FORMS}")
    ((way, target),) = value.items()
    if not isinstance(target, str) or not target:
        raise ValueError(f"must be {SECRET_FORMS}, with the name in quotes")
    if way == "file":
        return Secret(file=(folder or Path()) / target)
    return Secret(credential=target) if way == "credential" else Secret(env=target)


def parse_dsn(value: object, folder: Path | None) -> str | Secret:
    """Take a connection string without a password, or the way to one that may hold it."""
    if isinstance(value, Secret):
        return value
    if isinstance(value, Mapping):
        return parse_secret(value, folder)
    if not isinstance(value, str):
        raise ValueError(f"must be a string, in quotes, or {SECRET_FORMS}")  # noqa: TRY004 (pydantic takes ValueError)
    key = dsn_password_key(value)
    if key == "password":
        raise ValueError(
            'holds a password: write password = { credential = "pg_password" } beside it, or dsn = { env = "NAME" }'
        )
    if key is not None:
        raise ValueError(f'holds a secret ({key}): write dsn = {{ env = "NAME" }}')
    if value.strip() and "=" not in value and not value.startswith(_URI_SCHEMES):
        raise ValueError('must be "postgresql://USER@HOST/DATABASE" or "host=HOST dbname=DATABASE"')
    return value


def parse_password(value: object, folder: Path | None) -> Secret:
    """Take the way to a password, never the password."""
    if isinstance(value, Secret):
        return value
    if isinstance(value, Mapping):
        return parse_secret(value, folder)
    raise ValueError(f'is not written down: write password = {{ credential = "pg_password" }}; also {SECRET_FORMS}')


def parse_property(name: str, value: object, folder: Path | None) -> str | Secret:
    """Take one librdkafka property, from TOML or from `-X`, as text or as the way to a secret."""
    for pattern, reason in OWNED_PROPERTIES.items():
        if fnmatchcase(name, pattern):
            raise ValueError(f"is the daemon's own property: {reason}")
    if isinstance(value, Secret):
        return value
    if isinstance(value, Mapping):
        if value and not value.keys() & {"credential", "file", "env"}:
            raise ValueError(f'a property name with dots is written in quotes: "{name}.{next(iter(value))}" = …')
        return parse_secret(value, folder)
    if looks_secret(name):
        credential = re.sub(r"\W+", "_", name)
        raise ValueError(f'is a secret and not written down: write "{name}" = {{ credential = "{credential}" }}')
    return scalar_text(value, f"must be a string, a number, true or false, or {SECRET_FORMS}")


def scalar_text(value: object, otherwise: str) -> str:
    """Write a scalar as librdkafka and Postgres read it; ValueError(`otherwise`) for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(otherwise)


def looks_secret(name: str) -> bool:
    """Tell whether a value under this name is a secret, and not the way to one."""
    return bool(_SECRET_NAME.search(name)) and not _PLACE_NAME.search(name)


def dsn_password_key(dsn: str) -> str | None:
    """Name the part of a connection string that holds a secret, or None when there is none.

    In a URI that is what follows `user:` or a parameter, else a `password = …` pair. As in libpq,
    userinfo ends at the first `@` and holds no `/`.
    """
    if dsn.startswith(_URI_SCHEMES):
        match = _URI.match(dsn)
        user = (match and match["user"]) or ""
        if user.partition(":")[2]:
            return "password"
        pairs = parse_qsl((match and match["query"]) or "")
    else:
        pairs = _KEY_VALUE.findall(dsn)
    return next((key for key, value in pairs if value and looks_secret(key)), None)


def _read_first(what: str, places: list[Path]) -> str:
    """Read the first of these files that exists: systemd's credential wins over the folder's."""
    for place in places:
        try:
            value = _without_newline(place.read_bytes().decode())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{what}: cannot read {place}: {error.strerror}") from error
        except UnicodeDecodeError:
            # Without its cause: a UnicodeDecodeError carries the bytes that it could not decode.
            raise ConfigError(f"{what}: {place} is not UTF-8 text") from None
        if not value:
            raise ConfigError(f"{what}: {place} is empty")
        if sentence := file_trust.writable(place) or file_trust.readable(place):
            raise ConfigError(f"{what}: {place} {sentence}")
        return value
    raise ConfigError(f"{what}: there is no file {' or '.join(map(str, places))}")


def _without_newline(value: str) -> str:
    """Strip the one newline that `echo` and editors add, and no other white space."""
    return value.removesuffix("\n").removesuffix("\r") if value.endswith("\n") else value
