"""Copies of modules of Triton kernels that Triton's interpreter runs on a CPU."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import pytest


@functools.cache
def interpreted(name: str) -> ModuleType:
    """Load a copy of module ``name`` for the interpreter."""
    triton = pytest.importorskip("triton", reason="needs Triton: pip install -e '.[cuda]'")
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module
