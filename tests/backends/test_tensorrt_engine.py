"""The TensorRT engine without a GPU: the reference runs every launch that it makes, and every refusal is a sentence."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pairs import LIMITS, SIZES
from random_calls import Script, inputs_for
from refusal import refused
from role_sessions import SLOTS, packed

from echo_trt.backends.cuda import choose, transfers
from echo_trt.backends.cuda import sizes as cuda_sizes
from echo_trt.backends.cuda.calls import Staging
from echo_trt.backends.cuda.device import missing
from echo_trt.backends.cuda.sizes import CallBounds, graph_sizes
from echo_trt.backends.tensorrt import engine as tensorrt
from echo_trt.backends.tensorrt.calls import packed_pieces
from echo_trt.backends.tensorrt.engine import TensorRTEngine, check_card, check_version
from echo_trt.backends.tensorrt.library import TensorRTFacts
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.speculation.pack import BLOCK, LevelShape, pack, pack_levels


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


@pytest.mark.parametrize(
    ("pair", "name"), [("eagle3", "target"), ("eagle3", "draft"), ("dflash", "draft"), ("model", "draft")]
)
def test_every_call_equals_the_reference(pair, name, networks, tmp_path):
    role, engine, session = packed(name, networks, tmp_path, pair)
    assert_like_the_reference(role, engine, 12)
    assert any(tokens > 32 for (tokens,) in session.launched)


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
    engine._tokens = 6
    engine.run(packed_call([3, 5, 1]))  # two launches
    assert (len(launched), around) == (3, {"uploads": 2, "waits": 1})


def test_a_head_keeps_the_states_of_the_trees_that_it_drafts(networks, tmp_path):
    _, engine, session = packed("draft", networks, tmp_path)
    batch = LIMITS["batch"]
    assert len(engine.feature_cache("hidden").rows) == batch * engine._tokens
    small = TensorRTEngine(session, SLOTS, 4, 16, tree=10)
    assert len(small.feature_cache("hidden").rows) == batch * 10


def test_a_heads_states_go_back_as_they_came(networks, tmp_path):
    """A second draft level reads what the first one left on the device."""
    role, engine, _ = packed("draft", networks, tmp_path)
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


def test_moved_rows_are_those_that_later_calls_see(networks, tmp_path):
    role, engine, _ = packed("draft", networks, tmp_path, "model")
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


def test_more_requests_than_it_was_built_for(networks, tmp_path):
    _, _, session = packed("draft", networks, tmp_path)
    batch = session.largest("past_lens", 0, session.num_profiles - 1)
    with refused(f"batch is {batch + 1}", f"built for {batch}", "limits.batch", "build again"):
        TensorRTEngine(session, batch + 1, 4, 16)


# -- refusals ---------------------------------------------------------------------------------------------------


FACTS = TensorRTFacts(version="1.0.0", capabilities=["8.0", "8.9"])


def test_an_engine_of_another_version(monkeypatch):
    module = type("Module", (), {"__version__": "1.9.9"})
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda: module)
    with refused("TensorRT 1.0.0", "1.9.9 is installed", "build it again", "install TensorRT 1.0.0"):
        check_version(FACTS)
    check_version(FACTS.model_copy(update={"version": "1.9.9"}))


def test_an_engine_for_another_card():
    check_card(FACTS, "8.9", "L4")
    with refused("8.0, 8.9", "A10 has 8.6", "on this machine"):
        check_card(FACTS, "8.6", "A10")


def test_too_little_memory_says_how_much():
    message = missing(6 * 2**30, 2**30, "L4", "the KV cache of 9 blocks", "lower limits.kv_blocks")
    assert message == (
        "the KV cache of 9 blocks needs 6.0 GiB, but L4 has 1.0 GiB free, 5.0 GiB too little; lower limits.kv_blocks."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that nothing is refused")
def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda: SimpleNamespace(__version__="1.0.0"))
    with refused("no CUDA device", "run on a machine with an NVIDIA GPU", "--engine openvino"):
        TensorRTEngine.open(tmp_path / "target.engine", FACTS, 1, 4, 4)


# -- calls without logits --------------------------------------------------------------------------------------------


def packed_call(counts, past=0):
    counts = np.asarray(counts)
    table = np.arange(len(counts) * 8).reshape(len(counts), 8)
    total = counts.sum()
    return pack(np.arange(total), np.zeros(total), np.full(len(counts), past), counts, table, np.arange(0, total, 2))


def test_a_launch_asks_for_a_row_even_if_the_call_does_not():
    call = packed_call([3])
    call = pack(call.token_ids, call.positions, np.zeros(1, int), np.array([3]), np.zeros((1, 8)), np.zeros(0))
    (piece,) = packed_pieces(call, {}, 32, graph_sizes(8), CallBounds(8, 8))
    assert len(piece.arrays["logit_rows"]) >= 1
    assert len(piece.requested) == 0
