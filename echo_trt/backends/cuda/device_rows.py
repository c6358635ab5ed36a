"""Rows of an output that stay on the device until they are read."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from echo_trt.backends.cuda.device import send


class DeviceRows:
    """Rows that read like a float32 array [n, size]; only rows that are read are copied.

    rows   float [m, size], on the device
    best   int64 [n], on the host: the rows' argmax, for which logits then need no copy
    index  int64 [n], on the host: the rows among ``rows``; by default all of them

    With ``best`` picked rows wait until they are read, mostly never: they are valid until the engine's next run. Other
    rows are copied on the device when they are picked, and stay valid.
    """

    def __init__(self, rows: Tensor, best: np.ndarray | None = None, index: np.ndarray | None = None):
        self._rows, self._best, self._index = rows, best, index
        self.shape = (len(rows) if index is None else len(index), *rows.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> DeviceRows | np.ndarray:
        if isinstance(index, (int, np.integer)):
            return _on_host(self._rows[int(index if self._index is None else self._index[index])])
        places = (np.arange(len(self)) if self._index is None else self._index)[index]
        picked = DeviceRows(self._rows, None if self._best is None else self._best[index], places)
        return picked if self._best is not None else DeviceRows(picked._gathered())

    def _gathered(self) -> Tensor:
        if self._index is None:
            return self._rows
        return self._rows[send(self._index, self._rows.device)]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return _on_host(self._gathered()).astype(dtype or np.float32, copy=False)

    def astype(self, dtype: np.dtype) -> np.ndarray:
        return np.asarray(self, dtype)

    def copy(self) -> np.ndarray:
        return np.array(self)

    def argmax(self, axis: int) -> np.ndarray:
        """Return a row's first largest column, int64 [n]; ``axis`` is 1."""
        if axis != 1:
            raise ValueError(f"axis is {axis}; rows have an argmax along axis 1")
        return (_on_host(self._gathered()).argmax(1) if self._best is None else self._best).copy()


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
