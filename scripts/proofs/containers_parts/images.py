"""Docker, found or started, and the images: built from docker/, or stand-ins for those that cannot be pulled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .run import LONG, PROJECT, docker, run, until

DOCKER, DEBIAN = PROJECT / "docker", "debian:trixie-slim"
#: Stages of stand_ins/Dockerfile that stand for images which Dockerfiles and compose files name.
OFFICIAL = {
    "python": "python:3.11.13-slim-trixie",
    "prometheus": "prom/prometheus:v3.5.0",
    "nginx": "nginxinc/nginx-unprivileged:1.29.1",
}


def answers() -> bool:
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


@contextmanager
def docker_at_hand(folder: Path) -> Iterator[str]:
    """Yield a sentence about the Docker that is used: the one at hand, else one in ``folder``, ended by its pid."""
    if answers():
        yield "the Docker at hand"
        return
    if not shutil.which("dockerd"):
        sys.exit("error: no Docker answers; to start one here, run apt-get install docker.io docker-buildx.")
    os.environ["DOCKER_HOST"] = socket = f"unix://{folder}/docker.sock"
    words = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid", "-H", socket]
    with (folder / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(["dockerd", *map(str, words)], stdout=log, stderr=log, start_new_session=True)
    try:
        until(answers, 60, "dockerd answers")
        yield "a Docker of its own"
    finally:
        daemon.terminate()
        daemon.wait(60)
        for place in reversed([line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]):
            if place.startswith(f"{folder}/"):  # what would keep the folder from being removed
                run("umount", "--lazy", place, check=False)


@cache
def at_hand(image: str) -> bool:
    """Whether an image is here or can be pulled."""
    if docker("images", "--quiet", image):
        return True
    try:
        return subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, timeout=LONG).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def size(image: str) -> int:
    """Return an image's size in MB (10^6 bytes), its base's included."""
    return int(docker("image", "inspect", "--format", "{{.Size}}", image)) // 10**6


def build(folder: Path, dockerfile: str, tag: str, *options: str, edit: Callable[[str], str] = str) -> None:
    """Build an image of docker/; its syntax line goes where that frontend cannot be pulled. ``edit``: of its text."""
    text = (DOCKER / dockerfile).read_text()
    syntax, rest = text.split("\n", 1)
    if not at_hand(syntax.partition("syntax=")[2]):
        text = rest
    (folder / dockerfile).write_text(edit(text))
    shutil.copy(DOCKER / f"{dockerfile}.dockerignore", folder)  # where BuildKit looks for it
    docker("build", "--network", "host", "-f", folder / dockerfile, "-t", tag, *options, PROJECT, seconds=LONG)


def have(image: str) -> str:
    """Return an image's name: here, pulled, or made by its stage of stand_ins/Dockerfile."""
    if not at_hand(image):
        stages = {official: stage for stage, official in OFFICIAL.items()}
        debian() if image == DEBIAN else stand_in(stages[image])
    return image


def stand_in(stage: str) -> str:
    """Make an image of stand_ins/Dockerfile, and return its name."""
    tag = OFFICIAL.get(stage, f"echo-trt-proof:{stage}")
    words = ["--network", "host", "--target", stage, "-t", tag, Path(__file__).parent / "stand_ins"]
    if stage != "python":
        docker("build", "--build-arg", f"PYTHON={have(OFFICIAL['python'])}", *words, seconds=LONG)
        return tag
    prefix, ignored = Path(sys.base_prefix), shutil.ignore_patterns("site-packages", "test", "__pycache__", "share")
    if not tag.startswith(f"python:3.{sys.version_info.minor}.") or prefix == Path("/usr"):
        sys.exit(f"error: {tag} cannot be pulled; run this by its Python in a folder of its own, not {prefix}.")
    have(DEBIAN)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(prefix, folder, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        docker("build", "--build-context", f"prefix={folder}", *words, seconds=LONG)
    return tag


def debian() -> None:
    """Make a minimal Debian by debootstrap, with what pip is told on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "trixie", root, seconds=LONG)
        text = run(sys.executable, "-m", "pip", "config", "list")
        told = dict(re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", text, re.MULTILINE))
        for path in filter(os.path.exists, " ".join(told.values()).split()):  # certificates, wheels on this disk
            (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-rLT", path, root / path.lstrip("/"))
        lines = [f"{name} = {value}\n" for name, value in ({"retries": "1"} | told).items()]
        (root / "etc/pip.conf").write_text("[global]\n" + "".join(lines))
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            docker("import", "-", DEBIAN, stdin=tar.stdout, seconds=300)
