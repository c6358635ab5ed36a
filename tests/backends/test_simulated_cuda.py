"""The path to a GPU on a simulated one: graphs of what was captured, and faults that only a card would punish."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gpu.engines import Card
from gpu.random_networks import TINY, random_decoder, random_head
from gpu.serving import Served, recipe_of, torch_engines
from simulated_cuda import SimulatedCuda

from echo_trt.backends.cuda import choose, levels
from echo_trt.backends.cuda.calls import Graphs, Staging
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.cuda.transfers import TRANSFERS
from echo_trt.backends.torch import engine as torch_engine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.engine.params import SamplingParams
from echo_trt.models import layers
from echo_trt.models.roles import HeadModule
from echo_trt.speculation.pack import BLOCK, LevelShape, pack, pack_levels

BLOCKS, BOUNDS = 16, CallBounds(4, 4, 16)
SHAPES = LevelShape(1, 2, 3, 4), LevelShape(3, 2, 3, 4)


@pytest.fixture
def card(monkeypatch) -> Iterator[SimulatedCuda]:
    monkeypatch.setattr("echo_trt.backends.cuda.sizes.SIZES", (4, 16))
    monkeypatch.setattr(torch_engine, "SIZES", (4, 16))
    monkeypatch.setattr(layers, "fused", lambda x: None)
    monkeypatch.setattr(choose, "_LANES", 128)
    with SimulatedCuda(monkeypatch) as simulated:
        yield simulated


@pytest.fixture(scope="module")
def head() -> HeadModule:
    model = random_decoder(TINY, BLOCKS * BLOCK, torch.float32, torch.device("cpu"))
    return HeadModule(random_head(model, torch.float32), 4)


def drafts(engine: TorchEngine) -> list[np.ndarray]:
    """Levels in two goes, the second for a part of the requests, from two sets of inputs: sorted scores."""
    found = []
    for seed, counts in enumerate(([4, 1, 6], [2, 5, 3, 1])):
        counts, rng = np.array(counts), np.random.default_rng(seed)
        rows, table = np.arange(counts.sum()), rng.permutation(BLOCKS)[: 2 * len(counts)].reshape(-1, 2)
        features = rng.standard_normal((len(rows), 3 * TINY.hidden_size), np.float32)
        engine.feature_cache("features").write(rows, features, rows)
        positions, ends = np.concatenate([np.arange(n) for n in counts]), np.cumsum(counts) - 1
        call = pack(rng.integers(0, TINY.vocab_size, len(rows)), positions, 0 * counts, counts, table, ends)
        inputs = {"features": engine.feature_cache("features").read(rows)}
        inputs["hidden"] = engine.feature_cache("hidden").read(rows[:0])
        below, further = SHAPES
        _, first = engine.start_levels(call, pack_levels(counts, table, below), below, 20, **inputs)
        part = np.arange(1, len(counts))
        second = engine.run_levels(pack_levels(counts[part], table[part], further), part, further, 20)
        found += [np.sort(np.ascontiguousarray(go[:, 3]).view(np.float32), axis=1) for go in (first, second)]
    return found


@pytest.fixture(scope="module")
def wanted(head) -> list[np.ndarray]:
    return drafts(TorchEngine(copy.deepcopy(head), BLOCKS, bounds=BOUNDS, resident=True))


def on(card: SimulatedCuda, head: HeadModule) -> TorchEngine:
    engine = TorchEngine(copy.deepcopy(head), BLOCKS, "cuda", card.attention, bounds=BOUNDS)
    engine.capture_levels(lambda requests: SHAPES)
    return engine


def test_drafts_of_graphs_are_those_of_launches(card, head, wanted):
    engine = on(card, head)
    replays = card.replays
    for got, launched in zip(drafts(engine), wanted, strict=True):
        np.testing.assert_allclose(got, launched, atol=1e-4)
    assert card.replays - replays >= 6
    assert not card.faults


# -- faults, which it must find ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (True, "1 values are copied from the host in a capture"),
        (False, "add takes tensors of host and device in a capture"),
    ],
)
def test_a_host_tensor_in_a_capture_is_found(card, head, monkeypatch, sent, fault):
    level_call = levels.level_call

    def wrong(level, beams, call):
        found, zero = level_call(level, beams, call), torch.from_numpy(np.zeros(1, np.int64))
        return found | {"positions": found["positions"] + (zero.to("cuda") if sent else zero)}

    monkeypatch.setattr(levels, "level_call", wrong)
    on(card, head)
    assert fault in card.faults


def test_a_value_that_a_capture_bakes_in_shows_in_the_drafts(card, head, wanted, monkeypatch):
    """The number of requests, read when the graph was captured; texts would be the same."""
    level_call = levels.level_call

    def wrong(level, beams, call):
        live = int(call["live"].host[0])
        return level_call(level, beams, call | {"live": torch.full_like(call["live"], live)})

    monkeypatch.setattr(levels, "level_call", wrong)
    drafted = drafts(on(card, head))
    assert not card.faults
    assert not all(np.allclose(got, launched, atol=1e-4) for got, launched in zip(drafted, wanted, strict=True))


def test_a_graph_over_memory_that_was_freed_is_found(card):
    held = [torch.ones(4, device="cuda")]
    graphs = Graphs(lambda inputs: (inputs["x"] + held[0],), torch.device("cuda", 0))
    x = {"x": np.full(4, 2.0, np.float32)}
    assert graphs.run(x)[0].cpu().tolist() == [3.0] * 4
    assert not card.faults
    held.clear()
    graphs.run(x)
    assert "uses memory that was freed" in card.faults[0]


@pytest.mark.parametrize("waits", [True, False])
def test_a_pinned_buffer_that_is_written_before_its_copy_ran_is_found(card, head, monkeypatch, waits):
    """In chunks of a prompt, after which nothing is read."""
    made = Staging.__init__

    def careless(staging, *arguments):
        made(staging, *arguments)
        staging._turns = [(*staging._turns[0][:2], None)] * 2

    if not waits:
        monkeypatch.setattr(Staging, "__init__", careless)
    engine, tokens, none = on(card, head), np.arange(4), np.zeros(0, np.int64)
    inputs = {
        name: engine.feature_cache(name).read(rows) for name, rows in {"features": tokens, "hidden": none}.items()
    }
    for chunk in range(4):
        positions, past = 4 * chunk + tokens, np.array([4 * chunk])
        engine.run(pack(positions, positions, past, np.array([4]), np.arange(2)[None], none), **inputs)
    torch.cuda.synchronize()
    assert bool(card.faults) != waits


# -- what is served ------------------------------------------------------------------------------------------------


def test_a_served_text_is_that_of_the_cpus_engine(card):
    """Chunks of prompts, drafts, draws and penalties behind the loop, and no fault."""
    cpu = Card(torch.device("cpu"))
    recipe, rng = recipe_of(cpu, "torch", torch.float32, 2, 40), np.random.default_rng(3)
    model = random_decoder(TINY, 512, torch.float32, cpu.device)
    pair, texts = (model, random_head(model, torch.float32)), []
    prompts = [rng.integers(0, TINY.vocab_size, count) for count in (5, 20, 9)]
    params = [
        SamplingParams(4, ignore_eos=True),
        SamplingParams(4, ignore_eos=True, temperature=0.8, seed=1, frequency_penalty=0.5),
        SamplingParams(4, ignore_eos=True, temperature=0.8, seed=2, top_k=5, top_p=0.9),
    ]
    for where, chosen in ((cpu, "autoregressive"), (Card(torch.device("cuda"), card.attention), "echo")):
        networks = [copy.deepcopy(network) for network in pair]
        served = Served(recipe, TINY, torch_engines(where, recipe, TINY, torch.float32, networks))
        loop, requests = served.loop(chosen, prompts, params)
        while loop.scheduler.busy:
            loop.step()
        texts.append([request.generated for request in requests])
    assert texts[0] == texts[1]
    loop, _ = served.loop("autoregressive", prompts[1:], params[1:])
    while len(loop.batch.decoding()) < 2:
        loop.step()
    waits = TRANSFERS.waits
    loop.step()
    assert TRANSFERS.waits == waits + 1  # draws are launched behind the logits, before anybody waits for these
    assert not card.faults
