"""What one server's container must stand: each step is a function that returns what was seen, or raises Missed."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .engine import LONG, PROJECT, Missed, base, build, docker, run, size, stand_in, stand_in_debian, until
from .load import CHAT, Streams, answer, ask, body, serves

IMAGE, GPU, USER, START = (
    "echo-trt:cpu",
    "echo-trt:gpu",
    10001,
    400,
)  # START: seconds until a server answers at the latest
HARDENED = (
    "--read-only",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
    "--tmpfs",
    "/tmp:size=256m,mode=1777",
)
ENGINE, API = "echo_trt.engine.process", "echo_trt.server"  # modules, by which their processes are found
NVIDIAS = re.compile("^(nvidia-|cuda-|tensorrt|triton)")  # packages that need NVIDIA's index, or gigabytes
KILL = """
import os, psutil, sys
found = [p for p in psutil.process_iter() if sys.argv[1] in p.cmdline() and p.pid != os.getpid()]
sys.exit("no such process") if not found else [p.kill() for p in found]"""


@dataclass(frozen=True)
class Bench:
    """Where the steps work. ``port``: the first of some that they take on 127.0.0.1."""

    folder: Path
    bundle: Path
    port: int
    tests: bool = False  # README's second command, too, which takes half an hour

    @property
    def mount(self) -> tuple[str, str]:
        return "-v", f"{self.bundle}:/bundle:ro"


@contextmanager
def container(*words: object, name: str = "echo-trt-proof") -> Iterator[str]:
    """``docker run`` in the background; removed at the end. A failure inside comes with the end of its log."""
    docker("rm", "--force", name, check=False)
    try:
        docker("run", "--detach", "--name", name, *words)
        yield name
    except Missed as missed:
        raise Missed(f"{missed}\nthe container's log:\n{logs(name)[-2500:]}") from missed
    finally:
        docker("rm", "--force", "--volumes", name, check=False)


def options_of(bench: Bench, port: int) -> list[str]:
    """What ``docker run`` gets for a hardened server at a port of 127.0.0.1."""
    return [*HARDENED, *bench.mount, "-p", f"127.0.0.1:{port}:9000"]


@contextmanager
def server(bench: Bench, *options: str, port: int = 0, name: str = "echo-trt-proof", image: str = IMAGE, command=()):
    """A hardened server that answers: its name, and the seconds until its first answer."""
    port = port or bench.port
    with container(*options_of(bench, port), *options, image, *command, name=name):
        seconds = until(lambda: serves(port) or ended(name), START, "a server answers")
        if ended(name):
            raise Missed("the server has ended")
        answer(port)
        yield name, seconds


def ended(name: str) -> bool:
    return docker("inspect", "--format", "{{.State.Running}}", name) == "false"


def exit_code(name: str) -> int:
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", name))


def logs(name: str) -> str:
    return docker("logs", name, check=False)


def kill(name: str, module: str) -> None:
    """End the processes of a module with signal 9."""
    docker("exec", name, "python", "-c", KILL, module)


# -- the image -------------------------------------------------------------------------------------------------------


def image(bench: Bench) -> str:
    build(bench.folder, "Dockerfile.cpu", IMAGE)
    docker("run", "--rm", "--entrypoint", "python", IMAGE, "-m", "pip", "check")
    under = size(base("Dockerfile.cpu"))
    return f"{size(IMAGE) - under:,} MB over its base, whose stand-in or own has {under:,} MB; pip check is content"


def hardened(bench: Bench) -> str:
    with server(bench) as (name, seconds):
        for place in ("/opt/echo", "/etc", "/bundle"):
            if "Read-only" not in docker("exec", "--user", "0", name, "touch", f"{place}/x", check=False):
                raise Missed(f"{place} can be written")
        with Streams(bench.port, tokens=64, once=True) as streams:
            streams.flowing()
            stop = until(lambda: docker("stop", "--time", 90, name, seconds=100), 1, "stop")
        if code := exit_code(name):
            raise Missed(f"exit code {code} after docker stop")
        return f"first answer after {seconds:.0f} s; docker stop in {stop:.0f} s with 32 streams: {streams.check()}, exit 0"


def killed(bench: Bench) -> str:
    with server(bench, "--init") as (name, _):
        seen = []
        for module, word in ((ENGINE, "engine"), (API, "API server")):
            kill(name, module)
            until(lambda: not serves(bench.port), 20, f"the {word}'s end shows")
            seen.append(f"{word} back after {until(lambda: serves(bench.port), START, 'it serves again'):.1f} s")
            answer(bench.port)
        return "; ".join(seen)


def keys(bench: Bench) -> str:
    """The mounted folder of docs/compose.md, and its rotation."""
    folder, (old, new) = key_folder(bench), (secrets.token_urlsafe(32) for _ in range(2))
    write_keys(folder, old)
    command = ("serve", "/bundle", "--host", "0.0.0.0", "--api-keys-file", "/keys/keys")
    with container(*options_of(bench, bench.port), "-v", f"{folder}:/keys:ro", IMAGE, *command):
        until(lambda: serves(bench.port), START, "a server answers")
        seen = [[serves(bench.port, "/v1/models", key=key) for key in (old, new)]]
        write_keys(folder, new)
        until(lambda: serves(bench.port, "/v1/models", key=new), 5, "the new key is taken")
        statuses = [ask(bench.port, CHAT, body(4), key=key)[0] for key in (old, new, "")]
    if seen != [[True, False]] or statuses != [401, 200, 401]:
        raise Missed(f"before {seen}; old, new and no key afterwards: {statuses}")
    return "after mv in the mounted folder: old key 401, new key 200, none 401, without a restart"


def key_folder(bench: Bench) -> Path:
    folder = bench.folder / "keys"
    folder.mkdir(exist_ok=True)
    return folder


def write_keys(folder: Path, text: str, user: int = USER) -> None:
    (folder / "next").unlink(missing_ok=True)
    (folder / "next").write_text(f"{text}\n")
    os.chown(folder / "next", user, user)
    (folder / "next").chmod(0o400)
    (folder / "next").rename(folder / "keys")


# -- bounds ----------------------------------------------------------------------------------------------------------


def memory_small(bench: Bench) -> str:
    """A limit below what the bundle needs: one sentence, before the weights are read."""
    with container(*HARDENED, *bench.mount, "--memory", "500m", "--memory-swap", "500m", IMAGE) as name:
        seconds = until(lambda: ended(name), 120, "it ends")
        said = [line for line in logs(name).splitlines() if line.startswith("error: ")]
        if len(said) != 1 or not re.search(r"0\.5\d? GB.* GB", said[0]) or "signal" in said[0]:
            raise Missed(f"no sentence with the limit and the need, exit code {exit_code(name)}")
        return f"exit {exit_code(name)} after {seconds:.0f} s: {said[0].removeprefix('error: ')}"


def memory_reached(bench: Bench) -> str:
    """/tmp counts as the container's memory: filling it makes the kernel kill the engine."""
    limit = ("--memory", "2g", "--memory-swap", "2g", "--init", "--tmpfs", "/tmp:size=4g,mode=1777")
    with server(bench, *limit) as (name, _):
        with Streams(bench.port, tokens=64) as streams:
            streams.more(32)
        first = streams.check()
        docker("exec", name, "sh", "-c", "head -c 3g /dev/zero >/tmp/full", check=False, seconds=120)
        until(lambda: not serves(bench.port) or "has died" in logs(name), 60, "the limit is reached")
        docker("exec", name, "rm", "-f", "/tmp/full")
        seconds = until(lambda: serves(bench.port), START, "it serves again")
        answer(bench.port)
        said = next((line for line in logs(name).splitlines() if "has died" in line), "")
        return (
            f"at 2 GB: {first}; /tmp filled: {said.partition('serve: ')[2]!r}, serves {seconds:.0f} s after it is empty"
        )


