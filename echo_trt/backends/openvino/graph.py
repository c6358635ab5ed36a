"""ONNX to OpenVINO: ``echo::SuperTreeAttention`` becomes PagedAttention, whose qq_bias is our tree mask."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import compress_model_transformation
from openvino._pyopenvino.op import _PagedAttentionExtension  # experimental: the reason why openvino is pinned
from openvino.frontend.onnx import ConversionExtension
from openvino.op import Constant
from openvino.preprocess import PrePostProcessor

from echo_trt.backends.base import DOMAIN, OPERATOR
from echo_trt.backends.openvino import cpu
from echo_trt.errors import UserError
from echo_trt.speculation.pack import BLOCK

FEATURES = "features"  # the output that only a head reads
SLIDING_WINDOW, MAX_CONTEXT = 10, 12  # indices of these inputs of PagedAttention
NARROW = (ov.Type.bf16, ov.Type.f16)
DECOMPRESSION = "decompression_0"  # OpenVINO's mark of a conversion that stays in the graph


def read_graph(path: Path) -> ov.Model:
    """Read the exported graph as an OpenVINO model, with weights memory-mapped."""
    data = path.with_name(f"{path.name}.data")
    if path.parent.resolve() not in data.resolve().parents:
        raise UserError(
            f"bundle file {data} is a link to {data.resolve()}, and OpenVINO reads no weights from outside of the "
            "bundle; copy it with its files (cp -rL)."
        )
    core = ov.Core()
    core.add_extension(ConversionExtension(OPERATOR, DOMAIN, _to_paged_attention))
    try:
        return core.read_model(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".").replace(". ", ", ")
        raise UserError(
            f"{path} is not a network that OpenVINO reads ({reason}); see with echo-trt inspect whether the bundle is "
            "as it was built, or build it again."
        ) from error


def compile_graph(model: ov.Model, precision: str, threads: int = 0) -> ov.CompiledModel:
    """Compile for this CPU. ``threads`` 0 takes OMP_NUM_THREADS, or OpenVINO's choice where that is not set."""
    for parameter in model.get_parameters():
        if "_cache." in parameter.get_friendly_name():
            parameter.set_partial_shape(ov.PartialShape([-1, BLOCK, -1]))
            parameter.set_element_type(ov.Type.dynamic)
    _measure_context(model)
    model.validate_nodes_and_infer_types()
    if cpu.stores_fp16(precision):
        compress_model_transformation(model)
    compute = cpu.compute_type(precision).to_string()
    _keep_narrow(model)
    options = {"INFERENCE_PRECISION_HINT": compute, "KV_CACHE_PRECISION": compute, "PERFORMANCE_HINT": "LATENCY"}
    threads = threads or _asked_threads()
    if compute == "bf16":
        model = _with_short_features(model)
        if cpu.has_amx() and (threads or cpu.cores()) > 1:  # its kernel divides by half the threads
            join_mlps(model)
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return ov.Core().compile_model(model, "CPU", options)


def smallest_window(model: ov.Model) -> int | None:
    """Return up to how many tokens of a request, its tree's among them, trees are exact; None: any number.

    PagedAttention counts rows of a window, and siblings are rows behind each other.
    """
    attention = (node for node in model.get_ops() if node.get_type_name() == "PagedAttentionExtension")
    windows = [int(node.input_value(SLIDING_WINDOW).get_node().data) for node in attention]
    return min((window for window in windows if window), default=None)


