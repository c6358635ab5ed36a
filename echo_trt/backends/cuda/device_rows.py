"""Rows of an output that stay on the device until they are read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class DeviceRows:
    """Rows that read like a float32 array [n, size]; only rows that are read are copied.

    rows  float [n, size], on the device
    best  int64 [n], on the host: the rows' argmax, for which logits then need no copy
    """

    def __init__(self, rows: Tensor, best: np.ndarray | None = None):
        self._rows, self._best = rows, best
        self.shape = tuple(rows.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> DeviceRows | np.ndarray:
        if isinstance(index, (int, np.integer)):
            return _on_host(self._rows[int(index)])
        place = index
        if isinstance(index, np.ndarray):
            place = torch.from_numpy(np.flatnonzero(index) if index.dtype == bool else index).to(self._rows.device)
        return DeviceRows(self._rows[place], None if self._best is None else self._best[index])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return _on_host(self._rows).astype(dtype or np.float32, copy=False)

    def astype(self, dtype: np.dtype) -> np.ndarray:
        return np.asarray(self, dtype)

    def copy(self) -> np.ndarray:
        return np.array(self)

    def argmax(self, axis: int) -> np.ndarray:
        """Return a row's first largest column, int64 [n]; ``axis`` is 1."""
        if axis != 1:
            raise ValueError(f"axis is {axis}; rows have an argmax along axis 1")
        return (_on_host(self._rows).argmax(1) if self._best is None else self._best).copy()


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
