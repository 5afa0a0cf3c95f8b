"""What ships to run it elsewhere fits what it runs: docker-compose.yml, image, dashboard, Kubernetes example."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumerd import http, metrics
from consumerd.config import Config
from consumerd.credentials import CREDENTIALS_FOLDER, Secret
from consumerd.loader import SYSTEM_FILE, load
from tests.servers.daemon import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
EXAMPLES = sorted((REPOSITORY / "handlers").glob("*.toml"))
IDLE_MIB = 63
"""Of a process without messages (docs/performance.md)."""
PINNED = r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[\w-]+)?"


def yaml(text: str) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return what a document of YAML holds; skips the test where nothing reads YAML."""
    pytest.importorskip("yaml", reason="PyYAML is not there: pip install pyyaml")
    return msgspec.yaml.decode(text)


@pytest.fixture
def services() -> dict[str, Any]:
    """Give the services of docker-compose.yml."""
    whole = yaml((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))
    found: dict[str, Any] = whole["services"]
    return found


@pytest.fixture
def manifest() -> dict[str, Any]:
    """Give the objects of the Kubernetes example by `Kind/name`."""
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    objects = [yaml(document) for document in text.split("\n---\n")]
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in objects}


def compose() -> list[str]:
    """Return the command that reads docker-compose.yml; skips the test where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        version = [*command, "version"]
        if shutil.which(command[0]) and subprocess.run(version, capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("Docker Compose is not there: apt-get install docker-compose")


def test_compose_takes_the_file() -> None:
    """Docker Compose itself reads docker-compose.yml, finds no mistake, and has nothing to warn of."""
    done = subprocess.run(
        [*compose(), "-f", str(REPOSITORY / "docker-compose.yml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)


def test_each_service_is_pinned_and_watched(services: dict[str, Any]) -> None:
    """Images have exact versions, ports are open on loopback alone, and whatever stays up tells how it is."""
    assert set(services) >= {"kafka", "postgres", "consumerd", "prometheus", "grafana"}
    for name, service in services.items():
        assert service.get("build") == "." or re.fullmatch(PINNED, service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        waited_for = [each["depends_on"].get(name) for each in services.values() if "depends_on" in each]
        ends = {"condition": "service_completed_successfully"} in waited_for
        assert ("healthcheck" in service) != ends, name
        for source in (volume.partition(":")[0] for volume in service.get("volumes", [])):
            assert not source.startswith(".") or (REPOSITORY / source).exists(), source


def test_what_is_wired_is_there(services: dict[str, Any]) -> None:
    """Each HOST:PORT that one service is told of is another one, or itself; who waits, waits for one that is there."""
    told = [str(service.get("environment", {})) + str(service.get("command", "")) for service in services.values()]
    told += [
        (DEPLOY / name).read_text(encoding="utf-8") for name in ("prometheus/prometheus.yml", "grafana/datasource.yml")
    ]
    named = re.findall(r"(?<![\w.])([a-z]+):\d{4}\b", " ".join(told))
    assert {"kafka", "consumerd", "prometheus"} == set(named)
    assert set(named) <= services.keys()
    for service in services.values():
        assert service.get("depends_on", {}).keys() <= services.keys()


def test_the_image_runs_the_examples(services: dict[str, Any], tmp_path: Path) -> None:
    """The image's config, its environment from docker-compose.yml, takes the handlers and serves what is asked."""
    shutil.copy(DEPLOY / "consumerd.toml", tmp_path)
    shutil.copytree(REPOSITORY / "handlers", tmp_path / "handlers")
    service = services["consumerd"]
    config = load(tmp_path / "consumerd.toml", environ=service["environment"])
    assert [path.stem for path in EXAMPLES] == [handler.name for handler in config.handlers]
    assert config.kafka.bootstrap_servers == "kafka:9092"
    assert config.postgres.dsn == Secret(env="DATABASE_URL")
    assert [f"127.0.0.1:{config.daemon.listen_port}:{config.daemon.listen_port}"] == service["ports"]
    assert f'HTTPConnection("127.0.0.1", {config.daemon.listen_port}, ' in service["healthcheck"]["test"]
    assert int(service["stop_grace_period"].removesuffix("s")) > config.daemon.drain_timeout
    topics = {topic for handler in config.handlers for topic in handler.topics}
    (made,) = re.findall(r"for topic in ([\w ]+); do", services["topics"]["command"][0])
    assert topics == set(made.split())


