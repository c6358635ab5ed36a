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


def read_results(packed: Tensor, outputs: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Copy packed results to the host: narrow outputs by name, float32 or int64, and best tokens, int64 [R].

    ``outputs`` tell which are packed and how wide they are.
    """
    table = fetch(packed) if len(packed) else np.zeros(tuple(packed.shape), np.int32)
    if "logits" in outputs:
        return {}, table[:, 0].astype(np.int64)
    read, begin = {}, 0
    for name in (name for name in _NARROW if name in outputs):
        end = begin + outputs[name].shape[1]
        part = np.ascontiguousarray(table[:, begin:end])
        read[name], begin = part.view(np.float32) if outputs[name].is_floating_point() else part.astype(np.int64), end
    return read, None
