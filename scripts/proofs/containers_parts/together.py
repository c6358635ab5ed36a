"""Several containers together: Compose, two replicas behind a proxy, Dynamo's fleet, and podman's Kubernetes."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import yaml

from .battery import ENGINE, IMAGE, KILL, NAME, START, TMP, USER, Bench, container, kill, server, stop
from .engine import OFFICIAL, PROJECT, Missed, at_hand, build, docker, run, stand_in, until
from .load import CHAT, Streams, answer, ask, body, serves

DOCKER, DYNAMO = PROJECT / "docker", "echo-trt:dynamo"
PROXIES = {  # name -> the configuration in docker/proxies, where it is mounted, and the command
    "nginx": ("nginx.conf", "/etc/nginx/conf.d/echo-trt.conf", "nginx -g 'daemon off;'"),
    "HAProxy": ("haproxy.cfg", "/haproxy.cfg", "haproxy -W -db -f /haproxy.cfg"),
    "Caddy": ("Caddyfile", "/Caddyfile", "caddy run --adapter caddyfile --config /Caddyfile"),
    "Envoy": ("envoy.yaml", "/envoy.yaml", "envoy -c /envoy.yaml"),
    "Traefik": (
        "traefik-dynamic.yaml",
        "/traefik-dynamic.yaml",
        "traefik --entrypoints.clients.address=127.0.0.1:8080 --providers.file.filename=/traefik-dynamic.yaml",
    ),
}


# -- Compose ---------------------------------------------------------------------------------------------------------


@contextmanager
def composed(bench: Bench, file: str, services: list[str], **variables: str) -> Iterator[Callable[..., str]]:
    """``up --wait`` of services, of Prometheus, and of Grafana if it can be had; the ports are the bench's."""
    images = {
        name: service["image"] for name, service in yaml.safe_load((DOCKER / file).read_text())["services"].items()
    }
    for target, official in OFFICIAL.items():
        if not at_hand(official):
            stand_in(target)
    moved = {"prometheus": (bench.port + 1, 9090), "grafana": (bench.port + 2, 3000)}
    ports = {
        name: f'  {name}: {{ ports: !override ["127.0.0.1:{mine}:{its}"] }}' for name, (mine, its) in moved.items()
    }
    over = bench.folder / f"over.{file}"
    over.write_text("\n".join(["services:", *ports.values(), ""]))
    given = {"BUNDLE": str(bench.bundle), "KEYS": str(bench.folder / "keys"), "GRAFANA_PASSWORD": secrets.token_hex(8)}
    files = ("-p", NAME, "-f", DOCKER / file, "-f", over)
    command = partial(docker, "compose", *files, env=os.environ | given | {"PORT": str(bench.port)} | variables)
    try:
        wanted = [*services, "prometheus", *["grafana"] * at_hand(images["grafana"])]
        command("up", "--detach", "--wait", "--wait-timeout", START, *wanted, seconds=START + 60)
        yield command
    except Missed as missed:
        raise Missed(f"{missed}\n{command('logs', '--tail', 25, seconds=60, check=False)[-4000:]}") from missed
    finally:
        command("down", "--volumes", "--timeout", 20, seconds=120, check=False)


def scraped(bench: Bench, servers: int) -> str:
    """Wait until Prometheus has metrics of so many servers, and return what it has."""

    def prometheus(path: str) -> dict:
        status, text = ask(bench.port + 1, f"/api/v1/{path}")
        return json.loads(text)["data"] if status == 200 else {"result": []}

    query = "query?" + urllib.parse.urlencode({"query": 'up{job="server"} == 1'})
    until(lambda: len(prometheus(query)["result"]) == servers, 60, f"Prometheus scrapes {servers}")
    alerts = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    wanted = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
    if len(alerts) != len(wanted) or any(rule["health"] == "err" for rule in alerts):
        raise Missed(f"{len(alerts)} of {len(wanted)} alerts are loaded: {alerts}")
    grafana = "Grafana answers" if serves(bench.port + 2, "/api/health") else "no Grafana, which cannot be pulled"
    return f"Prometheus scrapes {servers}, {len(alerts)} alerts loaded; {grafana}"


def write_keys(bench: Bench, text: str, user: int = USER) -> None:
    """Write the mounted folder's file as docs/deployment.md rotates it."""
    new = bench.folder / "keys/next"
    new.parent.mkdir(exist_ok=True)
    new.write_text(f"{text}\n")
    os.chown(new, user, user)
    new.chmod(0o400)
    new.rename(new.with_name("keys"))


def compose(bench: Bench) -> str:
    old, new = (secrets.token_urlsafe(32) for _ in range(2))
    write_keys(bench, old)
    with composed(bench, "compose.yaml", ["server"], IMAGE=IMAGE):
        statuses = [ask(bench.port, CHAT, body(4), key)[0] for key in ("", old, new)]
        write_keys(bench, new)
        until(lambda: serves(bench.port, "/v1/models", key=new), 5, "the new key is taken")
        statuses += [ask(bench.port, CHAT, body(4), key)[0] for key in ("", old, new)]
        if statuses != [401, 200, 401, 401, 401, 200]:
            raise Missed(f"without, with the old and the new key, before and after rotation: {statuses}")
        return f"healthy; {scraped(bench, 1)}; keys rotated in the mounted folder: old 200 to 401, new 401 to 200"


# -- behind a proxy --------------------------------------------------------------------------------------------------


def behind(proxy: str) -> Callable[[Bench], str]:
    """Return the step of a roll-out of two replicas behind a proxy, one after the other, under 32 streams."""
    return partial(roll_out, *PROXIES[proxy])


