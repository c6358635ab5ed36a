"""Seconds of passes, timed in rounds, in which sizes take turns: what other work adds falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from echo_trt.speculation.pack import ForwardBatch

ROUNDS = 9
LONG_PASS = 10.0  # times what the shortest takes: beside that, what a first pass takes more is little


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
