"""Checkpoints on disk, read one tensor at a time: Hugging Face folders (safetensors, or PyTorch's .bin) and GGUF files.

All kinds have Hugging Face's tensor names and an equivalent ``config.json``, so that callers see no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open

from echo_trt.errors import UserError
from echo_trt.files.inputs import gguf_parts

Part = tuple[slice, ...]  # one slice an axis; () is the whole tensor
# Bytes that are read of a file before it is mapped anew. Pages that were read stay in memory with their map; larger:
# more of them do.
MAPPED = 256 << 20
PICKLED = "pytorch_model*.bin"


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


@runtime_checkable
class HasBlocks(Protocol):
    """A checkpoint whose matrices may be stored in blocks of few bits."""

    def in_blocks(self, name: str) -> bool:
        """Return whether a tensor is stored so."""

    def stored(self, name: str) -> tuple[str, torch.Tensor]:
        """Return the type of a matrix, such as q4_k, and its rows of blocks as they are, uint8 [rows, bytes]."""


class SafetensorsCheckpoint:
    """A Hugging Face folder: config.json and one or many safetensors files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        self._files: dict[str, _MappedFile] = {}
        for file in _weight_files(path):
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


class PickledCheckpoint:
    """A Hugging Face folder of PyTorch's own files, of which only tensors are read: config.json and weights."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        self._tensors: dict[str, torch.Tensor] = {}
        for file in _weight_files(path):
            try:
                held = torch.load(file, map_location=torch.device("cpu"), weights_only=True, mmap=True)
                self._tensors.update((name, tensor.detach()) for name, tensor in held.items())
            except Exception as error:  # of pickle, of zip, of PyTorch, of what it held instead
                raise UserError(
                    f"checkpoint file {file} cannot be read ({type(error).__name__}); download it again, or "
                    "convert it to safetensors."
                ) from error

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        return self._tensors[name][part].clone()  # a caller may change it


def is_pickled(folder: Path) -> bool:
    """Return whether a folder holds its weights in PyTorch's own files alone."""
    return any(folder.glob(PICKLED)) and not any(folder.glob("*.safetensors*"))


def _weight_files(path: Path) -> list[Path]:
    """List the files of weights of a folder: those that its index names, or all."""
    pickled = is_pickled(path)
    index = path / ("pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json")
    files = sorted(path.glob(PICKLED if pickled else "*.safetensors"))
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} holds no weight_map object; download the checkpoint again.")
        files = sorted({path / name for name in weight_map.values()})
    if not files:
        raise UserError(f"checkpoint {path} holds no *.safetensors or {PICKLED} file; download it whole.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the folder of a complete checkpoint, or a .gguf file.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download the checkpoint again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object; download the checkpoint again.")
    return data


def weights_sha256(path: Path) -> str:
    """Hash the checkpoint's weight files; the digest identifies a target."""
    files = gguf_parts(path) if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob(PICKLED))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
