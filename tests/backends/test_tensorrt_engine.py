"""The TensorRT engine without a GPU: the reference runs every launch that it makes, and every refusal is a sentence."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pairs import SIZES
from random_calls import Script, inputs_for
from refusal import refused
from role_sessions import SLOTS, packed

from echo_trt.backends.cuda import transfers
from echo_trt.backends.cuda.calls import Staging
from echo_trt.backends.cuda.device import missing
from echo_trt.backends.tensorrt import engine as tensorrt
from echo_trt.backends.tensorrt.engine import TensorRTEngine, check_card, check_version
from echo_trt.backends.tensorrt.library import TensorRTFacts
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.speculation.pack import BLOCK, pack


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


@pytest.mark.parametrize("network", ["target", "draft"])
def test_every_size_that_is_captured_at_the_start_is_in_a_profile(network, networks, tmp_path):
    _, engine, session = packed(network, networks, tmp_path)
    engine._graphs = SimpleNamespace(sealed=False, run=lambda *call: None)
    engine.capture_all()
    assert engine._graphs.sealed
    assert len(session.launched) == len(engine._sizes)
    assert {tokens for (tokens,) in session.launched} == {size.tokens for size in engine._sizes}
    script = Steps(0, engine.num_blocks // SLOTS)
    engine._graphs = None
    known = set(session.recurring)
    for step in range(6):
        call = script.step(first=step == 0)
        if network == "target":
            engine.run(call)
    assert session.recurring == known


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


def test_a_heads_states_go_back_as_they_came(networks, tmp_path):
    """A second draft level reads what the first one left on the device."""
    role, engine, _ = packed("draft", networks, tmp_path)
    reference = TorchEngine(role, engine.num_blocks)
    table = np.arange(engine.num_blocks).reshape(SLOTS, -1)
    features = np.random.default_rng(0).standard_normal((SLOTS, SIZES["hidden_size"]), np.float32)
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
    with refused("no CUDA device", "run on a machine with an NVIDIA GPU", "--engine cpu"):
        TensorRTEngine.open(tmp_path / "target.engine", FACTS, 1, 4, 4)


# -- calls without logits --------------------------------------------------------------------------------------------


def packed_call(counts, past=0):
    counts = np.asarray(counts)
    table = np.arange(len(counts) * 8).reshape(len(counts), 8)
    total = counts.sum()
    return pack(np.arange(total), np.zeros(total), np.full(len(counts), past), counts, table, np.arange(0, total, 2))
