"""Measure T(N, context) of target and draft on this machine, in a few seconds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np

from echo_trt.backends.kind import computes_in, engine_kind
from echo_trt.bundle.costs import CostTable, CurveTable, HingeTable
from echo_trt.bundle.manifest import Manifest
from echo_trt.engine.assemble import Networks
from echo_trt.engine.kv_blocks import blocks_for
from echo_trt.speculation.arrays import begins, ragged_arange
from echo_trt.speculation.echo.budget import fit_hinge
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack

ROUNDS = 9  # of passes, in which sizes take turns: what other work adds falls on all of them
LONG_PASS = 10.0  # times what the shortest takes: beside that, what a first pass takes more is little
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SHORT, LONG = 8, 8 * BLOCK  # cached tokens of a request
LONG_TOTAL = 16 * LONG  # cached tokens of few requests in all; larger: their attention is noticed more surely
NODES = 3  # tokens of a small tree
SMALL_BATCH_SIZES, SIZES_LIMIT = 64, 128  # tokens measured of few requests, and of any; larger: slower to measure
STEEP = 3.0  # times one token's pass, up to which larger sizes are measured, too; larger: more sizes, as on a GPU
PAIRS = 10  # passes of each size, two in a row, for what a change of size takes
KNEE_RANGE = 10.0  # times one token's pass; larger: longer passes, measured once, count for the knee
ACCURACY = 0.02  # of what is measured, relative
NOTICED = 0.05  # of a pass: what another size must take more to count
CHECKED = (1, 4, 8)  # tokens of the passes that a table is checked by
TRIES, CHECKING = 3, 0.5  # passes of each, and the seconds that they may take, where that is more than one
NOISE = 1e-3  # seconds; larger: smaller differences are taken for noise
PLAUSIBLE = 2.0  # times what n passes over one token take: larger, and less of other work's share is noticed


def measure(networks: Networks, seconds: float = 4.0) -> CostTable:
    """Time passes over N tokens of the slots' requests, all sizes in turn, round after round.

    ``seconds`` bounds what the rounds take, half of them where an engine pads no passes, so that a change of size costs
    nothing; each size is timed once at least. Nothing may be running.
    """
    seconds = seconds if networks.target.sizes else seconds / 2
    networks.batch.blocks.forget_cached()  # these passes write over the pool
    target = _measured(networks, lambda call: networks.target.run(call), 0.75 * seconds)
    draft, cold = CurveTable(sizes=[1], seconds=[0.0]), 0.0
    if networks.drafter and networks.drafter.has_network:
        run = networks.drafter.run_empty
        draft, cold = _measured(networks, run, 0.25 * seconds), _cold(networks, run)
    sizes, times = np.array(target.sizes), np.array(target.seconds)
    near = times <= KNEE_RANGE * times[0]
    return CostTable(
        machine=machine(networks.manifest),
        measured=date.today(),
        target=target,
        draft=draft,
        hinge=HingeTable(**asdict(fit_hinge(sizes[near], times[near], ACCURACY))),
        cold=cold,
        change=_change(networks) if networks.target.sizes else 0.0,
        sizes=networks.target.sizes,
    )


def times_as_long(table: CostTable, networks: Networks) -> float:
    """Return the largest ratio of a recorded pass time to the same pass timed now, at least 1.

    Nothing may be running. Other work makes passes longer, then or now, but never shorter.
    """
    networks.batch.blocks.forget_cached()
    maximum, curve = 1.0, table.target
    for tokens, seconds in zip(curve.sizes, curve.seconds, strict=True):
        if tokens in CHECKED:
            call = _call(networks, _spread(tokens, networks.batch.count), SHORT)
            tries = min(max(int(CHECKING / seconds), 1), TRIES)
            now = (
                min(seconds_again(networks.target.run, call) for _ in range(tries)) - curve.per_context * tokens * SHORT
            )
            if seconds - now > NOISE:
                maximum = max(maximum, seconds / max(now, NOISE))
    return maximum


def disturbance(table: CostTable) -> str:
    """Say which of the target's passes only other work explains; empty where there is none.

    One pass over n tokens does the work of n passes over one. So it takes n times as long at most on a quiet machine.
    Only a few tokens are looked at: speculation depends on their times, and longer passes are timed just once.
    """
    one = table.target.seconds[0]
    for tokens, seconds in zip(table.target.sizes, table.target.seconds, strict=True):
        if tokens <= CHECKED[-1] and seconds > PLAUSIBLE * tokens * one:
            return f"a pass over {tokens} tokens took {seconds / one:,.0f} times as long as one over 1"
    return ""


def without_speculation(table: CostTable) -> CostTable:
    """Replace the target's times by ones at which no draft pays: each further token costs a pass of its own.

    A pass is taken to be as long as the longest over few tokens. That is too long rather than too short: what is then
    observed of plain decoding's passes makes further tokens look dearer still.
    """
    sizes = table.target.sizes
    longest = max(s for n, s in zip(sizes, table.target.seconds, strict=True) if n <= CHECKED[-1])
    target = CurveTable(sizes=sizes, seconds=[n * longest for n in sizes])
    return table.model_copy(update={"target": target, "hinge": HingeTable(t_ar=longest, gamma=1.0, k_max=1, error=0.0)})


def _measured(networks: Networks, run: Callable, seconds: float) -> CurveTable:
    batch, blocks = networks.batch, networks.target.num_blocks
    long = min(max(LONG, LONG_TOTAL // batch.count), batch.context - NODES)
    short = min(SHORT, long)
    # No more requests than there are slots: a call of more may be divided. Beyond, each request brings a chain.
    longest = min(batch.reserve, batch.context - short, networks.target.longest)
    possible = [n for n in SIZES if n <= batch.count * longest]
    calls = {n: _call(networks, _spread(n, batch.count), short) for n in possible}
    sizes = [n for n in possible if n <= min(max(4 * batch.count, SMALL_BATCH_SIZES), SIZES_LIMIT)]
    one = seconds_again(run, calls[1])
    while len(sizes) < len(possible) and seconds_again(run, calls[sizes[-1]]) < STEEP * one:
        sizes.append(possible[len(sizes)])
    long_blocks = blocks_for(long + NODES)
    # Requests with long contexts, one token each; the same with NODES tokens each.
    wide = max(n for n in sizes if n <= batch.count and (n * long_blocks <= blocks or n == 1))
    bushy = max(n for n in sizes if n * NODES <= sizes[-1] and n <= wide)
    far_calls = [_call(networks, np.full(wide, 1), long), _call(networks, np.full(bushy, NODES), long)]
    padded = bool(networks.target.sizes)
    taken = timed_rounds(run, [*(calls[n] for n in sizes), *far_calls], seconds, again=padded)
    *usual, far, tree = typical(taken).tolist()
    per_context = max(far - usual[sizes.index(wide)], 0.0) / max(wide * (long - short), 1)
    base = [t - per_context * n * short for n, t in zip(sizes, usual, strict=True)]
    straight = float(np.interp(bushy * NODES, sizes, base)) + per_context * bushy * long
    per_node = max(tree - straight, 0.0) / (bushy * (NODES - 1) * long)
    often = np.isfinite(taken).sum(axis=0)[: len(sizes)]
    monotone = np.maximum(rising(np.array(base), often), 1e-6)
    return CurveTable(
        sizes=sizes, seconds=[round(t, 7) for t in monotone.tolist()], per_context=per_context, per_node=per_node
    )


def timed_rounds(run: Callable, calls: list, seconds: float, again: bool = True) -> np.ndarray:
    """Seconds of each call: [rounds, calls], nan where a call's share of the time was used up.

    So short passes, whose sizes speculation lives on, run in many rounds, and long ones, beside which a warm-up is
    nothing, once. A GPU's first pass of a size compiles kernels and captures a graph, which takes many times as long
    as the pass, so that what comes first is never what counts. ``again``: whether passes are timed behind one of their
    size, since a change of size takes longer.
    """
    first = np.array([seconds_of(run, call) for call in calls])
    for i in np.flatnonzero(first > LONG_PASS * first.min()):
        first[i] = seconds_of(run, calls[i])
    long = first > LONG_PASS * first.min()
    share, spent = seconds / len(calls), np.where(long, first, 0.0)
    rng, taken = np.random.default_rng(0), [np.where(long, first, np.nan)]
    while len(taken) < ROUNDS and (spent < share).any():
        if np.isfinite(taken[0]).all():
            taken.append(np.full(len(calls), np.nan))
        for i in rng.permutation(np.flatnonzero(spent < share)):  # what ran before leaves its weights in the cache
            begin = time.perf_counter()
            taken[-1][i] = (seconds_again if again else seconds_of)(run, calls[i])
            spent[i] += time.perf_counter() - begin
    return np.array(taken)


def typical(taken: np.ndarray) -> np.ndarray:
    """Seconds of each call, of ``timed_rounds``: what calls are to each other is apart from what the machine was worth
    in each round. Of the rounds the lower quartile: whatever else ran only ever adds.
    """
    rounds = taken[:, np.isfinite(taken).all(axis=0)].mean(axis=1)
    seconds: np.ndarray = np.quantile(rounds, 0.25) * np.nanmedian(taken / rounds[:, None], axis=0)
    return seconds


def seconds_again(run: Callable, call: ForwardBatch) -> float:
    run(call)  # a pass of another size than the last one takes longer
    return seconds_of(run, call)


def seconds_of(run: Callable, call: ForwardBatch) -> float:
    begin = time.perf_counter()
    run(call)
    return time.perf_counter() - begin


def rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the values float64 [m] that never fall and are nearest to ``values`` by weighted squares: float64 [m]."""
    levels: list[tuple[float, float, int]] = []  # value, weight and length of a stretch
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        length = 1
        while levels and levels[-1][0] >= value:  # a stretch that would fall becomes one with the stretch before it
            before, heavy, long = levels.pop()
            value, weight, length = (before * heavy + value * weight) / (heavy + weight), heavy + weight, long + length
        levels.append((value, weight, length))
    return np.repeat([value for value, _, _ in levels], [length for _, _, length in levels])


