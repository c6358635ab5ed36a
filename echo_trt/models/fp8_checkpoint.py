"""FP8 checkpoints, read as e4m3 weights times their scales.

ModelOpt (quant_algo FP8, or FP8_PER_CHANNEL_PER_TOKEN) stores one ``weight_scale`` a tensor or an output channel.
quant_method fp8, which Qwen publishes, stores one ``weight_scale_inv`` per block. Scales of activations and of an fp8
KV cache are left out: echo-trt computes and caches in the recipe's precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from echo_trt.errors import UserError

if TYPE_CHECKING:
    from echo_trt.models.checkpoint import Checkpoint, Part

MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_SCALE = re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|k_scale|v_scale)$")


class Fp8Checkpoint:
    """A Hugging Face folder with FP8 weights; ``block``: rows and columns that share a scale, None without blocks."""

    def __init__(self, stored: Checkpoint, block: tuple[int, int] | None):
        self.path, self.config = stored.path, {k: v for k, v in stored.config.items() if k != "quantization_config"}
        self._stored, self._block = stored, block
        self._scales = {name for name in stored.names() if _SCALE.search(name)}

    def names(self) -> Sequence[str]:
        return [name for name in self._stored.names() if name not in self._scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self._stored.dtype(name)
        return torch.float32 if stored == torch.float8_e4m3fn else stored

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        """Read a tensor or a part of it: a quantised one as float32, any other in its stored type."""
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
        slices = part or (slice(None),) * 2
        row, column = (torch.arange(size)[chosen] for size, chosen in zip(shape, slices, strict=True))
        return tensor.float() * scale.reshape(grid)[row // rows][:, column // columns]


def dequantised(stored: Checkpoint) -> Checkpoint:
    """Return ``stored``, with a reader over it if it has FP8 weights; any other quantisation is refused."""
    scheme: dict[str, Any] = stored.config.get("quantization_config") or {}
    where, separate = f"{stored.path}: quantization_config", stored.path / "hf_quant_config.json"
    if not scheme and separate.exists():  # older versions of ModelOpt wrote this file alone
        from echo_trt.models.checkpoint import read_json

        scheme = {"quant_algo": None, **(read_json(separate).get("quantization") or {})}
        where = f"{separate}: quantization"
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