def one_cpu(bench: Bench) -> str:
    with server(bench, "--cpus", "1") as (name, seconds):
        threads = docker("exec", name, "python", "-c", "import os; print(len(os.sched_getaffinity(0)))")
        with Streams(bench.port, 8, tokens=32, once=True) as streams:
            streams.flowing()
        return f"first answer after {seconds:.0f} s, {streams.check()} of 8 ({threads} cores seen)"


def no_network(bench: Bench) -> str:
    """The engine without a network; an API server in another container asks it by the socket in a shared folder."""
    folder = bench.folder / "socket"
    folder.mkdir(exist_ok=True)
    os.chown(folder, USER, USER)
    folder.chmod(0o700)
    python = ("--entrypoint", "python", IMAGE, "-m")
    share = (*bench.mount, "-v", f"{folder}:/run/echo")
    socket = "/run/echo/engine"
    with container(
        *HARDENED, *share, "--network", "none", *python, ENGINE, "/bundle", "--socket", socket, name="echo-trt-engine"
    ):
        api = (*HARDENED, *share, "-p", f"127.0.0.1:{bench.port}:9000", *python, API, "--engine-socket", socket)
        with container(*api, "--host", "0.0.0.0", name="echo-trt-api"):
            until(lambda: serves(bench.port), START, "the API server reaches the engine")
            answer(bench.port)
    with container(*HARDENED, *bench.mount, "--network", "none", IMAGE) as name:
        check = ("exec", name, "python", "/opt/echo/healthcheck.py", "gateway", "9000")
        until(lambda: docker(*check, check=False) == "", START, "it is healthy")
    return (
        "engine with --network none, asked by a socket from another container; serve with it is healthy on its loopback"
    )