def _change(networks: Networks) -> float:
    """Seconds that a pass of another size than the last one takes more; 0 where that is noise beside the pass."""
    run, calls = networks.target.run, [_call(networks, np.array([tokens]), SHORT) for tokens in (1, 2 * NODES)]
    for call in calls:
        run(call)
    # Each size twice in a row: two passes side by side, whatever the machine is worth just then.
    pairs = np.array([[seconds_of(run, call), seconds_of(run, call)] for _ in range(PAIRS) for call in calls])
    first, again = pairs.T
    more = float(np.median(first - again))
    return more if more > NOTICED * np.median(again) else 0.0


def _cold(networks: Networks, draft: Callable) -> float:
    """Seconds that a draft's pass takes more right after a target's, which has driven its weights out of the cache."""
    call, warm, after = _call(networks, np.array([1]), SHORT), [], []
    draft(call)
    for _ in range(ROUNDS):
        networks.target.run(call)
        after.append(seconds_of(draft, call))
        warm.append(seconds_of(draft, call))
    return max(float(np.median(after) - np.median(warm)), 0.0)


def _spread(tokens: int, slots: int) -> np.ndarray:
    """Spread ``tokens`` over as many requests as there are slots for: int64 [B]."""
    requests = min(tokens, slots)
    fewer, more = tokens // requests, tokens % requests
    return np.where(np.arange(requests) < more, fewer + 1, fewer)


