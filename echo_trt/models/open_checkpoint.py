"""Opening of a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path

from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Checkpoint, SafetensorsCheckpoint
from echo_trt.models.fp8_checkpoint import dequantised


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors, which may be FP8, or a .gguf file."""
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; give a Hugging Face folder or a .gguf file.")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"checkpoint {path} is a single file; give a Hugging Face folder or a .gguf file.")
    if path.suffix == ".gguf":
        from echo_trt.models.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    return dequantised(SafetensorsCheckpoint(path))
