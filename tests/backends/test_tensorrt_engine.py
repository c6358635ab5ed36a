"""The TensorRT engine without a GPU: every launch it makes is run by ONNX Runtime, and every refusal is a sentence."""

import dataclasses
import importlib.util
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_sessions import SLOTS, OnnxSession, packed
from pairs import LIMITS, SIZES, recipe_of, roles_of
from random_calls import Script, inputs_for
from refusal import refused

from echo_trt.backends.cuda import choose, transfers
from echo_trt.backends.cuda import sizes as cuda_sizes
from echo_trt.backends.cuda.calls import Staging
from echo_trt.backends.cuda.device import missing
from echo_trt.backends.cuda.sizes import CallBounds, graph_sizes
from echo_trt.backends.native_export import export_native
from echo_trt.backends.padded import SlotLayout
from echo_trt.backends.tensorrt import engine as tensorrt
from echo_trt.backends.tensorrt.calls import CallLimits, linear_pieces, packed_pieces
from echo_trt.backends.tensorrt.engine import TensorRTEngine, check_card, check_version
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.manifest import TensorRTFacts
from echo_trt.speculation.pack import BLOCK, LevelShape, pack, pack_levels

NETWORKS = {
    "target": ("eagle3", "target"),
    "draft": ("model", "draft"),
    "head": ("eagle3", "draft"),
    "block": ("dflash", "draft"),
}
rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def opened(networks, tmp_path_factory):
    """network, limits -> its role, the engine under test and its session."""
    folder, graphs = tmp_path_factory.mktemp("graphs"), {}

    def get(network, slots=SLOTS, rows=None):
        pair, name = NETWORKS[network]
        sizes = CallSizes.of(recipe_of(pair, networks, limits=LIMITS | {"prefill_chunk": 32}))
        if network not in graphs:
            role = roles_of(pair, networks)[name]
            export_native(role, folder / f"{network}.onnx", "fp32", sizes.cache_rows)
            graphs[network] = role, folder / f"{network}.onnx"
        role, graph = graphs[network]
        session = OnnxSession(graph, sizes)
        if rows is not None:
            for profile in session._profiles:
                profile["logit_rows"] = ((1,), (rows,))
        return role, TensorRTEngine(session, slots, sizes.blocks, 0), session

    return get


class Steps(Script):
    """Random calls over the same slots: prompts of any length, then trees beside chunks and single tokens."""

    def __init__(self, seed, blocks):
        super().__init__(seed, np.arange(SLOTS * blocks).reshape(SLOTS, blocks))

    def step(self, first: bool):
        slots = self.rng.permutation(SLOTS)[: int(self.rng.integers(1, SLOTS + 1))]
        planted = 0 if first else int(self.rng.integers(0, len(slots) + 1))
        chunks = self.rng.choice([1, 1, 2, 17, 40], len(slots) - planted)
        return self.call(slots, planted, chunks, int(self.rng.integers(0, 11)), 0.7)