def _call(networks: Networks, counts: np.ndarray, context: int) -> ForwardBatch:
    """Pack ``counts`` [B] tokens per request: one token, or a chain with a tree's mask."""
    requests, blocks = len(counts), blocks_for(context + int(counts.max()))
    table = np.arange(requests * blocks).reshape(requests, blocks) % networks.target.num_blocks
    position, total = ragged_arange(counts), int(counts.sum())
    triangles = np.concatenate([np.tri(n, dtype=np.uint8).reshape(-1) for n in counts])
    mask = (triangles, begins(counts**2)) if total > requests else None
    return pack(np.ones(total), context + position, np.full(requests, context), counts, table, np.arange(total), mask)


def machine(manifest: Manifest) -> str:
    """Describe the machine: measured times hold while this stays the same."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions, parts = manifest.tools.get(manifest.engine, ""), [_processor(), f"{cores} cores"]
    if engine_kind(manifest.engine).card:
        from echo_trt.backends.cuda.device import device_name

        parts += filter(None, [device_name()])
    return ", ".join([*parts, f"{manifest.engine} {versions} {computes_in(manifest)}"]).replace("  ", " ")


def processor_facts() -> dict[str, str]:
    """Return what the system says of a core, by its names; nothing where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _processor() -> str:
    """Its name and, since virtual machines shorten names, its family and model where they are told."""
    reported = processor_facts()
    name = reported.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {reported[key]}" for key in ("cpu family", "model") if key in reported]
    return f"{name} ({', '.join(numbers)})" if numbers else name
