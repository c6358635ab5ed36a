"""The steps: what one server's container must stand, and several containers together."""

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

from .images import DEBIAN, DOCKER, OFFICIAL, at_hand, build, have, size, stand_in

# isort: off
from .run import (
    API, CHAT, ENGINE, HARDENED, IMAGE, KILL, LONG, NAME, PROJECT, START, TMP, USER, Bench, Missed, Streams,
    answer, ask, body, container, docker, run, server, serves, step, streamed, until,
)  # fmt: skip
# isort: on

DYNAMO, GPU = "echo-trt:dynamo", "echo-trt:gpu"
NVIDIAS = "^(nvidia-|cuda-|tensorrt)"  # packages that need NVIDIA's index, or gigabytes
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


# -- one server -------------------------------------------------------------------------------------------------------


@step("image")
def image(bench: Bench) -> str:
    base = have(OFFICIAL["python"])
    build(bench.folder, "Dockerfile.cpu", IMAGE)
    docker("run", "--rm", "--entrypoint", "python", IMAGE, "-m", "pip", "check")
    over = size(IMAGE) - size(base)
    if over > 700:
        raise Missed(f"{over} MB over its base, and 700 are allowed")
    return f"{over} MB over its base; pip check is content"


@step("hardened")
def hardened(bench: Bench) -> str:
    with server(bench) as it:
        for place in ("/opt/echo", "/etc", "/bundle"):
            if "Read-only" not in docker("exec", "--user", "0", it.name, "touch", f"{place}/x", check=False):
                raise Missed(f"{place} can be written")
        seen = streamed(it.port, it.stop, tokens=64)
        return f"first answer after {it.seconds:.1f} s; docker stop with 32 streams: {seen}, exit code 0"


@step("killed")
def killed(bench: Bench) -> str:
    with server(bench, "--init") as it:
        return "; ".join(map(it.comes_back, (ENGINE, API)))


@step("/tmp full")
def tmp_full(bench: Bench) -> str:
    with server(bench, "--init") as it:
        it.inside("sh", "-c", "cat /dev/zero >/tmp/full", check=False)
        answer(it.port)
        return "; ".join(map(it.comes_back, (ENGINE, API)))


@step("memory too small")
def memory_small(bench: Bench) -> str:
    """Give less memory than the bundle needs, which must be told in one sentence before the weights are read."""
    limit = f"{max(400, sum(path.stat().st_size for path in bench.bundle.glob('target.*')) // 10**6)}m"
    with container(*bench.options(), *TMP, "--memory", limit, "--memory-swap", limit, IMAGE) as it:
        seconds = until(lambda: it.state("Running") == "false", 120, "it ends")
        said = it.line("memory limit is")
        if not said or "signal" in said:
            raise Missed(f"no sentence with the limit and the need, exit code {it.state('ExitCode')}")
        return f"exit code {it.state('ExitCode')} after {seconds:.0f} s: {said.partition('ERROR ')[2]}"


@step("memory reached")
def memory_reached(bench: Bench) -> str:
    """Fill /tmp, which counts as the container's memory, until the kernel kills the engine."""
    limit = ("--memory", "2g", "--memory-swap", "2g", "--init")
    with server(bench, *limit, tmp=("--tmpfs", "/tmp:size=1750m,mode=1777")) as it:
        seen = streamed(it.port)
        it.inside("sh", "-c", "cat /dev/zero >/tmp/full", check=False)
        until(lambda: it.line("has died"), 60, "the limit is reached")
        it.inside("rm", "-f", "/tmp/full")
        seconds = until(partial(serves, it.port), START, "it serves again")
        answer(it.port)
        said = it.line("has died").partition("serve: ")[2]
        return f"2 GB, {seen}; /tmp filled: {said}; answers {seconds:.0f} s after /tmp is empty"


@step("one CPU")
def one_cpu(bench: Bench) -> str:
    with server(bench, "--cpus", "1") as it:
        return f"first answer after {it.seconds:.0f} s, {streamed(it.port, count=8, tokens=32)} of 8"


