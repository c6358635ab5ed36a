"""What can be said of the files for NVIDIA Dynamo without a container: they fit their schemas, and names agree."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import options_of
from served import free_ports
from server.docker_files import (
    DOCKER,
    KUBERNETES,
    check_pod,
    check_services,
    documents,
    entrypoint,
    options_in,
    requirements,
)

from echo_trt.adapters.dynamo.environment import VERSION

SCHEMA = json.loads((Path(__file__).parent / "dynamo_graph_deployment.schema.json").read_text())
GRAPHS = ("dynamo", "dynamo-gpu")
KEYS = DOCKER / "keys.conf.template"


def components(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in graph["spec"]["components"]}


def main_of(component: dict[str, Any]) -> dict[str, Any]:
    [container] = component["podTemplate"]["spec"]["containers"]
    assert container["name"] == "main"  # into which the operator puts its own
    return container


@pytest.mark.parametrize("name", GRAPHS)
class TestGraphs:
    def test_it_fits_the_operator_s_types_and_pods_fit_kubernetes(self, name):
        jsonschema = pytest.importorskip("jsonschema")
        validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate").validate
        graph = documents(f"kubernetes/{name}.yaml")[0]
        jsonschema.validate(graph, SCHEMA)
        for wrong in ({"replicas": -1}, {"type": "engine"}, {"runtimeVersionOverride": "v1"}, {"replica": 1}):
            part = json.loads(json.dumps(graph))
            part["spec"]["components"][0] |= wrong
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(part, SCHEMA)
        for component in graph["spec"]["components"]:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **component["podTemplate"]}
            validate(pod, KUBERNETES, strict=True)

    def test_pods_are_hardened_and_told_what_they_know(self, name):
        graph = documents(f"kubernetes/{name}.yaml")[0]
        for component in graph["spec"]["components"]:
            assert component["runtimeVersionOverride"] == VERSION
            container, pod = main_of(component), component["podTemplate"]["spec"]
            check_pod(pod)
            words = container["command"] + container["args"]
            if component["type"] == "worker":
                assert words[: words.index("worker")] == entrypoint(
                    "Dockerfile.gpu" if "gpu" in name else "Dockerfile.cpu"
                )
                assert options_in(words) <= options_of("worker")
                assert int(words[words.index("--drain-timeout") + 1]) < pod["terminationGracePeriodSeconds"]
        assert len(main_of(components(graph)["Worker"])["resources"]["limits"]) == (2 if "gpu" in name else 1)


def test_what_is_beside_the_graph_fits_kubernetes_and_names_agree():
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate").validate
    graph, *rest = documents("kubernetes/dynamo.yaml")
    for manifest in rest:
        validate(manifest, KUBERNETES, strict=True)
    by_name = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in rest}
    name = graph["metadata"]["name"]
    scaled = by_name["HorizontalPodAutoscaler", "echo-trt-worker"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == f"{name}-worker"
    assert scaled["minReplicas"] <= components(graph)["Worker"]["replicas"] <= scaled["maxReplicas"]
    inside = by_name["NetworkPolicy", "echo-trt-graph"]["spec"]["podSelector"]["matchLabels"]
    assert inside == {"nvidia.com/dynamo-graph-deployment-name": name}
    keys = by_name["Deployment", "echo-trt-keys"]["spec"]["template"]
    [admitted] = by_name["NetworkPolicy", "echo-trt-frontend"]["spec"]["ingress"][0]["from"]
    assert admitted["podSelector"]["matchLabels"] == keys["metadata"]["labels"]
    conf = by_name["ConfigMap", "echo-trt-keys-conf"]["data"]["default.conf.template"]
    assert conf == KEYS.read_text()


def test_compose_is_hardened_and_publishes_nothing_without_a_key():
    compose = documents("compose.dynamo.yaml")[0]
    services = compose["services"]
    assert set(services) == {"discovery", "frontend", "worker-1", "worker-2", "keys", "prometheus", "grafana"}
    check_services(services)
    for name, service in services.items():
        published = [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
        assert published == (["${ADDRESS:-127.0.0.1}:${PORT:-9000}:9000"] if name == "keys" else [])
    assert compose["networks"]["inside"]["internal"] is True
    assert services["frontend"]["networks"] == ["inside"]
    folder = compose["x-dynamo"]["DYN_FILE_KV"]
    addresses = set()
    for worker in (services["worker-1"], services["worker-2"]):
        assert f"discovery:{folder}" in worker["volumes"]
        assert options_in(worker["command"]) <= options_of("worker")
        [address] = {worker["environment"][f"DYN_{n}_HOST"] for n in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE")}
        assert address == worker["networks"]["inside"]["ipv4_address"]
        addresses.add(address)
    assert len(addresses) == 2
    jobs = {
        job["job_name"]: job["static_configs"][0]["targets"]
        for job in documents("prometheus.dynamo.yml")[0]["scrape_configs"]
    }
    assert {target.split(":")[0] for targets in jobs.values() for target in targets} <= set(services)


def test_the_image_s_dynamo_is_the_one_that_was_tried():
    packages = requirements("dynamo")
    assert packages["ai-dynamo"] == packages["ai-dynamo-runtime"] == VERSION
    for other in ("cpu", "gpu"):
        assert not packages.keys() & requirements(other).keys()


class Frontend(BaseHTTPRequestHandler):
    """Says the path that it was asked for, and whether it was told a key."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['Authorization']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Answer with a stream of two pieces, the second of which comes late."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in (b"one", b"two"):
            self.wfile.write(b"3\r\n" + piece + b"\r\n")
            self.wfile.flush()
            time.sleep(1)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def keys(tmp_path) -> Iterator[str]:
    """Return the URL of a real nginx with the template's configuration, before a frontend."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin") or shutil.which("nginx")
    if not nginx:
        pytest.skip("nginx is not on PATH")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Frontend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    [port] = free_ports(1)
    (tmp_path / "keys").write_text('"Bearer sk-one" 1;\n"Bearer sk-two" 1;\n')
    site = KEYS.read_text().replace("${FRONTEND}", f"127.0.0.1:{server.server_address[1]}")
    site = site.replace("listen 9000", f"listen 127.0.0.1:{port}").replace("/etc/nginx/keys/", f"{tmp_path}/")
    site = site.replace("/dev/stdout", str(tmp_path / "access"))
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = f"daemon off; pid {tmp_path}/pid; events {{}} http {{ {temporary}\n{site} }}"
    (tmp_path / "nginx.conf").write_text(configuration)
    words = [nginx, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-e", str(tmp_path / "errors")]
    process = subprocess.Popen(words)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()
        server.shutdown()


def test_the_door_admits_who_has_a_key_and_keeps_it(keys):
    known, unknown = {"Authorization": "Bearer sk-two"}, {"Authorization": "Bearer sk-three"}
    assert httpx.get(f"{keys}/v1/models", headers=known).text == "/v1/models None"
    for headers in ({}, unknown, {"Authorization": "sk-two"}):
        reply = httpx.get(f"{keys}/v1/models", headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{keys}/health").status_code == 200
    assert httpx.get(f"{keys}/metrics", headers=known).status_code == 404
    begin, times = time.monotonic(), []
    with httpx.stream("POST", f"{keys}/v1/completions", headers=known, json={}) as answer:
        for piece in answer.iter_raw():
            times.append((piece, time.monotonic() - begin))
    assert [piece for piece, _ in times] == [b"one", b"two"]
    assert times[0][1] < 0.9  # before the second was written
