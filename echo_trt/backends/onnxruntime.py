"""The ONNX Runtime engine: runs the native export on a CPU, to check it before other compilers take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from echo_trt.backends.base import Engine
from echo_trt.backends.padded import ROW_OUTPUTS, Padded, SlotLayout, pad, piece_states, split
from echo_trt.speculation.pack import BLOCK, ForwardBatch

_ARRAY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}  # numpy has no bfloat16


class OnnxRuntimeEngine(Engine):
    """A native graph and its caches: ``slots`` requests at a time, with ``blocks`` adjacent KV blocks per request."""

    def __init__(self, graph: Path, slots: int, blocks: int, threads: int = 0):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._caches = [name for name in inputs if "_cache." in name]
        self._inputs = [name for name in inputs if "_cache." not in name]
        self._outputs = [o.name for o in self._session.get_outputs() if "_cache." not in o.name]
        _, heads, rows, head_dim = inputs[self._caches[0]].shape
        self._type = _ARRAY_TYPES[inputs[self._caches[0]].type]
        self._layout = SlotLayout(slots, blocks, rows - blocks * BLOCK)
        self.num_blocks, self.sizes = slots * blocks, ()
        # One array for all layers, so that a commit is one indexed copy. calloc leaves untouched pages unallocated.
        self._pool = np.zeros((len(self._caches), slots, heads, rows, head_dim), self._type)

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        # Masked rows must be finite, and a slot's previous request may have left rows that are not.
        starting = call.past_lens == 0
        if starting.any():
            self._pool[:, self._layout.slots_of(call)[starting]] = 0
        parts = [pad(call, part, self._layout) for part in split(call, self._layout)]
        states = inputs.pop("state_rows", None)
        typed = {name: np.ascontiguousarray(array, self._type) for name, array in inputs.items()}
        outputs = []
        for part in parts:
            own = typed
            if states is not None:
                total, requested = len(call.logit_rows), len(part.requested)
                features, renumbered = piece_states(
                    states[part.rows], part.requested, total, typed["features"], requested
                )
                part.state_rows.flat[part.padded_rows] = renumbered
                own = {"features": np.ascontiguousarray(features)}
            outputs.append(self._run(part, own))
        return unpad(call, parts, outputs)

    def _run(self, part: Padded, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        binding = self._session.io_binding()
        for name in self._inputs:
            binding.bind_cpu_input(name, inputs[name] if name in inputs else getattr(part, name))
        for name in self._outputs:
            binding.bind_output(name)
        for name, cache in zip(self._caches, self._pool, strict=True):
            slots = ort.OrtValue.ortvalue_from_numpy(cache[part.first : part.first + len(part.past_lens)])
            binding.bind_ortvalue_input(name, slots)
            binding.bind_ortvalue_output(f"new_{name}", slots)  # written in place
        self._session.run_with_iobinding(binding)
        outputs = zip(self._outputs, binding.get_outputs(), strict=False)  # caches were bound last, and are left out
        return {name: _as_engine_type(value.numpy()) for name, value in outputs}

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        (old, old_row), (new, new_row) = self._layout.slots_and_rows(source), self._layout.slots_and_rows(target)
        self._pool[:, new, :, new_row] = self._pool[:, old, :, old_row]


def _as_engine_type(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def unpad(call: ForwardBatch, parts: list[Padded], outputs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put the outputs of a packed call's parts together."""
    joined = {}
    for name, sample in outputs[0].items():
        per_row = name in ROW_OUTPUTS
        whole = np.empty((len(call.token_ids if per_row else call.logit_rows), *sample.shape[1:]), sample.dtype)
        for part, output in zip(parts, outputs, strict=True):
            if per_row:
                whole[part.rows] = output[name][part.padded_rows]
            else:
                whole[part.requested] = output[name][: len(part.requested)]
        joined[name] = whole
    return joined
