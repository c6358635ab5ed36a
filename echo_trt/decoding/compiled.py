"""Loops over nodes, compiled to machine code by numba when their module is imported.

What an iteration decides is a few thousand operations, of which array calls make a few hundred of some microseconds
each, most of them overhead. Written as loops and compiled they take a tenth of it. The machine code is kept in a cache
beside the module, or in NUMBA_CACHE_DIR, so that only the first import on a machine takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

try:
    from numba import njit
except ImportError:  # where nothing can be installed
    njit = None
    warnings.warn("numba is missing: planning is interpreted, and slow; install numba.", stacklevel=1)

Function = TypeVar("Function", bound=Callable)


def compiled(signature: str | None = None) -> Callable[[Function], Function]:
    """Compile a function for arguments of this numba ``signature``; without one, as a part of others."""

    def compile_(function: Function) -> Function:
        if njit is None:
            return function
        types = [signature] if signature else []
        try:
            return njit(*types, cache=True)(function)
        except RuntimeError:  # no folder of numba's can be written: compiled anew in each process
            return njit(*types)(function)

    return compile_
