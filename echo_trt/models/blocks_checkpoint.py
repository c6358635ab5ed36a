"""A Hugging Face folder whose matrices are in GGUF's blocks of few bits, as a head of a few million weights is shipped.

``block_types`` in config.json names their types, such as {"fc.weight": "q8_0"}; they are uint8 [rows, bytes].
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize

from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Part, SafetensorsCheckpoint


class BlocksCheckpoint(SafetensorsCheckpoint):
    """Reads blocks as float32, or as they are (``checkpoint.HasBlocks``)."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._types = {}
        for name, kind in self.config["block_types"].items():
            try:
                self._types[name] = gguf.GGMLQuantizationType[kind.upper()]
            except (KeyError, AttributeError):
                raise UserError(
                    f"{path}: block_types of config.json gives {name} the type {kind!r}, which GGUF does not have; "
                    "download the head again."
                ) from None

    def in_blocks(self, name: str) -> bool:
        return name in self._types

    def stored(self, name: str) -> tuple[str, torch.Tensor]:
        return self._types[name].name.lower(), super().get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        if name not in self._types:
            return shape
        weights, size = gguf.GGML_QUANT_SIZES[self._types[name]]
        return shape[0], shape[1] // size * weights

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._types else super().dtype(name)

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        if name not in self._types:
            return super().get(name, part)
        return torch.from_numpy(dequantize(super().get(name).numpy(), self._types[name]))[part]
