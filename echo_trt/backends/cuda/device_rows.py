"""Rows of an output that stay on the device: they are read there, or copied when they are read here."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda import choose
from echo_trt.backends.cuda.calls import Staging
from echo_trt.decoding.sampling.choice import Choice


class DeviceRows:
    """Rows that read like a float32 array [n, size]; only rows that are read are copied."""

    def __init__(self, rows: Tensor):
        self._rows = rows
        self.shape = tuple(rows.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> DeviceRows | np.ndarray:
        if isinstance(index, (int, np.integer)):
            return _on_host(self._rows[int(index)])
        place = index
        if isinstance(index, np.ndarray):
            place = torch.from_numpy(np.flatnonzero(index) if index.dtype == bool else index).to(self._rows.device)
        return type(self)(self._rows[place])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return _on_host(self._rows).astype(dtype or np.float32, copy=False)

    def astype(self, dtype: np.dtype) -> np.ndarray:
        return np.asarray(self, dtype)

    def copy(self) -> np.ndarray:
        return np.array(self)


class DeviceLogits(DeviceRows):
    """The target's logits float [n, V]: what is chosen from them is computed where they are.

    best  int64 [n], on the device: the rows' argmax, where it is known
    """

    def __init__(self, rows: Tensor, best: Tensor | None = None):
        super().__init__(rows)
        self._best = best

    def argmax(self, axis: int) -> np.ndarray:
        """Return a row's first largest column, int64 [n]; ``axis`` is 1."""
        if axis != 1:
            raise ValueError(f"axis is {axis}; rows have an argmax along axis 1")
        return (self._rows.argmax(dim=1) if self._best is None else self._best).cpu().numpy()

    def choose(self, rows: np.ndarray, choice: Choice) -> np.ndarray:
        """Choose a token at each of ``rows`` int64 [m], as ``decoding.sampling.choice.choose``: int64 [m]."""
        arrays = {field.name: getattr(choice, field.name) for field in fields(choice)}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        sent = self._send(arrays | {"rows": rows})
        return choose.choose(self._rows[sent.pop("rows")], sent).cpu().numpy()

    def log_probabilities(
        self, rows: np.ndarray, tokens: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See ``choose.log_probabilities``, at ``rows`` int64 [m]."""
        sent = self._send({"rows": rows, "tokens": tokens})
        found = choose.log_probabilities(self._rows[sent["rows"]], sent["tokens"], most)
        packed = torch.cat([part.reshape(len(rows), -1).double() for part in found], dim=1).cpu().numpy()
        return packed[:, 0].astype(np.float32), packed[:, 1 : 1 + most], packed[:, 1 + most :].astype(np.int64)

    def _send(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return Staging(arrays, self._rows.device).upload(arrays)


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
