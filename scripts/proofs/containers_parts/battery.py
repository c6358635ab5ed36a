"""What one server's container must stand: each step is a function that returns what was seen, or raises Missed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .engine import LONG, PROJECT, Missed, base, build, docker, run, size, stand_in, stand_in_debian, until
from .load import Streams, answer, serves

IMAGE, GPU, NAME, USER = "echo-trt:cpu", "echo-trt:gpu", "echo-trt-proof", 10001
START = 400  # seconds until a server answers, at the latest
TMP = ("--tmpfs", "/tmp:size=256m,mode=1777")
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
ENGINE, API = "echo_trt.engine.process", "echo_trt.server"  # modules, by which their processes are found
NVIDIAS = "^(nvidia-|cuda-|tensorrt|triton)"  # packages that need NVIDIA's index, or gigabytes
KILL = """
import os, psutil, sys
found = [p for p in psutil.process_iter() if sys.argv[1] in p.cmdline() and p.pid != os.getpid()]
[p.kill() for p in found] or sys.exit("no such process")"""


@dataclass(frozen=True)
class Bench:
    """Where the steps work. ``port``: the first of some that they take on 127.0.0.1. ``tests``: scripts/test, too."""

    folder: Path
    bundle: Path
    port: int
    tests: bool = False

    def options(self, port: int = 0) -> list[str]:
        """Return what ``docker run`` gets for a hardened server; 0: no port of it is published."""
        return [*HARDENED, "-v", f"{self.bundle}:/bundle:ro", *(["-p", f"127.0.0.1:{port}:9000"] if port else [])]


@contextmanager
def container(*words: object, name: str = NAME) -> Iterator[str]:
    """``docker run`` in the background; removed at the end. A failure inside comes with the end of its log."""
    docker("rm", "--force", name, check=False)
    try:
        docker("run", "--detach", "--name", name, *words)
        yield name
    except Missed as missed:
        raise Missed(f"{missed}\nthe log of {name}:\n{logs(name)[-2500:]}") from missed
    finally:
        docker("rm", "--force", "--volumes", name, seconds=120, check=False)


@contextmanager
def server(
    bench: Bench, *options: str, port: int = 0, name: str = NAME, image: str = IMAGE, command: Sequence[str] = ()
) -> Iterator[tuple[str, float]]:
    """Run a hardened server; yield its name, and the seconds until its first answer."""
    port = port or bench.port
    with container(*bench.options(port), *(options or TMP), image, *command, name=name):
        seconds = until(lambda: serves(port) or not runs(name), START, "a server answers")
        if not runs(name):
            raise Missed("the server has ended")
        answer(port)
        yield name, seconds


def runs(name: str) -> bool:
    return docker("inspect", "--format", "{{.State.Running}}", name) == "true"


def exit_code(name: str) -> int:
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", name))


def stop(name: str) -> None:
    """``docker stop``; raise Missed where answers were not finished."""
    docker("stop", "--time", 90, name, seconds=100)
    if code := exit_code(name):
        raise Missed(f"exit code {code} after docker stop")


def logs(name: str) -> str:
    return docker("logs", name, check=False)


def kill(name: str, module: str) -> None:
    """End the processes of a module with signal 9."""
    docker("exec", name, "python", "-c", KILL, module)


def comes_back(bench: Bench, name: str, module: str) -> str:
    """Kill a module's process; return how long it took until an answer came."""
    kill(name, module)
    until(lambda: not serves(bench.port), 20, f"the end of {module} shows")
    seconds = until(partial(serves, bench.port), START, f"{module} comes back")
    answer(bench.port)
    return f"{module} killed: answers again after {seconds:.0f} s"


def image(bench: Bench) -> str:
    build(bench.folder, "Dockerfile.cpu", IMAGE)
    docker("run", "--rm", "--entrypoint", "python", IMAGE, "-m", "pip", "check")
    over = size(IMAGE) - size(base("Dockerfile.cpu"))
    if over > 700:
        raise Missed(f"{over} MB over its base, and 700 are allowed")
    return f"{over} MB over its base; pip check is content"


def hardened(bench: Bench) -> str:
    with server(bench) as (name, seconds):
        for place in ("/opt/echo", "/etc", "/bundle"):
            if "Read-only" not in docker("exec", "--user", "0", name, "touch", f"{place}/x", check=False):
                raise Missed(f"{place} can be written")
        with Streams(bench.port, tokens=64, once=True) as streams:
            streams.flowing()
            stop(name)
        return f"first answer after {seconds:.0f} s; docker stop with 32 streams: {streams.check()}, exit code 0"


def killed(bench: Bench) -> str:
    with server(bench, *TMP, "--init") as (name, _):
        return "; ".join(comes_back(bench, name, module) for module in (ENGINE, API))


