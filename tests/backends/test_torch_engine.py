"""The PyTorch engine's way to a GPU, walked on a CPU as far as it goes: padding, staging, rows that are read late."""

import copy
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pairs import SIZES, block_inputs, recipe_of, roles_of
from random_calls import Script
from refusal import refused
from stand_in_graphs import StandInGraph, as_on_a_gpu, in_banks, with_graphs

from echo_trt.backends.cuda import sizes as cuda_sizes
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch import engine as torch_engine
from echo_trt.backends.torch import files
from echo_trt.backends.torch.engine import METADATA, TorchEngine, _operator_for, open_torch
from echo_trt.backends.torch.files import load_role, save_role
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack

BLOCKS, BOUNDS = 16, CallBounds(2, 4, 16)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FEATURES = 2 * SIZES["hidden_size"]  # a number of the block drafter's alone
#: pair, network, size of an entry's features
NETWORKS = {
    "target": ("eagle3", "target", 0),
    "draft": ("model", "draft", 0),
    "head": ("eagle3", "draft", 192),
    "block": ("dflash", "draft", FEATURES),
}


def calls(seed: int, requests: int = 3) -> list[ForwardBatch]:
    """Prompts, then trees for the first two requests and chunks for the others."""
    rng, slots = np.random.default_rng(seed), np.arange(requests)
    script = Script(seed, rng.permutation(BLOCKS)[: requests * 4].reshape(requests, 4))
    prompt = script.call(slots, chunks=rng.integers(1, BLOCK, requests))
    return [prompt, script.call(slots, 2, rng.integers(1, 9, requests - 2), 9)]


def inputs_for(call: ForwardBatch, features: int, seed: int) -> dict[str, np.ndarray]:
    """All of a call's entries have features, or all have the head's own state."""
    if not features:
        return {}
    if features == FEATURES:
        return block_inputs(call, features, np.random.default_rng(seed))
    rng, known = np.random.default_rng(seed), len(call.token_ids) * (seed % 2)
    shapes = {"features": (known, features), "hidden": (len(call.token_ids) - known, SIZES["hidden_size"])}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def arrays_of(call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    names = ("token_ids", "positions", *METADATA, "logit_rows")
    return {name: getattr(call, name) for name in names} | inputs


def assert_same(want: dict[str, np.ndarray], got: dict, tolerance: float = 0.0) -> None:
    assert want.keys() == got.keys()
    for name, values in want.items():
        assert got[name].shape == values.shape
        np.testing.assert_allclose(np.asarray(got[name]), values, atol=tolerance, rtol=tolerance)


def test_a_block_without_context_has_a_graph(networks, monkeypatch):
    """Costs are measured by such passes, and launched one by one their kernels take several times as long."""
    monkeypatch.setattr(cuda_sizes, "SIZES", (4, 8))
    plain, engine = (TorchEngine(roles_of("dflash", networks)["draft"], BLOCKS, bounds=BOUNDS) for _ in range(2))
    with_graphs(engine, monkeypatch)
    engine._capture_all()
    replays, rows = StandInGraph.replays, np.arange(6)
    call = pack(rows, rows, np.zeros(1, int), np.array([6]), np.zeros((1, 1), int), rows)
    none = engine.feature_cache("features").read(rows[:0])
    outputs = engine.run(call, features=none, state_rows=rows)
    assert StandInGraph.replays == replays + 1
    assert_same(plain.run(call, features=np.zeros((0, FEATURES), np.float32), state_rows=rows), outputs, 1e-5)


def test_states_of_drafted_nodes_have_room_where_the_pool_is_small(networks):
    """Engines of a few blocks, of self-checks, have less."""
    bounds = CallBounds(32, 1, 16)
    engine = as_on_a_gpu(TorchEngine(roles_of("eagle3", networks)["draft"], 8, bounds=bounds))
    assert len(engine._feature_caches["hidden"].rows) >= 32 * 16 > 8 * BLOCK
    unbounded = as_on_a_gpu(TorchEngine(roles_of("eagle3", networks)["draft"], 8))
    assert len(unbounded._feature_caches["hidden"].rows) == 8 * BLOCK


@pytest.mark.parametrize("network", ["head", "block"])
def test_features_are_kept_as_the_state_that_the_draft_makes_of_them(network, networks):
    """A token's three hidden states take three times the memory, and are read by one projection alone."""
    pair, name, features = NETWORKS[network]
    plain, engine = (TorchEngine(roles_of(pair, networks)[name], BLOCKS) for _ in range(2))
    as_on_a_gpu(engine)
    assert engine.feature_cache("features").rows.shape == (BLOCKS * BLOCK, SIZES["hidden_size"])
    for seed, call in enumerate(calls(1)):
        inputs = inputs_for(call, features, 1 - seed)
        assert_same(plain.run(call, **inputs), engine.run(call, **in_banks(engine, inputs)), 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_named(networks):
    with pytest.raises(UserError, match=r"no CUDA device: PyTorch .* build with --engine cpu"):
        TorchEngine(roles_of("lookup", networks)["target"], BLOCKS, "cuda")


@pytest.mark.parametrize("network", NETWORKS)
def test_a_role_comes_back_from_its_file(network, networks, tmp_path):
    pair, name, features = NETWORKS[network]
    role = roles_of(pair, networks)[name]
    for precision in ("fp32", "bf16"):
        save_role(role, tmp_path / precision, precision)
    loaded = load_role(tmp_path / "fp32")
    assert (type(loaded), loaded.outputs, loaded.network.config) == (type(role), role.outputs, role.network.config)
    assert {p.dtype for p in load_role(tmp_path / "bf16").parameters()} == {torch.bfloat16}
    engines = TorchEngine(role, BLOCKS), TorchEngine(loaded, BLOCKS)
    for call in calls(0):
        inputs = inputs_for(call, features, 1)
        assert_same(*(engine.run(call, **inputs) for engine in engines))


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["the target's", "its own"])
def test_a_head_reads_the_table_of_its_open_target_where_they_are_equal(own, networks, tmp_path):
    roles = copy.deepcopy(roles_of("eagle3", networks))
    table = roles["target"].network.embed.weight.detach()
    roles["draft"].network.embed.weight = torch.nn.Parameter(table + own)
    for name, role in roles.items():
        save_role(role, tmp_path / name, "fp32")
    target, head = (load_role(tmp_path / name).network for name in ("target", "draft"))
    assert (target.embed.weight.data_ptr() == head.embed.weight.data_ptr()) == (own == 0)
    target.bfloat16()
    assert torch.equal(head.embed.weight, table + own)


def test_a_file_of_something_else_is_refused(networks, tmp_path):
    (tmp_path / "text").write_text("not a network")
    for path in (tmp_path / "text", networks / "target" / "model.safetensors"):
        with pytest.raises(UserError, match=r"holds no network of echo-trt .*build the bundle again"):
            load_role(path)


def test_a_gpu_without_its_kernel_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "super_tree_attention.triton_attention", None)
    with refused("pip install -e '.[cuda]'", "echo-trt build the bundle with --engine cpu"):
        _operator_for(torch.device("cuda"), SimpleNamespace(num_heads=32, num_kv_heads=8, head_dim=128))


