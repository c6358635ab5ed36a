"""Promises of the PyTorch engine on a card: graphs compute what launches do, and costs are those of replays."""

from __future__ import annotations

import dataclasses
import time
import warnings

import numpy as np
import pytest
import torch
from gpu.engines import apart, call_of
from gpu.random_networks import SMALL, TINY, random_decoder, random_head
from torch import nn

from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.engine.measure import seconds_again, timed_rounds, typical
from echo_trt.models.config import DecoderConfig
from echo_trt.models.fp8_linear import Fp8Linear, dequantise, has_fp8_products, quantise_rows
from echo_trt.models.layers import Experts, has_grouped_products
from echo_trt.models.roles import DraftModule, HeadModule, TargetModule
from echo_trt.speculation.pack import BLOCK, LevelShape, pack, pack_levels

pytestmark = pytest.mark.gpu
BOUND = 1e-3  # of the largest value, in float32
TIMED = 0.5  # relative; larger: costs that are further from the replays' times pass. A capture takes 50 replays or more


@pytest.fixture
def config(card) -> DecoderConfig:
    return card.pick(dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32), TINY)


@pytest.fixture
def all_captured():
    """Fails a test in which a size was not captured."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(one.message) for one in caught if "CUDA graph" in str(one.message)]


@pytest.fixture
def pair_of(card, config):
    """role, blocks, bounds -> the same network with graphs that are captured at the start, and without any."""

    def get(role, blocks: int, bounds: CallBounds) -> tuple[TorchEngine, TorchEngine]:
        model = random_decoder(config, blocks * BLOCK, torch.float32, card.device)
        shared = {"operator": card.operator}
        graphed = TorchEngine(role(model), blocks, str(card.device), bounds=bounds, **shared)
        return graphed, TorchEngine(role(model), blocks, str(card.device), graphs=False, **shared)

    return get


def test_graphs_compute_what_launches_do(card, config, pair_of, all_captured, figures, monkeypatch):
    begin, free = time.monotonic(), card.free()
    graphed, plain = pair_of(TargetModule, 48, CallBounds(8, 5, 16))
    figures(start_seconds=time.monotonic() - begin, start_bytes=free - card.free())
    rng, replayed = np.random.default_rng(1), []
    if graphed._graphs is not None:
        run = graphed._graphs.run
        monkeypatch.setattr(graphed._graphs, "run", lambda *a: replayed.append(run(*a)) or replayed[-1])
    for batch, count in card.pick(((1, 1), (1, 16), (3, 5), (8, 4), (5, 1)), ((1, 1), (1, 4), (3, 2))):
        call = call_of(batch, count, 33, config.vocab_size, rng)
        got, wanted = (np.asarray(engine.run(call)["logits"]) for engine in (graphed, plain))
        assert apart(got, wanted) <= BOUND
    assert all(outputs is not None for outputs in replayed)
    assert bool(replayed) == (card.device.type == "cuda")


def test_a_drafts_prefill_computes_each_chunk_on_its_own_inputs(card, config, pair_of):
    """Chunks of a long prompt that read nothing back, beside launches that wait."""
    prompt, chunk = card.pick((3000, 256), (40, 8))
    blocks = -(-prompt // BLOCK) + 1
    engines = pair_of(lambda model: DraftModule(model, 4), blocks, CallBounds(2, blocks, 16))
    tokens, table = np.random.default_rng(2).integers(0, config.vocab_size, prompt), np.arange(blocks)[None]
    for engine in engines:
        for begin in range(0, prompt - 1, chunk):
            part = tokens[begin : begin + chunk]
            positions, past, count = begin + np.arange(len(part)), np.array([begin]), np.array([len(part)])
            engine.run(pack(part, positions, past, count, table, np.zeros(0, np.int64)))
            if engine is engines[1] and card.device.type == "cuda":
                torch.cuda.synchronize()
    assert apart(*(engine._pool.float() for engine in engines)) <= BOUND


def test_draft_levels_in_one_graph_are_those_of_launches(card, config, all_captured):
    """For fewer requests than the graph was captured for, too, and where a part of them goes on."""
    shape, deeper, counts, blocks = LevelShape(1, 2, 3, 4), LevelShape(3, 2, 3, 4), np.array([4, 1, 6]), 16
    head = random_head(random_decoder(config, blocks * BLOCK, torch.float32, card.device), torch.float32)
    features = np.random.default_rng(4).standard_normal((int(counts.sum()), 3 * config.hidden_size), np.float32)
    table, rows, scores = np.arange(4 * 4).reshape(4, 4), np.arange(len(features)), []
    positions = np.concatenate([np.arange(n) for n in counts])
    for graphs in (True, False):
        bounds = CallBounds(4, 4, 16) if graphs else None
        device = str(card.device)
        engine = TorchEngine(HeadModule(head, 4), blocks, device, card.operator, graphs, bounds=bounds, resident=True)
        engine.capture_levels(lambda requests: [shape, deeper])
        engine.feature_cache("features").write(rows, features, rows)
        call = pack(rows % config.vocab_size, positions, 0 * counts, counts, table[:3], np.cumsum(counts) - 1)
        inputs = {
            "features": engine.feature_cache("features").read(rows),
            "hidden": engine.feature_cache("hidden").read(rows[:0]),
        }
        _, drafted = engine.start_levels(call, pack_levels(counts, table[:3], shape), shape, 20, **inputs)
        further = engine.run_levels(pack_levels(counts[1:], table[1:3], deeper), np.array([1, 2]), deeper, 20)
        found = np.concatenate([part[:, 3].ravel() for part in (drafted, further)])
        scores.append(np.sort(np.ascontiguousarray(found).view(np.float32)))
    assert apart(*scores) <= BOUND


@torch.no_grad()
def test_tokens_are_routed_to_their_experts_in_a_graph(card, seed, figures):
    """A layer of Qwen3-30B-A3B: the sum of all experts, faster, on tokens that the graph was not captured with.

    PyTorch's grouped product is for capabilities 9.x and 10.x; elsewhere every expert computes.
    """
    wide = {"hidden_size": 2048, "num_experts": 128, "experts_per_token": 8, "expert_size": 768}
    tiny = {"hidden_size": 32, "num_experts": 5, "experts_per_token": 2, "expert_size": 16}
    config = dataclasses.replace(SMALL, **card.pick(wide, tiny))
    layer = Experts(config).to(card.device, torch.bfloat16).eval()
    for parameter in layer.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    x, held = (torch.randn(64, config.hidden_size, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    top, chosen = layer.router(x).float().softmax(dim=-1).topk(layer.top_k, dim=-1)
    top = (top / top.sum(dim=-1, keepdim=True) if layer.normalise else top).to(x.dtype)
    weights = torch.zeros(len(x), config.num_experts, device=x.device, dtype=x.dtype).scatter(-1, chosen, top)
    grouped = not card.cuda or has_grouped_products(x, layer.down)
    figures(grouped_products=grouped)
    routed = layer._routed(x, top, chosen) if grouped else layer(x)
    if card.cuda and grouped:
        from triton.testing import do_bench

        layer(held)  # kernels are compiled outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            routed = layer(held)
        held.copy_(x)
        graph.replay()
        dense, fast = do_bench(lambda: layer._dense(x, weights)), do_bench(lambda: layer._routed(x, top, chosen))
        figures(routed_speedup=dense / fast)
    assert apart(routed.float(), layer._dense(x, weights).float()) <= 0.02


def test_costs_have_no_part_of_a_graphs_capture(card, config, figures):
    """Times as a server measures them, of sizes that never ran before, against many replays."""
    sizes, dtype = card.pick(((1, 2, 4, 8, 16, 24, 32), torch.bfloat16), ((1, 2), torch.float32))
    model, rng = random_decoder(config, 8 * BLOCK, dtype, card.device), np.random.default_rng(3)
    engine = TorchEngine(TargetModule(model), 256, str(card.device), operator=card.operator)
    calls = [call_of(size, 1, 40, config.vocab_size, rng) for size in sizes]
    measured = typical(timed_rounds(engine.run, calls, card.pick(1.0, 0.1)))
    rounds = [[seconds_again(engine.run, call) for call in calls] for _ in range(card.pick(50, 2))]
    again = np.median(rounds, axis=0)
    figures(measured_ms=(1e3 * measured).tolist(), replayed_ms=(1e3 * again).tolist())
    if card.device.type == "cuda":
        assert np.abs(measured / again - 1).max() <= TIMED


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 64, 500])
def test_products_in_fp8_are_near_those_of_the_dequantised_matrix(card, figures, tokens, blocks):
    """A card from compute capability 8.9 on has the product, also in a CUDA graph; others dequantise."""
    inputs, outputs = card.pick((4096, 6144), (256, 384))
    has = has_fp8_products(card.device)
    figures(computes_in_fp8=has)
    generator = torch.Generator().manual_seed(tokens)
    weight, x = (torch.randn(n, inputs, generator=generator) for n in (outputs, tokens))
    rows, scale = quantise_rows(weight)
    if blocks:
        scale = torch.rand(outputs // 128, inputs // 128, generator=generator)
    product = Fp8Linear(rows, scale).to(card.device)
    x = x.to(card.device, torch.bfloat16)
    if card.cuda and not has:
        assert torch.cuda.get_device_capability(card.device) < (8, 9)
        network = nn.Sequential(product)
        dequantise(network, torch.bfloat16)
        assert apart(network(x).float().cpu(), product(x.float()).cpu()) < 0.02
        return
    wanted, got = product(x.float()), product(x)
    off = float((got.float() - wanted).norm() / wanted.norm())
    figures(fp8_product_off=off)
    assert off < 0.04
    if has:
        stream, graph = torch.cuda.Stream(card.device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            replayed = product(x)
        graph.replay()
        assert torch.equal(replayed, got)