def memory_small(bench: Bench) -> str:
    """Give less memory than the bundle needs, which must be told in one sentence before the weights are read."""
    limit = max(400, sum(path.stat().st_size for path in bench.bundle.glob("target.*")) // 10**6)
    with container(*bench.options(), *TMP, "--memory", f"{limit}m", "--memory-swap", f"{limit}m", IMAGE) as name:
        seconds = until(lambda: not runs(name), 120, "it ends")
        said = [line for line in logs(name).splitlines() if "memory limit is" in line]
        if not said or "signal" in said[-1]:
            raise Missed(f"no sentence with the limit and the need, exit code {exit_code(name)}")
        return f"exit code {exit_code(name)} after {seconds:.0f} s: {said[-1].partition('ERROR ')[2]}"


def memory_reached(bench: Bench) -> str:
    """Fill /tmp, which counts as the container's memory, until the kernel kills the engine."""
    limit = ("--memory", "2g", "--memory-swap", "2g", "--init", "--tmpfs", "/tmp:size=1750m,mode=1777")
    with server(bench, *limit) as (name, _):
        with Streams(bench.port, once=True) as streams:
            streams.flowing()
        fill = "cat /dev/zero >/tmp/full"
        docker("exec", name, "sh", "-c", fill, check=False, seconds=120)
        until(lambda: "has died" in logs(name), 60, "the limit is reached")
        docker("exec", name, "rm", "-f", "/tmp/full")
        seconds = until(partial(serves, bench.port), START, "it serves again")
        answer(bench.port)
        said = next(line for line in logs(name).splitlines() if "has died" in line).partition("serve: ")[2]
        return f"2 GB, {streams.check()}; /tmp filled: {said}; answers {seconds:.0f} s after /tmp is empty"


def one_cpu(bench: Bench) -> str:
    with server(bench, *TMP, "--cpus", "1") as (_, seconds):
        with Streams(bench.port, 8, tokens=32, once=True) as streams:
            streams.flowing()
        return f"first answer after {seconds:.0f} s, {streams.check()} of 8"


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
    with container(*bench.options(), *TMP, *alone, IMAGE) as name:
        check = ("exec", name, "python", "/opt/echo/healthcheck.py", "gateway", "9000")
        until(lambda: docker(*check, check=False) == "", START, "it is healthy")
    return "engine without a network, asked by its socket from another container; serve without one is healthy, too"


def tmp_full(bench: Bench) -> str:
    with server(bench, *TMP, "--init") as (name, _):
        docker("exec", name, "sh", "-c", "cat /dev/zero >/tmp/full", check=False, seconds=60)
        answer(bench.port)
        return "; ".join(comes_back(bench, name, module) for module in (ENGINE, API))


def gpu_image(bench: Bench) -> str:
    """Dockerfile.gpu's own steps on a stand-in: without Triton, and without the packages of NVIDIA's index and CUDA."""
    lines = (PROJECT / "docker/requirements-gpu.txt").read_text().splitlines()
    left_out = [line for line in lines if re.match(NVIDIAS, line)]

    def edit(text: str) -> str:
        without = rf"RUN sed -i -E '/{NVIDIAS}/d' /src/docker/requirements-gpu.txt\n"
        return re.sub(r"(?m)^(COPY .*docker/requirements-gpu.txt.*\n)", rf"\1{without}", text, count=1)

    build(bench.folder, "Dockerfile.gpu", GPU, "--build-arg", f"TRITON={stand_in('triton')}", edit=edit)
    check = "PATH=${PATH#*:} python3 -m pip --python /opt/echo/bin/python check"  # it has no pip of its own
    found = docker("run", "--rm", "--entrypoint", "sh", GPU, "-c", check, check=False).splitlines()
    if strange := [line for line in found if not re.search("tensorrt|triton|nvidia|cuda|No broken", line)]:
        raise Missed(f"pip check: {strange}")
    shared = ("--tmpfs", "/tmp:size=1g,mode=1777,exec", "--shm-size", "1g")
    with server(bench, *shared, image=GPU, command=("serve", "/bundle", "--host", "0.0.0.0")) as (_, seconds):
        serving = f"serves a bundle of openvino after {seconds:.0f} s"
    return f"its steps without {len(left_out)} of NVIDIA's packages; {serving}; not run: Triton, TensorRT, CUDA"


def readme(bench: Bench, image: str) -> str:
    """README's commands from nothing in a container: scripts/demo, and with ``tests`` scripts/test."""
    tree = bench.folder / "tree.tar"
    run("git", "-C", PROJECT, "archive", "--output", tree, "HEAD")
    words = ("--network", "host", "-v", f"{tree}:/tree.tar:ro", "--entrypoint", "sleep", image, "86400")
    with container(*words, name=f"{NAME}-readme") as name:
        docker("exec", name, "sh", "-c", "mkdir /echo-trt && tar -C /echo-trt -xf /tree.tar")
        inside = ("exec", "--workdir", "/echo-trt", name)
        seen = [docker(*inside, "python3", "--version")]
        for command in ("scripts/demo", *["scripts/test"] * bench.tests):
            seen.append(docker(*inside, command, seconds=3 * LONG).splitlines()[-1].strip())
        return "; ".join([*seen, docker(*inside, "du", "-sh", ".").split()[0] + "B of disk"])


def readme_newest(bench: Bench) -> str:
    return readme(bench, stand_in_debian(bench.folder))


def readme_oldest(bench: Bench) -> str:
    return readme(bench, base("Dockerfile.cpu"))
