"""Triton's installation, on PATH or in nvidia-pytriton from PyPI, and its command line."""

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

from echo_trt.engine.service import MODEL
from echo_trt.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
#: The beginning of the names of a launcher's shared memory and folder; its process id and a hyphen follow. The id's
#: namespace is in it, since containers may share memory, and every container has a process 1.
_NAMESPACE = Path("/proc/self/ns/pid")
PREFIX = f"echo-trt-{_NAMESPACE.stat().st_ino if _NAMESPACE.exists() else 0}-"


@dataclass(frozen=True)
class TritonServer:
    """An installation; ``pip`` is pytriton's package, None for a server that finds its backends itself."""

    executable: Path
    pip: Path | None = None

    def command(self, host: str, ports: dict[str, int], work: Path) -> list[str]:
        """Return the command that starts Triton; ``ports`` by option, ``work``: a folder that lives as long as it."""
        # The APIs of the machine's files and memory want a header of random digits, which no client has.
        closed = f"model-repository,shared-memory,trace,logging:closed={secrets.token_hex(16)}"
        options = {
            "model-repository": model_repository(),
            "model-control-mode": "none",  # a client's model would be code
            "exit-timeout-secs": 60,  # the launcher's limit is shorter
            "http-address": host,
            "grpc-address": host,
            **{option.removeprefix("--"): port for option, port in ports.items()},
            "log-info": "false",
            "allow-gpu-metrics": "false",
            "allow-cpu-metrics": "false",
            "backend-config": f"python,shm-region-prefix-name={own_prefix()}",
            "http-restricted-api": closed,
            "grpc-restricted-protocol": closed,
        }
        if self.pip:
            options["backend-directory"] = self._backends(work)
        # config.pbtxt is complete. To complete it, Triton would start a process that imports the model for seconds.
        whole = "--disable-auto-complete-config"
        return [str(self.executable), whole, *(f"--{name}={value}" for name, value in options.items())]

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        """Return Triton's environment, with ``settings`` (ECHO_TRT_*); its backend runs in this Python."""
        variables = {**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        variables["PYTHONPATH"] = _joined(str(package_root()), os.environ.get("PYTHONPATH"))
        if self.pip:
            libraries = str(self.pip.parent / "nvidia_pytriton.libs")
            python = sysconfig.get_config_var("LIBDIR")
            variables["LD_LIBRARY_PATH"] = _joined(libraries, python, os.environ.get("LD_LIBRARY_PATH"))
            variables["PATH"] = os.pathsep.join((str(Path(sys.prefix, "bin")), os.environ.get("PATH", "")))
        return variables

    def _backends(self, work: Path) -> Path:
        """Put the Python backend beside the stub for this Python, which the wheel keeps apart."""
        assert self.pip
        folder, server = work / "backends", self.pip / "tritonserver"
        (folder / "python").mkdir(parents=True)
        for part in (*(server / "backends" / "python").iterdir(), _stub(server)):
            (folder / "python" / part.name).symlink_to(part)
        return folder


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(filter(None, paths))


def find_server() -> TritonServer:
    """Find the server on PATH, else nvidia-pytriton's. Raises UserError without either."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return TritonServer(Path(on_path))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.origin:
        raise UserError(
            "Triton Inference Server is not here: no tritonserver on PATH and no nvidia-pytriton; "
            "pip install -e '.[triton]' in the repository, or leave --triton out."
        )
    package = Path(spec.origin).parent
    _stub(package / "tritonserver")
    return TritonServer(package / "tritonserver" / "bin" / "tritonserver", package)


def _stub(server: Path) -> Path:
    version = ".".join(map(str, sys.version_info[:2]))
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise UserError(
            f"nvidia-pytriton has no backend for Python {version}; use Python 3.11 or 3.12, or leave --triton out."
        )
    return stub


def package_root() -> Path:
    """Return the folder from which echo_trt is imported."""
    return Path(__file__).parents[3]


def model_repository() -> Path:
    """Return the model repository: beside the package in a checkout, inside it in a wheel."""
    folders = (package_root() / "model_repo", Path(__file__).parents[2] / "model_repo")
    return next((path for path in folders if (path / MODEL).is_dir()), folders[0])


def own_prefix() -> str:
    """Return the beginning of the names of this process's shared memory and folder."""
    return f"{PREFIX}{os.getpid()}-"


def remove_regions(folder: Path = SHARED_MEMORY) -> None:
    """Remove the shared memory that this launcher's servers left, and launchers that have ended."""
    for region in _leftovers(folder, os.getpid()):
        with contextlib.suppress(OSError):  # another user's
            region.unlink()


def remove_folders(folder: Path) -> None:
    """Remove the folders of launchers that have ended; a killed one leaves its folder."""
    for path in _leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(folder: Path, launcher: int | None = None) -> Iterator[Path]:
    """Yield what ended launchers, and the process ``launcher``, have put into a folder."""
    for path in folder.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and (int(owner) == launcher or not Path("/proc", owner).exists()):
            yield path
