"""The daemon as a process: configured from a test, asked over HTTP, stopped or killed."""

import http.client
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families

from tests.servers.process import Process

READY_TIMEOUT = 30  # seconds to join its groups
STOP_TIMEOUT = 45  # seconds: the daemon's own drain_timeout is 30
COMMAND_TIMEOUT = 60  # seconds for a command that ends by itself
ANSWER_TIMEOUT = 10  # seconds for one HTTP answer
REPOSITORY = Path(__file__).parents[2]


class Daemon:
    """``consumerd run -c CONFIG``. start() after stop() or kill() runs it again with the same files."""

    def __init__(self, config: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Prepare a run of ``config``; ``arguments`` follow on its command line, ``env`` adds to the environment."""
        self.config = config
        self.log = config.with_name("consumerd.log")
        listen = tomllib.loads(config.read_text(encoding="utf-8")).get("daemon", {}).get("listen", "127.0.0.1:9464")
        self.listen = str(listen)
        self._command = [sys.executable, "-m", "consumerd", "run", "-c", str(config), *arguments]
        self._env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process started last."""
        if self._process is None:
            raise RuntimeError("the daemon was never started")
        return self._process

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Start the process; wait_ready() waits for what it says of itself."""
        self._process = Process(self._command, self.log, cwd=self.config.parent, env=self._env)

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until /readyz says 200."""
        self.process.wait_ready(lambda: self._get_or_none("/readyz") == http.client.OK, timeout, "consumerd")

    def get(self, path: str) -> tuple[int, str]:
        """Return the HTTP status and body of a path."""
        host, _, port = self.listen.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=ANSWER_TIMEOUT)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """Return what /status says."""
        answer: dict[str, Any] = json.loads(self.get("/status")[1])
        return answer

    def metrics(self) -> dict[str, float]:
        """Return each sample of /metrics, named as in the text: ``name`` or ``name{a="x",b="y"}``, labels sorted."""
        return {
            _sample_name(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
        }

    def memory(self, field: Literal["VmRSS", "VmHWM"] = "VmRSS") -> float:
        """Return its resident memory in MiB: as it is, or at its highest."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition(f"{field}:")[2].split()[0]) / 1024

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """SIGTERM; return the exit status."""
        return self.process.stop(timeout)

    def kill(self) -> None:
        """SIGKILL, and nothing else: what the daemon started must notice by itself."""
        self.process.kill()

    def close(self) -> None:
        """Leave nothing of it running."""
        if self._process is not None:
            self._process.kill_group()

    def logs(self) -> str:
        """Return everything it logged, of all its runs."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def _get_or_none(self, path: str) -> int | None:
        try:
            return self.get(path)[0]
        except (OSError, http.client.HTTPException):
            return None


def consumerd(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "NO_COLOR": "1"}
    environment.pop("CONSUMERD_CONFIG", None)
    command = [sys.executable, "-m", "consumerd", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False
    )


def write_config(
    folder: Path, config: Mapping[str, Any] | str, handlers: Mapping[str, Mapping[str, Any] | str]
) -> Path:
    """Write ``consumerd.toml`` and ``handlers/NAME.toml``, strings as they are; return the path of the first.

    A name that ends in ``.py`` is a module beside the handlers.
    """
    (folder / "handlers").mkdir(parents=True, exist_ok=True)
    for name, handler in handlers.items():
        file = name if name.endswith(".py") else f"{name}.toml"
        (folder / "handlers" / file).write_text(_toml(handler), encoding="utf-8")
    path = folder / "consumerd.toml"
    path.write_text(_toml(config), encoding="utf-8")
    return path


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``defaults`` with what is given in their place, table by table."""
    both = {key: merged(defaults[key], given[key]) for key in defaults.keys() & given.keys() if _is_table(given[key])}
    return {**defaults, **given, **both}


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _sample_name(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


def _toml(document: Mapping[str, Any] | str) -> str:
    if isinstance(document, str):
        return document
    plain = [f"{json.dumps(key)} = {_value(value)}\n" for key, value in document.items() if not _is_table(value)]
    tables = [
        f"\n[{json.dumps(name)}]\n" + "".join(f"{json.dumps(key)} = {_value(value)}\n" for key, value in table.items())
        for name, table in document.items()
        if _is_table(table)
    ]
    return "".join(plain + tables)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(inner) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=False)
