"""Weight matrices of an exported graph in 8 or 4 bits, one matrix in memory at a time.

In 8 bits they are NNCF's: symmetric, with a scale per channel. In 4 bits GROUP weights of a row share a scale and a
zero point that is no whole number, so that weights of a GGUF file in Q4_0 or Q4_1 keep their values. Embedding, output
matrix and routers have 8 bits in both, since 4 change the choice of tokens most there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from echo_trt.backends.openvino.graph import GROUP

CHUNK = 1 << 24  # weights that are quantised at once; larger: more memory
ALIGNMENT = 64  # bytes between which tensors begin in the file
EIGHT_BITS = ("embed.weight", "lm_head.weight", "router.weight")
#: Operators with weights -> the input that has them.
INPUT_INDEX = {"Gemm": 1, "MatMul": 1, "Gather": 0}


@dataclass(frozen=True)
class _Use:
    """A weight's reader: the axis that its scales run along, and the axis that a product sums over."""

    node: onnx.NodeProto
    input_index: int
    axis: int
    summed: int


def quantise(path: Path, precision: str) -> None:
    """Replace the weight matrices of the graph at ``path`` in place; ``precision`` is int8 or int4."""
    model = onnx.load(path, load_external_data=False)
    uses = _uses(model.graph)
    data = path.with_name(path.name + ".data")
    new = path.with_name(data.name + "-new")
    tensors, nodes = [], []
    with new.open("wb") as file:
        for tensor in model.graph.initializer:
            if found := uses.get(tensor.name):
                quantised = _in_groups if _has_four(tensor, found[0], precision) else _quantised
                parts, made = quantised(tensor, found[0], path.parent)
                for use in found:
                    use.node.input[use.input_index] = made[-1].output[0]
                nodes += made
            else:
                parts = [(tensor, None)]
            for part, values in parts:
                _store(part, values, file, data.name, path.parent)
                tensors.append(part)
    # A graph's nodes come before their readers; conversions of replaced weights are left out.
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    rest = [node for node in model.graph.node if node.op_type != "Cast" or node.output[0] in used]
    _replace(model.graph.node, nodes + rest)
    _replace(model.graph.initializer, tensors)
    new.replace(data)
    onnx.save(model, path)


def _replace(field, values: list) -> None:
    kept = list(values)
    del field[:]
    field.extend(kept)