def tmp_full(bench: Bench) -> str:
    with server(bench, "--init") as (name, _):
        fill = "cat /dev/zero >/tmp/full"
        docker("exec", name, "sh", "-c", fill, check=False, seconds=60)
        answer(bench.port)
        for module in (ENGINE, API):
            kill(name, module)
            until(lambda: not serves(bench.port), 20, "the kill shows")
            until(lambda: serves(bench.port), START, "it serves again")
        answer(bench.port)
        return "answers; engine and API server killed and started again meanwhile"


# -- others ----------------------------------------------------------------------------------------------------------


def gpu_image(bench: Bench) -> str:
    """Dockerfile.gpu's own steps on a stand-in: without Triton, and without the packages of NVIDIA's index and CUDA."""
    given = requirements("gpu")
    ours = [line for line in given if not NVIDIAS.match(line)]
    tag = stand_in("triton")
    copied = "COPY docker/requirements-gpu.txt"
    without = f"RUN sed -i -E '/{NVIDIAS.pattern}/d' /src/docker/requirements-gpu.txt\n"

    def edit(text: str) -> str:
        return re.sub(rf"^{copied}.*\n(?=ARG)", lambda line: line[0] + without, text, flags=re.MULTILINE)

    build(bench.folder, "Dockerfile.gpu", GPU, "--build-arg", f"TRITON={tag}", edit=edit)
    check = ("run", "--rm", "--entrypoint", "python3", GPU, "-m", "pip", "--python", "/opt/echo/bin/python", "check")
    missed = docker(*check, check=False).splitlines()
    if strange := [line for line in missed if not re.search("tensorrt|triton|nvidia|cuda|No broken", line)]:
        raise Missed(f"pip check: {strange}")
    shared = ("--tmpfs", "/tmp:size=1g,mode=1777,exec", "--shm-size", "1g")
    with server(bench, *shared, image=GPU, command=("serve", "/bundle", "--host", "0.0.0.0")) as (_, seconds):
        return (
            f"its steps, with {len(ours)} of {len(given)} requirements; serves a bundle of openvino after {seconds:.0f} s; "
            "not run: Triton, TensorRT, CUDA"
        )


def requirements(name: str) -> list[str]:
    lines = (PROJECT / f"docker/requirements-{name}.txt").read_text().splitlines()
    return [line for line in lines if line and line[0] not in "#-"]


def readme(bench: Bench, image: str) -> str:
    """README's commands from nothing in a container: scripts/demo, and with ``tests`` scripts/test."""
    tree = bench.folder / "tree.tar"
    run("git", "-C", PROJECT, "archive", "--output", tree, "HEAD")
    pip = "PIP_CACHE_DIR=/tmp/pip"
    try:
        with container(
            "--network", "host", "-v", f"{tree}:/tree.tar:ro", "--entrypoint", "sleep", image, "86400"
        ) as name:
            docker("exec", name, "sh", "-c", "mkdir /echo-trt && tar -C /echo-trt -xf /tree.tar")
            inside = ("exec", "--workdir", "/echo-trt", "--env", pip, name)
            version = docker(*inside, "python3", "--version")
            said = docker(*inside, "scripts/demo", seconds=2 * LONG).splitlines()[-1]
            disk = docker(*inside, "du", "-sh", "--block-size=M", ".").split()[0]
            if bench.tests:
                said += "; " + docker(*inside, "scripts/test", seconds=4 * LONG).splitlines()[-1]
            return f"{version}: {said}; {disk}B of disk"
    finally:
        tree.unlink()


def readme_newest(bench: Bench) -> str:
    return readme(bench, stand_in_debian(bench.folder))


def readme_oldest(bench: Bench) -> str:
    return readme(bench, base("Dockerfile.cpu"))
