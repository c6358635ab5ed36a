"""What crosses between the host and a device: every copy goes through here, and is counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
