"""What crosses between the host and a device: every copy goes through here, and is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PACKED = "packed"
_NARROW = ("scores", "candidates", "confidence")  # outputs with few columns, which are read whole


@dataclass
class Transfers:
    """Copies of this process so far.

    waits  copies to the host, each of which waits for the device
    down   bytes to the host
    up     bytes to the device; these copies wait for nothing
    """

    waits: int = 0
    down: int = 0
    up: int = 0


TRANSFERS = Transfers()


def fetch(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to the host, when the device has computed it."""
    TRANSFERS.waits += 1
    TRANSFERS.down += tensor.numel() * tensor.element_size()
    return tensor.cpu().numpy()


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device in the order of its stream, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    TRANSFERS.up += array.nbytes
    # PyTorch keeps the pinned memory until the copy has ended, whatever becomes of this tensor.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


def pack_results(outputs: Mapping[str, Tensor]) -> Tensor:
    """Put the rows' best tokens, or scores, candidates and confidence side by side: int32 [R, w].

    ``outputs`` by name, with a row for each of the R logit rows. Floats are packed as float32, by their bits.
    """
    if "logits" in outputs:
        return outputs["logits"].argmax(dim=-1, keepdim=True).to(torch.int32)
    parts = [outputs[name] for name in _NARROW if name in outputs]
    return torch.cat([p.float().view(torch.int32) if p.is_floating_point() else p.to(torch.int32) for p in parts], 1)


def read_packed(packed: Tensor) -> np.ndarray:
    """Copy packed results to the host, int32 [R, w]; no rows are no reason to wait."""
    return fetch(packed) if len(packed) else np.zeros(tuple(packed.shape), np.int32)


def read_results(packed: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copy a draft's packed results to the host, by name: float32 or int64.

    ``outputs`` tell which are packed and how wide they are.
    """
    table, read, begin = read_packed(packed), {}, 0
    for name in (name for name in _NARROW if name in outputs):
        end = begin + outputs[name].shape[1]
        part = np.ascontiguousarray(table[:, begin:end])
        read[name], begin = part.view(np.float32) if outputs[name].is_floating_point() else part.astype(np.int64), end
    return read
