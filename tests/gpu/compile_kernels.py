"""Compile attention's variants of these tests into Triton's cache: ``compile_kernels.py PART OF``, from 0 on.

``scripts/gpu_proof`` runs the parts side by side before any section's time begins. Prints how many were compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from plugins.attention_calls import Batch

#: Type -> (head sizes, query heads of a KV head). bfloat16 is served; others are compared in Qwen3-8B's group alone.
COMPARED = {
    torch.bfloat16: ((128, 64), (4, 1, 2, 5, 8, 16)),
    torch.float16: ((128, 64), (4,)),
    torch.float32: ((128, 64), (4,)),
}


def variants() -> Iterator[tuple[torch.dtype, int, int]]:
    """Yield type, head size and group: Qwen3-8B's first, then those of small networks, float32 of large heads last."""
    yield torch.bfloat16, 128, 4
    yield from ((dtype, 32, 4) for dtype in (torch.bfloat16, torch.float32))
    for dtype, (sizes, groups) in COMPARED.items():
        yield from ((dtype, size, group) for size in sizes for group in groups)


def main(part: int, parts: int) -> None:
    jobs = [(*variant, rows) for variant in dict.fromkeys(variants()) for rows in (16, 64, 128)]
    for dtype, size, group, rows in jobs[part::parts]:
        Batch([(300, 5, True)], 1, group, size, dtype).check(rows=rows, num_splits=2)
    sys.stdout.write(f"{len(jobs[part::parts])}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
