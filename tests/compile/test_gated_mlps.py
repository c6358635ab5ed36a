"""Gated MLPs as OpenVINO knows them: gates activated within their products, and with AMX one kernel for each."""

from collections import Counter

import numpy as np
import openvino as ov
import pytest

from echo_trt.compile.openvino import compile_graph, has_amx, join_mlps, read_graph

NETWORKS = pytest.mark.parametrize(("pair", "network", "layers"), [("self", "target", 3), ("close", "draft", 1)])


@NETWORKS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gates_are_activated_within_their_products(bundle_of, pair, network, layers, precision):
    compiled = compile_graph(read_graph(bundle_of(pair) / f"{network}.onnx"), precision)
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    fused = [info["originalLayersNames"].astype(str) for info in nodes if _kind(info) in ("FullyConnected", "LLMMLP")]
    gates = sum("silu" in names for names in fused)
    alone = Counter(_kind(info) for info in nodes if "silu" in info["originalLayersNames"].astype(str))
    assert gates == layers == alone.total(), alone


@NETWORKS
def test_joined_mlps_are_the_same_function(bundle_of, pair, network, layers):
    parted, joined = (read_graph(bundle_of(pair) / f"{network}.onnx") for _ in range(2))
    join_mlps(joined)
    more = Counter(node.get_type_name() for node in joined.get_ops())
    more.subtract(node.get_type_name() for node in parted.get_ops())
    assert more["Squeeze"] == layers
    assert more["MatMul"] == 0
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    parted_output, joined_output = (_first_mlp(model)(x)[0] for model in (parted, joined))
    assert abs(parted_output).max() > 1e-3
    assert joined_output == pytest.approx(parted_output, abs=1e-5)


@pytest.mark.skipif(not has_amx(), reason="needs a CPU with AMX")
def test_with_amx_each_is_one_kernel(bundle_of):
    compiled = compile_graph(read_graph(bundle_of("self") / "target.onnx"), "bf16")
    kinds = [_kind(node.get_rt_info()) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("LLMMLP") == 3


def _kind(info: dict) -> str:
    return info["layerType"].astype(str)


def _first_mlp(model: ov.Model) -> ov.CompiledModel:
    """The graph from what the first MLP reads to what it writes."""
    sigmoid = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Sigmoid")
    above = sigmoid
    while above.get_type_name() != "MatMul":
        above = above.input_value(0).get_node()
    unsqueezed = above.input_value(0).get_node().get_type_name() == "Unsqueeze"
    source = above.input_value(0).get_node().input(0) if unsqueezed else above.input(0)
    read = ov.opset13.parameter([-1, 64], np.float32)
    users = list(source.get_source_output().get_target_inputs())
    below = next(iter(sigmoid.output(0).get_target_inputs())).get_node()
    while below.get_type_name() != "MatMul":
        below = next(iter(below.output(0).get_target_inputs())).get_node()
    if unsqueezed:
        below = next(iter(below.output(0).get_target_inputs())).get_node()
    for user in users:
        user.replace_source_output(read.output(0))
    return ov.Core().compile_model(ov.Model([below], [read]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
