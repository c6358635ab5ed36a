"""The native graph: what its table promises, standard operators alone, and none of what compilers ignore in silence."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from pairs import NATIVE_ROWS, VOCAB, roles_of

from echo_trt.backends.native_export import export_native

FLOAT = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
INT32, INT64, UINT8, SCORES = TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.FLOAT


@pytest.fixture(
    scope="module", params=[("eagle3", "target", "fp32"), ("eagle3", "draft", "fp16"), ("model", "draft", "bf16")]
)
def exported(request, networks, tmp_path_factory):
    """Return a graph's file, the network that it came from, and its float type."""
    pair, name, precision = request.param
    role, path = roles_of(pair, networks)[name], tmp_path_factory.mktemp("native") / f"{name}.onnx"
    if precision == "bf16":  # as a loader gives it: weights in the graph's type, the rotary table in float32
        for parameter in role.parameters():
            parameter.data = parameter.data.bfloat16()
    export_native(role, path, precision, NATIVE_ROWS)
    return path, role, FLOAT[precision]


@pytest.fixture
def graph(exported):
    return onnx.load(exported[0], load_external_data=False).graph


def test_operators_are_standard_and_every_input_counts(exported, graph):
    path, role, _ = exported
    opsets = onnx.load(path, load_external_data=False).opset_import
    assert [(o.domain, o.version) for o in opsets] == [("", 24)]
    assert {node.domain for node in graph.node} == {""}
    assert {i.name for i in graph.input} <= {name for node in graph.node for name in node.input}
    onnx.checker.check_model(path, full_check=True)
    operators = [node.op_type for node in graph.node]
    assert operators.count("Attention") == role.num_layers
    assert operators.count("TensorScatter") == 2 * role.num_layers


def test_attention_reads_the_written_caches_under_an_additive_mask(exported, graph):
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    nodes = [node for node in graph.node if node.op_type == "Attention"]
    for layer, node in enumerate(nodes):
        _, keys, values, mask = node.input
        assert (keys, values) == (f"new_key_cache.{layer}", f"new_value_cache.{layer}")
        assert types[mask] == exported[2]  # compilers refuse or misread bool masks
        assert len(node.output) == 1
        assert len(node.attribute) == 0
    written = {out: node for node in graph.node for out in node.output if node.op_type == "TensorScatter"}
    for name, node in written.items():
        assert node.input[0] == name.removeprefix("new_")
        assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {"axis": 2}


def test_weights_lie_beside_the_graph_once_in_its_type(exported, graph):
    path, role, floats = exported
    stored = [t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL]
    indices = [{entry.key: entry.value for entry in t.external_data} for t in stored]
    assert {index["location"] for index in indices} == {path.name + ".data"}
    ranges = sorted((int(index["offset"]), int(index["offset"]) + int(index["length"])) for index in indices)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    matrices = [t for t in graph.initializer if len(t.dims) == 2 and VOCAB in t.dims]
    assert len(matrices) == sum(p.dim() == 2 and VOCAB in p.shape for p in role.parameters())
    float_types = {t.data_type for t in graph.initializer if t.data_type in FLOAT.values() and np.prod(t.dims) > 1}
    assert float_types == {floats}
    assert max(len(t.raw_data) for t in graph.initializer) < 1000


def test_the_callers_network_keeps_its_type(exported):
    _, role, floats = exported
    assert {p.dtype for p in role.parameters()} == {torch.bfloat16 if floats == FLOAT["bf16"] else torch.float32}
    assert role.network.rotary.cos.dtype == torch.float32
