"""Several containers together: Compose, two replicas behind a proxy, Dynamo's fleet, and podman's Kubernetes."""

from __future__ import annotations

import json
import os
import re
import secrets
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml

from .battery import (
    ENGINE, IMAGE, KILL, START, Bench, container, exit_code, key_folder, kill, options_of, server, write_keys,
)  # fmt: skip
from .engine import OFFICIAL, PROJECT, Missed, at_hand, build, docker, run, stand_in, until
from .load import CHAT, Streams, answer, ask, body, serves

DOCKER = PROJECT / "docker"
PROXIES = {  # name -> the configuration in docker/proxies, where it is mounted, and the command
    "nginx": ("nginx.conf", "/etc/nginx/conf.d/echo-trt.conf", ["nginx", "-g", "daemon off;"]),
    "HAProxy": ("haproxy.cfg", "/conf", ["haproxy", "-W", "-db", "-f", "/conf"]),
    "Caddy": ("Caddyfile", "/conf", ["caddy", "run", "--adapter", "caddyfile", "--config", "/conf"]),
    "Envoy": ("envoy.yaml", "/envoy.yaml", ["envoy", "-c", "/envoy.yaml"]),
    "Traefik": ("traefik.yaml", "/traefik.yaml", [
        "traefik", "--entrypoints.clients.address=127.0.0.1:8080", "--providers.file.filename=/traefik.yaml",
    ]),
}  # fmt: skip
DYNAMO = "echo-trt:dynamo"


# -- Compose ---------------------------------------------------------------------------------------------------------


def images_of_others() -> None:
    for target, image in OFFICIAL.items():
        if not at_hand(image):
            stand_in(target)


@contextmanager
def composed(bench: Bench, file: str, services: list[str], **variables: str) -> Iterator[Callable[..., str]]:
    """``up --wait`` of a compose file, Prometheus at the bench's second port, and with Grafana if it can be had."""
    texts = yaml.safe_load((DOCKER / file).read_text())["services"]
    moved = {"prometheus": 9090, "grafana": 3000}
    services = services + [name for name in moved if name == "prometheus" or at_hand(texts[name]["image"])]
    over = bench.folder / f"over.{file}"
    lines = [
        f'  {name}: {{ ports: !override ["127.0.0.1:{bench.port + 1 + i}:{port}"] }}'
        for i, (name, port) in enumerate(moved.items())
    ]
    over.write_text("\n".join(["services:", *lines, ""]))
    given = {"BUNDLE": str(bench.bundle), "KEYS": str(key_folder(bench)), "GRAFANA_PASSWORD": secrets.token_hex(8)}
    environment = os.environ | given | {"PORT": str(bench.port)} | variables

    def command(*words: object, **more) -> str:
        files = ("-f", DOCKER / file, "-f", over)
        return docker("compose", "-p", "echo-trt-proof", *files, *words, env=environment, **more)

    try:
        command("up", "--detach", "--wait", "--wait-timeout", START, *services, seconds=START + 60)
        yield command
    except Missed as missed:
        raise Missed(
            f"{missed}\nthe logs:\n{command('logs', '--tail', 25, seconds=60, check=False)[-4000:]}"
        ) from missed
    finally:
        command("down", "--volumes", "--timeout", 20, seconds=120, check=False)


def prometheus(bench: Bench, path: str, **parameters: str):
    query = urllib.parse.urlencode(parameters)
    status, _, text = ask(bench.port + 1, f"/api/v1/{path}?{query}")
    return json.loads(text)["data"] if status == 200 else {}


