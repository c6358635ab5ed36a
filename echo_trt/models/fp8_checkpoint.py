"""FP8 checkpoints, read as e4m3 weights times their scales, or as FP8 matrices with a scale per row or block.

ModelOpt (quant_algo FP8, or FP8_PER_CHANNEL_PER_TOKEN) and compressed-tensors (strategy tensor, channel or block) store
a ``weight_scale`` per tensor, output channel or block. quant_method fp8, which Qwen publishes, stores one
``weight_scale_inv`` per block. Scales of activations and of an fp8 KV cache are left out: a token's activations get
their scale as they come, and the KV cache has the network's type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from echo_trt.errors import UserError
from echo_trt.models.fp8_linear import BLOCK_COLUMNS, E4M3

if TYPE_CHECKING:
    from echo_trt.models.checkpoint import Checkpoint, Part

MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_SCALE = re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|k_scale|v_scale)$")


class Fp8Checkpoint:
    """A Hugging Face folder with FP8 weights.

    block   rows and columns that share a scale; None without blocks
    suffix  of the name of a weight's scales
    """

    def __init__(self, stored: Checkpoint, block: tuple[int, int] | None, suffix: str = "_scale"):
        self.path, self.config = stored.path, {k: v for k, v in stored.config.items() if k != "quantization_config"}
        self._stored, self._block, self._suffix = stored, block, suffix
        self._scales = {name for name in stored.names() if _SCALE.search(name)}

    def names(self) -> Sequence[str]:
        return [name for name in self._stored.names() if name not in self._scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.has_fp8(name) else self._stored.dtype(name)

    def has_fp8(self, name: str) -> bool:
        return self._stored.dtype(name) == E4M3

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        """Read a tensor or a part of it: a quantised one as float32, any other in its stored type."""
        tensor = self._stored.get(name, part)
        if tensor.dtype != E4M3:
            return tensor
        grid, (rows, columns), shape = *self._scales_of(name), self.shape(name)
        slices = part or (slice(None),) * 2
        row, column = (torch.arange(size)[chosen] for size, chosen in zip(shape, slices, strict=True))
        return tensor.float() * grid[row // rows][:, column // columns]

    def in_fp8(self, name: str, part: Part = ()) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Read a matrix in FP8 or a part of it as stored: e4m3 [n, k], and scales float32 [n, 1] or of its blocks.

        None where the matrix or the part does not begin and end with a block, or blocks are not of BLOCK_COLUMNS.
        """
        grid, block = self._scales_of(name)
        weight, shape = self._stored.get(name, part), self.shape(name)
        slices = part or tuple(slice(0, size) for size in shape)
        if grid.shape[1] == 1:
            return weight, grid[torch.arange(shape[0])[slices[0]] // block[0]]
        edges = [(chosen.start, chosen.stop, size) for chosen, size in zip(slices, block, strict=True)]
        if block[1] not in BLOCK_COLUMNS or any(begin % size or end % size for begin, end, size in edges):
            return None
        return weight, grid[tuple(slice(begin // size, end // size) for begin, end, size in edges)]

    def _scales_of(self, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the scales of a weight, float32 [rows of blocks, columns of blocks], and the sizes of a block."""
        scale_name = name + self._suffix
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
        return scale.reshape(grid), (rows, columns)


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
    method, compressed = scheme.get("quant_method"), _compressed(scheme)
    if "quant_algo" in scheme:
        if scheme["quant_algo"] in MODELOPT:
            return Fp8Checkpoint(stored, None)
        named = f"quant_algo {scheme['quant_algo']}"
    elif method == "fp8" and (block := scheme.get("weight_block_size")):
        return Fp8Checkpoint(stored, tuple(block), "_scale_inv")
    elif compressed and compressed[0] in ("tensor", "channel", "block"):
        return Fp8Checkpoint(stored, compressed[1])
    else:
        named = f"quant_method {method}" + (f" with weights {compressed[0]}" if compressed else "")
    raise UserError(
        f"{where} is {named}, which is not supported; use an FP8 checkpoint of ModelOpt, of compressed-tensors or with "
        "block scales, or one without."
    )


def _compressed(scheme: dict[str, Any]) -> tuple[str, tuple[int, int] | None] | None:
    """Return how the weights of a compressed-tensors checkpoint share scales, and the block; None for another method.

    Groups of layers that differ, and weights that are not FP8, are returned as what they are called.
    """
    if scheme.get("quant_method") != "compressed-tensors":
        return None
    groups = [group.get("weights") or {} for group in (scheme.get("config_groups") or {}).values()]
    kinds = {
        (w.get("type"), w.get("num_bits"), w.get("strategy"), tuple(w.get("block_structure") or ())) for w in groups
    }
    if len(kinds) != 1:
        return "of several kinds", None
    kind, bits, strategy, block = kinds.pop()
    if (kind, bits) != ("float", 8):
        return f"of {bits} bits ({kind})", None
    return str(strategy), (block[0], block[1]) if len(block) == 2 else None