def assert_like_the_reference(role, engine, seeds):
    reference = TorchEngine(role, engine.num_blocks)
    for seed in range(seeds):
        script = Steps(seed, engine.num_blocks // SLOTS)
        engine._pool[:] = 0
        for step in range(3):
            call = script.step(first=step == 0)
            inputs = inputs_for(role, call, script.rng)
            wanted, got = reference.run(call, **inputs), engine.run(call, **inputs)
            assert wanted.keys() == got.keys()
            for name, array in wanted.items():
                found = np.asarray(got[name])
                assert found.shape == array.shape
                assert found.dtype == array.dtype
                np.testing.assert_allclose(found, array, atol=1e-5 * max(np.abs(array).max(initial=0), 1e-9), rtol=0)
            if "logits" in got:
                assert (got["logits"].argmax(axis=1) == wanted["logits"].argmax(axis=1)).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_every_call_equals_the_reference(network, opened):
    role, engine, session = opened(network)
    assert_like_the_reference(role, engine, 12)
    assert any(batch > 1 for batch, _ in session.launched)
    assert any(batch == 1 and tokens > 16 for batch, tokens in session.launched)


@pytest.mark.parametrize("pair", ["eagle3", "dflash"])
def test_every_packed_call_equals_the_reference(pair, networks, tmp_path):
    role, engine, session = packed("draft", networks, tmp_path, pair)
    assert_like_the_reference(role, engine, 12)
    assert any(tokens > 32 for (tokens,) in session.launched)


def test_a_head_with_a_cache_a_slot_drafts_level_by_level(opened):
    assert not opened("head")[1].drafts_levels
    assert not opened("target")[1].drafts_levels


def test_sizes_are_few(opened):
    """CUDA graphs are one a size: of all batches and lengths, only these are launched."""
    _, engine, session = opened("target")
    for seed in range(20):
        script = Steps(seed, engine.num_blocks // SLOTS)
        for step in range(2):
            engine.run(script.step(first=step == 0))
    batches, tokens = ({shape[axis] for shape in session.launched} for axis in (0, 1))
    assert batches <= {1, 2, 4}
    assert tokens <= {1, 2, 4, 8, 12, 16, 24, 32}


def test_of_large_calls_no_two_of_which_are_alike_no_context_is_kept(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_sizes, "SIZES", (1, 2, 4, 8, 12, 16))
    _, engine, session = packed("target", networks, tmp_path)
    for seed in range(12):
        script = Steps(seed, engine.num_blocks // SLOTS)
        for step in range(3):
            engine.run(script.step(first=step == 0))
    assert max(session.launched) > (16,)
    assert {shapes[session.inputs.index("token_ids")] for shapes in session.recurring} <= {
        (n,) for n in (1, 2, 4, 8, 12, 16)
    }


@pytest.mark.parametrize("network", ["target", "draft"])
def test_every_size_that_is_captured_at_the_start_is_in_a_profile(network, networks, tmp_path):
    _, engine, session = packed(network, networks, tmp_path)
    engine._graphs = SimpleNamespace(sealed=False, run=lambda *call: None)
    engine.capture_all()
    assert engine._graphs.sealed
    assert len(session.launched) == len(engine._sizes) * (2 if network == "draft" else 1)
    assert {tokens for (tokens,) in session.launched} == {size.tokens for size in engine._sizes}
    script = Steps(0, engine.num_blocks // SLOTS)
    engine._graphs = None
    known = set(session.recurring)
    for step in range(6):
        call = script.step(first=step == 0)
        if network == "target":
            engine.run(call)
    assert session.recurring == known


@pytest.mark.parametrize("network", ["target", "draft"])
def test_the_move_and_a_draw_are_compiled_before_requests_wait(network, networks, tmp_path, monkeypatch):
    _, engine, _ = packed(network, networks, tmp_path)
    compiled = []
    monkeypatch.setattr(engine, "compact_kv", lambda source, target: compiled.append("compact_kv"))
    monkeypatch.setattr(choose, "choose", lambda *_: compiled.append("choose") or torch.zeros(1).long())
    engine._graphs, engine._sizes = SimpleNamespace(sealed=False), ()
    engine.capture_all()
    assert compiled == ["compact_kv", "choose", "choose"][: 3 if network == "target" else 1]  # with masks, and without


def test_runs_wait_for_the_pool_to_be_zeroed(networks, tmp_path, monkeypatch):
    """The pool is zeroed on the current stream, and calls run on the own one of the engine, which does not wait."""
    _, _, session = packed("target", networks, tmp_path)
    waits = []
    session.device = torch.device("cuda")
    monkeypatch.setattr(TensorRTEngine, "_allocate", lambda self, shape: torch.zeros(1))
    monkeypatch.setattr(tensorrt, "Graphs", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "PyTorch's")
    monkeypatch.setattr(tensorrt, "own_stream", lambda *_: SimpleNamespace(wait_stream=waits.append))
    TensorRTEngine(session, SLOTS, 4, 16)
    assert waits == ["PyTorch's"]


def test_streams_wait_for_each_other_and_the_host_for_results_alone(networks, tmp_path, monkeypatch):
    """Banks are written and outputs are read on the current stream, and calls run on the engine's own one."""
    _, engine, session = packed("draft", networks, tmp_path)
    order, launch = [], session.launch
    session.launch = lambda *words, **named: order.append("launch") or launch(*words, **named)
    own, current = (SimpleNamespace(wait_stream=lambda other, n=n: order.append(n)) for n in ("engine", "PyTorch"))
    engine._stream = own  # neither can be synchronised
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    one, rows = np.ones(1, np.int64), np.arange(2)
    call = pack(rows, rows, 0 * one, 2 * one, np.arange(4)[None], rows[1:])
    inputs = {
        "features": engine.feature_cache("features").read(rows),
        "hidden": engine.feature_cache("hidden").read(rows[:0]),
    }
    engine.run(call, **inputs)
    shape = LevelShape(1, 1, 2, 3)
    below = pack_levels(2 * one, np.arange(4)[None], shape)
    engine.start_levels(call, below, shape, 4, **inputs)
    engine.run_levels(below, 0 * one, shape, 4)
    levels = ["engine", "launch", "launch", "PyTorch", "engine", "launch", "PyTorch"]
    assert order == ["engine", "launch", "PyTorch", *levels]


@pytest.fixture
def around(monkeypatch):
    """Count uploads and waits of calls."""
    counts, upload, send = Counter(), Staging.upload, tensorrt.send
    monkeypatch.setattr(Staging, "upload", lambda *words: counts.update(uploads=1) or upload(*words))
    monkeypatch.setattr(tensorrt, "send", lambda *words: counts.update(uploads=1) or send(*words))
    fetch = transfers.fetch
    monkeypatch.setattr(transfers, "fetch", lambda tensor: counts.update(waits=1) or fetch(tensor))
    return counts


def test_a_packed_call_is_one_upload_one_launch_and_one_wait(networks, tmp_path, around):
    """Its outputs are the launch's own memory, without the padding."""
    _, engine, session = packed("target", networks, tmp_path)
    launched, launch = [], session.launch
    session.launch = lambda *words, **named: launched.append(launch(*words, **named)) or launched[-1]
    got = engine.run(packed_call([3, 5, 1]))
    assert around == {"uploads": 1, "waits": 1}
    (outputs,) = launched
    assert {got[name]._rows.data_ptr() for name in got} == {outputs[name].data_ptr() for name in got}
    assert [len(got[name]) for name in ("logits", "features")] == [5, 9]
    assert len(outputs["features"]) > 9
    around.clear()
    engine._limits = dataclasses.replace(engine._limits, tokens=6)
    engine.run(packed_call([3, 5, 1]))  # two launches
    assert (len(launched), around) == (3, {"uploads": 2, "waits": 1})


def test_a_padded_call_is_two_uploads(opened, around):
    _, engine, session = opened("target")
    script = Steps(0, engine.num_blocks // SLOTS)
    counts = np.array([2, 1, 2])
    call = pack(np.arange(5), np.array([0, 1, 0, 0, 1]), 0 * counts, counts, script.table[:3], np.arange(5))
    session.launched.clear()
    around.clear()
    engine.run(call)
    assert (len(session.launched), around["waits"]) == (1, 1)
    assert around["uploads"] == 3  # the slots to clear, the call, and where its rows go


def test_a_head_keeps_the_states_of_the_trees_that_it_drafts(networks, tmp_path):
    _, engine, session = packed("draft", networks, tmp_path)
    batch, tokens = engine._limits.batch, engine._limits.tokens
    assert len(engine.feature_cache("hidden").rows) == batch * tokens
    small = TensorRTEngine(session, SLOTS, 4, 16, tree=10)
    assert len(small.feature_cache("hidden").rows) == batch * 10


@pytest.mark.parametrize("paged", [False, True])
def test_a_heads_states_go_back_as_they_came(paged, opened, networks, tmp_path):
    """A second draft level reads what the first one left on the device."""
    role, engine, _ = packed("draft", networks, tmp_path) if paged else opened("head")
    reference = TorchEngine(role, engine.num_blocks)
    table = np.arange(engine.num_blocks).reshape(SLOTS, -1)
    features = np.random.default_rng(0).standard_normal((SLOTS, 3 * SIZES["hidden_size"]), np.float32)
    ones = np.ones(SLOTS, int)
    first = pack(np.arange(SLOTS), ones * 0, ones * 0, ones, table, np.arange(SLOTS))
    second = pack(np.arange(SLOTS), ones, ones, ones, table, np.arange(SLOTS))
    states = []
    for each in (reference, engine):
        hidden = np.zeros((0, SIZES["hidden_size"]), np.float32)
        left = each.run(first, features=features, hidden=hidden)["state"]
        states.append(each.run(second, features=features[:0], hidden=left[np.arange(SLOTS)])["state"])
    np.testing.assert_allclose(np.asarray(states[1]), states[0], atol=1e-4)


def test_a_call_that_asks_for_more_rows_than_a_launch_gives_is_divided(opened):
    limit = max(CallSizes(1, 1, 13, 16, 1).tree, 16)
    role, engine, session = opened("target", rows=limit)
    reference = TorchEngine(role, engine.num_blocks)
    table = np.arange(engine.num_blocks).reshape(SLOTS, -1)
    counts, rng = np.full(SLOTS, 7), np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], 28)
    call = pack(tokens, np.tile(np.arange(7), SLOTS), np.zeros(SLOTS, int), counts, table, np.arange(28))
    wanted, got = reference.run(call), engine.run(call)
    np.testing.assert_allclose(np.asarray(got["logits"]), wanted["logits"], atol=1e-3)
    assert len(session.launched) > 1


def test_moved_rows_are_those_that_later_calls_see(opened):
    role, engine, _ = opened("draft")
    reference = TorchEngine(role, engine.num_blocks)
    script = Steps(3, engine.num_blocks // SLOTS)
    for step in range(4):
        call = script.step(first=step == 0)
        reference.run(call), engine.run(call)
    slot = int(script.past.argmax())
    rows = script.table[slot, 0] * BLOCK + np.arange(script.past[slot])
    source, target = rows[3:8], rows[2:7]  # they overlap
    for which in (reference, engine):
        which.compact_kv(source, target)
    later = pack([5], [script.past[slot]], script.past[[slot]], np.array([1]), script.table[[slot]], np.array([0]))
    wanted, got = reference.run(later), engine.run(later)
    np.testing.assert_allclose(np.asarray(got["scores"]), wanted["scores"], atol=1e-4)


def test_more_requests_than_it_was_built_for(opened):
    with refused(f"batch is {LIMITS['batch'] + 1}", f"built for {LIMITS['batch']}", "limits.batch", "build again"):
        opened("draft", slots=LIMITS["batch"] + 1)


def test_a_starting_request_finds_its_slot_cleared(opened):
    _, engine, _ = opened("draft")
    engine._pool[:] = np.nan
    call = Steps(1, engine.num_blocks // SLOTS).step(first=True)
    assert np.isfinite(np.asarray(engine.run(call)["scores"])).all()


# -- refusals ---------------------------------------------------------------------------------------------------


FACTS = TensorRTFacts(version="1.0.0", capabilities=["8.0", "8.9"])


def test_an_engine_of_another_version(monkeypatch):
    module = type("Module", (), {"__version__": "1.9.9"})
    monkeypatch.setattr(tensorrt, "load_compiler", lambda engine: module)
    with refused("TensorRT-RTX 1.0.0", "1.9.9 is installed", "build it again", "install TensorRT-RTX 1.0.0"):
        check_version("tensorrt-rtx", FACTS)
    check_version("tensorrt-rtx", FACTS.model_copy(update={"version": "1.9.9"}))


def test_an_engine_for_another_card():
    check_card("tensorrt-rtx", FACTS, "8.9", "L4")
    with refused("8.0, 8.9", "H100 has 9.0", "--compute-capability 9.0"):
        check_card("tensorrt-rtx", FACTS, "9.0", "H100")
    with refused("8.0, 8.9", "A10 has 8.6", "on this machine"):
        check_card("tensorrt", FACTS, "8.6", "A10")


def test_too_little_memory_says_how_much():
    message = missing(6 * 2**30, 2**30, "L4", "the KV cache of 9 blocks", "lower limits.kv_blocks")
    assert message == (
        "the KV cache of 9 blocks needs 6.0 GiB, but L4 has 1.0 GiB free, 5.0 GiB too little; lower limits.kv_blocks."
    )


@rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that nothing is refused")
def test_no_gpu(tmp_path):
    import tensorrt_rtx

    facts = TensorRTFacts(version=tensorrt_rtx.__version__, capabilities=["8.9"])
    with refused("no CUDA device", "run on a machine with an NVIDIA GPU", "--engine openvino"):
        TensorRTEngine.open("tensorrt-rtx", tmp_path / "target.engine", facts, 1, 4, 4)


# -- calls without logits --------------------------------------------------------------------------------------------


def packed_call(counts, past=0):
    counts = np.asarray(counts)
    table = np.arange(len(counts) * 8).reshape(len(counts), 8)
    total = counts.sum()
    return pack(np.arange(total), np.zeros(total), np.full(len(counts), past), counts, table, np.arange(0, total, 2))


def test_a_launch_asks_for_a_row_even_if_the_call_does_not():
    call = packed_call([3])
    call = pack(call.token_ids, call.positions, np.zeros(1, int), np.array([3]), np.zeros((1, 8)), np.zeros(0))
    (piece,) = packed_pieces(call, {}, CallLimits(8, 32, 32, 32), graph_sizes(8), CallBounds(8, 8))
    assert len(piece.arrays["logit_rows"]) >= 1
    assert len(piece.requested) == 0
    (piece,) = linear_pieces(call, {}, SlotLayout(2, 8, 16), CallLimits(2, 16, 16, 16))
    assert len(piece.arrays["logit_rows"]) >= 1
    assert len(piece.requested) == 0
