"""Names by which TensorRT finds the plugins and their kernels. Imports nothing of TensorRT."""

from __future__ import annotations

import re

NAMESPACE, VERSION = "echo", "1"
ATTENTION, COMBINE = "SuperTreeAttention", "SuperTreeCombine"
#: A cache's output is bound to the memory of the cache itself.
WRITTEN = ".written"


def relist_parameters(ptx: str, order: list[int | None], name: str) -> tuple[str, str]:
    """A kernel's new name and PTX, whose parameters are those of ``order``; None is a pointer that it does not read.

    The name begins with ``echo_`` and ends with ``name``: those of one engine are told apart.

    TensorRT passes all inputs, then the extra integers, then all outputs. The two pointers at the end of a Triton
    kernel (its scratch memory) are not among them.
    """
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("the PTX has no entry")
    known = [line.strip().rstrip(",") for line in entry[2].strip().splitlines()]
    for line in (known[i] for i in range(len(known)) if i not in order):
        if re.search(rf"\b{line.split()[-1]}\b", ptx[entry.end() :]):
            raise ValueError(f"{entry[1]} reads its parameter {line.split()[-1]}, which TensorRT does not pass")
    unread = (f".param .u64 .ptr .global .align 1 {entry[1]}_unread_{place}" for place in range(len(order)))
    lines = [next(unread) if i is None else known[i] for i in order]
    relisted = ptx[: entry.start(2)] + "\n\t" + ",\n\t".join(lines) + ptx[entry.end(2) :]
    return f"echo_{name}", re.sub(rf"\b{entry[1]}(?=\b|_(param|unread)_)", f"echo_{name}", relisted)