def _uses(graph: onnx.GraphProto) -> dict[str, list[_Use]]:
    """Find the readers of each matrix among the initializers, also behind a conversion to fp32."""
    matrices = {tensor.name: tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    matrices |= {output: name for output, name in casts.items() if name in matrices}
    uses: dict[str, list[_Use]] = {}
    for node in graph.node:
        input_index = INPUT_INDEX.get(node.op_type)
        if input_index is None or node.input[input_index] not in matrices:
            continue
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        if node.op_type == "Gather":
            use = _Use(node, input_index, 0, 1)
        elif transposed:
            use = _Use(node, input_index, -2, -1)
        else:
            use = _Use(node, input_index, -1, -2)
        uses.setdefault(matrices[node.input[input_index]], []).append(use)
    return uses


def _has_four(tensor: TensorProto, use: _Use, precision: str) -> bool:
    rows = len(tensor.dims) == 2 and use.summed == -1 and tensor.dims[1] % GROUP == 0
    return precision == "int4" and rows and not tensor.name.endswith(EIGHT_BITS)


Quantised = tuple[list[tuple[TensorProto, np.ndarray]], list[onnx.NodeProto]]


def _quantised(tensor: TensorProto, use: _Use, folder: Path) -> Quantised:
    """Quantise one matrix to 8 bits: its integers, its scales, and the node that multiplies them."""
    weight = numpy_helper.to_array(tensor, str(folder))
    pieces = [_compress(piece, use.summed % weight.ndim) for piece in _pieces(weight, use.summed % weight.ndim)]
    integers, scales = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    parts = _parts(tensor.name, (TensorProto.INT8, integers.shape), (TensorProto.FLOAT, scales.shape))
    names = [part.name for part in parts]
    node = helper.make_node("DequantizeLinear", names, [f"{tensor.name}_dequantized"], axis=use.axis)
    return list(zip(parts, (integers, scales), strict=True)), [node]


def _in_groups(tensor: TensorProto, use: _Use, folder: Path) -> Quantised:
    """Quantise one matrix [O, I] to 4 bits: integers, scales, zero points, and the nodes that compute its numbers."""
    weight, name = numpy_helper.to_array(tensor, str(folder)), tensor.name
    groups = weight.shape[0], weight.shape[1] // GROUP, GROUP
    pieces = [_fit(piece.reshape(-1, *groups[1:])) for piece in _pieces(weight, 1)]
    arrays = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
    one = TensorProto.FLOAT16, (*groups[:2], 1)
    parts = _parts(name, (TensorProto.UINT4, groups), one, one)
    parts.append(numpy_helper.from_array(np.array(weight.shape), f"{name}_shape"))
    integers, scale, zero, shape = (part.name for part in parts)
    steps = (
        ("Cast", [integers], "wide", {"to": TensorProto.FLOAT16}),
        ("Sub", [f"{name}_wide", zero], "shifted", {}),
        ("Mul", [f"{name}_shifted", scale], "scaled", {}),
        ("Reshape", [f"{name}_scaled", shape], "rows", {}),
        ("Cast", [f"{name}_rows"], "dequantized", {"to": TensorProto.FLOAT}),
    )
    nodes = [helper.make_node(kind, inputs, [f"{name}_{output}"], **more) for kind, inputs, output, more in steps]
    return list(zip(parts, (*arrays, None), strict=True)), nodes


def _parts(name: str, *kinds: tuple[int, tuple[int, ...]]) -> list[TensorProto]:
    named = zip(("quantized", "scale", "zero"), kinds, strict=False)
    return [TensorProto(name=f"{name}_{part}", data_type=kind, dims=shape) for part, (kind, shape) in named]


def _fit(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the integers of ``groups`` float32 [O, groups, GROUP], packed, their scales and their zero points."""
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    scale = np.maximum((high - low) / 15, np.finfo(np.float16).tiny).astype(np.float16)
    zero = np.clip(-low / scale, -6e4, 6e4).astype(np.float16)
    return _packed(np.clip(np.rint(groups / scale + zero), 0, 15)), scale, zero


def _pieces(weight: np.ndarray, summed: int) -> Iterator[np.ndarray]:
    """Cut a large matrix along its first axis, unless scales are taken over that."""
    rows = len(weight) if summed == 0 else max(CHUNK // max(weight[0].size, 1), 1)
    for begin in range(0, len(weight), rows):
        yield weight[begin : begin + rows].astype(np.float32)


def _compress(weight: np.ndarray, summed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return NNCF's integers, int8 in the shape of ``weight``, and scales, float32 without the summed axis."""
    from nncf import CompressWeightsMode  # slow to import, and only a build in few bits needs it
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.weight_lowering import compress_weight
    from nncf.tensor import Tensor

    compressed = compress_weight(Tensor(weight), (summed,), WeightCompressionConfig(CompressWeightsMode.INT8_SYM))
    # Copies: OpenVINO, which NNCF computes with, may write its next results over these.
    integers = compressed.tensor.as_numpy_tensor().data.reshape(weight.shape).copy()
    scale = compressed.scale.as_numpy_tensor().data.copy()
    return integers, scale.squeeze(axis=summed)


def _packed(integers: np.ndarray) -> np.ndarray:
    """Pack 4-bit integers by twos, the first in the low half of a byte, as ONNX stores them."""
    low, high = integers.reshape(-1, 2).astype(np.uint8).T & 15
    return low | high << 4


def _store(tensor: TensorProto, values: np.ndarray | None, file: BinaryIO, location: str, folder: Path) -> None:
    """Write a tensor's values, or copy what it has in the old file; a tensor in the graph itself stays there."""
    if values is None:
        if tensor.data_location != TensorProto.EXTERNAL:
            return
        values = numpy_helper.to_array(tensor, str(folder))
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset, length = file.tell(), values.nbytes
    file.write(np.ascontiguousarray(values).data if values.dtype.kind in "iuf" else values.tobytes())
    tensor.raw_data = b""  # the helper asks for it
    set_external_data(tensor, location, offset, length)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
