"""The TensorRT plugins as far as they go without TensorRT's libraries and without a GPU: all but the launch itself."""

import re
import subprocess
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorrt_alone
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import SIZES, roles_of

from echo_trt.backends.onnx_export import export
from super_tree_attention import kernel_plan, super_tree_attention, tensorrt_names, tensorrt_plugin

INPUTS = ("query", "key", "value", "key_cache", "value_cache", "past_lens", "seq_begins", "block_indices",
          "block_begins", "tree_mask", "tree_mask_begins")  # fmt: skip
BLOCK = 32


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    """TensorRT's bindings with the plugins registered."""
    if reason := tensorrt_alone.missing():
        pytest.skip(reason)
    yield tensorrt_alone.load(tmp_path_factory.mktemp("tensorrt"))
    tensorrt_alone.unload()


@pytest.fixture(scope="module")
def definitions(trt):
    tensorrt_plugin.register()
    tensorrt_plugin.register()  # a second time is none
    from super_tree_attention import tensorrt_definitions

    return tensorrt_definitions


@pytest.fixture(scope="module")
def registered(definitions):
    from tensorrt.plugin._lib import QDP_CREATORS, QDP_REGISTRY

    plugins = {name.removeprefix("echo::"): QDP_REGISTRY[name] for name in QDP_CREATORS if name.startswith("echo::")}
    assert set(plugins) == {tensorrt_names.ATTENTION, tensorrt_names.COMBINE}
    return plugins


@pytest.fixture
def card(definitions, monkeypatch):
    """Stand in for a driver that describes an H100."""
    monkeypatch.setattr("super_tree_attention.launch.device_facts", lambda: (90, 132))


def plugin_of(trt, registered, name: str, ahead_of_time: bool, **attributes: int):
    """Return a plugin as the parser creates it from a node's attributes."""
    from tensorrt.plugin._lib import _TemplatePluginCreator

    creator = _TemplatePluginCreator(name, "echo", {n: (True, t) for n, t in registered[name].input_attrs.items()})
    fields = [trt.PluginField(n, np.array([v]), trt.PluginFieldType.INT64) for n, v in attributes.items()]
    wanted = trt.QuickPluginCreationRequest
    request = wanted.STRICT_AOT if ahead_of_time else wanted.STRICT_JIT
    fields = trt.PluginFieldCollection(fields)
    return creator.create_plugin(name, "echo", fields, trt.TensorRTPhase.BUILD, request)


@pytest.mark.parametrize("ahead_of_time", [False, True])
@pytest.mark.parametrize("alias", [0, 1])
def test_outputs_are_described(trt, registered, card, ahead_of_time, alias):
    bf16, int32, single = trt.DataType.BF16, trt.DataType.INT32, trt.DataType.FLOAT
    attributes = {"num_kv_heads": 2, "head_dim": 64}
    attention = plugin_of(trt, registered, "SuperTreeAttention", ahead_of_time, **attributes, alias_caches=alias)
    types = attention.get_output_data_types([bf16] * 5 + [int32] * 6, [2, 2, 2, 4, 4, 1, 1, 1, 1, 1, 1])
    assert types == [bf16, single, single, bf16, bf16]
    assert attention.aliased_map == {0: -1, 1: -1, 2: -1, 3: 3 if alias else -1, 4: 4 if alias else -1}
    combine = plugin_of(trt, registered, "SuperTreeCombine", ahead_of_time, **attributes)
    assert combine.get_output_data_types([int32] * 4 + [single, single, bf16], [1, 1, 1, 1, 2, 1, 2]) == [bf16]
    assert combine.aliased_map == {0: 6}


@pytest.mark.parametrize("name", ["SuperTreeAttention", "SuperTreeCombine"])
def test_there_is_one_choice_of_types(trt, registered, card, name):
    inputs, outputs = len(registered[name].input_tensor_names), registered[name].num_outputs
    attributes = (2, 64) if name == "SuperTreeAttention" else ()

    def combinations(dtype):
        descs = [desc(trt, dtype, (64, 512)) for _ in range(inputs)]
        (choice,) = registered[name].autotune_func(*descs, *attributes, ())
        return choice._get_combinations()

    for dtype in (trt.DataType.BF16, trt.DataType.HALF):
        (only,) = combinations(dtype)
        assert len(only.types) == inputs + outputs
        assert set(only.types) == {dtype, trt.DataType.INT32, trt.DataType.FLOAT}
        assert len(only.tactics or ()) == (name == "SuperTreeAttention")
    with pytest.raises(ValueError, match=r"computes in fp16 or bf16, not in .*FLOAT; build in one of them"):
        combinations(trt.DataType.FLOAT)


