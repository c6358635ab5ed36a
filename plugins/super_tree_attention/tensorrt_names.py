"""Names by which TensorRT finds the plugins and their kernels. This module does not import TensorRT."""

from __future__ import annotations

import re

NAMESPACE, VERSION = "echo", "1"
ATTENTION, COMBINE = "SuperTreeAttention", "SuperTreeCombine"
WRITTEN = ".written"  # suffix of a cache's output, which is bound to the memory of the cache


def relist_parameters(ptx: str, order: list[int | None], name: str) -> tuple[str, str]:
    """Reorder a kernel's parameters; returns its new name, ``echo_`` and ``name``, and its new PTX.

    ``order`` has the indices of the old parameters; None is a pointer that the kernel does not read. TensorRT passes
    all inputs, then the extra integers, then all outputs, without the two pointers to Triton's scratch memory at the
    end.
    """
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("the PTX has no entry")
    parameters = [line.strip().rstrip(",") for line in entry[2].strip().splitlines()]
    for line in (parameters[i] for i in range(len(parameters)) if i not in order):
        if re.search(rf"\b{line.split()[-1]}\b", ptx[entry.end() :]):
            raise ValueError(f"{entry[1]} reads its parameter {line.split()[-1]}, which TensorRT does not pass")
    unread = (f".param .u64 .ptr .global .align 1 {entry[1]}_unread_{index}" for index in range(len(order)))
    lines = [next(unread) if i is None else parameters[i] for i in order]
    relisted = ptx[: entry.start(2)] + "\n\t" + ",\n\t".join(lines) + ptx[entry.end(2) :]
    return f"echo_{name}", re.sub(rf"\b{entry[1]}(?=\b|_(param|unread)_)", f"echo_{name}", relisted)
