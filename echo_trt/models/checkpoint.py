"""Checkpoints on disk, read one tensor at a time: Hugging Face folders (safetensors) and GGUF files.

Both kinds have Hugging Face's tensor names and an equivalent ``config.json``, so that callers see no difference.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from echo_trt.errors import UserError

Part = tuple[slice, ...]  # one slice an axis; () is the whole tensor
# Bytes that are read of a file before it is mapped anew. Pages that were read stay in memory with their map; larger:
# more of them do.
MAPPED = 256 << 20
MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_SCALE = re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|k_scale|v_scale)$")


class Checkpoint(Protocol):
    """Stored weights by name; ``config`` has the keys of Hugging Face's config.json."""

    path: Path
    config: dict[str, Any]

    def names(self) -> Sequence[str]:
        """List the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which ``get`` reads a tensor."""

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        """Read a tensor or a part of it, in its stored type (GGUF: float32)."""


class SafetensorsCheckpoint:
    """A Hugging Face folder: config.json and one or many safetensors files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        files = sorted(path.glob("*.safetensors"))
        index = path / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} holds no weight_map object; download the checkpoint again.")
            files = sorted({path / name for name in weight_map.values()})
        if not files:
            raise UserError(f"checkpoint {path} holds no *.safetensors file; download it whole.")
        self._files: dict[str, _MappedFile] = {}
        for file in files:
            try:
                mapped = _MappedFile(file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"checkpoint file {file} cannot be read ({error}); download it again.") from error
            self._files.update(dict.fromkeys(mapped.handle.keys(), mapped))

    def names(self) -> Sequence[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].handle.get_slice(name)[(slice(0, 0),) * len(self.shape(name))].dtype

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        return self._files[name].read(name, part)


class _MappedFile:
    """A safetensors file; ``handle`` maps it, and is replaced when much of it was read."""

    def __init__(self, path: Path):
        self._path, self._read = path, 0
        self.handle = safe_open(path, framework="pt")

    def read(self, name: str, part: Part) -> torch.Tensor:
        if self._read > MAPPED:
            self.handle, self._read = safe_open(self._path, framework="pt"), 0
        tensor = self.handle.get_slice(name)[part] if part else self.handle.get_tensor(name)
        self._read += tensor.nbytes
        return tensor


class Fp8Checkpoint:
    """A Hugging Face folder with FP8 weights, read as e4m3 weights times their scales.

    ModelOpt (quant_algo FP8, or FP8_PER_CHANNEL_PER_TOKEN) stores one ``weight_scale`` a tensor or an output channel.
    quant_method fp8, which Qwen publishes, stores one ``weight_scale_inv`` per block. Scales of activations and of an
    fp8 KV cache are left out: echo-trt computes and caches in the recipe's precision.

    block  rows and columns that share a scale; None: there are no blocks
    """

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


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the folder of a complete checkpoint.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download the checkpoint again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object; download the checkpoint again.")
    return data


def weights_sha256(path: Path) -> str:
    """Hash the checkpoint's weight files; the digest identifies a target."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
