"""Where Triton is, and how it is started: the server on PATH, or the one that nvidia-pytriton brings from PyPI."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_trt.errors import UserError
from echo_trt.serving.protocol import MODEL

SHARED_MEMORY = Path("/dev/shm")
#: Of the names of a launcher's shared memory and folder. Its process id and a hyphen follow; the namespace that the id
#: belongs to comes before: containers may share memory, and each has a process 1.
_NAMESPACE = Path("/proc/self/ns/pid")
PREFIX = f"echo-trt-{_NAMESPACE.stat().st_ino if _NAMESPACE.exists() else 0}-"


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True)
class TritonServer:
    """An installation. ``pip`` holds pytriton's folders; None for a server that finds its backends itself."""

    executable: Path
    pip: Path | None = None

    def command(self, host: str, ports: Ports, work: Path) -> list[str]:
        """``work`` is a folder that lives as long as the server."""
        options = {
            "model-repository": model_repository(),
            "model-control-mode": "none",  # nobody may load a model of his own, which would be code
            "exit-timeout-secs": 60,  # the launcher's limit comes first
            "http-address": host,
            "grpc-address": host,
            "http-port": ports.http,
            "grpc-port": ports.grpc,
            "metrics-port": ports.metrics,
            "log-info": "false",
            "allow-gpu-metrics": "false",
            "allow-cpu-metrics": "false",
            "backend-config": f"python,shm-region-prefix-name={own_prefix()}",
            **_closed(),
        }
        if self.pip:
            options["backend-directory"] = self._backends(work)
        return [str(self.executable), *(f"--{name}={value}" for name, value in options.items())]

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        """``settings`` are ECHO_TRT_*; the backend's Python is the one that runs this."""
        own = {**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package_root()), os.environ.get("PYTHONPATH"))))
        if self.pip:
            libraries = (str(self.pip.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or "")
            own["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (*libraries, os.environ.get("LD_LIBRARY_PATH"))))
            own["PATH"] = os.pathsep.join((str(Path(sys.prefix, "bin")), os.environ.get("PATH", "")))
        return own

    def _backends(self, work: Path) -> Path:
        """The Python backend beside the stub for this Python, which the wheel keeps apart."""
        folder, server = work / "backends", self.pip / "tritonserver"
        (folder / "python").mkdir(parents=True)
        for part in (*(server / "backends" / "python").iterdir(), _stub(server)):
            (folder / "python" / part.name).symlink_to(part)
        return folder


def _closed() -> dict[str, str]:
    """Options that leave clients what a model's client needs: nothing of the machine's files and memory."""
    apis = "model-repository,shared-memory,trace,logging"
    key = f"{apis}:closed={secrets.token_hex(16)}"  # a header that nobody is told
    return {"http-restricted-api": key, "grpc-restricted-protocol": key}


def find_server() -> TritonServer:
    """The server on PATH, else the one of nvidia-pytriton. Raises UserError where there is neither."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return TritonServer(Path(on_path))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.origin:
        raise UserError(
            "Triton Inference Server is not here: no tritonserver on PATH and no nvidia-pytriton; "
            "pip install -e '.[serve]' in the repository."
        )
    package = Path(spec.origin).parent
    _stub(package / "tritonserver")
    return TritonServer(package / "tritonserver" / "bin" / "tritonserver", package)


def _stub(server: Path) -> Path:
    version = ".".join(map(str, sys.version_info[:2]))
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise UserError(f"nvidia-pytriton has no backend for Python {version}; use Python 3.11.")
    return stub


def package_root() -> Path:
    """The folder from which echo_trt is imported."""
    return Path(__file__).parents[2]


def model_repository() -> Path:
    """In a checkout, beside the package; in a wheel, inside it."""
    places = (package_root() / "model_repo", Path(__file__).parents[1] / "model_repo")
    return next((place for place in places if (place / MODEL).is_dir()), places[0])


def own_prefix() -> str:
    """Of the names of this process's shared memory and folder."""
    return f"{PREFIX}{os.getpid()}-"


def remove_regions(folder: Path = SHARED_MEMORY) -> None:
    """Shared memory that this launcher's servers left, and that of launchers which are no more."""
    for region in _left(folder, os.getpid()):
        with contextlib.suppress(OSError):  # another user's
            region.unlink()


def remove_folders(folder: Path) -> None:
    """Of launchers that are no more: a killed one leaves its own."""
    for each in _left(folder):
        shutil.rmtree(each, ignore_errors=True)


def _left(folder: Path, mine: int | None = None) -> Iterator[Path]:
    """What launchers have put into a folder that live no longer, and process ``mine``."""
    for each in folder.glob(f"{PREFIX}*"):
        owner = each.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and (int(owner) == mine or not Path("/proc", owner).exists()):
            yield each
