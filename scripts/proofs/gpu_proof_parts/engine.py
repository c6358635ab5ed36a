"""Promises of the PyTorch engine: graphs compute what launches do, inputs are not overwritten, costs are replays'."""

from __future__ import annotations

import dataclasses
import time
import warnings

import numpy as np
import torch

from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.decoding.pack import BLOCK, LevelShape, Packed, pack, pack_levels
from echo_trt.models.config import DecoderConfig
from echo_trt.models.roles import DraftRole, HeadRole, TargetRole
from echo_trt.runtime.rounds import seconds_again, timed_rounds, typical
from gpu_proof_parts.curves import call_of, operator
from gpu_proof_parts.experts import prove_experts
from gpu_proof_parts.networks import SMALL, TINY, random_decoder, random_head
from gpu_proof_parts.report import Proof

BOUND = 1e-3  # of the largest value, in float32
TIMED = 0.5  # relative; larger: costs that are further from the replays' times pass. A capture takes 50 replays or more


def prove(proof: Proof) -> None:
    small = proof.interpret
    config = TINY if small else dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32)
    prove_graphs(proof, config)
    if proof.in_time:
        prove_catch_up(proof, config, *((40, 8) if small else (3000, 256)))
    if proof.in_time:
        prove_levels(proof, config)
    if proof.in_time:
        prove_experts(proof)
    if proof.in_time:
        prove_costs(proof, config)
    proof.say("Checks of the PyTorch engine on a small random network, in float32 where results are compared.")


def pair(
    proof: Proof, config: DecoderConfig, draft: bool, blocks: int, bounds: CallBounds
) -> tuple[TorchEngine, TorchEngine]:
    """The same network with graphs that are captured at the start, and without any."""
    model = random_decoder(config, blocks * BLOCK, torch.float32, proof.device)
    roles = [DraftRole(model, 4) if draft else TargetRole(model) for _ in range(2)]
    device = str(proof.device)
    options = {"operator": operator(proof)}
    return (
        TorchEngine(roles[0], blocks, device, bounds=bounds, **options),
        TorchEngine(roles[1], blocks, device, graphs=False, **options),
    )


