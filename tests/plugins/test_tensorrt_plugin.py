"""The TensorRT plugin as far as it goes without TensorRT's libraries and without a GPU: all but the launch itself."""

import numpy as np
import onnx
import pytest
import tensorrt_alone
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import SIZES, roles_of
from plugins.attention_calls import Batch

from echo_trt.backends.onnx_export import export
from super_tree_attention import super_tree_attention, tensorrt_plugin

WINDOW = 130
ID = f"{tensorrt_plugin.NAMESPACE}::{tensorrt_plugin.OPERATOR}"


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    """TensorRT's bindings with the plugin registered."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    if reason := tensorrt_alone.missing():
        pytest.skip(reason)
    yield tensorrt_alone.load(tmp_path_factory.mktemp("tensorrt"))
    tensorrt_alone.unload()


@pytest.fixture(scope="module")
def registered(trt):
    from tensorrt.plugin._lib import QDP_CREATORS, QDP_REGISTRY

    tensorrt_plugin.register()
    tensorrt_plugin.register()  # a second time is none
    assert [name for name in QDP_CREATORS if name.startswith("echo::")] == [ID]
    return QDP_REGISTRY[ID]


def plugin_of(trt, phase: str):
    """Return the plugin as the parser (phase BUILD) or the loader of an engine (phase RUNTIME) creates it."""
    from tensorrt.plugin._lib import _TemplatePluginCreator

    name, requests = tensorrt_plugin.OPERATOR, trt.QuickPluginCreationRequest
    request = requests.STRICT_JIT if phase == "BUILD" else requests.UNKNOWN
    field = trt.PluginField("sliding_window", np.array([WINDOW], np.int32), trt.PluginFieldType.INT32)
    fields, phase = trt.PluginFieldCollection([field]), getattr(trt.TensorRTPhase, phase)
    return _TemplatePluginCreator(name, "echo", {}).create_plugin(name, "echo", fields, phase, request)


def described(trt, half) -> tuple[list, list]:
    """Return types and ranks of the plugin's inputs."""
    return [half] * 5 + [trt.DataType.INT32] * 6, [2, 2, 2, 4, 4, 1, 1, 1, 1, 1, 1]


def test_outputs_are_those_of_the_inputs_types_and_share_no_declared_memory(trt, registered):
    for half in (trt.DataType.BF16, trt.DataType.HALF):
        plugin = plugin_of(trt, "BUILD")
        assert plugin.get_output_data_types(*described(trt, half)) == [half] * 3
        assert plugin.aliased_map == {0: -1, 1: -1, 2: -1}
        assert [(f.name, int(f.data[0])) for f in plugin.get_fields_to_serialize()] == [("sliding_window", WINDOW)]


