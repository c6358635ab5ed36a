"""A call's arrays on a GPU: padded to few sizes, sent in one copy, replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
Forward = Callable[..., tuple[Tensor, ...]]  # of the inputs, and of further arguments of a call

LARGEST = 512  # tokens of a call that is padded and captured; larger: more graphs, whose launches arithmetic hides
_ALIGNMENT = 256  # bytes, which TensorRT asks of every tensor; smaller: kernels cannot load vectors


def bucket(count: int) -> int:
    """Return the padded size: the next one of 1, 2, 4, 8, 12, 16, 24, 32, 48, ..., at most a half more."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 16 and count <= 3 * power // 4 else power


SIZES = tuple(sorted({bucket(count) for count in range(1, LARGEST + 1)}))  # of calls, in tokens


def pad(arrays: Arrays) -> Arrays | None:
    """Pad a call to the next captured size; return None for a call that runs faster unpadded.

    Padding is tokens without a request, and requests without tokens, which the call does not see. Output rows of
    padding are undefined.
    """
    tokens = len(arrays["token_ids"])
    parts = [len(arrays[name]) for name in ("features", "hidden") if name in arrays]
    if not 0 < tokens <= LARGEST or np.count_nonzero(parts) > 1 or len(arrays["logit_rows"]) > tokens:
        return None
    size, requests = bucket(tokens), bucket(len(arrays["past_lens"]))
    sizes = {
        **dict.fromkeys(("token_ids", "positions", "state_rows", "logit_rows"), size),
        **{name: size if len(arrays[name]) else 0 for name in ("features", "hidden") if name in arrays},
        "past_lens": requests,
        **dict.fromkeys(("seq_begins", "block_begins", "tree_mask_begins"), requests + 1),
        "block_indices": bucket(len(arrays["block_indices"])),
        "tree_mask": size * size,
    }
    if "state_rows" in arrays:  # the states of features follow the states of logit rows, and padding adds logit rows
        states, asked = arrays["state_rows"], len(arrays["logit_rows"])
        arrays = arrays | {"state_rows": np.where(states < asked, states, states + size - asked)}
    return {name: _padded(array, sizes[name], name.endswith("_begins")) for name, array in arrays.items()}


def _padded(array: np.ndarray, size: int, repeat_last: bool) -> np.ndarray:
    out = np.zeros((size, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    if repeat_last:
        out[len(array) :] = array[-1]
    return out


class Staging:
    """Buffers for arrays of the shapes and types of ``like``: one pinned on the host, one on the device."""

    def __init__(self, like: Arrays, device: torch.device):
        ends = np.cumsum([-(-a.nbytes // _ALIGNMENT) * _ALIGNMENT for a in like.values()])
        self._host = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.empty_like(self._host, device=device)
        self._arrays, self.tensors = {}, {}
        for (name, array), begin in zip(like.items(), (0, *ends[:-1]), strict=True):
            part = slice(int(begin), int(begin) + array.nbytes)
            dtype = torch.from_numpy(array[:0]).dtype
            self._arrays[name] = self._host[part].numpy().view(array.dtype).reshape(array.shape)
            self.tensors[name] = self._device[part].view(dtype).view(array.shape)

    def upload(self, arrays: Arrays) -> dict[str, Tensor]:
        """Copy arrays to the device, until the next upload; work on the previous arrays must have ended."""
        for name, array in arrays.items():
            self._arrays[name][...] = array
        self._device.copy_(self._host, non_blocking=True)
        return self.tensors


Captured = tuple[Staging, torch.cuda.CUDAGraph, tuple[Tensor, ...]]  # a graph, where it reads and where it writes


class Graphs:
    """``forward`` as CUDA graphs: one for every size of a call, captured at the first call."""

    def __init__(self, forward: Forward, device: torch.device):
        self._forward, self._device = forward, device
        self._memory = torch.cuda.graph_pool_handle()  # shared: only one graph runs at a time
        self._outputs: list[Tensor] = []  # shared, so that graphs keep no memory apart
        self._captured: dict[tuple, Captured] = {}

    def run(self, arrays: Arrays, *arguments: int) -> tuple[Tensor, ...]:
        """Run a call; outputs are valid until the next run. A graph is also captured for every set of ``arguments``."""
        key = (*arguments, *(array.shape for array in arrays.values()))
        if key not in self._captured:
            self._captured[key] = self._capture(arrays, arguments)
        staging, graph, outputs = self._captured[key]
        staging.upload(arrays)
        graph.replay()
        return outputs

    def _capture(self, arrays: Arrays, arguments: tuple[int, ...]) -> Captured:
        staging = Staging(arrays, self._device)
        inputs = staging.upload(arrays)
        # A run before the capture compiles kernels and starts libraries. The replay writes its KV rows once more.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            outputs = self._forward(inputs, *arguments)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        places = self._output_places(outputs)
        del outputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            for place, output in zip(places, self._forward(inputs, *arguments), strict=True):
                place.copy_(output)
        return staging, graph, places

    def _output_places(self, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the shared memory of outputs of the shapes of ``like``."""
        if not self._outputs:
            self._outputs = [o.new_empty((LARGEST, *o.shape[1:])) for o in like]
        return tuple(whole[: len(o)] for whole, o in zip(self._outputs, like, strict=True))
