"""The OpenVINO engine, for CPUs that the default engine, ``cpu``, does not run on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from echo_trt.backends.base import Engine
from echo_trt.backends.openvino import cpu
from echo_trt.backends.openvino.graph import FEATURES, compile_graph, read_graph, smallest_window
from echo_trt.backends.openvino.sequence_split import as_sequences, pad_requests
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.planner import Plan

MIN_BF16_TOKENS = 4  # least padded size in bf16 without AMX, where 1 to 3 tokens are slower. Larger: more padding
PREPARED = 32  # tokens up to which kernels are prepared at the start; larger: a longer start, fewer slow first passes
PREPARE_SECONDS = 1.0  # after which no further size is prepared; larger: likewise
#: Padded sizes. Finer: less padding, more changes of size. A target's steps are two tokens, or an eighth of the size; a
#: draft's passes up to PREPARED are not padded, since a change between prepared sizes costs little.
TARGET_SIZES = (*range(2, 32, 2), *range(32, 64, 4), *range(64, 128, 8), *range(128, 256, 16), *range(256, 513, 32))
DRAFT_SIZES = (*range(1, PREPARED), *range(PREPARED, 513, 16))

_ARRAY_TYPES = {ov.Type.f32: np.float32, ov.Type.bf16: np.uint16}  # numpy has no bfloat16; rows are only moved


class OpenVINOEngine(Engine):
    """A graph compiled for this CPU and a KV pool of ``num_blocks`` blocks, whose memory is allocated as it fills.

    One more block takes the rows of padding.
    """

    def __init__(self, graph: Path, precision: str, num_blocks: int, threads: int = 0):
        self.num_blocks = num_blocks
        model = read_graph(graph)
        self._window = smallest_window(model)
        compiled = compile_graph(model, precision, threads)
        self._request = compiled.create_infer_request()
        uncached = [port for port in compiled.inputs if "_cache." not in port.get_any_name()]
        inputs = [port.get_any_name() for port in uncached]
        self._outputs = [o.get_any_name() for o in compiled.outputs]
        self._short = any(FEATURES in o.names and o.element_type == ov.Type.bf16 for o in compiled.outputs)
        tables = [port for port in (*compiled.inputs, *compiled.outputs) if len(port.partial_shape) == 2]
        #: Columns of inputs and outputs with one row per token, by name.
        self.widths = {name: port.partial_shape[1].get_length() for port in tables for name in port.names}
        self._target = "logits" in self._outputs
        # In bf16 logits can change visibly with the shape of a call.
        self.rounds_trees = self._target and cpu.compute_type(precision) == ov.Type.bf16
        # Products of a single row are rounded differently from those of several rows.
        minimum = 2 if self.rounds_trees else 1
        if self.rounds_trees and precision == "bf16" and not cpu.has_amx():
            minimum = MIN_BF16_TOKENS
        usual = TARGET_SIZES if self._target else DRAFT_SIZES
        self.sizes = (minimum, *(size for size in usual if size > minimum))
        self._pool = self._bind_pool(compiled, cpu.compute_type(precision))
        self._bound = {name: self._request.get_tensor(name) for name in inputs}
        self._views = {name: tensor.data for name, tensor in self._bound.items()}
        self._prepare({name: self.widths[name] for name in inputs if name in self.widths})

    def _bind_pool(self, compiled: ov.CompiledModel, cache_type: ov.Type) -> np.ndarray:
        caches = [i for i in compiled.inputs if "_cache." in i.get_any_name()]
        if not caches:
            return np.zeros((0, self.num_blocks + 1, 0, BLOCK, 0), _ARRAY_TYPES[cache_type])
        _, heads, block, head_dim = (d.get_length() if d.is_static else -1 for d in caches[0].partial_shape)
        if block != BLOCK or caches[0].element_type != cache_type:
            raise RuntimeError(
                f"OpenVINO laid the KV cache out as {caches[0]}; this build expects blocks of {BLOCK} in {cache_type}"
            )
        # One array for all layers, so that a commit is one indexed copy. calloc leaves untouched pages unallocated.
        pool = np.zeros((len(caches), self.num_blocks + 1, heads, block, head_dim), _ARRAY_TYPES[cache_type])
        self._caches = [ov.Tensor(part, ov.Shape(part.shape), cache_type) for part in pool]
        for node, tensor in zip(caches, self._caches, strict=True):
            self._request.set_tensor(node.get_any_name(), tensor)
        return pool

    def _prepare(self, widths: dict[str, int]) -> None:
        """Run a pass of every usual size, whose first pass takes 2 to 10 ms more.

        ``widths``: columns of a head's inputs, by name.
        """
        begin = time.perf_counter()
        for count in (size for size in self.sizes if size <= PREPARED):
            if time.perf_counter() - begin > PREPARE_SECONDS:
                return
            for used in widths or [""]:  # a head reads features, or its state where it goes on from a drafted token
                shapes = {name: (count if name == used else 0, width) for name, width in widths.items()}
                rows = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
                self.run(_blank(count, self.num_blocks), **rows, state_rows=np.arange(count))

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        height = dict.fromkeys((FEATURES, "state"), len(call.token_ids))
        rows = len(call.logit_rows)
        drafts = not self._target
        verifies = len(call.tree_mask) > 0
        # A verified chain gets the bits of plain decoding, unless products of a single row have others; a draft, speed.
        if drafts or len(call.past_lens) > 1 or self.sizes[0] > 1:
            call = as_sequences(call, unmasked=drafts)
        tokens = len(call.token_ids)
        size = next_size(self.sizes, tokens) if verifies or drafts else max(tokens, self.sizes[0])
        size = max(size, call.padded_to)
        if drafts:
            inputs = _longer(inputs, size - tokens)
        call = pad_requests(call, size, self.num_blocks, pad_rows=self._target)
        self._feed(call._asdict() | inputs)
        outputs = self._request.infer(share_outputs=True).values()  # a copy of the logits would take half a millisecond
        read = dict(zip(self._outputs, outputs, strict=True))
        read = {name: read[name][: height.get(name, rows)] for name in self._outputs}
        if self._short:
            read[FEATURES] = _from_bf16(read[FEATURES])
        return read

    def _feed(self, inputs: dict[str, np.ndarray]) -> None:
        """Write inputs into the bound tensors' memory: binding new tensors takes three times as long."""
        for name, view in self._views.items():
            values = inputs[name]
            if view.shape != values.shape:
                self._bound[name].shape = values.shape
                self._views[name] = view = self._bound[name].data
            view[...] = values

    def exact(self, plan: Plan, past: np.ndarray) -> Plan:
        return plan.on_one_path(past + plan.tree.sizes > self._window) if self._window else plan

    def kv_block(self, index: int) -> Sequence[np.ndarray]:
        return (self._pool[:, index],)

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        rows = self._pool[:, source // BLOCK, :, source % BLOCK]
        self._pool[:, target // BLOCK, :, target % BLOCK] = rows


def _longer(inputs: dict[str, np.ndarray], more: int) -> dict[str, np.ndarray]:
    """Pad a draft's inputs by ``more`` rows: ``hidden``, which belongs to later tokens, or else ``features``.

    A block drafter's padding takes the first state.
    """
    if more == 0:
        return inputs
    if "hidden" not in inputs and "state_rows" in inputs:
        return inputs | {"state_rows": np.pad(inputs["state_rows"], (0, more))}
    last = next((name for name in ("hidden", "features") if len(inputs.get(name, ()))), None)
    return {name: np.pad(rows, ((0, more if name == last else 0), (0, 0))) for name, rows in inputs.items()}


def _from_bf16(values: np.ndarray) -> np.ndarray:
    """Convert bf16 [n, F], in the bits of an fp16 array, to float32, whose upper half it is."""
    halves = np.zeros((*values.shape, 2), np.uint16)
    halves[..., 1] = values.view(np.uint16)
    return halves.view(np.float32)[..., 0]


def _blank(count: int, block: int) -> ForwardBatch:
    """Make a call of ``count`` requests of one token, whose keys and values go to ``block``."""
    table, one = np.full((count, 1), block), np.ones(count, np.int64)
    return pack(np.zeros(count), np.zeros(count), 0 * one, one, table, np.arange(count))
