"""Calls on a GPU, walked on a CPU: their captured sizes, the buffers they are sent in, and what comes back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import roles_of
from stand_in_graphs import StandInGraph, in_banks, with_graphs
from test_torch_engine import BLOCKS, NETWORKS, arrays_of, assert_same, calls, inputs_for

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda import sizes as cuda_sizes
from echo_trt.backends.cuda.calls import MAX_GRAPHS, Staging
from echo_trt.backends.cuda.sizes import LARGEST, CallBounds, bucket
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.eagle3 import EngineDrafter
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.speculation.pack import pack
from echo_trt.speculation.policies import make_planner

BOUNDS = CallBounds(4, 4, 16)


@pytest.fixture
def small_sizes(monkeypatch):
    """Fewer sizes, which capture in less time."""
    sizes = cuda_sizes.SIZES
    monkeypatch.setattr(cuda_sizes, "SIZES", tuple(size for size in sizes if size <= 96))


def prompt(tokens: int, past: int, requested: int = 0):
    """Return a chunk of one request's prompt, whose last ``requested`` tokens' logits are asked for."""
    table = np.arange(BLOCKS)[None]
    positions, count = past + np.arange(tokens), np.array([tokens])
    rows = tokens - requested + np.arange(requested)
    return pack(positions % 90, positions, np.array([past]), count, table, rows)


# -- sizes ---------------------------------------------------------------------------------------------------------


@given(
    requests=st.integers(1, 300),
    maximum=st.integers(1, 300),
    tokens=st.integers(1, LARGEST),
    requested=st.floats(0, 1),
    tree=st.sampled_from([8, 16, 64, 128]),
)
def test_every_call_of_up_to_the_largest_has_a_captured_size(requests, maximum, tokens, requested, tree):
    requests = min(requests, maximum, tokens)
    # One request's logits are all asked for of a tree, and of a prompt's end alone.
    rows = int(requested * tokens) if requests > 1 or tokens <= tree else 1
    arrays = {"token_ids": np.zeros(tokens), "logit_rows": np.zeros(rows), "past_lens": np.zeros(requests)}
    sizes = cuda_sizes.graph_sizes(maximum, tree)
    found = cuda_sizes.size_for(arrays, sizes)
    assert found.tokens == bucket(tokens)
    assert requests > 1 or rows > 1 or found.rows <= max(16, bucket(tokens) * (tokens < 64))
    assert len(sizes) <= MAX_GRAPHS


class Sized(Engine):
    """An engine that notes the captured sizes of its calls, and computes nothing."""

    sizes, prefill_alone = cuda_sizes.SIZES, LARGEST

    def __init__(self, num_blocks, outputs, listed):
        self.num_blocks, self._outputs, self._listed = num_blocks, outputs, listed
        self.used, self.prompt_tokens = [], []

    def run(self, call, **inputs):
        self.used.append(cuda_sizes.size_for(arrays_of(call), self._listed))
        self.prompt_tokens.append(len(call.token_ids) if len(call.logit_rows) <= 1 else 0)
        return {name: make(len(call.logit_rows)) for name, make in self._outputs.items()}

    def compact_kv(self, source, target):
        pass


def test_a_server_under_load_has_a_graph_for_every_pass():
    """64 slots, prompts of 50 to 2,500 tokens, chunks of 512 beside trees: as the recipes for GPUs."""
    rng, blocks = np.random.default_rng(0), 64 * 90
    batch = InputBatch(64, 2700, 64, blocks)
    listed = cuda_sizes.graph_sizes(64, 64)
    target = Sized(blocks, {"logits": lambda rows: rng.random((rows, 50), np.float32)}, listed)
    scores = {"scores": lambda rows: np.log(rng.random((rows, 4), np.float32) * 0.3 + 0.01)}
    draft = Sized(blocks, scores | {"candidates": lambda rows: rng.integers(0, 50, (rows, 4))}, listed)
    settings = {"max_depth": 4, "beams": 3, "width": 4, "per_request": 16, "gates": {},
                "static": {"depth": 3, "top_k": 3, "tokens": 6}, "budget": 384}  # fmt: skip
    loop = EngineCore(target, EngineDrafter(draft, batch, 512), batch, make_planner("static", settings, None), (), 512)
    for i in range(90):
        prompt_ids = rng.integers(0, 50, int(rng.integers(50, 2500)))
        loop.scheduler.add(Request(i, prompt_ids, SamplingParams(int(rng.integers(4, 40)), seed=i, ignore_eos=True)))
    while loop.scheduler.busy:
        loop.step()
    for engine in (target, draft):
        assert len(engine.used) > 50
        assert None not in engine.used
        assert len(set(engine.used)) <= len(listed) < 80


# -- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_all_graphs_are_captured_before_calls_come_and_compute_what_launches_do(
    network, networks, monkeypatch, small_sizes
):
    pair, name, features = NETWORKS[network]
    plain = TorchEngine(roles_of(pair, networks)[name], BLOCKS)
    engine = TorchEngine(roles_of(pair, networks)[name], BLOCKS, bounds=BOUNDS)
    graphs = with_graphs(engine, monkeypatch)
    engine._capture_all()
    captured = graphs.captures
    assert captured == len(engine._graph_sizes)
    assert (engine._pool == 0).all()  # a capture writes no KV row
    for seed in (1, 3) if network == "head" else range(4):  # a head's levels have graphs of their own
        for call in calls(seed, requests=3):
            inputs, replays = inputs_for(call, features, seed), StandInGraph.replays
            assert_same(plain.run(call, **inputs), engine.run(call, **in_banks(engine, inputs)), 1e-5)
            torch.testing.assert_close(engine._pool, plain._pool, atol=1e-5, rtol=1e-5)
            assert StandInGraph.replays == replays + 1
    assert graphs.captures == captured


def test_a_policy_that_drafts_level_by_level_has_graphs_as_its_calls_come(networks, monkeypatch, small_sizes):
    engine = TorchEngine(roles_of("eagle3", networks)["draft"], BLOCKS, bounds=BOUNDS)
    graphs = with_graphs(engine, monkeypatch)
    engine._capture_all()
    captured, call = graphs.captures, calls(0)[0]
    inputs = in_banks(engine, inputs_for(call, NETWORKS["head"][2], 0))  # states alone
    engine.run(call, **inputs)
    assert graphs.captures == captured
    engine.capture_levels(lambda requests: ())
    replays = StandInGraph.replays
    for _ in range(2):
        engine.run(call, **inputs)
    assert (graphs.captures, StandInGraph.replays) == (captured + 1, replays + 2)


def test_a_size_that_cannot_be_captured_runs_by_launches(networks, monkeypatch, small_sizes):
    plain = TorchEngine(roles_of("eagle3", networks)["target"], BLOCKS)
    engine = TorchEngine(roles_of("eagle3", networks)["target"], BLOCKS)
    graphs = with_graphs(engine, monkeypatch, refused=(8,))
    for past, tokens in ((0, 8), (8, 8), (16, 4)):
        call = prompt(tokens, past, 2)
        with warnings.catch_warnings(record=True) as reported:
            warnings.simplefilter("always")
            assert_same(plain.run(call), engine.run(call), 1e-5)
        output = [str(w.message) for w in reported if "CUDA graph" in str(w.message)]
        assert len(output) == (past == 0)  # once
        assert all(s.endswith("without a CUDA graph: operation not permitted when stream is capturing") for s in output)
    assert graphs.captures == 2  # no second try of the size that failed


@pytest.mark.parametrize("pair", ["close", "model", "dspark"])
def test_decoding_by_graphs_writes_the_same_text(pair, open_llm, monkeypatch, small_sizes):
    """Trees, catch-ups and chunks, all of them padded into graphs that were captured before."""
    prompts = [np.arange(i, i + n) % 90 for i, n in enumerate((5, 37, 1, 16))]
    params = [SamplingParams(12, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(4)]
    texts = []
    for graphed in (False, True):
        llm = open_llm(pair, "echo", 3, "resident" if graphed else "torch")
        engines = [llm.loop.target, llm.loop.drafter.engine]
        for engine in engines if graphed else []:
            graphs = with_graphs(engine, monkeypatch)
            engine._capture_all()
            before = graphs.captures
        levels = getattr(engines[1]._levels, "_graphs", None) if graphed and pair in ("eagle3", "close") else None
        if levels:
            engines[1].capture_levels(llm.loop.planner.level_shapes)
            captured = levels.captures
            assert captured >= len({1, 2, 3})  # for so many requests each
            assert (engines[1]._pool == 0).all()
        replays = StandInGraph.replays
        texts.append([c.token_ids for c in llm.generate([p.tolist() for p in prompts], params)])
    assert texts[0] == texts[1]
    assert StandInGraph.replays > replays + 2 * 12
    assert before > 20
    assert engines[1]._graphs.captures == before
    assert not levels or levels.captures == captured
    assert not levels or levels.replays > 6


# -- buffers -------------------------------------------------------------------------------------------------------


def test_arrays_of_varying_length_send_their_own_part_alone(monkeypatch):
    sent, copy = [], torch.Tensor.copy_
    like = {"token_ids": np.zeros(8, np.int64), "tree_mask": np.zeros(0, np.uint8)}
    like["block_indices"] = np.zeros(0, np.int32)
    staging = Staging(like, torch.device("cpu"), {"block_indices": 10_000, "tree_mask": 4096})
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, source, **options: sent.append(source.numel()) or copy(to, source)
    )
    for mask, blocks in ((0, 0), (64, 0), (0, 7), (64, 7)):
        arrays = {"token_ids": np.arange(8), "tree_mask": np.ones(mask, np.uint8), "block_indices": np.full(blocks, 3)}
        tensors = staging.upload(arrays)
        assert (tensors["tree_mask"][:mask] == 1).all()
        assert (tensors["block_indices"][:blocks] == 3).all()
        assert len(sent) <= 2
        assert sum(sent) <= 256 + mask + 4 * blocks
        sent.clear()
