"""Weight matrices of an exported graph in 8 or 4 bits, one matrix in memory at a time.

In 8 bits they are NNCF's: symmetric, with a scale per channel. In 4 bits a group of a row's weights shares a scale and
a whole zero point. Weights of a GGUF file in Q4_0, Q4_1 or Q4_K keep their values: their groups share an offset
instead, and a second product adds the offsets times the sums of activations, since OpenVINO has no 8-bit products for
zero points that are no whole numbers. Embedding, output matrix and routers have 8 bits in both, since 4 change the
choice of tokens most there.
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
SAMPLE = 64  # rows by which the form of a matrix in 4 bits is chosen; larger: a surer choice, and a longer build
#: Weights of a group, and whether its zero point is whole: the fastest form first. The first is taken whose squared
#: error is less than MOST_ERROR times the least. Larger: faster forms, and larger errors.
FORMS, MOST_ERROR = ((64, True), (GROUP, True), (GROUP, False)), 4
#: Candidate steps between a group's least and greatest weight; the best is taken. More than 15: both are clipped; fewer
#: are found in files alone. Larger: a longer build.
WHOLE_STEPS, FILE_STEPS = (15, 16, 17), (15, 14, 13, 12, 11, 10, 9, 8)
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
    offsets: dict[str, TensorProto] = {}  # by the output of the product that they are added to
    with new.open("wb") as file:
        for tensor in model.graph.initializer:
            if found := uses.get(tensor.name):
                quantised = _in_groups if _has_four(tensor, found[0], precision) else _quantised
                parts, made = quantised(tensor, found[0], path.parent)
                for use in found:
                    use.node.input[use.input_index] = made[-1].output[0]
                    if parts[-1][0].name == f"{tensor.name}_offset":
                        offsets[use.node.output[0]] = parts[-1][0]
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
    _replace(model.graph.node, [*nodes, *_with_offsets(rest, offsets)])
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


def _with_offsets(nodes: list[onnx.NodeProto], offsets: dict[str, TensorProto]) -> Iterator[onnx.NodeProto]:
    """Let products add their offsets [O, groups] times the sums of each group of activations.

    OpenVINO computes the sums once for all products that read the same activations.
    """
    for node in nodes:
        if (name := node.output[0]) in offsets:
            (rows, weight, *bias), offset = node.input, offsets[name]
            yield helper.make_node("Constant", [], [f"{name}_shape"], value_ints=[-1, offset.dims[1], GROUP])
            yield helper.make_node("Constant", [], [f"{name}_axis"], value_ints=[-1])
            yield helper.make_node("Reshape", [rows, f"{name}_shape"], [f"{name}_groups"])
            yield helper.make_node("ReduceSum", [f"{name}_groups", f"{name}_axis"], [f"{name}_sums"], keepdims=0)
            yield helper.make_node("Cast", [offset.name], [f"{name}_wide"], to=TensorProto.FLOAT)
            yield helper.make_node("Gemm", [f"{name}_sums", f"{name}_wide", *bias], [f"{name}_offsets"], transB=1)
            _replace(node.input, [rows, weight, f"{name}_offsets"])
        yield node


def _has_four(tensor: TensorProto, use: _Use, precision: str) -> bool:
    rows = len(tensor.dims) == 2 and use.summed == -1 and tensor.dims[1] % GROUP == 0
    return precision == "int4" and rows and not tensor.name.endswith(EIGHT_BITS)


Quantised = tuple[list[tuple[TensorProto, np.ndarray]], list[onnx.NodeProto]]


def _quantised(tensor: TensorProto, use: _Use, folder: Path) -> Quantised:
    """Quantise one matrix to 8 bits: its integers, its scales, and the node that multiplies them."""
    weight = numpy_helper.to_array(tensor, str(folder))
    pieces = [_compress(piece, use.summed % weight.ndim) for piece in _pieces(weight, use.summed % weight.ndim)]
    integers, scales = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    kinds = ("quantized", TensorProto.INT8, integers.shape), ("scale", TensorProto.FLOAT, scales.shape)
    parts = _parts(tensor.name, *kinds)
    names = [part.name for part in parts]
    node = helper.make_node("DequantizeLinear", names, [f"{tensor.name}_dequantized"], axis=use.axis)
    return list(zip(parts, (integers, scales), strict=True)), [node]


def _in_groups(tensor: TensorProto, use: _Use, folder: Path) -> Quantised:
    """Quantise one matrix [O, I] to 4 bits: integers, scales, zero points or offsets, and the nodes that read them."""
    weight, name = numpy_helper.to_array(tensor, str(folder)), tensor.name
    size, whole = _form(weight[:: max(len(weight) // SAMPLE, 1)].astype(np.float32))
    groups = weight.shape[0], weight.shape[1] // size, size
    pieces = [_fit(piece.reshape(-1, size), whole)[1:] for piece in _pieces(weight, 1)]
    integers, scale, offset = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    if whole:
        integers, offset = integers + 8, _packed(np.rint(8 - offset / scale))
    kind, half, one = TensorProto.UINT4 if whole else TensorProto.INT4, TensorProto.FLOAT16, (*groups[:2], 1)
    last = ("zero", kind, one) if whole else ("offset", half, groups[:2])
    parts = _parts(name, ("quantized", kind, groups), ("scale", half, one), last)
    shape = numpy_helper.from_array(np.array(weight.shape), f"{name}_shape")
    shifted = (("Cast", ["zero"], "zeros", {"to": half}), ("Sub", ["wide", "zeros"], "shifted", {}))
    steps = (
        ("Cast", ["quantized"], "wide", {"to": half}),
        *(shifted if whole else ()),
        ("Mul", ["shifted" if whole else "wide", "scale"], "scaled", {}),
        ("Reshape", ["scaled", "shape"], "rows", {}),
        ("Cast", ["rows"], "dequantized", {"to": TensorProto.FLOAT}),
    )
    nodes = [
        helper.make_node(operator, [f"{name}_{part}" for part in inputs], [f"{name}_{output}"], **more)
        for operator, inputs, output, more in steps
    ]
    return [(shape, None), *zip(parts, (_packed(integers), scale, offset), strict=True)], nodes


def _parts(name: str, *parts: tuple[str, int, tuple[int, ...]]) -> list[TensorProto]:
    return [TensorProto(name=f"{name}_{part}", data_type=kind, dims=shape) for part, kind, shape in parts]


def _form(rows: np.ndarray) -> tuple[int, bool]:
    """Choose the size of the groups of ``rows``, float32 [n, I], and whether their zero points are whole."""
    forms = [(size, whole) for size, whole in FORMS if rows.shape[1] % size == 0]
    errors = [float(_fit(rows.reshape(-1, size), whole)[0].sum()) for size, whole in forms]
    limit = MOST_ERROR * min(errors) + 1e-9 * float((rows**2).sum())
    return next(form for form, error in zip(forms, errors, strict=True) if error <= limit)


def _fit(groups: np.ndarray, whole: bool) -> tuple[np.ndarray, ...]:
    """Return the squared errors, integers (-8 to 7), scales and offsets of ``groups`` float32 [n, size].

    A weight is about scale x integer + offset.
    """
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    if whole:  # a zero point is one of the sixteen integers
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    best = [np.full_like(low, np.inf), np.zeros(groups.shape, np.int8), *np.zeros((2, *low.shape), np.float16)]
    for steps in WHOLE_STEPS if whole else FILE_STEPS:
        scale = np.maximum((high - low) / steps, np.finfo(np.float16).tiny).astype(np.float16).astype(np.float32)
        offset = low + (8 - (15 - steps) // 2) * scale
        offset = np.clip(np.rint(offset / scale), -7, 8) * scale if whole else offset.astype(np.float16)
        integers = np.clip(np.rint((groups - offset) / scale), -8, 7)
        error = ((integers * scale + offset - groups) ** 2).sum(1, keepdims=True)
        better = error < best[0]
        for kept, new in zip(best, (error, integers, scale, offset), strict=True):
            np.copyto(kept, new, "unsafe", where=better)
    return tuple(best)


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
    low, high = np.append(integers, [0] * (integers.size % 2)).reshape(-1, 2).astype(np.int8).view(np.uint8).T & 15
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