@given(st.lists(st.integers(0, 1), max_size=40))
def test_a_mask_keeps_its_bytes(mask):
    mask = np.array(mask, np.uint8)
    words = tensorrt_plugin.words(mask)
    assert (words.dtype, len(words)) == (np.int32, -(-len(mask) // 4))
    assert (words.view(np.uint8)[: len(mask)] == mask).all()


class Enqueued:
    """A call of the plugin as TensorRT makes it, by addresses, on a CPU, where Triton's interpreter launches.

    copied  whether TensorRT binds the caches' outputs to memory of their own
    """

    def __init__(self, trt, batch: Batch, monkeypatch, copied: bool = False):
        from super_tree_attention import tensorrt_definitions

        self.trt, self.kinds = trt, {torch.float16: trt.DataType.HALF, torch.int32: trt.DataType.INT32}
        *tables, mask, begins = batch.metadata
        mask = torch.from_numpy(tensorrt_plugin.words(mask.numpy()))
        self.inputs = [*batch.packed, *(cache.clone() for cache in batch.caches), *tables, mask, begins]
        written = [torch.full_like(t, torch.nan) for t in self.inputs[3:5]] if copied else self.inputs[3:5]
        self.outputs = [torch.full_like(batch.packed[0], torch.nan), *written]
        at = {tensor.data_ptr(): tensor for tensor in (*self.inputs, *self.outputs)}
        monkeypatch.setattr(tensorrt_definitions, "memory", lambda tensor: at[tensor.data_ptr])
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address: None)

    def run(self, plugin) -> torch.Tensor:
        described = [[self._described(t) for t in tensors] for tensors in (self.inputs, self.outputs)]
        addresses = [[t.data_ptr() for t in tensors] for tensors in (self.inputs, self.outputs)]
        strides = [[t.stride() for t in tensors] for tensors in (self.inputs, self.outputs)]
        plugin.enqueue(*described, *addresses, *strides, 0)
        return self.outputs[0]

    def _described(self, tensor: torch.Tensor):
        made = self.trt.PluginTensorDesc()
        made.dims, made.type, made.scale = tuple(tensor.shape), self.kinds[tensor.dtype], 1.0
        made.format = self.trt.TensorFormat.LINEAR
        return made


REQUESTS = {"splits": [(700, 3, True), (3, 2, False)], "a prompt": [(0, 40, False)], "one": [(260, 1, False)]}


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("copied", [False, True])
def test_a_loaded_engines_call_computes_the_operator(trt, registered, monkeypatch, requests, copied):
    """As an engine's loader creates the plugin, from stored fields; with caches that TensorRT copies it is slower."""
    batch = Batch(requests, 2, 2, 64, torch.float16)
    wanted_caches = [cache.clone() for cache in batch.caches]
    wanted = super_tree_attention(*batch.packed, *wanted_caches, *batch.metadata, WINDOW)
    call = Enqueued(trt, batch, monkeypatch, copied)
    plugin = plugin_of(trt, "RUNTIME")
    if copied:
        with pytest.warns(UserWarning, match="TensorRT keeps a KV cache twice, and a call copies"):
            output = call.run(plugin)
    else:
        output = call.run(plugin)
    torch.testing.assert_close(output, wanted, atol=4e-3, rtol=4e-3)
    for cache, expected in zip(call.outputs[1:], wanted_caches, strict=True):
        torch.testing.assert_close(cache, expected, atol=0, rtol=0, equal_nan=True)


@pytest.fixture(scope="module")
def graphs(networks, tmp_path_factory):
    """Return the exported target, as it was and as TensorRT takes it."""
    folder = tmp_path_factory.mktemp("graphs")
    export(roles_of("lookup", networks)["target"], folder / "target.onnx")
    tensorrt_plugin.prepare_graph(folder / "target.onnx", folder / "tensorrt.onnx")
    return onnx.load(folder / "target.onnx"), onnx.load(folder / "tensorrt.onnx")


def test_the_graph_has_the_caches_outputs_and_is_else_as_it_was(graphs):
    before, after = (g.graph for g in graphs)
    assert len([n for n in after.node if n.domain == "echo"]) == SIZES["num_hidden_layers"]
    for old, new in zip(before.node, after.node, strict=True):
        written = [name + ".written" for name in old.input[3:5]] if old.domain == "echo" else []
        assert (new.domain, new.op_type, list(new.input)) == (old.domain, old.op_type, list(old.input))
        assert list(new.output) == [*old.output, *written]
    caches = [i.name for i in before.input if "_cache." in i.name]
    assert [o.name for o in after.output] == [o.name for o in before.output] + [c + ".written" for c in caches]
    types = {v.name: v.type for v in (*after.input, *after.output)}
    assert all(types[c] == types[c + ".written"] for c in caches)
    assert types["tree_mask"].tensor_type.elem_type == onnx.TensorProto.INT32
    assert {i.name: i.raw_data for i in after.initializer} == {i.name: i.raw_data for i in before.initializer}


def test_nodes_have_what_the_parser_asks_for(graphs, registered):
    for node in (n for n in graphs[1].graph.node if n.domain == "echo"):
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (values["plugin_namespace"], values["plugin_version"], values["aot"]) == (b"echo", b"1", 0)
        assert (registered.input_attrs, values["sliding_window"], len(values)) == ({"sliding_window": int}, 0, 4)
        assert len(node.input) == len(registered.input_tensor_names)
        assert len(node.output) == registered.num_outputs
