"""Decoding as it is served: a head with its feature bank, levels in graphs between gates, work that overlaps."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from gpu.compiled import assert_caches_are_not_copied, skip_without_tensorrt
from gpu.engines import Card, apart
from gpu.random_networks import QWEN3_8B, SMALL, TINY
from gpu.serving import CacheCopies, KnownText, Served, foreseen, gap, recipe_of, tensorrt_engines, torch_engines

from echo_trt.engine.params import SamplingParams
from echo_trt_lab.synthetic_engine import text_keys
from echo_trt_lab.synthetic_text import HashedText, Rates

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:.*(CUDA graph|cache)")]
POLICIES = ("goodput", "autoregressive", "static", "echo")  # memory is looked at after the first one
TIE = 1e-4  # of the largest logit: kernels of other batch sizes round otherwise
BATCHES = (1, 8, 64)
SIZES = (1, 4, 8, 16, 32, 64, 128, 192, 256)  # tokens of a pass
RATES = "0.8,0.75,0.7,0.65,0.6"  # P(a head's best proposal is right) by depth
CONSIDERED = 1.5  # draft tokens of a node whose children the planner reads, at high load; see test_device_counts.py
COMPILED = dataclasses.replace(QWEN3_8B, num_layers=2, vocab_size=32_768)  # which TensorRT builds in about a minute
DRAFTED = 0.05  # of the largest drafted score, in bfloat16: graphs have rows of padding, whose products round otherwise
ROOM = 1.1  # of the bytes that sizing foresaw; larger: a pool that fills a card's memory may not fit


@pytest.fixture(scope="module")
def card(card) -> Card:
    """On a CPU attention is the reference here: Triton's interpreter takes most of a walk, and ``smoke`` walks it."""
    return dataclasses.replace(card, operator=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_policy_writes_plain_decodings_text(card, dtype, figures):
    """Of a target's real choices, half of them draws, by a head that proposes them. In float32 texts part at ties
    alone; bfloat16's are reported, not judged.
    """
    count, prompt, tokens, batch = card.pick((24, 200, 48, 8), (2, 9, 5, 2))
    # Heads of 32: in float32, larger ones need more shared memory than some cards have.
    config = card.pick(dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32), TINY)
    recipe, rng = recipe_of(card, "torch", dtype, batch, prompt + tokens + 2), np.random.default_rng(3)
    served = Served(recipe, config, torch_engines(card, recipe, config, dtype))
    prompts = [rng.integers(0, config.vocab_size, n) for n in rng.integers(1, prompt + 1, count)]
    params = [SamplingParams(tokens, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(count)]
    plain, keys = [], {}
    drafting = card.pick(("static", "echo", "goodput"), ("echo", "goodput") if dtype == torch.float32 else ("echo",))
    for policy in ("autoregressive", *drafting):
        loop, requests = served.loop(policy, prompts, params)
        while loop.scheduler.busy:
            loop.step()
            for slot in loop.batch.active.nonzero()[0]:
                keys[int(text_keys(loop.batch, [slot])[0])] = loop.scheduler.running_in([slot])[0].id
        texts = [request.generated for request in requests]
        if not plain:
            plain, whole = texts, {key: np.concatenate((prompts[i], texts[i])) for key, i in keys.items()}
            served.text, served.draft_only = KnownText(whole, config.vocab_size), True
            continue
        gaps = [gap(served.target, prompts[i], plain[i], texts[i]) for i in range(count) if texts[i] != plain[i]]
        accepted = loop.counters.emitted_tokens / loop.counters.verifications
        reported = {"same": count - len(gaps), "of": count, "accepted": accepted, "largest_gap": max(gaps, default=0)}
        figures(**{policy: reported})
        if dtype == torch.float32:
            assert max(gaps, default=0) <= TIE, policy
            assert accepted > 1.5, policy


@pytest.fixture(scope="module")
def engine() -> str:
    return "torch"


@pytest.fixture(scope="module")
def served(engine, card, tmp_path_factory) -> Served:
    """Of Qwen3-8B's shape, with as many layers as the card takes; TensorRT has two, since a build takes long."""
    if engine == "tensorrt":
        skip_without_tensorrt(card)
    recipe = recipe_of(card, engine, card.pick(torch.bfloat16, torch.float32), *card.pick((64, 1024), (2, 40)))
    config = COMPILED if engine == "tensorrt" else card.pick(QWEN3_8B, TINY)
    while card.cuda and 1.2 * foreseen(recipe, config)[1] > card.free():
        if config.num_layers < 6:
            pytest.skip(f"this card's memory takes less than {config.num_layers} layers of Qwen3-8B's shape")
        config = dataclasses.replace(config, num_layers=config.num_layers - 1)
    begin, free = time.monotonic(), card.free()
    if engine == "torch":
        engines = torch_engines(card, recipe, config, card.pick(torch.bfloat16, torch.float32))
    else:
        engines = tensorrt_engines(recipe, config, tmp_path_factory.mktemp("built"))
    served = Served(recipe, config, engines)
    served.text = HashedText(Rates.parse(RATES), np.arange(config.vocab_size))
    served.free, served.start, served.taken = free, time.monotonic() - begin, free - card.free()
    return served


def test_drafted_scores_are_those_of_launches(served, card, figures):
    """Of an iteration at every load: a graph of levels that computes from old values writes the same texts."""
    text, served.text = served.text, None  # the head's own choices, before it has ever been told a text
    for batch in card.pick(BATCHES, (2,)):
        drafts = []
        for graphs in (True, False):
            loop = served.begun("static", batch)
            with nullcontext() if graphs else served.launching():
                served.head.drafted = []
                loop.step()
            drafts.append(np.concatenate([scores.ravel() for scores in served.head.drafted]))
            served.head.drafted = None
        off = apart(*drafts)
        figures(**{f"drafted at {batch}": len(drafts[0]), f"off at {batch}": off})
        assert off <= DRAFTED
    served.text = text


def test_drafts_are_what_gates_let_pass_at_every_load(served, card, figures):
    """Tokens/s of every policy, and draft tokens counted where they are computed: a level's once, padding included."""
    figures(layers=served.config.num_layers, start_seconds=served.start)
    if importlib.util.find_spec("numba") is None:
        figures(note="numba is not installed, so that the host's planning is interpreted and its share larger")
    figures(**served.measure(card.pick(2.0, 0.01), card.pick(SIZES, SIZES[:2])))
    for policy in POLICIES:
        for batch in card.pick(BATCHES, (2,)):
            found = served.rate(policy, batch, card.pick(1.5, 0.3))
            figures(**{f"{policy} at {batch}": found})
            assert found["tokens_per_s"] > 0
            assert found["drafted"] == found["requested"], "levels are computed again, or not as they were asked for"
            if policy in ("static", "echo"):
                assert found["accepted"] > 1.1
            if batch >= 64:
                assert found["drafted"] <= CONSIDERED * found["considered"], "gates do not limit what is drafted"
            if card.cuda:
                assert found["overlapped"] > 0
        if policy == POLICIES[0]:
            served.taken = served.free - card.free()


def test_no_pass_copies_a_cache(served, figures):
    """Neither the KV cache of target and head nor the banks of features and states, in prompts, drafts, commits."""
    engines = served.target, served.head
    served.policy = ""  # levels without graphs
    with CacheCopies(engines) as copies, served.launching():  # the same steps, which can be seen
        loop = served.begun("static", 2)
        loop.step()
    served.policy = ""
    assert not copies.found, f"a cache is copied: {sorted(copies.found)}"
    if served.recipe.engine == "tensorrt":
        for engine in engines:
            assert_caches_are_not_copied(engine._session, figures)


def test_memory_is_what_sizing_foresaw(served, card, figures):
    """Caches to the byte; all together with some room, since graphs and scratch memory are estimates."""
    (need, total), head = foreseen(served.recipe, served.config), served.head
    caches = {"pool": served.target._pool.nbytes + head._pool.nbytes}
    caches |= {name: head.feature_cache(name).rows.nbytes for name in ("features", "hidden")}
    figures(
        foreseen=total, reserved=dataclasses.asdict(need.reserved), working=need.working, taken=served.taken, **caches
    )
    assert (caches["pool"], caches["features"]) == (need.pool, need.features)
    assert caches["hidden"] <= need.reserved.states
    if card.cuda:
        assert served.taken <= ROOM * total
