"""CUDA graphs on a CPU: a replay computes again what was captured, on the memory that it was captured with."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from echo_trt.backends.cuda.calls import Graphs
from echo_trt.backends.torch.engine import TorchEngine


class StandInGraph:
    again = staticmethod(lambda: None)
    replays = 0  # of all graphs

    def replay(self) -> None:
        StandInGraph.replays += 1
        self.again()


class StandInGraphs(Graphs):
    """Graphs of ``forward``, whose captures are counted; ``refused``: tokens of calls that cannot be captured."""

    newest: StandInGraphs  # that were asked to compute

    def __init__(self, forward, refused: tuple[int, ...] = ()):
        self._refused, self.captures, self.replays, self._last = refused, 0, 0, None

        def remembered(inputs, *arguments):
            self._last, StandInGraphs.newest = (inputs, arguments), self
            return forward(inputs, *arguments)

        self.compute = forward
        super().__init__(remembered, torch.device("cpu"))

    @contextmanager
    def capturing(self, graph, **options):
        self.captures += 1
        yield
        if len(self._last[0].get("token_ids", ())) in self._refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        (inputs, arguments), handles = self._last, self._places

        def again():
            self.replays += 1
            for index, output in zip(handles, self.compute(inputs, *arguments), strict=True):
                index.copy_(output)

        graph.again = again

    def _output_buffers(self, like):
        self._places = super()._output_buffers(like)
        return self._places


def as_on_a_gpu(engine: TorchEngine) -> TorchEngine:
    """Make a CPU's engine keep outputs, features and states where it computes, as on a GPU but for the graphs."""
    engine._resident = True
    engine._feature_caches = engine._feature_caches or engine._make_feature_caches()
    return engine


def in_banks(engine: TorchEngine, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write a head's inputs into the engine's banks and read them from there, as a drafter does."""
    read = dict(inputs)
    for name, values in inputs.items():
        if feature_cache := engine.feature_cache(name):
            rows = np.arange(len(values))
            feature_cache.write(rows, values, rows)
            read[name] = feature_cache.read(rows)
    return read


def with_graphs(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...] = ()) -> StandInGraphs:
    """Make a CPU's engine work as a GPU's, with graphs that stand in for CUDA's."""
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    for name, value in {
        "graph_pool_handle": lambda: None,
        "CUDAGraph": StandInGraph,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("echo_trt.backends.cuda.calls.own_stream", lambda device, owner: stream)
    as_on_a_gpu(engine)
    engine._graphs = StandInGraphs(engine._forward, refused)
    if "hidden" in engine._feature_caches:
        engine._levels._graphs = StandInGraphs(engine._levels._draft)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: StandInGraphs.newest.capturing(graph, **options))
    return engine._graphs