@given(st.lists(st.integers(0, 1), max_size=40))
def test_a_mask_keeps_its_bytes(mask):
    mask = np.array(mask, np.uint8)
    words = tensorrt_plugin.words(mask)
    assert (words.dtype, len(words)) == (np.int32, -(-len(mask) // 4))
    assert (words.view(np.uint8)[: len(mask)] == mask).all()


class Launches:
    """Stands where the driver would be: runs what is launched through Triton's interpreter, on the same memory."""

    def __init__(self, kernels, tensors: list[torch.Tensor], head_dim: int, group: int):
        self.kernels, self.head_dim, self.group, self.names = kernels, head_dim, group, []
        self.at = {t.data_ptr(): t for t in tensors}

    def load(self, compiled):
        return compiled

    def launch(self, compiled, grid, threads, shared, stream, pointers, integers, results) -> None:
        assert results[-2:] == [0, 0]
        tensors = [self.at[p] for p in (*pointers, *results[:-2])]
        arguments = [*tensors[: len(pointers)], *integers, *tensors[len(pointers) :]]
        sizes = {"HEAD_DIM": self.head_dim, "GROUP": self.group, "BLOCK": BLOCK, "ROWS": compiled.rows,
                 "KEYS": 64, "NEW_KEYS": 32, "MAX_SPLITS": kernel_plan.MAX_SPLITS}  # fmt: skip
        kernel = getattr(self.kernels, compiled.kind)
        kernel[grid](*arguments, **{name: size for name, size in sizes.items() if name in kernel.arg_names})
        self.names.append(compiled.kind)


def tensor(value: torch.Tensor, dtype) -> SimpleNamespace:
    return SimpleNamespace(dtype=dtype, shape=tuple(value.shape), data_ptr=value.data_ptr())


@pytest.mark.parametrize(("past", "split"), [((700, 3), 6), ((0, 40), 1), ((260,), 3)])
def test_what_python_launches_computes_the_operator(trt, registered, definitions, card, monkeypatch, past, split):
    """Both plugins in turn, with their own grids, splits and arguments, against the reference."""
    from super_tree_attention.triton_attention import _interpreted

    heads, kv_heads, head_dim = 4, 2, 16
    call = make_call(np.array(past), np.array([5, 2][: len(past)]), heads, kv_heads, head_dim)
    wanted_caches = {n: call[n].clone() for n in ("key_cache", "value_cache")}
    wanted = super_tree_attention(**call | wanted_caches)

    tokens, requests = len(call["query"]), len(past)
    splits = kernel_plan.plan(tokens, requests, len(call["block_indices"]), kv_heads, heads // kv_heads).num_splits
    rows = tokens * heads
    scratch = torch.full((rows, splits, head_dim), torch.nan), torch.full((rows, splits), torch.nan)
    output = torch.full_like(wanted, torch.nan)
    whole = [*call.values(), *scratch, output]
    driver = Launches(_interpreted(), whole, head_dim, heads // kv_heads)
    monkeypatch.setattr(definitions, "_loaded", driver.load)
    monkeypatch.setattr("super_tree_attention.launch.launch", driver.launch)
    monkeypatch.setattr(definitions, "_kernel", lambda kind, dtype, head_dim, group=1, rows=0: SimpleNamespace(
        kind=kind, rows=rows, threads=128, shared=0))  # fmt: skip
    dtype = trt.DataType.HALF
    given = [tensor(call[name], dtype) for name in INPUTS]
    made = [tensor(t, dtype) for t in (output, *scratch)]
    registered["SuperTreeAttention"].impl_func(*given, kv_heads, head_dim, (*made, *given[3:5]), stream=0)
    merged = [tensor(call[n], dtype) for n in ("past_lens", "seq_begins", "block_indices", "block_begins")]
    registered["SuperTreeCombine"].impl_func(*merged, *made[1:], made[0], kv_heads, head_dim, (made[0],), stream=0)
    assert driver.names == ["attention", "combine"][: 1 + (split > 1)]
    assert splits == split
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    for name, cache in wanted_caches.items():
        assert call[name].equal(cache)


def test_a_cache_bound_elsewhere_is_refused(trt, registered, card):
    call = make_call(np.array([3]), np.array([1]), 4, 2, 16)
    given = [tensor(call[name], trt.DataType.HALF) for name in INPUTS]
    with pytest.raises(RuntimeError, match="not bound to the cache's own memory"):
        registered["SuperTreeAttention"].impl_func(*given, 2, 16, (given[0],) * 5, stream=0)


def make_call(past: np.ndarray, counts: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> dict:
    """Causal calls of ``counts`` tokens over ``past``, in blocks in reverse order."""
    generator = torch.Generator().manual_seed(0)
    tokens, used = int(counts.sum()), -(-(past + counts) // BLOCK)
    ints = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    noise = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    pool = int(used.sum()), kv_heads, BLOCK, head_dim
    begins = lambda sizes: ints([0, *np.cumsum(sizes).tolist()])  # noqa: E731
    values = (
        noise(tokens, heads * head_dim), noise(tokens, kv_heads * head_dim), noise(tokens, kv_heads * head_dim),
        noise(*pool), noise(*pool), ints(past.tolist()), begins(counts), ints(list(range(pool[0]))[::-1]), begins(used),
        torch.zeros(1, dtype=torch.uint8), ints([0] * (len(past) + 1)),
    )  # fmt: skip
    return dict(zip(INPUTS, values, strict=True))


def desc(trt, dtype, usual: tuple[int, ...], dynamic: bool = True):
    """Return a tensor as an optimisation profile gives it, its first extent free."""
    import tensorrt.plugin as trtp
    from tensorrt.plugin._tensor import Shape, ShapeExpr, ShapeExprs

    whole = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.dims = (-1, *usual[1:]) if dynamic else usual
    whole.desc = inner
    whole.min = whole.opt = whole.max = usual
    made = trtp.TensorDesc(shape_expr=ShapeExprs(len(usual)), dtype=dtype)
    for axis, size in enumerate(usual):
        made.shape_expr[axis] = ShapeExpr(size)
    made.shape = Shape(whole)
    return made


@pytest.mark.parametrize("dynamic", [False, True])
def test_kernels_are_compiled_into_the_engine(trt, registered, definitions, card, tmp_path, monkeypatch, dynamic):
    """PTX that the assembler takes, with the parameters that TensorRT passes, in their order."""
    launched, params = [], definitions._launch_params
    monkeypatch.setattr(
        definitions, "_launch_params", lambda kernel, *grid: launched.append(kernel) or params(kernel, *grid)
    )
    bf16, int32, single = trt.DataType.BF16, trt.DataType.INT32, trt.DataType.FLOAT
    widths = ((64, 1024), (64, 256), (64, 256), (99, 2, BLOCK, 128), (99, 2, BLOCK, 128))
    given = [desc(trt, bf16, usual, dynamic) for usual in widths]
    given += [desc(trt, int32, (length,), dynamic) for length in (8, 9, 90, 9, 50, 9)]
    made = [desc(trt, *of, dynamic) for of in ((bf16, (64, 1024)), (single, (1536, 128)), (single, (1536,)))]
    (choice,) = registered["SuperTreeAttention"].autotune_func(*given, 2, 128, ())
    (tactic,) = choice._get_combinations()[0].tactics
    attention = registered["SuperTreeAttention"].aot_impl_func(*given, 2, 128, 1, (*made, *given[3:5]), tactic)
    combine = registered["SuperTreeCombine"].aot_impl_func(*given[5:9], *made[1:], made[0], 2, 128, (made[0],), 0)
    # It is not known that TensorRT raises a kernel's limit of shared memory.
    assert [kernel.shared <= kernel_plan.PLAIN_SHARED for kernel in launched] == [True, True]
    for (name, ptx, _, integers), inputs, outputs, both in ((attention, 11, 5, 2), (combine, 7, 1, 1)):
        text = ptx.decode()
        listed = re.search(rf"\.entry {name.decode()}\((.*?)\n\)", text, re.DOTALL)[1]
        kinds = re.findall(r"\.param \.(u\d+)", listed)
        assert kinds == ["u64"] * inputs + ["u32"] * len(integers) + ["u64"] * outputs
        unread = ["unread" in line for line in listed.split(",")]
        assert unread[-outputs:] == [False] * (outputs - both) + [True] * both  # these are written through inputs
        assert not any(unread[inputs - 1 : -outputs])
        (tmp_path / "kernel.ptx").write_bytes(ptx)
        command = [ptxas_path(), "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
        assembled = subprocess.run(command, capture_output=True, text=True, check=False)
        assert assembled.returncode == 0, assembled.stderr


def test_profiles_of_different_tiles_have_kernels_of_their_own(trt, registered, card):
    """The bindings keep a plugin's kernels by types and tactic, whichever profile they were compiled for."""
    bf16, int32, single = trt.DataType.BF16, trt.DataType.INT32, trt.DataType.FLOAT

    def compiled(tokens, requests):
        widths = ((tokens, 1024), (tokens, 256), (tokens, 256), (99, 2, BLOCK, 128), (99, 2, BLOCK, 128))
        given = [desc(trt, bf16, usual) for usual in widths]
        given += [desc(trt, int32, (n,)) for n in (requests, requests + 1, 90, requests + 1, 50, requests + 1)]
        made = [desc(trt, *of) for of in ((bf16, (tokens, 1024)), (single, (1536, 128)), (single, (1536,)))]
        (choice,) = registered["SuperTreeAttention"].autotune_func(*given, 2, 128, ())
        (tactic,) = choice._get_combinations()[0].tactics
        name, ptx, *_ = registered["SuperTreeAttention"].aot_impl_func(*given, 2, 128, 1, (*made, *given[3:5]), tactic)
        assert f".entry {name.decode()}(" in ptx.decode()
        return tactic, name, ptx

    small, large = compiled(8, 8), compiled(1024, 2)
    assert all(a != b for a, b in zip(small, large, strict=True))


def test_a_parameter_that_is_read_cannot_be_left_out():
    ptx = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ld.param.b64 %rd1, [k_param_1];}"
    name, relisted = tensorrt_names.relist_parameters(ptx, [1, None], "small")
    assert name == "echo_small"
    assert re.findall(r"\.param \.u64 .*?(\w+),?\n", relisted) == ["echo_small_param_1", "echo_small_unread_0"]
    assert "[echo_small_param_1]" in relisted
    with pytest.raises(ValueError, match="k reads its parameter k_param_1, which TensorRT does not pass"):
        tensorrt_names.relist_parameters(ptx, [0], "small")
    with pytest.raises(ValueError, match="no entry"):
        tensorrt_names.relist_parameters("", [0], "small")


def ptxas_path() -> str:
    import triton

    return triton.knobs.nvidia.ptxas.path


@pytest.fixture(scope="module")
def graphs(networks, tmp_path_factory):
    """Return the exported target, as it was and as TensorRT takes it."""
    folder = tmp_path_factory.mktemp("graphs")
    export(roles_of("lookup", networks)["target"], folder / "target.onnx")
    tensorrt_plugin.prepare_graph(folder / "target.onnx", folder / "tensorrt.onnx")
    return onnx.load(folder / "target.onnx"), onnx.load(folder / "tensorrt.onnx")


def test_the_graph_has_both_plugins_and_the_caches_outputs(graphs):
    before, after = (g.graph for g in graphs)
    layers = SIZES["num_hidden_layers"]
    plugins = [n for n in after.node if n.domain == "echo"]
    assert [n.op_type for n in plugins] == ["SuperTreeAttention", "SuperTreeCombine"] * layers
    old = [n for n in before.node if n.domain == "echo"]
    for attention, combine, node in zip(plugins[::2], plugins[1::2], old, strict=True):
        assert list(attention.input) == list(node.input)
        assert list(attention.output[3:]) == [name + ".written" for name in node.input[3:5]]
        assert list(combine.input) == [*node.input[5:9], *attention.output[1:3], attention.output[0]]
        assert list(combine.output) == list(node.output)
    assert [n.op_type for n in after.node if n.domain != "echo"] == [
        n.op_type for n in before.node if n.domain != "echo"
    ]
    caches = [i.name for i in before.input if "_cache." in i.name]
    assert [o.name for o in after.output] == [o.name for o in before.output] + [c + ".written" for c in caches]
    types = {v.name: v.type for v in (*after.input, *after.output)}
    assert all(types[c] == types[c + ".written"] for c in caches)
    assert types["tree_mask"].tensor_type.elem_type == onnx.TensorProto.INT32
    known = {i.name for i in (*after.input, *after.initializer)}
    for node in after.node:  # every input is there before it is used
        assert set(node.input) - {""} <= known
        known |= set(node.output)
    assert {i.name: i.raw_data for i in after.initializer} == {i.name: i.raw_data for i in before.initializer}


def test_nodes_have_what_the_parser_asks_for(graphs, registered):
    for node in (n for n in graphs[1].graph.node if n.domain == "echo"):
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (values["plugin_namespace"], values["plugin_version"], values["aot"]) == (b"echo", b"1", 1)
        assert registered[node.op_type].input_attrs.keys() <= values.keys()
        assert len(node.input) == len(registered[node.op_type].input_tensor_names)
        assert len(node.output) == registered[node.op_type].num_outputs