@step("no network")
def no_network(bench: Bench) -> str:
    """Run the engine without a network; an API server in another container asks it by the socket in a folder."""
    folder = bench.folder / "socket"
    folder.mkdir(0o700, exist_ok=True)
    os.chown(folder, USER, USER)
    alone, share = ("--network", "none"), (*TMP, "-v", f"{folder}:/run/echo", "--entrypoint", "python")
    of_engine = (*bench.options(), *share, *alone, IMAGE, "-m", ENGINE, "/bundle", "--socket", "/run/echo/engine")
    of_api = (*bench.options(bench.port), *share, IMAGE, "-m", API, "--engine-socket", "/run/echo/engine")
    with container(*of_engine, name=f"{NAME}-engine"), container(*of_api, "--host", "0.0.0.0"):
        until(partial(serves, bench.port), START, "the API server reaches the engine")
        answer(bench.port)
    with container(*bench.options(), *TMP, *alone, IMAGE) as it:
        check = partial(it.inside, "python", "/opt/echo/healthcheck.py", "gateway", "9000", check=False)
        until(lambda: check() == "", START, "it is healthy")
    return "engine without a network, asked by its socket from another container; serve without one is healthy, too"


@step("no folder to write")
def no_folder(bench: Bench) -> str:
    """Machine code comes with the image: an engine compiles none, and needs no folder for it."""
    show = "from echo_trt.backends.cpu import attention, engine; print(attention.attend.cache_hits)"
    hits = docker("run", "--rm", *HARDENED, *TMP, "--entrypoint", "python", IMAGE, "-c", show)
    if hits != "1":
        raise Missed(f"hits of numba's cache: {hits}")
    words = ("generate", "/bundle", "Why is the sky blue?", "--max-tokens", "8")
    docker("run", "--rm", *bench.options(), "--user", "54321", "--env", "HOME=/nowhere", IMAGE, *words, seconds=START)
    return "the image's machine code is used; a user without home and /tmp generates, too"


# -- Compose ---------------------------------------------------------------------------------------------------------


@contextmanager
def composed(bench: Bench, file: str, *services: str, **variables: str) -> Iterator[Callable[..., str]]:
    """``up --wait`` of services, of Prometheus, and of Grafana if it can be had; the ports are the bench's."""
    named = yaml.safe_load((DOCKER / file).read_text())["services"]
    for official in OFFICIAL.values():
        have(official)
    over = bench.folder / f"over.{file}"
    over.write_text(f"""services:
  prometheus: {{ ports: !override ["127.0.0.1:{bench.port + 1}:9090"] }}
  grafana: {{ ports: !override ["127.0.0.1:{bench.port + 2}:3000"] }}
""")
    given = {"BUNDLE": str(bench.bundle), "KEYS": str(bench.folder / "keys"), "PORT": str(bench.port)}
    env = os.environ | given | {"GRAFANA_PASSWORD": secrets.token_hex(8)} | variables
    command = partial(docker, "compose", "-p", NAME, "-f", DOCKER / file, "-f", over, env=env)
    try:
        wanted = [*services, "prometheus", *["grafana"] * at_hand(named["grafana"]["image"])]
        command("up", "--detach", "--wait", "--wait-timeout", START, *wanted, seconds=START + 60)
        yield command
    except Missed as missed:
        raise Missed(f"{missed}\n{command('logs', '--tail', 25, seconds=60, check=False)[-4000:]}") from missed
    finally:
        command("down", "--volumes", "--timeout", 20, check=False)


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


def statuses(bench: Bench, *keys: str) -> list[int]:
    return [ask(bench.port, CHAT, body(4), key)[0] for key in keys]


@step("compose and keys")
def compose(bench: Bench) -> str:
    old, new = (secrets.token_urlsafe(32) for _ in range(2))
    write_keys(bench, old)
    with composed(bench, "compose.yaml", "server", IMAGE=IMAGE):
        before = statuses(bench, "", old, new)
        write_keys(bench, new)
        until(lambda: serves(bench.port, "/v1/models", key=new), 5, "the new key is taken")
        after = statuses(bench, "", old, new)
        if (before, after) != ([401, 200, 401], [401, 401, 200]):
            raise Missed(f"without, with the old and the new key: {before}, and after rotation {after}")
        return f"healthy; {scraped(bench, 1)}; keys rotated in the mounted folder: old 200 to 401, new 401 to 200"


# -- behind a proxy --------------------------------------------------------------------------------------------------


