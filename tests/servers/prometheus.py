"""A real Prometheus: it scrapes one daemon, and answers queries."""

import http.client
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.servers.process import MissingPart, Process, free_port, wait_until

START_TIMEOUT = 30  # seconds
SCRAPE_TIMEOUT = 30  # seconds until the first scrape is there

CONFIG = """\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: consumerd
    static_configs: [{{targets: ["{target}"]}}]
"""


class PrometheusServer:
    """``prometheus`` on a port of its own, with the alerts of ``rules``."""

    def __init__(self, folder: Path, target: str, rules: Path) -> None:
        if shutil.which("prometheus") is None:
            raise MissingPart("Prometheus is not there: apt-get install prometheus")
        (folder / "prometheus.yml").write_text(CONFIG.format(rules=rules, target=target), encoding="utf-8")
        self._folder = folder
        self._port = free_port()
        self._process: Process | None = None

    def start(self) -> None:
        """Start it and wait for its first scrape."""
        command = [
            "prometheus",
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        self._process = Process(command, self._folder / "prometheus.log")
        self._process.wait_ready(self._is_ready, START_TIMEOUT, "Prometheus")
        wait_until(lambda: bool(self.query("up == 1")), SCRAPE_TIMEOUT, "the first scrape")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression as it is now; raises ValueError for one that Prometheus does not take."""
        answer = self._get(f"/api/v1/query?{urlencode({'query': expression})}")
        if answer["status"] != "success":
            raise ValueError(f"{answer['error']}: {expression}")
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def close(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.kill_group()

    def _is_ready(self) -> bool:
        try:
            return self._ask("/-/ready")[0] == http.client.OK
        except OSError:
            return False

    def _get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._ask(path)[1])
        return answer

    def _ask(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
