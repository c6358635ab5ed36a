"""Decoding on a card: every policy's text is plain decoding's, and tokens per second at many loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import time

import numpy as np
import pytest
import torch
from gpu.engines import Decoding, call_of, fitting, seconds_of
from gpu.random_networks import QWEN3_8B, SMALL, TINY, quiet_layers, random_decoder

from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.rounds import timed_rounds, typical
from echo_trt.models.roles import TargetModule
from echo_trt.speculation.echo.budget import fit_hinge
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.pack import BLOCK

pytestmark = pytest.mark.gpu
POLICIES = ("static", "echo", "goodput")
TIE = 1e-4  # of the largest logit: kernels of other batch sizes round otherwise
BATCHES = (1, 8, 32, 64, 128, 256)
SIZES = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # tokens of a pass
TREES = (1, 2, 4, 8, 16, 32, 64)  # tokens per request
#: Verification all but free, so that trees grow.
FREE = Costs(Curve([1, 64, 128], [0.02, 0.02, 0.04]), Curve([1, 256], [1e-5, 1e-5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_policy_writes_plain_decodings_text(card, dtype, figures):
    """Every other request is sampled. In float32 texts part at ties alone; bfloat16's are reported, not judged."""
    count, prompt, tokens, batch = card.pick((24, 200, 48, 8), (2, 9, 4, 2))
    # Heads of 32: in float32, larger ones need more shared memory than some cards have.
    config = card.pick(dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32), TINY)
    model, rng = random_decoder(config, prompt + tokens + 99, dtype, card.device), np.random.default_rng(3)
    quiet_layers(model, 0.05)
    prompts = [rng.integers(0, config.vocab_size, n) for n in rng.integers(1, prompt + 1, count)]
    decoding = Decoding(card, model, batch, prompts, tokens)
    params = [SamplingParams(tokens, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(count)]
    texts = {}
    policies = POLICIES if dtype == torch.float32 else card.pick(POLICIES, POLICIES[:1])
    for policy in ("autoregressive", *policies):
        loop, requests = decoding.loop(policy, batch, FREE, params)
        while loop.scheduler.busy:
            loop.step()
        texts[policy] = [request.generated for request in requests]
        apart = [i for i in range(count) if texts[policy][i] != texts["autoregressive"][i]]
        gaps = [decoding.gap(i, texts["autoregressive"][i], texts[policy][i]) for i in apart]
        accepted = loop.counters.emitted_tokens / loop.counters.verifications
        reported = {"same": count - len(apart), "of": count, "accepted": accepted, "largest_gap": max(gaps, default=0)}
        figures(**{policy: reported})
        if dtype == torch.float32:
            assert all(gap <= TIE for gap in gaps), policy
            assert policy == "autoregressive" or accepted > 1.1, policy


def test_tokens_per_second_of_every_policy(card, figures):
    """A network of Qwen3-8B's shape: decoding alone, greedy, two seconds for each policy and batch."""
    batches, prompt, tokens = card.pick((BATCHES, 128, 400), ((2,), 6, 8))
    if importlib.util.find_spec("numba") is None:
        figures(note="numba is not installed, so that the host's planning is interpreted and its share larger")
    config = TINY
    if card.device.type == "cuda":
        config = fitting(QWEN3_8B, (prompt + tokens + 99) // BLOCK * batches[-1] * 9 // 8)
        if config.num_layers < 6:
            pytest.skip(f"this card's memory takes {config.num_layers} layers of Qwen3-8B beside their KV cache")
    dtype = card.pick(torch.bfloat16, torch.float32)
    model, rng = random_decoder(config, prompt + tokens + 99, dtype, card.device), np.random.default_rng(5)
    quiet_layers(model, 0.03)
    prompts = [rng.integers(0, config.vocab_size, prompt) for _ in range(batches[-1])]
    begin, free = time.monotonic(), card.free()
    decoding = Decoding(card, model, batches[-1], prompts, tokens)
    figures(layers=config.num_layers, start_seconds=time.monotonic() - begin, start_bytes=free - card.free())
    curves, sizes = [], [size for size in SIZES if size <= batches[-1]]
    for engine, name in ((decoding.target, "target"), (decoding.draft, "draft")):
        calls = [call_of(size, 1, prompt, config.vocab_size, rng) for size in sizes]
        seconds = np.maximum.accumulate(typical(timed_rounds(engine.run, calls, card.pick(2.0, 0.05))))
        curves.append(Curve(sizes, seconds))
        figures(**{f"{name}_ms": dict(zip(sizes, (1e3 * seconds).round(3).tolist(), strict=True))})
    for batch in batches:
        for policy in ("autoregressive", *POLICIES):
            figures(
                **{f"{policy} at {batch}": rate(decoding, policy, batch, Costs(*curves), tokens, card.pick(2.0, 0.05))}
            )


def rate(decoding: Decoding, policy: str, batch: int, costs: Costs, tokens: int, patience: float) -> dict[str, float]:
    """Decode while all requests run, for ``patience`` seconds at most; iterations with prompts do not count."""
    loop, _ = decoding.loop(policy, batch, costs, [SamplingParams(tokens, ignore_eos=True)] * batch)
    state = loop.batch
    while len(state.prefilling()) or not state.active.any():
        loop.step()
    loop.step()  # the draft's catch-up with the prompts
    before, begin = loop.counters.copy(), time.perf_counter()
    while int(state.active.sum()) == batch and time.perf_counter() < begin + patience:
        loop.step()
    seconds, after = time.perf_counter() - begin, loop.counters
    passes = sum(
        after.seconds[name] - before.seconds.get(name, 0) for name in ("draft", "verify") if after.seconds.get(name)
    )
    emitted, iterations = after.emitted_tokens - before.emitted_tokens, max(after.iterations - before.iterations, 1)
    assert emitted > 0
    return {
        "tokens_per_s": round(emitted / seconds, 1),
        "accepted": round(emitted / max(after.verifications - before.verifications, 1), 2),
        "tokens_per_pass": round((after.verified_tokens - before.verified_tokens) / iterations, 1),
        "iteration_ms": round(1e3 * seconds / iterations, 3),
        "host_share": round(1 - passes / seconds, 3),
    }


def test_the_seconds_of_passes_have_a_knee(card, figures):
    """T(N) at several batches, all of an engine's run: upload, CUDA graph, argmax, its copy to the host."""
    batches, context = card.pick(((1, 8, 32, 128, 256), 1024), ((1,), 40))
    blocks = batches[-1] * (-(-(context + TREES[-1]) // BLOCK))
    config = fitting(QWEN3_8B, blocks) if card.device.type == "cuda" else TINY
    if config.num_layers < 1:
        pytest.skip("this card's memory takes no layer of Qwen3-8B beside its KV cache")
    model = random_decoder(config, context + 128, card.pick(torch.bfloat16, torch.float32), card.device)
    engine = TorchEngine(TargetModule(model), blocks, str(card.device), operator=card.operator)
    rng = np.random.default_rng(0)
    figures(layers=config.num_layers)
    for batch in batches:
        sizes = [batch * count for count in TREES if batch * count <= card.pick(512, 4)]
        calls = [call_of(batch, size // batch, context, config.vocab_size, rng) for size in sizes]
        seconds = np.array([seconds_of(engine, call, card.pick(9, 1)) for call in calls])
        reported = {size: round(1e3 * one, 3) for size, one in zip(sizes, seconds, strict=True)}
        knee = fit_hinge(np.array(sizes), seconds).k_max if len(sizes) > 2 else None
        figures(**{f"ms at {batch}": reported, f"knee at {batch}": knee})
        assert (seconds > 0).all()