def scraped(bench: Bench, instances: int) -> str:
    """Wait until Prometheus has metrics of so many servers, and return what it has."""

    def up() -> bool:
        return (
            len([1 for r in prometheus(bench, "query", query='up{job="server"} == 1').get("result", [])]) == instances
        )

    until(up, 60, f"Prometheus scrapes {instances} servers")
    alerts = [rule for group in prometheus(bench, "rules")["groups"] for rule in group["rules"]]
    wanted = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
    if len(alerts) != len(wanted) or any(rule["health"] == "err" for rule in alerts):
        raise Missed(f"{len(alerts)} of {len(wanted)} alerts are loaded: {[rule['lastError'] for rule in alerts]}")
    grafana = ", Grafana answers" if serves(bench.port + 2, "/api/health") else ", without Grafana"
    return f"Prometheus scrapes {instances}, {len(alerts)} alerts loaded{grafana}"


def compose(bench: Bench) -> str:
    images_of_others()
    key = secrets.token_urlsafe(32)
    write_keys(key_folder(bench), key)
    with composed(bench, "compose.yaml", ["server"], IMAGE=IMAGE):
        statuses = [ask(bench.port, CHAT, body(4), key=given)[0] for given in ("", key)]
        if statuses != [401, 200]:
            raise Missed(f"without and with a key: {statuses}")
        return f"healthy, 401 without a key, 200 with one; {scraped(bench, 1)}"


# -- behind a proxy --------------------------------------------------------------------------------------------------


def behind(proxy: str) -> Callable[[Bench], str]:
    """A roll-out of two replicas behind a proxy, one after the other, under 32 streams."""

    def step(bench: Bench) -> str:
        proxies = stand_in("proxies")
        file, place, command = PROXIES[proxy]
        ports = {"8080": bench.port, "9000": bench.port + 1, "9001": bench.port + 2}

        def moved(text: str) -> str:
            return re.sub(r"\b(8080|9000|9001)\b", lambda match: str(ports[match[1]]), text)

        conf = bench.folder / file
        conf.write_text(moved((DOCKER / "proxies" / file).read_text()))
        words = ["--network", "host", "-v", f"{conf}:{place}:ro", proxies, *map(moved, command)]
        names = {"echo-trt-first": ports["9000"], "echo-trt-second": ports["9001"]}
        first, second = names
        with (
            server(bench, port=names[first], name=first),
            server(bench, port=names[second], name=second),
            container(*words, name="echo-trt-proxy"),
        ):
            until(lambda: serves(bench.port), 60, f"{proxy} serves")
            with Streams(bench.port, tokens=32) as streams:
                streams.more(48)
                for name, port in names.items():
                    replace(bench, name, port)
                    streams.more(48)
            seen = streams.check()
            if streams.pieces < 8:
                raise Missed(f"a stream of 32 tokens came in {streams.pieces} pieces")
            kill(first, ENGINE)
            until(lambda: ask(names[first], "/health")[0] == 503, 20, "its API server says 503")
            for _ in range(8):
                answer(bench.port, 4)
        return f"two replicas replaced one after the other under 32 streams: {seen}, at least {streams.pieces} pieces each; 503 of one goes to the other"

    return step


def replace(bench: Bench, name: str, port: int) -> None:
    """As docs/compose.md rolls out: the old container gets SIGTERM, and the new one takes its port."""
    docker("stop", "--time", 90, name, seconds=100)
    if code := exit_code(name):
        raise Missed(f"exit code {code} after docker stop")
    docker("rm", name)
    docker("run", "--detach", "--name", name, *options_of(bench, port), IMAGE)
    until(lambda: serves(port), START, "the new one serves")


# -- Dynamo ----------------------------------------------------------------------------------------------------------


