"""A call's arrays on a GPU: sent without waiting, replayed as one CUDA graph."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda.device import own_stream
from echo_trt.backends.cuda.sizes import LARGEST, RAGGED, Arrays, Capacity
from echo_trt.backends.cuda.transfers import TRANSFERS

Forward = Callable[..., tuple[Tensor, ...]]  # of the inputs, and of further arguments of a call

MAX_GRAPHS = 176  # graphs of an engine; larger: more memory, and more seconds to start
_ALIGNMENT = 256  # bytes, which TensorRT asks of every tensor; smaller: kernels cannot load vectors


def shapes_of(arrays: Arrays, capacity: Capacity) -> tuple[tuple[int, ...], ...]:
    return tuple((capacity.get(name, len(array)), *array.shape[1:]) for name, array in arrays.items())


class Staging:
    """Buffers for arrays of the shapes and types of ``like``: two pinned ones on the host, in turn, one on the device.

    ``capacity``: rows of memory by array, where the array may grow beyond ``like``. An upload sends the filled rows.
    """

    def __init__(self, like: Arrays, device: torch.device, capacity: Capacity | None = None):
        capacity = capacity or {}
        # Arrays of varying length come last, so that the others and the first of these are sent in one copy.
        names = sorted(like, key=lambda name: RAGGED.index(name) if name in capacity else -1)
        shapes = dict(zip(like, shapes_of(like, capacity), strict=True))
        sizes = {name: int(np.prod(shapes[name])) * like[name].itemsize for name in names}
        ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()]).tolist()
        self._begins = dict(zip(names, (0, *ends[:-1]), strict=True))
        self._sent = tuple(name for name in names if name in capacity)
        self._fixed = self._begins[self._sent[0]] if self._sent else ends[-1]

        def views(memory: Tensor) -> dict[str, Tensor]:
            parts = {name: memory[begin : begin + sizes[name]] for name, begin in self._begins.items()}
            types = {name: torch.from_numpy(like[name][:0]).dtype for name in names}
            return {name: part.view(types[name]).view(shapes[name]) for name, part in parts.items()}

        pinned = device.type == "cuda"
        hosts = [torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._device = torch.empty_like(hosts[0], device=device)
        event = torch.cuda.Event if pinned else lambda: None  # a CPU copies at once
        self._turns = [(host, {n: t.numpy() for n, t in views(host).items()}, event()) for host in hosts]
        self._turn, self.tensors = 0, views(self._device)

    def upload(self, arrays: Arrays) -> dict[str, Tensor]:
        """Copy arrays to the device in the order of its stream; the tensors are valid until the next upload's."""
        host, views, copied = self._turns[self._turn]
        self._turn = 1 - self._turn
        if copied is not None:
            copied.synchronize()  # the copy before the last may still wait behind a pass
        for name, array in arrays.items():
            views[name][: len(array)] = array
        spans = [[0, self._fixed]]
        for name in self._sent:
            begin, end = self._begins[name], self._begins[name] + views[name][: len(arrays[name])].nbytes
            if begin == spans[-1][1]:
                spans[-1][1] = end
            elif begin < end:
                spans.append([begin, end])
        for begin, end in spans:
            TRANSFERS.up += end - begin
            self._device[begin:end].copy_(host[begin:end], non_blocking=True)
        if copied is not None:
            copied.record()
        return self.tensors


def unowned(forward: Forward) -> Forward:
    """Return ``forward`` as a function that keeps the object of a bound method alive no longer than others do.

    An engine owns the graphs of its own method. In a circle of both, its memory would stay until Python's collector
    looks for circles, long after the next engine has asked for it; and NCCL waits for graphs with its collectives, for
    ever, before it ends a communicator.
    """
    if not inspect.ismethod(forward):
        return forward
    method = weakref.WeakMethod(forward)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        bound = method()
        assert bound is not None  # whoever calls has the object
        return bound(*arguments)

    return call


