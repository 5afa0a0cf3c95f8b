"""Alerts and dashboard: what they say by promtool, and that each of their queries finds what the daemon exposes."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from consumerd.errors import HaltReason
from tests.acceptance.halts import expect_rows, handler, make_tables, send
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY
from tests.servers.kafka import KafkaServer
from tests.servers.process import MissingPart
from tests.servers.prometheus import PrometheusServer

RULES = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"
BOARD = REPOSITORY / "deploy" / "grafana" / "consumerd.json"
RUNBOOK = REPOSITORY / "docs" / "runbook.md"
WINDOW = "1m"
"""In place of what Grafana makes of the screen's width."""


def yaml(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return what a file of YAML holds; skips the test where nothing reads YAML."""
    pytest.importorskip("yaml", reason="PyYAML is not there: pip install pyyaml")
    return msgspec.yaml.decode(path.read_text(encoding="utf-8"))


def alerts() -> dict[str, dict[str, Any]]:
    """Return each alert by its name."""
    return {rule["alert"]: rule for group in yaml(RULES)["groups"] for rule in group["rules"]}


def queries() -> Iterator[str]:
    """Return what alerts and dashboard ask Prometheus for."""
    yield from (rule["expr"] for rule in alerts().values())
    for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", WINDOW).replace("$handler", ".*")


@pytest.mark.parametrize(("command", "file"), [("check", "alerts.yml"), ("test", "alerts_test.yml")])
def test_promtool_takes_the_rules(command: str, file: str) -> None:
    """Promtool finds no mistake in the rules, and each alert comes and stays away as alerts_test.yml says."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not there: apt-get install prometheus")
    command_line = ["promtool", command, "rules", file]
    done = subprocess.run(command_line, cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways() -> None:
    """For each alert alerts_test.yml has a moment at which it comes, and one, or a series, without it."""
    comes: set[str] = set()
    stays_away: set[str] = set()
    for test in yaml(RULES.with_name("alerts_test.yml"))["tests"]:
        for each in test["alert_rule_test"]:
            (comes if each.get("exp_alerts") else stays_away).add(each["alertname"])
            series = {re.sub(r".*handler=\"(\w+)\".*", r"\1", one["series"]) for one in test["input_series"]}
            if len(each.get("exp_alerts", series)) < len(series):
                stays_away.add(each["alertname"])
    assert alerts().keys() == comes == stays_away


def test_each_alert_says_what_to_do() -> None:
    """Each has a severity, a summary, what to do, and a section of the runbook with meaning, check, act and verify."""
    page = RUNBOOK.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "action", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        words = re.findall(r"^\*\*(\w+)\.\*\*", sections[name], re.MULTILINE)
        assert words == ["Meaning", "Check", "Act", "Verify"], name


def test_each_halt_has_its_section() -> None:
    """The runbook has a section for each reason of a halt."""
    found = re.findall(r"^### Halt: `(\w+)`$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(get_args(HaltReason)) == sorted(found)


def test_queries_find_what_is_exposed(
    kafka: KafkaServer, topic: MakeTopic, database: str, daemon: MakeDaemon, tmp_path: Path
) -> None:
    """A real Prometheus takes each query of alerts and dashboard, and each series in it is there once rows are."""
    name = topic()
    make_tables(database, "events")
    send(kafka, name)
    run = daemon({"events": handler(name, "events")})
    expect_rows(database, "events")
    try:
        prometheus = PrometheusServer(tmp_path, run.listen, RULES)
    except MissingPart as missing:
        pytest.skip(str(missing))
    try:
        prometheus.start()
        asked = set()
        for query in queries():
            prometheus.query(query)
            asked |= set(re.findall(r"\b(?:(?:consumerd|process)_\w+|up)(?:\{[^}]*\})?", query))
        assert [] == sorted(selector for selector in asked if not prometheus.query(selector))
        assert len(asked) > 20
        (lag,) = prometheus.query('consumerd_lag_messages{handler="events"}')
        assert "0" == lag["value"][1]
    finally:
        prometheus.close()
