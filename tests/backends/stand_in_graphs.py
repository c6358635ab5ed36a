"""CUDA graphs on a CPU: a replay computes again what was captured, on the memory that it was captured with."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

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

    def __init__(self, forward, refused: tuple[int, ...] = ()):
        self._refused, self.captures, self._last = refused, 0, None

        def remembered(inputs, *arguments):
            self._last = inputs, arguments
            return forward(inputs, *arguments)

        self.compute = forward
        super().__init__(remembered, torch.device("cpu"))

    @contextmanager
    def capturing(self, graph, **options):
        self.captures += 1
        yield
        if len(self._last[0]["token_ids"]) in self._refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        (inputs, arguments), places = self._last, self._places

        def again():
            for place, output in zip(places, self.compute(inputs, *arguments), strict=True):
                place.copy_(output)

        graph.again = again

    def _output_places(self, like):
        self._places = super()._output_places(like)
        return self._places


def with_graphs(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...] = ()) -> StandInGraphs:
    """Make a CPU's engine work as a GPU's, with graphs that stand in for CUDA's."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "graph_pool_handle": lambda: None,
        "CUDAGraph": StandInGraph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    engine._lazy = True
    engine._graphs = StandInGraphs(engine._forward, refused)
    monkeypatch.setattr(torch.cuda, "graph", engine._graphs.capturing)
    return engine._graphs
