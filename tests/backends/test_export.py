"""The exported graph: standard but for one operator, each weight once and beside it; and the check of a build."""

import itertools

import numpy as np
import onnx
import pytest
from pairs import PAIRS, VOCAB, recipe_of, roles_of
from refusal import refused

from echo_trt.backends import self_check
from echo_trt.backends.openvino import build as building
from echo_trt.bundle.manifest import read_manifest
from echo_trt.cli.build import build

GRAPHS = [
    ("lookup", "target"), ("eagle3", "target"), ("model", "draft"), ("eagle3", "draft"), ("close", "draft"),
    ("dflash", "draft"), ("dspark", "draft"),
]  # fmt: skip


@pytest.fixture(params=GRAPHS, ids="/".join)
def exported(request, bundle_of, networks):
    """Return a graph's file, and the network that it came from."""
    pair, name = request.param
    return bundle_of(pair) / f"{name}.onnx", roles_of(pair, networks)[name]


def test_operators_are_standard_but_for_attention(exported):
    path, role = exported
    graph = onnx.load(path, load_external_data=False).graph
    assert {node.domain for node in graph.node} == {"", "echo"}
    ours = [node for node in graph.node if node.domain == "echo"]
    assert [node.op_type for node in ours] == ["SuperTreeAttention"] * role.num_layers
    for node in ours:
        attributes = {a.name: a.i for a in node.attribute}
        config = role.network.config
        assert (attributes["num_kv_heads"], attributes["head_dim"]) == (config.num_kv_heads, config.head_dim)


def test_weights_lie_beside_the_graph_and_once(exported):
    path, role = exported
    model = onnx.load(path, load_external_data=False)
    stored = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    indices = [{entry.key: entry.value for entry in t.external_data} for t in stored]
    assert {index["location"] for index in indices} == {path.name + ".data"}
    ranges = sorted((int(index["offset"]), int(index["offset"]) + int(index["length"])) for index in indices)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    tables_of_tokens = [t for t in model.graph.initializer if len(t.dims) == 2 and VOCAB in t.dims]
    parameters = list(role.parameters())
    assert len(tables_of_tokens) == sum(p.dim() == 2 and VOCAB in p.shape for p in parameters)
    numbers = sum(p.numel() for p in parameters)
    # The rotary table, and a head's token map, are all that comes on top; the smallest tensors stay in the graph.
    tables = sum(b.numel() * b.element_size() for b in role.buffers())
    assert 0.95 * 4 * numbers < sum(end - begin for begin, end in ranges) <= 4 * numbers + tables
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("pair", PAIRS)
def test_the_check_is_in_the_manifest(pair, bundle_of):
    manifest = read_manifest(bundle_of(pair))
    assert set(manifest.checks) == ({"target"} if manifest.draft is None else {"target", "draft"})
    for check in manifest.checks.values():
        assert 0 < check.prompt_error < 1e-5
        assert 0 <= check.tree_error < 1e-5
        assert check.bound == self_check.BOUNDS["fp32"]
        assert check.same_argmax == 1


@pytest.mark.parametrize("pair", ["lookup", "eagle3"])
def test_a_wrong_engine_fails_the_build(pair, networks, tmp_path, monkeypatch):
    """One weight of the last graph is changed between its export and its check."""
    export, last = building.export_parted, "target" if pair == "lookup" else "draft"

    def corrupting(role, path):
        export(role, path)
        if path.name == f"{last}.onnx":
            data = path.with_name(path.name + ".data")
            values = np.fromfile(data, np.float32)
            values[np.abs(values).argmax()] *= 1.5
            values.tofile(data)

    monkeypatch.setattr(building, "export_parted", corrupting)
    with refused("self-check failed", "fp32", "0.0001", "largest logit", "--engine"):
        build(recipe_of(pair, networks), networks, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
