"""Gated MLPs as OpenVINO knows them: gates activated within their products, and with AMX one kernel for each."""

from collections import Counter

import numpy as np
import openvino as ov
import pytest

from echo_trt.backends.openvino import cpu as cpu_facts
from echo_trt.backends.openvino import graph as graph_parts
from echo_trt.backends.openvino.cpu import has_amx, has_bf16
from echo_trt.backends.openvino.graph import compile_graph, join_mlps, read_graph

NETWORKS = pytest.mark.parametrize(("pair", "network", "layers"), [("self", "target", 3), ("close", "draft", 1)])
WITHIN = {"FullyConnected", "LLMMLP"}  # kernels that can activate a gate: a matrix product, and a whole MLP
needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="needs a CPU with AVX-512, for bf16")
needs_amx = pytest.mark.skipif(not has_amx(), reason="needs a CPU with AMX")


@pytest.fixture(
    params=[
        pytest.param((False, False), id="fp32-alone"),
        pytest.param((True, False), id="bf16", marks=needs_bf16),
        pytest.param((True, True), id="amx", marks=needs_amx),
    ]
)
def cpu(request, monkeypatch):
    """Make graphs for each kind of CPU that this one can stand in for: CPUs that lack its instructions."""
    bf16, amx = request.param
    monkeypatch.setattr(cpu_facts, "has_bf16", lambda: bf16)
    monkeypatch.setattr(cpu_facts, "has_amx", lambda: amx)


@NETWORKS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gates_are_activated_within_their_products(cpu, bundle_of, pair, network, layers, precision):
    kinds = _gate_kinds(compile_graph(read_graph(bundle_of(pair) / f"{network}.onnx"), precision, threads=2))
    assert kinds.total() == layers
    assert set(kinds) <= WITHIN


@NETWORKS
def test_gates_of_joined_mlps_are_so_too(bundle_of, pair, network, layers):
    """As on a CPU with AMX, where the one kernel does not take every size."""
    model = read_graph(bundle_of(pair) / f"{network}.onnx")
    join_mlps(model)
    assert _gate_kinds(compile_graph(model, "fp32")) == {"FullyConnected": layers}


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


@needs_amx
def test_with_amx_each_is_one_kernel(bundle_of):
    compiled = compile_graph(read_graph(bundle_of("self") / "target.onnx"), "bf16", threads=2)
    assert _gate_kinds(compiled) == {"LLMMLP": 3}


@needs_bf16
@pytest.mark.parametrize(("threads", "cores", "joined"), [(1, 2, False), (2, 1, True), (0, 1, False), (0, 2, True)])
def test_one_thread_has_no_kernel_for_a_whole_mlp(threads, cores, joined, bundle_of, monkeypatch):
    """OpenVINO's divides by half the threads, which would end the process."""
    found = []
    monkeypatch.setattr(graph_parts, "join_mlps", found.append)
    monkeypatch.setattr(cpu_facts, "has_amx", lambda: True)
    monkeypatch.setattr(cpu_facts, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    compile_graph(read_graph(bundle_of("lookup") / "target.onnx"), "bf16", threads=threads)
    assert bool(found) == joined


def _gate_kinds(compiled: ov.CompiledModel) -> Counter[str]:
    """Kinds of the compiled nodes that a gate's activation is in, alone or with others.

    By name, but for a whole MLP's kernel: it has a gate, whatever names OpenVINO leaves it.
    """
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    named = [(info["layerType"].astype(str), info["originalLayersNames"].astype(str)) for info in nodes]
    return Counter(kind for kind, names in named if "silu" in names or kind == "LLMMLP")


def _first_mlp(model: ov.Model) -> ov.CompiledModel:
    """Return the graph from what the first MLP reads to what it writes."""
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
