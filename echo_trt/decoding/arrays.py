"""Ragged batches as flat arrays, and loops over them compiled to machine code by numba.

An iteration's decisions are a few thousand operations. As array calls they are a few hundred, of some microseconds of
overhead each; compiled, they take a tenth of that. numba keeps the machine code in a cache beside the module, or
in NUMBA_CACHE_DIR, so that only the first import on a machine takes seconds.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

njit: Any = None  # its overloads take no list of signatures
try:
    from numba import njit
except ImportError:  # where nothing can be installed
    warnings.warn("numba is missing: planning and sampling are interpreted, and slow; install numba.", stacklevel=1)

Function = TypeVar("Function", bound=Callable)


def compiled(signature: str | None = None) -> Callable[[Function], Function]:
    """Compile a function for arguments of this numba ``signature``; without one, as a part of others."""

    def compile_(function: Function) -> Function:
        if njit is None:
            return function
        types = [signature] if signature else []
        try:
            machine_code: Function = njit(*types, cache=True)(function)
        except RuntimeError:  # no folder of numba's can be written: compiled anew in each process
            machine_code = njit(*types)(function)
        return machine_code

    return compile_


def begins(counts: np.ndarray) -> np.ndarray:
    """Return where sections of ``counts`` [B] elements begin, and the total: int64 [B+1]."""
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """Return 0..counts[0]-1, 0..counts[1]-1, ... end to end: int64 [sum counts]."""
    first = begins(counts)
    return np.arange(first[-1]) - np.repeat(first[:-1], counts)


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Return an element's place in its group: 0 for the first, 1 for the second, ...; int64 [n]."""
    return _rank_within(np.ascontiguousarray(groups, np.int64), int(groups.max(initial=-1)) + 1)


@compiled("i8[::1](i8[::1], i8)")
def _rank_within(groups: np.ndarray, count: int) -> np.ndarray:
    ranks, seen = np.empty(len(groups), np.int64), np.zeros(count, np.int64)
    for i in range(len(groups)):
        ranks[i] = seen[groups[i]]
        seen[groups[i]] += 1
    return ranks


def next_size(sizes: Sequence[int], tokens: int) -> int:
    """Return the first of ``sizes``, ascending, that holds ``tokens``; beyond the last one ``tokens`` themselves."""
    place = bisect_left(sizes, tokens)
    return sizes[place] if place < len(sizes) else tokens