class Captured(NamedTuple):
    """A graph, where it reads and where it writes."""

    staging: Staging
    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python's collector from running: what it ends in the middle of a capture, such as a graph, spoils that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """``forward`` as CUDA graphs: one for every size of a call, captured before calls come or at the first call.

    A size that cannot be captured is run by plain launches from then on, and so is one that comes while ``sealed``.

    All graphs are captured on a stream that no other object of this class has. PyTorch keeps a workspace of cuBLAS for
    each stream, of 32 MiB on an H100, and frees a stream's workspace when any graph ends that was captured there,
    though others still write into it (PyTorch's issue 193402). On PyTorch's own capture stream, graphs of an engine
    that is closed would take the memory of another engine's along.
    """

    def __init__(self, forward: Forward, device: torch.device, sealed: bool = False):
        self._forward, self._device, self.sealed = unowned(forward), device, sealed
        self._memory = torch.cuda.graph_pool_handle()  # shared: only one graph runs at a time
        self._outputs: list[Tensor] = []  # shared, so that graphs keep no memory apart
        self._captured: dict[tuple, Captured | None] = {}
        self._stream = own_stream(device, self)
        self._failed: list[torch.cuda.CUDAGraph] = []  # kept, since the end of one frees the workspace of all

    def run(self, arrays: Arrays, capacity: Capacity | None = None, *arguments: int) -> tuple[Tensor, ...] | None:
        """Replay a call; outputs are valid until the next run. A graph is kept for every set of ``arguments``.

        Returns None where there is no graph: the size cannot be captured, or there are too many.
        """
        capacity = capacity or {}
        if any(len(arrays[name]) > maximum for name, maximum in capacity.items()):
            return None
        key = (*arguments, *sorted(zip(arrays, shapes_of(arrays, capacity), strict=True)))
        if key not in self._captured:
            if self.sealed or len(self._captured) >= MAX_GRAPHS:
                return None
            self._captured[key] = self._capture(arrays, capacity, arguments)
        captured = self._captured[key]
        if captured is None:
            return None
        captured.staging.upload(arrays)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, arrays: Arrays, capacity: Capacity, arguments: tuple[int, ...]) -> Captured | None:
        """Capture a size; None, with a warning, where that fails."""
        staging = Staging(arrays, self._device, capacity)
        # In a call of zeros no request has tokens: it reads and writes no KV rows.
        inputs = staging.upload({name: np.zeros_like(array) for name, array in arrays.items()})
        # A run before the capture compiles kernels and starts libraries.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._forward(inputs, *arguments)
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        buffers = self._output_buffers(outputs)
        del outputs
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its stream as the current one, which the outer block sets back.
            with torch.cuda.stream(current), without_collections():
                # Other threads, such as NCCL's that watches over collectives, may ask for events meanwhile.
                capture = {"pool": self._memory, "stream": self._stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, **capture):
                    for buffer, output in zip(buffers, self._forward(inputs, *arguments), strict=True):
                        buffer.copy_(output)
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)  # a device that is lost fails here, and the call with it
            self._failed.append(graph)
            self._memory = torch.cuda.graph_pool_handle()  # PyTorch may take the old one for still being captured into
            count, reason = len(next(iter(arrays.values()))), " ".join(str(error).split())[:200]
            rows = "tokens" if "token_ids" in arrays else "requests"
            warnings.warn(f"calls of {count} {rows} run without a CUDA graph: {reason}", stacklevel=2)
            return None
        return Captured(staging, graph, buffers)

    def _output_buffers(self, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the shared memory of outputs of the shapes of ``like``."""
        if not all(o.shape[1:] == whole.shape[1:] for o, whole in zip(like, self._outputs, strict=False)):
            return tuple(torch.empty_like(o) for o in like)
        self._outputs = self._outputs or [o.new_empty((LARGEST, *o.shape[1:])) for o in like]
        return tuple(whole[: len(o)] for whole, o in zip(self._outputs, like, strict=True))
