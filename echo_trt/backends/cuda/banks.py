"""Rows that stay on the device between calls: the target's features by pool row, and states of drafted nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda.device import check_room
from echo_trt.backends.cuda.device_rows import DeviceRows
from echo_trt.backends.cuda.transfers import send


class DeviceBank:
    """Rows [count, width] on a device. ``read`` sends their numbers alone; the call gathers them."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device):
        if device.type == "cuda":
            needed = count * width * dtype.itemsize
            check_room(device, needed, f"the draft's memory of {count:,} rows", "lower limits.kv_blocks")
        self.rows = torch.zeros(count, width, dtype=dtype, device=device)

    def write(self, places: np.ndarray, outputs: Any, rows: np.ndarray) -> None:
        """Keep ``outputs[rows]``, rows int64 [m], at ``places`` int64 [m]. ``outputs`` may be on the device."""
        if len(places) == 0:
            return
        device = self.rows.device
        if isinstance(outputs, DeviceRows):
            both = send(np.stack((places, rows)).astype(np.int64), device)
            self.rows[both[0]] = outputs.tensor[both[1]].to(self.rows.dtype)
        else:
            values = send(np.asarray(outputs[rows], np.float32), device)
            self.rows[send(places.astype(np.int64), device)] = values.to(self.rows.dtype)

    def read(self, places: np.ndarray) -> BankRows:
        """Return rows ``places`` int64 [m] as an input of the engine that has this bank."""
        return BankRows(self, places.astype(np.int64))


@dataclass(frozen=True)
class BankRows:
    """Rows of a bank, by number: an input of a call."""

    bank: DeviceBank
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)


def numbered(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Replace rows of banks by their numbers, int64 [m]."""
    return {name: np.ascontiguousarray(i.places if isinstance(i, BankRows) else i) for name, i in inputs.items()}


def gathered(name: str, tensor: Tensor, banks: dict[str, DeviceBank]) -> Tensor:
    """Return an input of the network: rows of a bank where numbers were sent, else what was sent."""
    return banks[name].rows[tensor] if name in banks and tensor.ndim == 1 else tensor
