"""The OpenVINO engine: the embedded default, on any CPU."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import openvino as ov

from echo_trt.backends.openvino import cpu
from echo_trt.backends.openvino.graph import FEATURES, compile_graph, read_graph
from echo_trt.backends.openvino.lanes import as_lanes
from echo_trt.backends.openvino.rounding import is_verification, padded
from echo_trt.decoding.arrays import next_size
from echo_trt.decoding.pack import BLOCK, Packed, pack

LEAST = 4  # tokens: in bf16, but for AMX, one to three take longer
PREPARED = 32  # tokens up to which kernels of passes are prepared at the start: more take longer to prepare
PREPARING = 1.0  # seconds that this may take: what a large network's passes take, they take anyway
#: Tokens to which passes are padded: the finer, the less padding and the more changes of size. Of a target steps are of
#: two tokens, and an eighth at most; a draft's passes up to PREPARED change size for little, once those are prepared.
TARGET_SIZES = (*range(2, 32, 2), *range(32, 64, 4), *range(64, 128, 8), *range(128, 256, 16), *range(256, 513, 32))
DRAFT_SIZES = (*range(1, PREPARED), *range(PREPARED, 513, 16))

_ARRAY_TYPES = {ov.Type.f32: np.float32, ov.Type.bf16: np.uint16}  # numpy has no bfloat16; rows are only moved


class OpenVINOEngine:
    """A graph compiled for this CPU and a KV pool of ``num_blocks`` blocks, touched only as it fills.

    One more block behind them takes the rows of tokens that only pad a pass.
    """

    def __init__(self, graph: Path, precision: str, num_blocks: int, threads: int = 0):
        self.num_blocks = num_blocks
        compiled = compile_graph(read_graph(graph), precision, threads)
        self._request = compiled.create_infer_request()
        inputs = [i.get_any_name() for i in compiled.inputs if "_cache." not in i.get_any_name()]
        self._outputs = [o.get_any_name() for o in compiled.outputs]
        self._short = any(FEATURES in o.names and o.element_type == ov.Type.bf16 for o in compiled.outputs)
        tables = [port for port in (*compiled.inputs, *compiled.outputs) if len(port.partial_shape) == 2]
        #: Of inputs and outputs that have a row a token, by name.
        self.widths = {name: port.partial_shape[1].get_length() for port in tables for name in port.names}
        self._target = "logits" in self._outputs
        # A single row has not the bits of several.
        bf16 = self._target and precision == "bf16" and cpu.compute_type(precision) == ov.Type.bf16
        least = (2 if cpu.has_amx() else LEAST) if bf16 else 1
        usual = TARGET_SIZES if self._target else DRAFT_SIZES
        self.sizes = (least, *(size for size in usual if size > least))
        self._pool = self._bind_pool(compiled, cpu.compute_type(precision))
        self._bound = {name: self._request.get_tensor(name) for name in inputs}
        self._views = {name: tensor.data for name, tensor in self._bound.items()}
        widths = {i.get_any_name(): i.partial_shape[1] for i in compiled.inputs if len(i.partial_shape) == 2}
        self._prepare({name: width.get_length() for name, width in widths.items()})

    def _bind_pool(self, compiled: ov.CompiledModel, cache_type: ov.Type) -> np.ndarray:
        caches = [i for i in compiled.inputs if "_cache." in i.get_any_name()]
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
        """Run a pass of each usual size: its first takes 2 to 10 ms more. ``widths``: of a head's inputs, by name."""
        begin = time.perf_counter()
        for count in (size for size in self.sizes if size <= PREPARED):
            if time.perf_counter() - begin > PREPARING:
                return
            for given in widths or [""]:  # a head reads features, or where it goes on from a drafted token, its state
                rows = {name: np.zeros((count * (name == given), width), np.float32) for name, width in widths.items()}
                self.run(_blank(count, self.num_blocks), **rows)

    def run(self, call: Packed, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        asked = {FEATURES: len(call.token_ids), "state": len(call.token_ids)}
        rows = len(call.logit_rows)
        drafts = not self._target
        verifies = is_verification(call)
        # For the bits of plain decoding, which matrix products of one row alone do not have; and a draft for speed.
        if drafts or len(call.past_lens) > 1 or self.sizes[0] > 1:
            call = as_lanes(call, unmasked=drafts)
        tokens = len(call.token_ids)
        size = next_size(self.sizes, tokens) if verifies or drafts else max(tokens, self.sizes[0])
        size = max(size, call.padded_to)
        if drafts:
            inputs = _longer(inputs, size - tokens)
        call = padded(call, size, self.num_blocks, rows_too=self._target)
        self._feed(call._asdict() | inputs)
        outputs = self._request.infer(share_outputs=True).values()  # a copy of the logits would take half a millisecond
        read = {name: values[: asked.get(name, rows)] for name, values in zip(self._outputs, outputs, strict=True)}
        if self._short:
            read[FEATURES] = _from_bf16(read[FEATURES])
        return read

    def _feed(self, inputs: dict[str, np.ndarray]) -> None:
        """Write the bound tensors' memory: to bind another one takes three times as long."""
        for name, view in self._views.items():
            values = inputs[name]
            if view.shape != values.shape:
                self._bound[name].shape = values.shape
                self._views[name] = view = self._bound[name].data
            view[...] = values

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        rows = self._pool[:, source // BLOCK, :, source % BLOCK]
        self._pool[:, target // BLOCK, :, target % BLOCK] = rows


def _longer(inputs: dict[str, np.ndarray], more: int) -> dict[str, np.ndarray]:
    """With inputs of so many tokens ``more``. Of a head's two kinds, states are those of later tokens."""
    if more == 0:
        return inputs
    last = next((name for name in ("hidden", "features") if len(inputs.get(name, ()))), None)
    return {name: np.pad(rows, ((0, more * (name == last)), (0, 0))) for name, rows in inputs.items()}


def _from_bf16(values: np.ndarray) -> np.ndarray:
    """[n, F] as float32, of which bf16 is the upper half; OpenVINO calls its numbers fp16."""
    halves = np.zeros((*values.shape, 2), np.uint16)
    halves[..., 1] = values.view(np.uint16)
    return halves.view(np.float32)[..., 0]


def _blank(count: int, block: int) -> Packed:
    """``count`` requests of one token each, whose keys and values go to ``block``."""
    table, one = np.full((count, 1), block), np.ones(count, np.int64)
    return pack(np.zeros(count), np.zeros(count), 0 * one, one, table, np.arange(count))