def roll_out(file: str, place: str, command: str, bench: Bench) -> str:
    """Replace two replicas behind a proxy, one after the other, under 32 streams."""
    ports = {"8080": bench.port, "9000": bench.port + 1, "9001": bench.port + 2}
    moved = partial(re.sub, r"\b(8080|9000|9001)\b", lambda match: str(ports[match[1]]))
    conf = bench.folder / file
    conf.write_text(moved((DOCKER / "proxies" / file).read_text()))
    words = ("--network", "host", "-v", f"{conf}:{place}:ro", stand_in("proxies"), *shlex.split(moved(command)))
    with (
        server(bench, port=bench.port + 1) as first,
        server(bench, port=bench.port + 2) as second,
        container(*words, name=f"{NAME}-proxy"),
    ):
        until(lambda: serves(bench.port), 60, "the proxy serves")
        with Streams(bench.port, tokens=32) as streams:
            streams.more(48)
            for it in (first, second):
                it.stop()
                docker("rm", it.name)
                docker("run", "--detach", "--name", it.name, *bench.options(it.port), *TMP, IMAGE)
                until(partial(serves, it.port), START, "the new one serves")
                streams.more(48)
        seen = streams.check()
        if streams.pieces < 8:
            raise Missed(f"a stream of 32 tokens came in {streams.pieces} pieces")
        first.inside("python", "-c", KILL, ENGINE)
        until(lambda: ask(first.port, "/health")[0] == 503, 20, "its API server says 503")
        for _ in range(8):
            answer(bench.port, 4)
    return f"both replaced under 32 streams: {seen}, in up to {streams.pieces} pieces; a 503 goes to the other"


for proxy, words in PROXIES.items():
    step(f"behind {proxy}")(partial(roll_out, *words))


# -- Dynamo ----------------------------------------------------------------------------------------------------------


@step("Dynamo")
def dynamo(bench: Bench) -> str:
    build(bench.folder, "Dockerfile.cpu", DYNAMO, "--build-arg", "WITH=dynamo")
    key = secrets.token_urlsafe(32)
    write_keys(bench, f'"Bearer {key}" 1;', 101)
    with composed(bench, "compose.dynamo.yaml", "frontend", "worker-1", "worker-2", "keys") as command:
        until(lambda: serves(bench.port, CHAT, body(4), key), 60, "the frontend answers")
        if statuses(bench, "") != [401]:
            raise Missed("without a key it answers")
        scrapes = scraped(bench, 2)
        kill = partial(command, "exec", "-T", "worker-1", "python", "-c", KILL, "worker")
        seen = streamed(bench.port, kill, tokens=96, key=key)
        health = partial(command, "ps", "--format", "{{.Health}}", "worker-1")
        until(lambda: health() == "healthy", START, "the worker comes back")
        return f"one of two workers killed: {seen} of 32, and it comes back; 401 without a key; {scrapes}"


# -- podman ----------------------------------------------------------------------------------------------------------


@step("podman")
def podman(bench: Bench) -> str:
    """Walk docs/deployment.md as far as podman goes: claim, copied bundle, Secret, Deployment, probes."""
    folder = bench.folder / "podman"
    folder.mkdir()
    conf = folder / "containers.conf"
    conf.write_text("""[engine]
runtime = "runc"
[containers]
default_ulimits = []
[network]
firewall_driver = "iptables"
""")
    state = ("--root", folder / "storage", "--runroot", folder / "run", "--tmpdir", folder / "tmp")
    play = partial(run, "podman", "--log-level", "error", *state, env=os.environ | {"CONTAINERS_CONF": str(conf)})
    key = secrets.token_urlsafe(32)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "echo-trt-keys"}, "stringData": {"keys": key}}
    [claim] = re.findall(r"(?ms)^```yaml\n(.*?)^```", (PROJECT / "docs/deployment.md").read_text())
    deployment = (DOCKER / "kubernetes/deployment.yaml").read_text().replace(IMAGE, f"localhost/{IMAGE}")

    def kube(text: str, *options: str) -> None:
        file = folder / "this.yaml"
        file.write_text(text)
        play("kube", "play", *options, file, seconds=300)

    try:
        docker("save", "-o", folder / "image.tar", IMAGE, seconds=300)
        play("load", "-i", folder / "image.tar", seconds=300)
        play("tag", f"docker.io/library/{IMAGE}", f"localhost/{IMAGE}")
        (folder / "image.tar").unlink()
        kube(claim.replace("registry.example.com/", "localhost/"))
        play("cp", f"{bench.bundle}/.", "bundle-copy-copy:/bundle")
        words = ("generate", "/bundle", "Why is the sky blue?", "--max-tokens", "32")
        play("exec", "bundle-copy-copy", "echo-trt", *words)
        play("pod", "rm", "--force", "bundle-copy")
        kube(yaml.safe_dump(secret))
        kube(deployment, "--publish", f"127.0.0.1:{bench.port}:9000")
        seconds = until(partial(serves, bench.port), START, "the pod serves")
        # podman asks by curl in the container, which the image has not; a kubelet asks from outside, as here.
        probes = [ask(bench.port, path)[0] for path in re.findall(r"httpGet: { path: (\S+),", deployment)]
        if (seen := statuses(bench, "", key) + probes) != [401, 200, 200, 200, 200]:
            raise Missed(f"without and with the Secret's key, and the three probes: {seen}")
        name = play("ps", "--format", "{{.Names}}", "--filter", "name=server")
        play("stop", "--time", 90, name)
        code = play("inspect", "--format", "{{.State.ExitCode}}", name)
        return f"claim, Secret: serves after {seconds:.0f} s, 401 and 200; its three probes are 200; exit code {code}"
    finally:
        play("pod", "rm", "--force", "--all", check=False)
        play("system", "reset", "--force", check=False)