def _asked_threads() -> int:
    """Read OMP_NUM_THREADS, which PyTorch heeds and OpenVINO does not: a share of a machine's cores is set by it."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    return int(requested) if requested.isdecimal() else 0


def _keep_narrow(model: ov.Model) -> None:
    """Mark conversions of weights in bf16 and fp16, so that these are compiled from the mapped file.

    OpenVINO converts other constants to fp32 beforehand, in memory of its own. It also has that mark read before a
    lookup alone, so a table is converted there and not after it.
    """
    for node in model.get_ops():
        table = node.get_type_name() == "Gather" and node.input_value(0)
        if table and table.get_element_type() in NARROW and table.get_node().get_type_name() == "Constant":
            node.input(0).replace_source_output(ops.convert(table, "f32").output(0))
    for node in model.get_ops():
        if node.get_type_name() == "Convert" and node.input_value(0).get_element_type() in NARROW and _is_weight(node):
            node.get_rt_info()[DECOMPRESSION] = ""
    model.validate_nodes_and_infer_types()


def _with_short_features(model: ov.Model) -> ov.Model:
    """Put a target's features out in bf16.

    For an output in fp32, OpenVINO keeps everything from the last matrix products on in fp32. For features that is the
    residual of all layers, with two conversions per layer.
    """
    if all(FEATURES not in output.names for output in model.outputs):
        return model
    wrapper = PrePostProcessor(model)
    wrapper.output(FEATURES).tensor().set_element_type(ov.Type.bf16)
    return wrapper.build()


def join_mlps(model: ov.Model) -> None:
    """Write gated MLPs of three matrices over three axes, for which OpenVINO has one kernel with AMX.

    That takes a fifth off a pass of few tokens.
    """
    axis = np.int64(1)
    for sigmoid in [node for node in model.get_ops() if node.get_type_name() == "Sigmoid"]:
        gate, activated = _matrix_product(sigmoid.input_value(0)), _only_user(sigmoid)
        gated = activated and _only_user(activated)
        down = gated and _only_user(gated)
        if not gate or not down or down.get_type_name() != "MatMul":
            continue
        others = [value for value in gated.input_values() if value.get_node().get_name() != activated.get_name()]
        up = _matrix_product(others[0]) if len(others) == 1 else None
        products = [product for product in (gate, up, down) if product]
        if len(products) < 3 or not all(_is_weight(product.input_value(1).get_node()) for product in products):
            continue
        rows = ops.unsqueeze(gate.input_value(0), axis)
        wide, other = (ops.matmul(rows, product.input_value(1), False, True) for product in (gate, up))
        swish = ops.multiply(wide, ops.sigmoid(wide))
        joined = ops.multiply(swish, other)
        narrow = ops.matmul(joined, down.input_value(1), False, True)
        # A profile then still shows the names of the graph.
        for new, old in ((wide, gate), (other, up), (swish, activated), (joined, gated), (narrow, down)):
            new.set_friendly_name(old.get_friendly_name())
        replaced = ops.squeeze(narrow, axis).output(0)
        for user in down.output(0).get_target_inputs():
            user.replace_source_output(replaced)


def _matrix_product(value: ov.Output) -> ov.Node | None:
    """Return the matrix product behind ``value``, before the factor and the summand of a Gemm."""
    node = value.get_node()
    while node.get_type_name() in ("Add", "Multiply"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "MatMul" else None


def _is_weight(node: ov.Node) -> bool:
    """Return whether ``node`` is a constant, or the conversion of one that is stored in a narrower type."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant"


def _only_user(node: ov.Node) -> ov.Node | None:
    users = node.output(0).get_target_inputs()
    return next(iter(users)).get_node() if len(users) == 1 else None


def _measure_context(model: ov.Model) -> None:
    """Compute the longest context of a call in the graph: it sizes a workspace that is cleared at every call."""
    inputs = {p.get_friendly_name(): p for p in model.get_parameters()}
    new = ops.squeeze(ops.shape_of(inputs["token_ids"], "i32"), ops.constant(np.zeros(1, np.int64)))
    longest = ops.add(ops.reduce_max(inputs["past_lens"], np.zeros(1, np.int64)), new).output(0)
    for node in model.get_ops():
        if node.get_type_name() == "PagedAttentionExtension":
            node.input(MAX_CONTEXT).replace_source_output(longest)


def _constant(values: object, dtype: type) -> ov.Output:
    array = np.array(values, dtype=dtype)
    return Constant(ov.Type(dtype), ov.Shape(array.shape), array.reshape(-1).tolist()).output(0)


def _to_paged_attention(node) -> list[ov.Output]:
    inputs = [node.get_input(i) for i in range(node.get_input_size())]
    kv_heads, head_dim = node.get_attribute("num_kv_heads"), node.get_attribute("head_dim")
    no_int, no_float = _constant([], np.int32), _constant([], np.float32)
    scale, window = _constant(head_dim**-0.5, np.float32), _constant(node.get_attribute("sliding_window", 0), np.int32)
    longest, no_eviction = _constant(node.get_attribute("max_context"), np.int32), _constant(0, np.int32)
    attention = _PagedAttentionExtension(
        [
            *inputs[:9],  # query, key, value, caches, past_lens, seq_begins, block_indices, block_begins
            *(scale, window, no_float, longest, no_int),  # scale, sliding window, alibi, max context, score window
            *(no_int, no_int, no_float, no_float),  # rotation of evicted blocks (3), sparse attention threshold
            *(_constant(64, np.int32), _constant(8, np.int32), no_float),  # sparse attention block and stride, sinks
            *(no_eviction, no_int, no_int, no_int, no_int),  # adaptive eviction, token types
            *inputs[9:11],  # tree_mask, tree_mask_begins
        ]
    )
    info = attention.get_rt_info()
    for kind in "kv":
        info[f"num_{kind}_heads"], info[f"{kind}_head_size"] = kv_heads, head_dim
    return [attention.output(0)]
