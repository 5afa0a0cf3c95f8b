"""A certificate authority for one test module, and its certificates, made by the command `openssl`."""

import shutil
import subprocess
from pathlib import Path

from tests.servers.process import MissingPart

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
TIMEOUT = 30  # seconds: it takes a tenth


class Authority:
    """An authority of its own in ``folder``; ``ca`` is what its clients trust."""

    def __init__(self, folder: Path) -> None:
        """Make its own certificate."""
        if shutil.which("openssl") is None:
            raise MissingPart("The tests of TLS need openssl: install it (Debian: apt-get install openssl).")
        folder.mkdir()
        folder.chmod(0o755)
        self.folder = folder
        self.ca = folder / "ca.pem"
        _openssl("req", "-x509", *KEY, "-keyout", self._key("ca"), "-out", self.ca, "-days", 2, "-subj", "/CN=tests")

    def issue(self, name: str, host: str, days: int = 2) -> Path:
        """Issue a certificate for a host (``IP:…`` or ``DNS:…``) and return it with its key, in one PEM file."""
        request, extensions, made = (self.folder / f"{name}.{suffix}" for suffix in ("csr", "ext", "pem"))
        _openssl("req", *KEY, "-keyout", self._key(name), "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={host}\n", encoding="ascii")
        signing = ("-CA", self.ca, "-CAkey", self._key("ca"), "-CAcreateserial", "-extfile", extensions, "-days", days)
        _openssl("x509", "-req", "-in", request, "-out", made, *signing)
        both = self._key(name).read_bytes() + made.read_bytes()
        made.write_bytes(both)
        return made

    def _key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=TIMEOUT)
