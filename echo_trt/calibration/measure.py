"""Measure T(N, context) of target and draft on this machine, in a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date

import numpy as np

from echo_trt.bundle import Manifest
from echo_trt.calibration.store import CostTable, CurveTable, machine
from echo_trt.decoding.costs import fit_hinge
from echo_trt.decoding.pack import BLOCK, pack
from echo_trt.decoding.ragged import begins
from echo_trt.runtime.drafters import EngineDrafter
from echo_trt.runtime.loop import Loop

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
SHORT, LONG = 8, 8 * BLOCK  # cached tokens of a request
NODES = 3  # tokens of a small tree
ROUNDS = 5
NOTICED = 0.05  # of a pass: what another size must take more to count


def measure(loop: Loop, manifest: Manifest, seconds: float = 8.0) -> CostTable:
    """Passes over N requests of one token, all sizes in one round after another, so that drift spreads over all.

    ``seconds`` bounds the time: at least one round is run after a warm-up. Nothing may be running.
    """
    loop.state.forget_cached()  # these passes write over the pool
    target = _measured(loop, lambda call: loop.target.run(call), 0.75 * seconds)
    draft, cold = CurveTable(sizes=[1], seconds=[0.0]), 0.0
    if isinstance(loop.drafter, EngineDrafter):
        drafter = loop.drafter
        run = lambda call: drafter.engine.run(call, **drafter.blank(len(call.token_ids)))  # noqa: E731
        draft, cold = _measured(loop, run, 0.25 * seconds), _cold(loop, run)
    sizes, times = np.array(target.sizes), np.array(target.seconds)
    hinge = {k: float(v) for k, v in asdict(fit_hinge(sizes, times)).items()}
    return CostTable(
        machine=machine(manifest),
        measured=date.today(),
        target=target,
        draft=draft,
        hinge=hinge,
        cold=cold,
        granule=loop.target.granule,
        change=_change(loop),
        least=loop.target.least,
    )


def _measured(loop: Loop, run: Callable, seconds: float) -> CurveTable:
    state, blocks = loop.state, loop.target.num_blocks
    # A slot's own blocks serve one request of a call, so that beyond the slots each request brings more tokens.
    most = state.count if state.linear else blocks
    long = min(LONG, state.context - NODES)
    short = min(SHORT, long)
    tokens = {n: n // min(n, most) for n in SIZES if n % min(n, most) == 0 and n <= max(4 * state.count, 16)}
    sizes = [n for n, chain in tokens.items() if chain <= state.context - short]
    each = -(-(long + NODES) // BLOCK)
    # Requests with long contexts, one token each; the same with NODES tokens each.
    wide = max(n for n in sizes if n <= most and (n * each <= blocks or n == 1))
    bushy = max(n for n in sizes if n * NODES <= sizes[-1] and n <= wide)
    shapes = [(min(n, most), short, tokens[n]) for n in sizes] + [(wide, long, 1), (bushy, long, NODES)]
    calls = [_call(loop, *shape) for shape in shapes]
    for call in calls:
        run(call)
    taken: list[np.ndarray] = []
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    while len(taken) < ROUNDS and (not taken or time.perf_counter() - begin < seconds):
        seconds_of = np.empty(len(calls))
        for i in rng.permutation(len(calls)):  # what ran before leaves its weights in the cache, or evicts them
            seconds_of[i] = _seconds(run, calls[i])
        taken.append(seconds_of)
    # The lower quartile: whatever else ran only ever adds.
    *usual, far, tree = np.quantile(taken, 0.25, axis=0).tolist()
    per_context = max(far - usual[sizes.index(wide)], 0.0) / max(wide * (long - short), 1)
    base = [t - per_context * n * short for n, t in zip(sizes, usual, strict=True)]
    straight = float(np.interp(bushy * NODES, sizes, base)) + per_context * bushy * long
    per_node = max(tree - straight, 0.0) / (bushy * (NODES - 1) * long)
    monotone = np.maximum.accumulate(np.maximum(base, 1e-6))
    return CurveTable(
        sizes=sizes, seconds=[round(t, 7) for t in monotone.tolist()], per_context=per_context, per_node=per_node
    )


def _change(loop: Loop) -> float:
    """Seconds that a pass of another size than the last one takes more; 0 where that is noise beside the pass."""
    run, calls = loop.target.run, [_call(loop, 1, SHORT, 1), _call(loop, 1, SHORT, 2 * NODES)]
    same = [[_seconds(run, call) for call in calls] for _ in range(2 * ROUNDS)]
    other = [[_timed(run, call) for call in calls] for _ in range(2 * ROUNDS)]
    # Of each size for itself: theirs differ by more. The lower quartile, as above.
    usual = np.quantile(same, 0.25, axis=0)
    more = float((np.quantile(other, 0.25, axis=0) - usual).mean())
    return more if more > NOTICED * usual.mean() else 0.0


def _cold(loop: Loop, draft: Callable) -> float:
    """Seconds that a draft's pass takes more right after a target's, which has driven its weights out of the cache."""
    call, warm, after = _call(loop, 1, SHORT, 1), [], []
    for _ in range(ROUNDS):
        loop.target.run(call)
        after.append(_timed(draft, call))
        warm.append(_timed(draft, call))
    return max(float(np.median(after) - np.median(warm)), 0.0)


def _call(loop: Loop, requests: int, context: int, tokens: int):
    """``tokens`` of each request: one, or a chain with a tree's mask."""
    blocks = -(-(context + tokens) // BLOCK)
    table = loop.state.block_table[:requests]
    if not loop.state.linear:
        table = np.arange(requests * blocks).reshape(requests, blocks) % loop.target.num_blocks
    past, counts = np.full(requests, context), np.full(requests, tokens)
    total = requests * tokens
    mask = np.tile(np.tril(np.ones((tokens, tokens), np.uint8)).reshape(-1), requests), begins(counts**2)
    positions = context + np.tile(np.arange(tokens), requests)
    return pack(np.ones(total), positions, past, counts, table, np.arange(total), mask if tokens > 1 else None)


def _seconds(run: Callable, call) -> float:
    run(call)  # a pass of another size than the last one takes longer
    return _timed(run, call)


def _timed(run: Callable, call) -> float:
    begin = time.perf_counter()
    run(call)
    return time.perf_counter() - begin
