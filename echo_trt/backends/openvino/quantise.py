"""Weight matrices of an exported graph in 8 or 4 bits, one matrix in memory at a time.

The numbers are NNCF's: symmetric, with a scale per channel in 8 bits, and a scale per group of GROUP weights in 4 bits.
Embedding, output matrix and routers have 8 bits in both, since 4 change the choice of tokens most there.
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
                parts, node = _quantised(tensor, found[0], precision, path.parent)
                for use in found:
                    use.node.input[use.input_index] = node.output[0]
                nodes.append(node)
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


def _quantised(
    tensor: TensorProto, use: _Use, precision: str, folder: Path
) -> tuple[list[tuple[TensorProto, np.ndarray]], onnx.NodeProto]:
    """Quantise one matrix: its integers, its scales, and the node that multiplies them."""
    weight = numpy_helper.to_array(tensor, str(folder))
    four = precision == "int4" and weight.ndim == 2 and use.summed == -1 and weight.shape[1] % GROUP == 0
    four = four and not tensor.name.endswith(EIGHT_BITS)
    pieces = [_compress(piece, use.summed % weight.ndim, four) for piece in _pieces(weight, use.summed % weight.ndim)]
    integers, scales = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    kind = TensorProto.INT4 if four else TensorProto.INT8
    named = (("quantized", kind, integers.shape), ("scale", TensorProto.FLOAT, scales.shape))
    parts = [TensorProto(name=f"{tensor.name}_{name}", data_type=kind, dims=shape) for name, kind, shape in named]
    settings = {"axis": 1, "block_size": GROUP} if four else {"axis": use.axis}
    names = [part.name for part in parts]
    node = helper.make_node("DequantizeLinear", names, [f"{tensor.name}_dequantized"], **settings)
    return list(zip(parts, (_packed(integers) if four else integers, scales), strict=True)), node


def _pieces(weight: np.ndarray, summed: int) -> Iterator[np.ndarray]:
    """Cut a large matrix along its first axis, unless scales are taken over that."""
    rows = len(weight) if summed == 0 else max(CHUNK // max(weight[0].size, 1), 1)
    for begin in range(0, len(weight), rows):
        yield weight[begin : begin + rows].astype(np.float32)


def _compress(weight: np.ndarray, summed: int, four: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return NNCF's integers, int8 in the shape of ``weight``, and scales, float32 without the summed axis."""
    from nncf import CompressWeightsMode  # slow to import, and only a build in few bits needs it
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.weight_lowering import compress_weight
    from nncf.tensor import Tensor

    mode = CompressWeightsMode.INT4_SYM if four else CompressWeightsMode.INT8_SYM
    compressed = compress_weight(Tensor(weight), (summed,), WeightCompressionConfig(mode, GROUP if four else -1))
    # Copies: OpenVINO, which NNCF computes with, may write its next results over these.
    integers = compressed.tensor.as_numpy_tensor().data.reshape(weight.shape).copy()
    scale = compressed.scale.as_numpy_tensor().data.copy()
    return integers, scale.squeeze(axis=summed + 1 if four else summed)


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
