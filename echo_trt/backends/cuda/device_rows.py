"""Rows on a device: outputs that stay there until they are read, and feature caches, which outlive a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda import choose
from echo_trt.backends.cuda.calls import Staging
from echo_trt.backends.cuda.device import zeros
from echo_trt.backends.cuda.transfers import fetch, read_packed, send
from echo_trt.speculation.sampling.draw import SamplingBatch

#: Bytes of float32 logits whose best tokens are searched for at once; that takes several times as much memory. Larger:
#: fewer launches, and more memory that the KV pool must leave free.
_AT_ONCE = 32 << 20


class Best:
    """The best tokens of ``packed`` logits (``transfers.pack_results``), which the host copies when it reads them."""

    def __init__(self, packed: Tensor):
        self._packed = packed

    @cached_property
    def tokens(self) -> np.ndarray:
        tokens: np.ndarray = read_packed(self._packed)[:, 0].astype(np.int64)
        return tokens


class DeviceRows:
    """Rows that read like a float32 array [n, size]; only rows that are read are copied.

    rows   float [m, size], on the device
    best   the rows' argmax, for which logits then need no copy
    index  int64 [n], on the host: the rows among ``rows``; by default all of them

    With ``best`` picked rows wait until they are read, mostly never: they are valid until the engine's next run. Other
    rows are copied on the device when they are picked, and stay valid.
    """

    def __init__(self, rows: Tensor, best: Best | None = None, index: np.ndarray | None = None):
        self._rows, self._best, self._index = rows, best, index
        self.shape = (len(rows) if index is None else len(index), *rows.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> DeviceRows | np.ndarray:
        if isinstance(index, (int, np.integer)):
            return _on_host(self._rows[int(index if self._index is None else self._index[index])])
        handles = (np.arange(len(self)) if self._index is None else self._index)[index]
        picked = type(self)(self._rows, self._best, handles)
        return picked if self._best is not None else DeviceRows(picked.tensor)

    @property
    def tensor(self) -> Tensor:
        if self._index is None:
            return self._rows
        return self._rows[send(self._index, self._rows.device)]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return _on_host(self.tensor).astype(dtype or np.float32, copy=False)

    def astype(self, dtype: np.dtype) -> np.ndarray:
        return np.asarray(self, dtype)

    def copy(self) -> np.ndarray:
        return np.array(self)

    def argmax(self, axis: int) -> np.ndarray:
        """Return a row's first largest column, int64 [n]; ``axis`` is 1."""
        if axis != 1:
            raise ValueError(f"axis is {axis}; rows have an argmax along axis 1")
        if self._best is None:
            return _on_host(self.tensor).argmax(1)
        return self._best.tokens.copy() if self._index is None else self._best.tokens[self._index]


class DeviceLogits(DeviceRows):
    """The target's logits float [n, V]: what is chosen from them is computed where they are."""

    def choose(self, rows: np.ndarray, choice: SamplingBatch, *lineage: np.ndarray) -> np.ndarray:
        """Choose a token at each of ``rows`` int64 [m]; see ``backends.cuda.choose``, also for ``lineage``."""
        return choose.choose(self.tensor, rows, choice, *lineage)

    def log_probabilities(
        self, rows: np.ndarray, tokens: np.ndarray, max_top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See ``choose.log_probabilities``, at ``rows`` int64 [m]."""
        parts = [self._log_probabilities(rows[part], tokens[part], max_top_k) for part in self._parts(len(rows))]
        packed = fetch(torch.cat(parts)) if parts else np.zeros((0, 1 + 2 * max_top_k))
        return (
            packed[:, 0].astype(np.float32),
            packed[:, 1 : 1 + max_top_k],
            packed[:, 1 + max_top_k :].astype(np.int64),
        )

    def _log_probabilities(self, rows: np.ndarray, tokens: np.ndarray, max_top_k: int) -> Tensor:
        arrays = {"rows": rows, "tokens": tokens}
        sent = Staging(arrays, self._rows.device).upload(arrays)
        found = choose.log_probabilities(self.tensor[sent["rows"]], sent["tokens"], max_top_k)
        return torch.cat([part.reshape(len(rows), -1).double() for part in found], dim=1)

    def _parts(self, count: int) -> list[slice]:
        size = max(_AT_ONCE // (4 * self.shape[1]), 1)
        return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def compile_choice(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Choose at rows of zeros: what draws is compiled at its first launch, which takes a second or more.

    One row is penalised and biased, the other is not; with and without a grammar's mask.
    """
    rows, no, one = np.arange(2), np.zeros(2), np.zeros(1, np.int64)
    limits = {"temperature": no + 1, "top_k": rows + 2, "top_p": no + 0.5, "min_p": no + 0.5}
    penalties = {"repetition": no + 1, "presence": no, "frequency": no}
    history = {"history_row": one, "history_token": one, "history_generated": one.astype(bool)}
    logit_bias = {"logit_bias_row": one, "logit_bias_token": one, "logit_bias": one.astype(np.float32)}
    logits = DeviceLogits(torch.zeros(2, vocab, dtype=dtype, device=device))
    for masks in (None, np.full((2, -(-vocab // 8)), 255, np.uint8)):
        choice = SamplingBatch(**limits, **penalties, **history, **logit_bias, seed=rows, position=rows, masks=masks)
        logits.choose(rows, choice)


class DeviceFeatureCache:
    """Rows [count, width] on a device. ``read`` sends their numbers alone; the call gathers them.

    project  makes the rows of what is written; by default they are kept as they are
    """

    def __init__(
        self,
        count: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        project: Callable[[Tensor], Tensor] = lambda rows: rows,
    ):
        self.rows = zeros((count, width), dtype, device, f"the draft's memory of {count:,} rows")
        self._project = project

    @torch.inference_mode()
    def write(self, handles: np.ndarray, outputs: Any, rows: np.ndarray) -> None:
        """Keep ``outputs[rows]``, rows int64 [m], at ``handles`` int64 [m]. ``outputs`` may be on the device."""
        if len(handles) == 0:
            return
        device = self.rows.device
        if isinstance(outputs, DeviceRows):
            both = send(np.stack((handles, rows)).astype(np.int64), device)
            self.rows[both[0]] = self._project(outputs.tensor[both[1]].to(self.rows.dtype))
        else:
            values = send(np.asarray(outputs[rows], np.float32), device)
            self.rows[send(handles.astype(np.int64), device)] = self._project(values.to(self.rows.dtype))

    def read(self, handles: np.ndarray) -> FeatureHandles:
        """Return rows ``handles`` int64 [m] as an input of the engine that has this cache."""
        return FeatureHandles(self, handles.astype(np.int64))


@dataclass(frozen=True)
class FeatureHandles:
    """Rows of a feature cache, by number: an input of a call."""

    feature_cache: DeviceFeatureCache
    handles: np.ndarray

    def __len__(self) -> int:
        return len(self.handles)


def numbered(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(i.handles if isinstance(i, FeatureHandles) else i) for name, i in inputs.items()}


def gathered(name: str, tensor: Tensor, feature_caches: dict[str, DeviceFeatureCache]) -> Tensor:
    """Return an input of the network: rows of a feature cache where numbers were sent, else what was sent."""
    return feature_caches[name].rows[tensor] if name in feature_caches and tensor.ndim == 1 else tensor


def _on_host(tensor: Tensor) -> np.ndarray:
    return fetch(tensor.float())
