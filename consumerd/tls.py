"""What is wrong with a server's certificate, where the client's own words are the same for every mistake.

librdkafka and libpq say "certificate verify failed" of a wrong authority, an expired certificate and (librdkafka) a
wrong host name alike. So once they have said it, this looks by itself: it shakes hands with the same server, by the
same authority, and asks Python's ssl for OpenSSL's reason. Nothing is sent, and nothing depends on it but the sentence.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT: Final = 3.0
"""Seconds for the handshake."""
FAILED: Final = "certificate verify failed"
_BROKER = re.compile(r"ssl://\[?(?P<host>[^\]/]+?)\]?:(?P<port>\d+)/")
_SERVER = re.compile(r'connection to server at "(?P<host>[^"]+)".*?, port (?P<port>\d+) failed')
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
"""What a client of Postgres asks before the handshake (PostgreSQL documentation, 54.2.10)."""

# OpenSSL's x509_vfy.h.
_EXPIRED, _NOT_YET, _UNTRUSTED, _OTHER_HOST = {10}, {9}, {2, 18, 19, 20, 21}, {62, 64}


def broker(said: str, properties: Mapping[str, str]) -> str | None:
    """Say why librdkafka does not take the certificate that it speaks of, and the way on. Blocking."""
    place = _BROKER.search(said) if FAILED in said else None
    if place is None:
        return None
    trusted = properties.get("ssl.ca.location", "")
    named = properties.get("ssl.endpoint.identification.algorithm", "https") != "none"
    ways = (
        "write an address that it holds in kafka.bootstrap_servers, and have the brokers advertise such",
        'name the file of its authority as "ssl.ca.location" under [kafka.properties]',
    )
    return _look(place, trusted or None, ways, named=named, data=properties.get("ssl.ca.pem"))


def postgres(said: str, trusted: str | None, *, named: bool) -> str | None:
    """Say why libpq does not take the certificate that it speaks of, and the way on. Blocking."""
    place = _SERVER.search(said) if FAILED in said else None
    ways = (
        "write a host that it holds in postgres.dsn",
        "name the file of its authority as sslrootcert in postgres.dsn",
    )
    return _look(place, trusted, ways, named=named, ask=True) if place else None


def _look(
    place: re.Match[str],
    trusted: str | None,
    ways: tuple[str, str],
    *,
    named: bool,
    data: str | None = None,
    ask: bool = False,
) -> str | None:
    """Shake hands, and word what OpenSSL finds; None when it finds nothing, or the server is away."""
    host, port = place["host"], int(place["port"])
    try:
        context = _context(trusted, data)
        context.check_hostname = named
        with socket.create_connection((host, port), TIMEOUT) as plain:
            if ask:
                plain.sendall(_SSL_REQUEST)
                plain.recv(1)
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of {host}:{port} {_worded(error, trusted, ways)}"
    except OSError:
        pass
    return None


def _context(trusted: str | None, data: str | None) -> ssl.SSLContext:
    if trusted is not None and Path(trusted).is_dir():
        return ssl.create_default_context(capath=trusted)
    return ssl.create_default_context(cafile=trusted, cadata=data)


def _worded(error: ssl.SSLCertVerificationError, trusted: str | None, ways: tuple[str, str]) -> str:
    code = error.verify_code
    if code in _EXPIRED:
        return "has expired: have a new one issued for that server"
    if code in _NOT_YET:
        return "is not valid yet: look at the clocks of both machines"
    if code in _OTHER_HOST:
        return f"is for another host: {ways[0]}"
    if code in _UNTRUSTED:
        return f"is not signed by an authority in {trusted or 'the store of this system'}: {ways[1]}"
    return f"is refused: {error.verify_message}"