def roll_out(file: str, place: str, command: str, bench: Bench) -> str:
    ports = {"8080": bench.port, "9000": bench.port + 1, "9001": bench.port + 2}

    def moved(text: str) -> str:
        return re.sub(r"\b(8080|9000|9001)\b", lambda match: str(ports[match[1]]), text)

    conf = bench.folder / file
    conf.write_text(moved((DOCKER / "proxies" / file).read_text()))
    words = shlex.split(moved(command))
    proxy = container(
        "--network", "host", "-v", f"{conf}:{place}:ro", stand_in("proxies"), *words, name=f"{NAME}-proxy"
    )
    names = {f"{NAME}-{port}": port for port in (bench.port + 1, bench.port + 2)}
    first, second = names
    with server(bench, port=names[first], name=first), server(bench, port=names[second], name=second), proxy:
        until(lambda: serves(bench.port), 60, "the proxy serves")
        with Streams(bench.port, tokens=32) as streams:
            streams.more(48)
            for name, port in names.items():
                stop(name)
                docker("rm", name)
                docker("run", "--detach", "--name", name, *bench.options(port), *TMP, IMAGE)
                until(partial(serves, port), START, "the new one serves")
                streams.more(48)
        seen = streams.check()
        if streams.pieces < 8:
            raise Missed(f"a stream of 32 tokens came in {streams.pieces} pieces")
        kill(first, ENGINE)
        until(lambda: ask(names[first], "/health")[0] == 503, 20, "its API server says 503")
        for _ in range(8):
            answer(bench.port, 4)
    return f"both replaced under 32 streams: {seen}, in up to {streams.pieces} pieces; a 503 goes to the other"


# -- Dynamo ----------------------------------------------------------------------------------------------------------


def dynamo(bench: Bench) -> str:
    build(bench.folder, "Dockerfile.cpu", DYNAMO, "--build-arg", "WITH=dynamo")
    key = secrets.token_urlsafe(32)
    write_keys(bench, f'"Bearer {key}" 1;', 101)
    with composed(bench, "compose.dynamo.yaml", ["frontend", "worker-1", "worker-2", "keys"]) as command:
        until(lambda: serves(bench.port, CHAT, body(4), key), 60, "the frontend answers")
        if (status := ask(bench.port, CHAT, body(4))[0]) != 401:
            raise Missed(f"without a key: {status}")
        seen = scraped(bench, 2)
        with Streams(bench.port, tokens=96, key=key, once=True) as streams:
            streams.flowing()
            command("exec", "-T", "worker-1", "python", "-c", KILL, "worker")
        health = partial(command, "ps", "--format", "{{.Health}}", "worker-1")
        until(lambda: health() == "healthy", START, "the worker comes back")
        return f"one of two workers killed: {streams.check()} of 32, and it comes back; 401 without a key; {seen}"


# -- podman ----------------------------------------------------------------------------------------------------------


def podman(bench: Bench) -> str:
    """Walk docs/deployment.md as far as podman goes: claim, copied bundle, Secret, Deployment, probes."""
    folder = bench.folder / "podman"
    folder.mkdir()
    settings = (
        '[engine]\nruntime = "runc"\n[containers]\ndefault_ulimits = []\n[network]\nfirewall_driver = "iptables"\n'
    )
    (folder / "containers.conf").write_text(settings)
    environment = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}
    state = ("--root", folder / "storage", "--runroot", folder / "run", "--tmpdir", folder / "tmp")
    play = partial(run, "podman", "--log-level", "error", *state, env=environment, seconds=300)
    key = secrets.token_urlsafe(32)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "echo-trt-keys"}, "stringData": {"keys": key}}
    [claim] = re.findall(r"(?ms)^```yaml\n(.*?)^```", (PROJECT / "docs/deployment.md").read_text())
    texts = {
        "bundle": claim.replace("registry.example.com/", "localhost/"),
        "secret": yaml.safe_dump(secret),
        "deployment": (DOCKER / "kubernetes/deployment.yaml").read_text().replace(IMAGE, f"localhost/{IMAGE}"),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    try:
        docker("save", "-o", folder / "image.tar", IMAGE, seconds=300)
        play("load", "-i", folder / "image.tar")
        play("tag", f"docker.io/library/{IMAGE}", f"localhost/{IMAGE}")
        (folder / "image.tar").unlink()
        play("kube", "play", folder / "bundle.yaml")
        play("cp", f"{bench.bundle}/.", "bundle-copy-copy:/bundle")
        play(
            "exec", "bundle-copy-copy", "echo-trt", "generate", "/bundle", "Why is the sky blue?", "--max-tokens", "32"
        )
        play("pod", "rm", "--force", "bundle-copy")
        play("kube", "play", folder / "secret.yaml")
        play("kube", "play", "--publish", f"127.0.0.1:{bench.port}:9000", folder / "deployment.yaml")
        seconds = until(partial(serves, bench.port), START, "the pod serves")
        statuses = [ask(bench.port, CHAT, body(4), given)[0] for given in ("", key)]
        # podman asks by curl in the container, which the image has not; a kubelet asks from outside, as here.
        statuses += [ask(bench.port, path)[0] for path in re.findall(r"httpGet: { path: (\S+),", texts["deployment"])]
        if statuses != [401, 200, 200, 200, 200]:
            raise Missed(f"without and with the Secret's key, and the three probes: {statuses}")
        name = play("ps", "--format", "{{.Names}}", "--filter", "name=server")
        play("stop", "--time", 90, name)
        code = play("inspect", "--format", "{{.State.ExitCode}}", name)
        return f"claim, Secret: serves after {seconds:.0f} s, 401 and 200; its three probes are 200; exit code {code}"
    finally:
        play("pod", "rm", "--force", "--all", check=False)
        play("system", "reset", "--force", check=False)
