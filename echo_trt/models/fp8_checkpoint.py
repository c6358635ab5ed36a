"""FP8 checkpoints, read as what they stand for: e4m3 weights times their scales.

ModelOpt's (quant_algo FP8, or FP8_PER_CHANNEL_PER_TOKEN) have one ``weight_scale`` a tensor or an output channel; those
of quant_method fp8 (as Qwen publishes them) one ``weight_scale_inv`` a block. Scales of activations and of an fp8 KV
cache are left out: echo-trt computes and caches in the recipe's precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from echo_trt.errors import UserError

if TYPE_CHECKING:
    from echo_trt.models.checkpoint import Checkpoint, Part

MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_SCALE = re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|k_scale|v_scale)$")


class Fp8Checkpoint:
    """A Hugging Face folder with FP8 weights. ``block``: rows and columns of a weight that share a scale, if any do."""

    def __init__(self, stored: Checkpoint, block: tuple[int, int] | None):
        self.path, self.config = stored.path, {k: v for k, v in stored.config.items() if k != "quantization_config"}
        self._stored, self._block = stored, block
        self._scales = {name for name in stored.names() if _SCALE.search(name)}

    def names(self) -> Sequence[str]:
        return [name for name in self._stored.names() if name not in self._scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        """A quantised tensor, or a part of it, as float32, any other as it is stored."""
        tensor = self._stored.get(name, part)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scale_name = name + ("_scale_inv" if self._block else "_scale")
        if scale_name not in self._scales:
            raise UserError(f"{self.path}: tensor {scale_name} of {name} is missing; use a complete checkpoint.")
        scale, shape = self._stored.get(scale_name).float(), self.shape(name)
        rows, columns = self._block or ((1 if scale.numel() > 1 else shape[0]), shape[1])
        grid = -(-shape[0] // rows), -(-shape[1] // columns)  # the last blocks may be cut off
        if scale.shape != grid and (self._block or scale.numel() != grid[0]):
            raise UserError(
                f"{self.path}: tensor {scale_name} has shape {list(scale.shape)}, which does not belong to {name} of "
                f"{list(shape)}; download the checkpoint again."
            )
        down, across = (torch.arange(size)[own] for size, own in zip(shape, part or (slice(None),) * 2, strict=True))
        return tensor.float() * scale.reshape(grid)[down // rows][:, across // columns]


def dequantised(stored: Checkpoint) -> Checkpoint:
    """``stored`` itself, or what reads its FP8 weights; any other quantisation is refused."""
    scheme: dict[str, Any] = stored.config.get("quantization_config") or {}
    where, beside = f"{stored.path}: quantization_config", stored.path / "hf_quant_config.json"
    if not scheme and beside.exists():  # how ModelOpt wrote it before it also did into config.json
        scheme, where = _beside(beside), f"{beside}: quantization"
    if not scheme:
        return stored
    if "quant_algo" in scheme:
        if scheme["quant_algo"] in MODELOPT:
            return Fp8Checkpoint(stored, None)
        named = f"quant_algo {scheme['quant_algo']}"
    elif scheme.get("quant_method") == "fp8" and (block := scheme.get("weight_block_size")):
        return Fp8Checkpoint(stored, tuple(block))
    else:
        named = f"quant_method {scheme.get('quant_method')}"
    raise UserError(f"{where} is {named}, which is not supported; use an FP8 checkpoint of ModelOpt, or one without.")


def _beside(file: Path) -> dict[str, Any]:
    from echo_trt.models.checkpoint import read_json

    return {"quant_algo": None, **(read_json(file).get("quantization") or {})}