def prove_graphs(proof: Proof, config: DecoderConfig) -> None:
    """Every call, padded into a graph, has the logits of plain launches; all graphs are captured at the start."""
    bounds = CallBounds(8, 5, 16)
    start, told = time.monotonic(), []
    free = _free(proof)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        graphed, plain = pair(proof, config, False, 48, bounds)
        told += [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    captured, seconds = len(graphed._graph_sizes), time.monotonic() - start
    rng, worst = np.random.default_rng(1), 0.0
    replayed = count_replays(graphed)
    for batch, count in ((1, 1), (1, 4), (3, 2)) if proof.interpret else ((1, 1), (1, 16), (3, 5), (8, 4), (5, 1)):
        call = call_of(batch, count, 33, config, rng)
        got, wanted = (np.asarray(engine.run(call)["logits"]) for engine in (graphed, plain))
        worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    proof.check("graphs compute what launches do", worst <= BOUND, f"{worst:.1e} of the largest logit apart")
    held = None if graphed._graphs is None else all(replayed)
    proof.check("every call is replayed", held, f"{sum(replayed)} of {len(replayed)} calls")
    detail = f"{captured} sizes in {seconds:.1f} s, {(free - _free(proof)) / 2**20:.0f} MiB with the network"
    proof.check("all sizes are captured", None if graphed._graphs is None else not told, "; ".join([detail, *told[:1]]))
    proof.record(graphs=captured, capture_seconds=seconds, graph_error=worst)


def count_replays(engine: TorchEngine) -> list[bool]:
    """Return a list that gets, for each later call, whether a graph was there for it."""
    replayed: list[bool] = []
    if engine._graphs is not None:
        run = engine._graphs.run

        def noted(*arguments):
            outputs = run(*arguments)
            replayed.append(outputs is not None)
            return outputs

        engine._graphs.run = noted
    return replayed


def prove_catch_up(proof: Proof, config: DecoderConfig, prompt: int, chunk: int) -> None:
    """A draft catches up with a long prompt in chunks that read nothing back, as launches that wait would have it."""
    blocks = -(-prompt // BLOCK) + 1
    graphed, plain = pair(proof, config, True, blocks, CallBounds(2, blocks, 16))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, prompt)
    for engine in (graphed, plain):
        for begin in range(0, prompt - 1, chunk):
            engine.run(_chunk(tokens[begin : begin + chunk], begin, blocks))
            if engine is plain and proof.device.type == "cuda":
                torch.cuda.synchronize()
    rows = [engine._pool.float() for engine in (graphed, plain)]
    error = float((rows[0] - rows[1]).abs().max() / rows[1].abs().max())
    proof.check(
        "a draft's catch-up computes each chunk on its own inputs", error <= BOUND,
        f"{prompt} tokens in chunks of {chunk}: KV rows {error:.1e} of the largest apart",
    )  # fmt: skip
    proof.record(catch_up_error=error)


def _chunk(tokens: np.ndarray, begin: int, blocks: int) -> Packed:
    positions, table = begin + np.arange(len(tokens)), np.arange(blocks)[None]
    return pack(tokens, positions, np.array([begin]), np.array([len(tokens)]), table, np.zeros(0, np.int64))


def prove_levels(proof: Proof, config: DecoderConfig) -> None:
    """A head's levels in one graph are those of launches, for fewer requests than the graph was captured for, too."""
    shape, counts, blocks = LevelShape(3, 3, 4), np.array([4, 1, 6]), 16
    head = random_head(random_decoder(config, blocks * BLOCK, torch.float32, proof.device), torch.float32)
    rng, drafted = np.random.default_rng(4), []
    features = rng.standard_normal((int(counts.sum()), 3 * config.hidden_size)).astype(np.float32)
    table, rows = np.arange(4 * 4).reshape(4, 4), np.arange(len(features))
    positions = np.concatenate([np.arange(n) for n in counts])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for graphs in (True, False):
            engine = TorchEngine(
                HeadRole(head, 4), blocks, str(proof.device), operator(proof), graphs,
                bounds=CallBounds(4, 4, 16) if graphs else None, resident=True,
            )  # fmt: skip
            engine.capture_levels([shape])
            bank = engine.bank("features")
            bank.write(rows, features, rows)
            call = pack(rows % config.vocab_size, positions, 0 * counts, counts, table[:3], np.cumsum(counts) - 1)
            inputs = {"features": bank.read(rows), "hidden": engine.bank("hidden").read(rows[:0])}
            below = pack_levels(counts, table[:3], shape)
            drafted.append(engine.run_levels(call, below, shape, 20, **inputs))
    scores = [np.sort(np.ascontiguousarray(part[:, 3]).view(np.float32)) for part in drafted]
    error = float(np.abs(scores[0] - scores[1]).max() / np.abs(scores[1]).max())
    told = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    proof.check(
        "draft levels in one graph are those of launches", error <= BOUND and not told,
        "; ".join([f"log-probabilities {error:.1e} of the largest apart", *told[:1]]),
    )  # fmt: skip
    proof.record(levels_error=error)


def prove_costs(proof: Proof, config: DecoderConfig) -> None:
    """Times as `echo-trt serve` measures them, of sizes that never ran before, against many replays."""
    model = random_decoder(config, 8 * BLOCK, torch.float32 if proof.interpret else torch.bfloat16, proof.device)
    engine = TorchEngine(TargetRole(model), 256, str(proof.device), operator=operator(proof))
    sizes = (1, 2) if proof.interpret else (1, 2, 4, 8, 16, 24, 32)
    rng = np.random.default_rng(3)
    calls = [call_of(size, 1, 40, config, rng) for size in sizes]
    measured = typical(timed_rounds(engine.run, calls, 1.0))
    rounds = range(2 if proof.interpret else 50)
    again = np.median([[seconds_again(engine.run, call) for call in calls] for _ in rounds], axis=0)
    apart = float(np.abs(measured / again - 1).max())
    told = "; ".join(f"{n}: {1e3 * m:.2f}, {1e3 * a:.2f}" for n, m, a in zip(sizes, measured, again, strict=True))
    proof.check(
        "costs have no part of a graph's capture", None if proof.interpret else apart <= TIMED,
        f"N: measured, replayed in ms: {told}",
    )  # fmt: skip
    proof.record(costs_apart=apart)


def _free(proof: Proof) -> int:
    return torch.cuda.mem_get_info()[0] if proof.device.type == "cuda" else 0