def dynamo(bench: Bench) -> str:
    images_of_others()
    build(bench.folder, "Dockerfile.cpu", DYNAMO, "--build-arg", "WITH=dynamo")
    key = secrets.token_urlsafe(32)
    write_keys(key_folder(bench), f'"Bearer {key}" 1;', 101)
    with composed(bench, "compose.dynamo.yaml", ["frontend", "worker-1", "worker-2", "keys"]) as command:
        until(lambda: serves(bench.port, CHAT, content=body(4), key=key), 60, "the frontend answers")
        if (status := ask(bench.port, CHAT, body(4))[0]) != 401:
            raise Missed(f"without a key: {status}")
        seen = scraped(bench, 2)
        with Streams(bench.port, tokens=96, key=key, once=True) as streams:
            streams.flowing()
            command("exec", "-T", "worker-1", "python", "-c", KILL, "worker")
        seen = f"{streams.check()} of 32 while a worker was killed; {seen}"
        until(lambda: command("ps", "--format", "{{.Health}}", "worker-1") == "healthy", START, "the worker is back")
        return seen


# -- podman ----------------------------------------------------------------------------------------------------------


def podman(bench: Bench) -> str:
    """The walk of docs/kubernetes.md as far as podman goes: claim, copied bundle, Secret, Deployment, probes."""
    folder = bench.folder / "podman"
    folder.mkdir()
    (folder / "containers.conf").write_text('[engine]\nruntime = "runc"\n[containers]\ndefault_ulimits = []\n')
    environment = os.environ | {
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
    }

    def podman_(*words: object, **more) -> str:
        state = ("--root", folder / "storage", "--runroot", folder / "run", "--tmpdir", folder / "tmp")
        return run("podman", *state, *words, env=environment, **more)

    key = secrets.token_urlsafe(32)
    walk = (PROJECT / "docs/kubernetes.md").read_text()
    [claim] = re.findall(r"^```yaml\n(.*?)^```", walk, re.MULTILINE | re.DOTALL)
    (folder / "bundle.yaml").write_text(claim.replace("registry.example.com/", "localhost/"))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "echo-trt-keys"}, "stringData": {"keys": key}}
    (folder / "secret.yaml").write_text(yaml.safe_dump(secret))
    deployment = (DOCKER / "kubernetes/deployment.yaml").read_text()
    (folder / "deployment.yaml").write_text(deployment.replace("image: echo-trt:cpu", "image: localhost/echo-trt:cpu"))
    try:
        docker("save", "-o", folder / "image.tar", IMAGE, seconds=300)
        podman_("load", "-i", folder / "image.tar", seconds=300)
        podman_("tag", f"docker.io/library/{IMAGE}", f"localhost/{IMAGE}")
        (folder / "image.tar").unlink()
        podman_("kube", "play", folder / "bundle.yaml", seconds=60)
        podman_("cp", f"{bench.bundle}/.", "bundle-copy-copy:/bundle", seconds=120)
        podman_("exec", "bundle-copy-copy", "echo-trt", "inspect", "/bundle", seconds=120)
        podman_(
            "exec",
            "bundle-copy-copy",
            "echo-trt",
            "generate",
            "/bundle",
            "Why is the sky blue?",
            "--max-tokens",
            "32",
            seconds=120,
        )
        podman_("pod", "rm", "--force", "bundle-copy")
        podman_("kube", "play", folder / "secret.yaml")
        podman_("kube", "play", "--publish", f"{bench.port}:9000", folder / "deployment.yaml", seconds=60)
        seconds = until(lambda: serves(bench.port), START, "the pod serves")
        statuses = [ask(bench.port, CHAT, body(4), key=given)[0] for given in ("", key)]
        name = podman_("ps", "--format", "{{.Names}}", "--filter", "name=server").split()[0]
        probe = podman_("healthcheck", "run", name, check=False)
        if statuses != [401, 200]:
            raise Missed(f"without and with the Secret's key: {statuses}")
        begin = podman_("stop", "--time", 90, name, seconds=100)
        code = podman_("inspect", "--format", "{{.State.ExitCode}}", name)
        return f"claim filled, Secret mounted, serves after {seconds:.0f} s: 401 and 200; liveness probe: {probe or 'content'}; exit {code} at stop"
    finally:
        podman_("pod", "rm", "--force", "--all", check=False, seconds=60)
        podman_("system", "reset", "--force", check=False, seconds=120)
