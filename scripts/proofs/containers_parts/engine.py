"""Docker, found or started, and the images: built from docker/, or stand-ins for those that cannot be pulled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
SHORT, LONG = 120, 1500  # seconds for a command, and for a build
#: Debian's, that the Python of the base image is linked to and comes with.
LIBRARIES = (
    "ca-certificates,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8t64,libsqlite3-0,libssl3t64,zlib1g"
)
#: Stages of stand_ins/Dockerfile that stand for images which compose files name.
OFFICIAL = {"prometheus": "prom/prometheus:v3.5.0", "nginx": "nginxinc/nginx-unprivileged:1.29.1"}


class Missed(Exception):
    """A step that did not show what it must; the message says what was seen."""


def run(*words: object, seconds: float = SHORT, check: bool = True, **more) -> str:
    """Return what a command wrote to both its outputs; raise Missed with the end of it where it fails."""
    begin = [str(word) for word in words]
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | more
    try:
        done = subprocess.run(begin, timeout=seconds, **given)
    except subprocess.TimeoutExpired as late:
        raise Missed(f"{' '.join(begin)[:150]} took more than {seconds:.0f} s") from late
    if check and done.returncode:
        raise Missed(f"{' '.join(begin)[:150]} ended with {done.returncode}: {done.stdout[-1500:].strip()}")
    return done.stdout.strip()


def docker(*words: object, **more) -> str:
    return run("docker", *words, **more)


@contextmanager
def docker_at_hand(folder: Path) -> Iterator[str]:
    """Yield a sentence about the Docker that is used: the one at hand, else one in ``folder``, ended by its pid."""
    if subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        yield "the Docker at hand"
        return
    if os.geteuid() or not shutil.which("dockerd"):
        sys.exit("error: no Docker answers; to start one, be root and run apt-get install docker.io docker-buildx.")
    socket = f"unix://{folder}/docker.sock"
    words = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid", "-H", socket]
    with (folder / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(["dockerd", *map(str, words)], stdout=log, stderr=log, start_new_session=True)
    os.environ["DOCKER_HOST"] = socket
    try:
        until(lambda: subprocess.run(["docker", "info"], capture_output=True).returncode == 0, 60, "dockerd answers")
        yield "a Docker of its own"
    finally:
        daemon.terminate()
        daemon.wait(60)
        run("umount", "--recursive", "--lazy", folder / "data", check=False)


def until(holds, seconds: float, what: str) -> float:
    """Wait until ``holds`` is true and return the seconds that it took; raise Missed after ``seconds``."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > seconds:
            raise Missed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - begin


# -- images ----------------------------------------------------------------------------------------------------------


@cache
def at_hand(image: str) -> bool:
    """Whether an image is here or can be pulled."""
    if not docker("images", "--quiet", image):
        words = ["docker", "pull", "--quiet", image]
        try:
            return subprocess.run(words, capture_output=True, timeout=LONG).returncode == 0
        except subprocess.TimeoutExpired:
            return False
    return True


def size(image: str) -> int:
    """Return an image's size in MB (10^6 bytes), its base's included."""
    return int(docker("image", "inspect", "--format", "{{.Size}}", image)) // 10**6


def base(dockerfile: str) -> str:
    """Return the image that a Dockerfile of docker/ begins with."""
    text = (PROJECT / "docker" / dockerfile).read_text()
    return re.search(r"^ARG (?:PYTHON|TRITON)=(\S+)", text, re.MULTILINE)[1]


def build(folder: Path, dockerfile: str, tag: str, *options: str, edit: Callable[[str], str] = str) -> None:
    """Build an image of docker/; its syntax line goes where that frontend cannot be pulled. ``edit``: of its text."""
    text = (PROJECT / "docker" / dockerfile).read_text()
    syntax, rest = text.split("\n", 1)
    if not at_hand(syntax.partition("syntax=")[2]):
        text = rest
    (folder / dockerfile).write_text(edit(text))
    shutil.copy(PROJECT / "docker" / f"{dockerfile}.dockerignore", folder)  # where BuildKit looks for it
    docker("build", "--network", "host", "-f", folder / dockerfile, "-t", tag, *options, PROJECT, seconds=LONG)


def stand_in_python(folder: Path, image: str) -> bool:
    """Make the base image if it cannot be pulled: Debian's root with the Python that runs this in /usr/local."""
    if at_hand(image):
        return False
    version, suite = re.match(r"python:(\d+\.\d+).*-(\w+)$", image.partition("@")[0]).groups()
    prefix = Path(sys.base_prefix)
    if f"{sys.version_info.major}.{sys.version_info.minor}" != version or prefix == Path("/usr"):
        sys.exit(f"error: the image has Python {version}; run this with one in a folder of its own, not {prefix}.")
    root = debian(folder / "python", suite, LIBRARIES)
    ignored = shutil.ignore_patterns("site-packages", "test", "__pycache__", "share")
    shutil.copytree(prefix, root / "usr/local", symlinks=True, ignore=ignored, dirs_exist_ok=True)
    run("chroot", root, "ldconfig")
    run("chroot", root, "/usr/local/bin/python3", "-m", "ensurepip", seconds=120)
    (root / "usr/local/bin/python").unlink(missing_ok=True)
    (root / "usr/local/bin/python").symlink_to("python3")
    docker_import(root, image)
    return True


def stand_in_debian(folder: Path) -> str:
    """Return the name of a stock Debian 13: pulled, else made by debootstrap, with its own Python 3.13."""
    image = "debian:trixie-slim"
    if not at_hand(image):
        packages = "ca-certificates,python3,python3-venv"
        docker_import(debian(folder / "debian", "trixie", packages), image)
    return image


def stand_in(target: str) -> str:
    """Make an image of stand_ins/Dockerfile, and return its name."""
    files, tag = Path(__file__).parent / "stand_ins", OFFICIAL.get(target, f"echo-trt-proof:{target}")
    words = ("--network", "host", "--build-arg", f"PYTHON={base('Dockerfile.cpu')}", "--target", target)
    docker("build", *words, "-t", tag, files, seconds=LONG)
    return tag


def debian(root: Path, suite: str, packages: str) -> Path:
    """Make a minimal root of Debian that fetches packages as this machine does: Debian's, and Python's."""
    words = ["debootstrap", "--variant=minbase", f"--include={packages}", suite, root]
    run(*words, seconds=LONG)
    for value in pip_configuration().values():
        for path in filter(os.path.exists, value.split()):  # certificates, wheels that lie on this machine's disk
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-rLT", path, target)
    lines = [f"{name} = {value}" for name, value in ({"retries": "1"} | pip_configuration()).items()]
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    return root


@cache
def pip_configuration() -> dict[str, str]:
    """Return what pip is told on this machine: its files and variables, by the options' names."""
    text = run(sys.executable, "-m", "pip", "config", "list")
    return dict(re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", text, re.MULTILINE))


def docker_import(root: Path, image: str) -> None:
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        run("docker", "import", "--change", path, "-", image, stdin=tar.stdout, seconds=300)
    shutil.rmtree(root)
