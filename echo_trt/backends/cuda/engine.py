"""What engines on a GPU share: outputs that stay there until they are read, and a head's drafts of several levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.calls import Graphs
from echo_trt.backends.cuda.device_rows import Best, DeviceFeatureCache, DeviceLogits, DeviceRows, numbered
from echo_trt.backends.cuda.levels import Levels
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.cuda.transfers import PACKED, read_results, send
from echo_trt.speculation.pack import ForwardBatch, LevelShape


class DeviceEngine(Engine):
    """A network on a device, and its KV pool.

    A subclass sets ``device``; ``_bounds``, the largest calls; ``_graphs`` of calls, None for plain launches; and
    ``_feature_caches``, a head's inputs that stay on the device.
    """

    device: torch.device
    _bounds: CallBounds
    _graphs: Graphs | None
    _feature_caches: dict[str, DeviceFeatureCache]
    _work: Callable[[], None] | None = None  # for the host, while the device computes

    @abstractmethod
    def _outputs(self, call: ForwardBatch, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Launch a call; return its outputs by name, without rows of padding, and PACKED, of ``pack_results``."""

    @abstractmethod
    def _level(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Launch one level of a head's draft; return scores, candidates and states."""

    def _on_stream(self) -> AbstractContextManager[None]:
        """Launch on the engine's own stream, if it has one."""
        return nullcontext()

    def run(self, call: ForwardBatch, **inputs: Any) -> dict[str, np.ndarray]:
        """See ``backends.base.Engine``; large outputs are ``DeviceRows``, which read like arrays."""
        outputs = self.launch(call, **inputs)
        if isinstance(logits := outputs.get("logits"), DeviceLogits):
            logits.argmax(1)
        return outputs

    @torch.inference_mode()
    def launch(self, call: ForwardBatch, **inputs: Any) -> dict[str, np.ndarray]:
        """See ``backends.base.Engine``. One copy brings a draft's outputs, or a target's best tokens, to the host."""
        with self._on_stream():
            outputs = self._outputs(call, numbered(inputs))
            if self._work:
                self._work()
            packed = outputs.pop(PACKED)
            read = {} if "logits" in outputs else read_results(packed, outputs)
            late: dict[str, Any] = {
                name: DeviceLogits(output, Best(packed)) if name == "logits" else DeviceRows(output)
                for name, output in outputs.items()
                if name not in read
            }
            return {name: (read | late)[name] for name in outputs}

    def overlap(self, work: Callable[[], None]) -> bool:
        self._work = work
        return True

    def feature_cache(self, name: str) -> DeviceFeatureCache | None:
        return self._feature_caches.get(name)

    @property
    def drafts_levels(self) -> bool:
        """Whether this is a head whose states stay on the device, which can draft several levels there."""
        return "hidden" in self._feature_caches

    @cached_property
    def _levels(self) -> Levels:
        states = self._feature_caches["hidden"].rows
        return Levels(self._level, states, self._top_k, self._bounds, self._graphs is not None)

    @property
    @abstractmethod
    def _top_k(self) -> int:
        """Children that a head proposes per node."""

    @torch.inference_mode()
    def capture_levels(self, shapes: Callable[[int], Collection[LevelShape]]) -> None:
        """Capture drafts of several levels as CUDA graphs before requests wait; see ``Levels.capture``.

        A policy that asks for none may draft level by level, by calls that are captured as they come.
        """
        if self._graphs and not any(map(shapes, range(1, self._bounds.requests + 1))):
            self._graphs.sealed = False
        with self._on_stream():
            self._levels.capture(shapes)

    def padded_requests(self, requests: int) -> int:
        """Return the number of requests to which a level of ``requests`` is padded."""
        return self._levels.padded(requests)

    @torch.inference_mode()
    def start_levels(
        self, call: ForwardBatch, below: ForwardBatch, shape: LevelShape, max_nodes: int, **inputs: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run ``call``, whose logit rows are the roots', and the first levels, ``below``.

        Returns int32 [A, 2k], the bits of the roots' scores and their children, and what ``run_levels`` returns.
        """
        with self._on_stream():
            outputs = self._outputs(call, numbered(inputs))
            states = outputs["state"][send(call.logit_rows, self.device)]
            self._levels.begin(outputs["scores"], outputs["candidates"], states)
            return self._levels.run(below, np.arange(len(call.logit_rows)), shape, max_nodes, outputs[PACKED])

    @torch.inference_mode()
    def run_levels(self, below: ForwardBatch, rows: np.ndarray, shape: LevelShape, max_nodes: int) -> np.ndarray:
        """Run further levels of the requests in ``rows`` of the call before: int32 [A, 4, m], see ``Levels.run``."""
        with self._on_stream():
            return self._levels.run(below, rows, shape, max_nodes)[1]