def test_the_image_is_pinned_and_not_root() -> None:
    """The base has an exact version, packages have hashes, the user is a number, and what is copied is there."""
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(PINNED, base)
    assert "pip install --no-cache-dir --require-hashes -r requirements.txt" in DOCKERFILE
    assert ["10001:10001"] == re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    allowed = re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(copied) == sorted(allowed)
    assert [] == [name for name in copied if not (REPOSITORY / name).exists()]
    assert f"COPY deploy/consumerd.toml {SYSTEM_FILE}" in DOCKERFILE


def test_the_tables_are_those_of_the_examples() -> None:
    """deploy/tables.sql has each table of a handler's comment, as it is there, and no other."""

    def tables(text: str) -> list[str]:
        return [" ".join(each.split()) for each in re.findall(r"CREATE TABLE .*?\);", text, re.DOTALL)]

    comments = [path.read_text(encoding="utf-8").partition("\n\n")[0].replace("#", "") for path in EXAMPLES]
    wanted = [table for comment in comments for table in tables(comment)]
    assert len(wanted) == len(EXAMPLES)
    assert sorted(wanted) == sorted(tables((DEPLOY / "tables.sql").read_text(encoding="utf-8")))


def test_the_readme_sends_what_an_example_takes() -> None:
    """The order that the README has sent to the containers is that of handlers/orders.toml's comment."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (sent,) = re.findall(r"^docker compose exec .* --topic orders <<'END'\n(.*)\nEND$", readme, re.MULTILINE)
    comment = (REPOSITORY / "handlers" / "orders.toml").read_text(encoding="utf-8").partition("\n\n")[0]
    (example,) = re.findall(r"\{.*\}", comment.replace("#", ""), re.DOTALL)
    assert json.loads(example) == json.loads(sent)


def expressions() -> Iterator[str]:
    """Return the queries of the dashboard."""
    board = json.loads((DEPLOY / "grafana" / "consumerd.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["query"]["query"] for variable in board["templating"]["list"])


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Each series that the dashboard asks for is exposed, with the labels that it names; its panels have a source."""
    there: dict[str, set[str]] = {}
    for metric in metrics.registry._collector_to_names:
        labels = set(getattr(metric, "_labelnames", ()))
        there |= dict.fromkeys(metrics.registry._collector_to_names[metric], labels)
    asked = 0
    for expression in expressions():
        names = re.findall(r"\b((?:consumerd|process)_\w+)", expression)
        assert names, expression
        assert [] == [name for name in names if name not in there], expression
        written = re.findall(r"(\w+)=~?\"", expression) + re.findall(r"by \(([\w, ]+)\)", expression)
        used = {label for each in written for label in each.split(", ")} - {"le", "instance", "job"}
        assert used <= set.union(*(there[name] for name in names)), expression
        asked += len(names)
    assert asked > 20
    board = (DEPLOY / "grafana" / "consumerd.json").read_text(encoding="utf-8")
    sources = set(re.findall(r'"type": "prometheus", "uid": "(\w+)"', board))
    assert sources == set(re.findall(r"uid: (\w+)", (DEPLOY / "grafana" / "datasource.yml").read_text("utf-8")))


def loaded(manifest: dict[str, Any], folder: Path, pod: str) -> Config:
    """Load the example's config as a pod does."""
    (folder / "handlers").mkdir()
    (folder / "consumerd.toml").write_text(manifest["ConfigMap/consumerd"]["data"]["consumerd.toml"], encoding="utf-8")
    for name, text in manifest["ConfigMap/consumerd-handlers"]["data"].items():
        (folder / "handlers" / name).write_text(text, encoding="utf-8")
    return load(folder / "consumerd.toml", environ={"POD_NAME": pod})


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the one container of the pods."""
    (only,) = manifest["StatefulSet/consumerd"]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def sources(volume: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Return the kind and the name of what a volume shows."""
    if "configMap" in volume:
        yield "ConfigMap", volume["configMap"]["name"]
    if "secret" in volume:
        yield "Secret", volume["secret"]["secretName"]


