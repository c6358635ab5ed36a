"""Rows of an output that stay on the device: they are used there, or copied when they are read."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda import choose
from echo_trt.backends.cuda.calls import Staging
from echo_trt.backends.cuda.transfers import fetch, send
from echo_trt.decoding.sampling.choice import Choice, part_of

#: Bytes of float32 logits from which tokens are chosen at once; a choice takes about 15 times as much memory. Larger:
#: fewer launches, and more memory that the KV pool must leave free.
_AT_ONCE = 32 << 20


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
        picked = type(self)(self._rows, None if self._best is None else self._best[index], places)
        return picked if self._best is not None else DeviceRows(picked._gathered())

    @property
    def tensor(self) -> Tensor:
        """The rows, on the device."""
        return self._gathered()

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


class DeviceLogits(DeviceRows):
    """The target's logits float [n, V]: what is chosen from them is computed where they are."""

    def choose(self, rows: np.ndarray, choice: Choice) -> np.ndarray:
        """Choose a token at each of ``rows`` int64 [m], as ``decoding.sampling.choice.choose``: int64 [m]."""
        chosen = [self._choose(rows[part], part_of(choice, part)) for part in self._parts(len(rows))]
        return fetch(torch.cat(chosen)) if chosen else np.zeros(0, np.int64)

    def _choose(self, rows: np.ndarray, choice: Choice) -> Tensor:
        arrays = {field.name: getattr(choice, field.name) for field in fields(choice)}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        sent = self._send(arrays | {"rows": rows})
        limits, most = choice.limits, choice.largest_top_k
        return choose.choose(self.tensor[sent.pop("rows")], sent, limits=limits, most=most)

    def log_probabilities(
        self, rows: np.ndarray, tokens: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See ``choose.log_probabilities``, at ``rows`` int64 [m]."""
        parts = [self._log_probabilities(rows[part], tokens[part], most) for part in self._parts(len(rows))]
        packed = fetch(torch.cat(parts)) if parts else np.zeros((0, 1 + 2 * most))
        return packed[:, 0].astype(np.float32), packed[:, 1 : 1 + most], packed[:, 1 + most :].astype(np.int64)

    def _log_probabilities(self, rows: np.ndarray, tokens: np.ndarray, most: int) -> Tensor:
        sent = self._send({"rows": rows, "tokens": tokens})
        found = choose.log_probabilities(self.tensor[sent["rows"]], sent["tokens"], most)
        return torch.cat([part.reshape(len(rows), -1).double() for part in found], dim=1)

    def _parts(self, count: int) -> list[slice]:
        """Divide ``count`` rows into parts that are worked on at once."""
        size = max(_AT_ONCE // (4 * self.shape[1]), 1)
        return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def _send(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return Staging(arrays, self._rows.device).upload(arrays)


def compile_choice(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Choose at a row of zeros: what draws is compiled at its first launch, which takes a second or more."""
    none, row, one = np.zeros(0, np.int64), np.zeros(1, np.int64), np.ones(1)
    limits = {"temperature": one, "top_k": row + 2, "top_p": one / 2, "min_p": one / 2}
    penalties = {"repetition": one, "presence": one - 1, "frequency": one - 1}
    said = {"said_row": none, "said_token": none, "said_generated": np.zeros(0, bool)}
    moved = {"moved_row": none, "moved_token": none, "moved": none.astype(np.float32)}
    logits = DeviceLogits(torch.zeros(1, vocab, dtype=dtype, device=device))
    logits.choose(row, Choice(**limits, **penalties, **said, **moved, seed=row, place=row))


def _on_host(tensor: Tensor) -> np.ndarray:
    return fetch(tensor.float())