def test_a_machine_without_a_c_compiler_is_told_what_to_install(monkeypatch):
    """Triton compiles a launcher in C at the first launch of a kernel."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    getattr(build, "_find_compiler", SimpleNamespace(cache_clear=lambda: None)).cache_clear()

    def launch(*_, **__):
        build.compile_module_from_src(src=f"// {random.random()}", name="launcher")

    monkeypatch.setattr(files, "load_role", lambda *_: None)
    monkeypatch.setattr(torch_engine, "TorchEngine", launch)
    with refused("Triton finds no C compiler", "install gcc and python3-dev", "a compiler in CC"):
        open_torch(None, BLOCKS)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 100), (64, 2, 128)])
def test_heads_that_the_kernel_does_not_have_are_named(heads, kv_heads, head_dim):
    config = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    with refused(f"heads of {head_dim} and {heads // kv_heads} query heads", "16, 32, 64, 128, 256", "--engine cpu"):
        _operator_for(torch.device("cuda"), config)


# -- bundles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["eagle3", "dspark"])
def test_it_answers_like_the_openvino_bundle(pair, networks, bundle_of, tmp_path):
    manifest = build(recipe_of(pair, networks, engine="torch"), networks, tmp_path / "torch")
    assert manifest.checks["target"].tree_error < 1e-5
    assert manifest.checks["draft"].tree_error < 1e-5
    prompts, params = [[7, 8, 9], [*range(40, 90)]], SamplingParams(12, ignore_eos=True)
    texts = [
        [c.token_ids for c in LLM(bundle, "static", batch=2).generate(prompts, params)]
        for bundle in (tmp_path / "torch", bundle_of(pair))
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0][1])) > 1


def test_a_precision_it_has_not_is_refused(networks, tmp_path):
    with pytest.raises(UserError, match="precision is 'int8', which torch does not have; use one of fp32, bf16, fp16"):
        build(recipe_of("lookup", networks, engine="torch", precision="int8"), networks, tmp_path / "torch")