def test_a_pod_finds_its_config(manifest: dict[str, Any], tmp_path: Path) -> None:
    """The example's TOML is loaded without a mistake; its member is the pod, its secrets are keys of the Secret."""
    config = loaded(manifest, tmp_path, "consumerd-1")
    assert config.kafka.group_instance_id == "consumerd-1"
    assert container(manifest)["env"][0]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    secrets = [config.postgres.password, *config.kafka.properties.values()]
    wanted = {each.credential for each in secrets if isinstance(each, Secret)}
    assert wanted == manifest["Secret/consumerd"]["stringData"].keys()
    mounts = {each["mountPath"]: each["name"] for each in container(manifest)["volumeMounts"]}
    config_folder = SYSTEM_FILE.parent
    assert mounts == {
        str(SYSTEM_FILE): "config",
        str(config_folder / config.daemon.handlers.name): "handlers",
        str(CREDENTIALS_FOLDER): "credentials",
    }
    volumes = manifest["StatefulSet/consumerd"]["spec"]["template"]["spec"]["volumes"]
    assert [(each["name"], kind, name) for each in volumes for kind, name in sources(each)] == [
        ("config", "ConfigMap", "consumerd"),
        ("handlers", "ConfigMap", "consumerd-handlers"),
        ("credentials", "Secret", "consumerd"),
    ]


def test_a_pod_is_asked_and_stopped_as_the_daemon_answers_and_stops(manifest: dict[str, Any], tmp_path: Path) -> None:
    """Probes have the daemon's pages, port and patience; the grace period is longer than the drain."""
    daemon = loaded(manifest, tmp_path, "consumerd-0").daemon
    it = container(manifest)
    for probe, page in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert it[probe]["httpGet"] == {"path": page, "port": "http"}
        assert it[probe]["timeoutSeconds"] > http.LOOP_TIMEOUT
    assert (daemon.listen_host, it["ports"]) == (
        "0.0.0.0",
        [{"name": "http", "containerPort": daemon.listen_port}],
    )
    assert manifest["Service/consumerd"]["spec"]["ports"] == [{"name": "http", "port": daemon.listen_port}]
    pod = manifest["StatefulSet/consumerd"]["spec"]["template"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(daemon.listen_port)
    assert pod["spec"]["terminationGracePeriodSeconds"] >= daemon.drain_timeout + 10


def test_a_pod_has_the_memory_that_its_config_takes(manifest: dict[str, Any], tmp_path: Path) -> None:
    """The limit holds `max_buffered` and a fifth, the idle process, and three brokers' fetches, decompressed 5:1."""
    config = loaded(manifest, tmp_path, "consumerd-0")
    bound = config.daemon.max_buffered / (1 << 20)
    needed = 1.2 * bound + IDLE_MIB + 3 * 5 * bound / 128
    resources = container(manifest)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert int(resources["limits"]["memory"].removesuffix("Mi")) >= needed


def test_a_pod_has_no_privileges(manifest: dict[str, Any]) -> None:
    """It runs as the image's user, by number, with no capability and nothing to write to."""
    spec = manifest["StatefulSet/consumerd"]["spec"]["template"]["spec"]
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert user == [(str(context["runAsUser"]), str(context["runAsGroup"]))]
    assert container(manifest)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False


def test_the_objects_belong_together(manifest: dict[str, Any]) -> None:
    """Service, budget and StatefulSet select the pods that the template makes."""
    labels = manifest["StatefulSet/consumerd"]["spec"]["template"]["metadata"]["labels"]
    assert labels == manifest["Service/consumerd"]["spec"]["selector"]
    for owner in ("StatefulSet/consumerd", "PodDisruptionBudget/consumerd"):
        assert labels == manifest[owner]["spec"]["selector"]["matchLabels"]
    assert f"Service/{manifest['StatefulSet/consumerd']['spec']['serviceName']}" in manifest


def test_the_kubernetes_page_has_the_examples_numbers(manifest: dict[str, Any], tmp_path: Path) -> None:
    """docs/kubernetes.md explains the grace period and the memory that the example has."""
    page = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    spec = manifest["StatefulSet/consumerd"]["spec"]["template"]["spec"]
    daemon = loaded(manifest, tmp_path, "consumerd-0").daemon
    assert f"{spec['terminationGracePeriodSeconds']} leaves" in page
    assert f"`drain_timeout` ({daemon.drain_timeout:.0f} s)" in page
    assert f"{daemon.max_buffered >> 20} + {IDLE_MIB} + " in page
    assert f"so {container(manifest)['resources']['limits']['memory']}" in page
