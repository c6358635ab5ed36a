"""T(N): what a pass over N tokens of B requests takes, on a network of Qwen3-8B's shape with random weights."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from echo_trt.backends.base import Engine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.decoding.echo.budget import fit_hinge
from echo_trt.decoding.pack import BLOCK, Packed, pack
from echo_trt.decoding.super_tree import ancestor_mask
from echo_trt.models.config import DecoderConfig
from echo_trt.models.roles import TargetRole
from gpu_proof_parts.calls import random_trees, scattered
from gpu_proof_parts.networks import QWEN3_8B, TINY, random_decoder
from gpu_proof_parts.report import Failed, Proof, Skipped

BATCHES = (1, 8, 32, 128, 256)
TREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens a request
MOST = 512  # tokens of a pass
CONTEXT = 1024
RUNS = 9


def prove(proof: Proof) -> None:
    batches, context = ((1, 2), 40) if proof.interpret else (BATCHES, CONTEXT)
    config, blocks = TINY, 2 * (-(-(context + TREES[-1]) // BLOCK))
    if not proof.interpret:
        blocks = blocks // 2 * BATCHES[-1]
        config = fitting(QWEN3_8B, blocks)
        if config.num_layers < 1:
            raise Failed("this card's memory takes no layer of the network beside its KV cache")
    dtype = torch.float32 if proof.interpret else torch.bfloat16
    model = random_decoder(config, context + 2 * TREES[-1], dtype, proof.device)
    weights = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
    proof.say(
        f"{config.num_layers} of {QWEN3_8B.num_layers} layers in {str(dtype).removeprefix('torch.')}, "
        f"{weights * dtype.itemsize / 1e9:.2f} GB of weights read by a pass, {context} cached tokens a request, "
        f"{blocks} KV blocks. A pass is all of an engine's run: upload, CUDA graph, argmax, its copy to the host; "
        f"median of {RUNS}, milliseconds."
    )
    engine = TorchEngine(TargetRole(model), blocks, str(proof.device), operator=operator(proof))
    eager = TorchEngine(TargetRole(model), 64, str(proof.device), operator=operator(proof), graphs=False)
    rng, rows, figures = np.random.default_rng(0), [], {}
    for batch in batches:
        sizes, seconds = [], []
        for count in TREES:
            if batch * count > (4 if proof.interpret else MOST) or not proof.in_time:
                break
            sizes.append(batch * count)
            seconds.append(time_of(engine, call_of(batch, count, context, config, rng), proof))
        if not sizes:
            proof.lacks(f"B = {batch} for lack of time")
            continue
        figures[batch] = dict(zip(sizes, (1e3 * s for s in seconds), strict=True))
        known = "; ".join(f"{n}: {1e3 * s:.2f}" for n, s in zip(sizes, seconds, strict=True))
        knee = str(fit_hinge(np.array(sizes), np.array(seconds)).k_max) if len(sizes) > 2 else "-"
        rows.append((batch, known, f"{1e3 * seconds[0] / batch:.3f}", f"{1e3 * seconds[-1] / sizes[-1]:.3f}", knee))
    if not rows:
        raise Skipped
    proof.table(("B", "N: ms", "ms a token, plain", "ms a token, most", "knee of the hinge fit"), rows)
    proof.record(layers=config.num_layers, ms=figures)
    plain = time_of(eager, call_of(1, 1, context, config, rng), proof)
    proof.say(f"Without CUDA graphs, B = 1 and N = 1 take {1e3 * plain:.2f} ms.")


def operator(proof: Proof):
    """The kernel, on a CPU too."""
    from super_tree_attention.triton_attention import super_tree_attention_triton

    return super_tree_attention_triton if proof.interpret else None


def fitting(config: DecoderConfig, blocks: int) -> DecoderConfig:
    """The network with as many layers as this card's memory takes beside their KV cache."""
    free, _ = torch.cuda.mem_get_info()
    hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    layer = hidden * (2 * config.num_heads * config.head_dim + 2 * kv + 3 * config.intermediate_size)
    cache = 2 * (blocks + 64) * BLOCK * kv
    room = 0.85 * free - 2 * 2 * config.vocab_size * hidden - 3e9  # embeddings, and what a pass needs for itself
    return dataclasses.replace(config, num_layers=min(config.num_layers, int(room // (2 * (layer + cache)))))


def call_of(batch: int, count: int, context: int, config: DecoderConfig, rng: np.random.Generator) -> Packed:
    """Every request verifies a tree of ``count`` tokens."""
    counts, past = np.full(batch, count), np.full(batch, context)
    table = scattered(past + counts, rng, 0)
    tokens = rng.integers(0, config.vocab_size, batch * count)
    if count == 1:
        return pack(tokens, past, past, counts, table, np.arange(batch))
    tree = random_trees(counts, rng)
    positions = context + tree.depth
    return pack(tokens, positions, past, counts, table, np.arange(batch * count), ancestor_mask(tree))


def time_of(engine: Engine, call: Packed, proof: Proof) -> float:
    """Median seconds of a run, best tokens read."""
    taken = []
    for _ in range(1 if proof.interpret else RUNS + 2):
        start = time.perf_counter()
        engine.run(call)["logits"].argmax(axis=1)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[-RUNS:]))