# -- the GPU's image, and README --------------------------------------------------------------------------------------


@step("GPU image")
def gpu_image(bench: Bench) -> str:
    """Dockerfile.gpu's own steps on a stand-in: without Triton, and without the packages of NVIDIA's index and CUDA."""
    lines = (DOCKER / "requirements-gpu.txt").read_text().splitlines()
    left_out = [line for line in lines if re.match(NVIDIAS, line)]
    without = rf"RUN sed -i -E '/{NVIDIAS}/d' /src/docker/requirements-gpu.txt\n"
    edit = partial(re.sub, r"(?m)^(COPY .*docker/requirements-gpu.txt.*\n)", rf"\1{without}")
    build(bench.folder, "Dockerfile.gpu", GPU, "--build-arg", f"TRITON={stand_in('triton')}", edit=edit)
    check = "PATH=${PATH#*:} python3 -m pip --python /opt/echo/bin/python check"  # it has no pip of its own
    found = docker("run", "--rm", "--entrypoint", "sh", GPU, "-c", check, check=False).splitlines()
    if strange := [line for line in found if not re.search("tensorrt|triton|nvidia|cuda|No broken", line)]:
        raise Missed(f"pip check: {strange}")
    tmp, command = ("--tmpfs", "/tmp:size=1g,mode=1777,exec"), ("serve", "/bundle", "--host", "0.0.0.0")
    with server(bench, "--shm-size", "1g", tmp=tmp, image=GPU, command=command) as it:
        serving = f"serves a bundle of a CPU's engine after {it.seconds:.0f} s"
    return f"its steps without {len(left_out)} of NVIDIA's packages; {serving}; not run: Triton, TensorRT, CUDA"


def readme(image: str, prepare: str, bench: Bench) -> str:
    """README's commands from nothing in a container: scripts/demo, and with ``tests`` scripts/test."""
    tree = bench.folder / "tree.tar"
    run("git", "-C", PROJECT, "archive", "--output", tree, "HEAD")
    words = ("--network", "host", "-v", f"{tree}:/tree.tar:ro", "--entrypoint", "sleep", have(image), "86400")
    with container(*words, name=f"{NAME}-readme") as it:
        it.inside("sh", "-ec", f"{prepare}; mkdir /echo-trt; tar -C /echo-trt -xf /tree.tar", seconds=LONG)
        inside = partial(docker, "exec", "--workdir", "/echo-trt", it.name)
        seen = [inside("python3", "--version")]
        for command in ("scripts/demo", *["scripts/test"] * bench.tests):
            said = inside(command, seconds=3 * LONG).splitlines()
            seen += [" ".join(line.strip("= ").split()) for line in said if re.search(r"\d of \d+$|\d passed", line)]
        return "; ".join([*seen, inside("du", "-sh", ".").split()[0] + "B of disk"])


step("README, Python 3.11")(partial(readme, OFFICIAL["python"], "true"))
step("README, Debian 13")(partial(readme, DEBIAN, "apt-get update; apt-get install -y python3 python3-venv"))
