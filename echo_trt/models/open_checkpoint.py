"""Opening of a checkpoint of any format."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from echo_trt.errors import UserError
from echo_trt.files.inputs import is_gguf
from echo_trt.models.blocks_checkpoint import BlocksCheckpoint
from echo_trt.models.checkpoint import Checkpoint, PickledCheckpoint, SafetensorsCheckpoint, is_pickled
from echo_trt.models.families import FAMILIES
from echo_trt.models.fp8_checkpoint import dequantised
from echo_trt.models.split_checkpoint import SplitCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors, which may be FP8, or PyTorch's .bin files; or a .gguf file."""
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; give a Hugging Face folder or a .gguf file.")
    if is_gguf(path):
        return _gguf(path, path.stat().st_size, path.stat().st_mtime_ns)
    if path.is_file():
        raise UserError(f"checkpoint {path} is a single file and no GGUF file; give a Hugging Face folder or one.")
    checkpoint = PickledCheckpoint(path) if is_pickled(path) else SafetensorsCheckpoint(path)
    if "block_types" in checkpoint.config:
        return BlocksCheckpoint(path)
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    family = next((family for family in FAMILIES.values() if family.architecture == architecture), None)
    opened = dequantised(checkpoint)
    return SplitCheckpoint(opened, family) if family and family.merged else opened


@lru_cache(1)  # a build opens it for its recipe, its engine and its weights, and a vocabulary takes a second
def _gguf(path: Path, size: int, changed: int) -> Checkpoint:
    from echo_trt.models.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)
