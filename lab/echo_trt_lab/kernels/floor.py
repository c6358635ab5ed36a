"""The floor of a call's cost, beside the compiled kernel's: ``python -m echo_trt_lab.kernels.floor``.

The floor reads all keys, values and queries once, and writes all outputs and new rows once. The kernel's traffic is
counted in its PTX: the bytes that one step of the loop over the past copies from global memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from echo_trt_lab.kernels.compiled import CompiledKernel, compiled
from super_tree_attention.kernel_plan import MIN_SPLIT_KEYS, STEPS, KernelPlan, plan

BANDWIDTH, FLOPS = 3.35e12, 989e12  # an H100's, bytes/s of its memory and bf16 FLOP/s
KV_HEADS, GROUP, HEAD_DIM, ELEMENT = 8, 4, 128, 2  # Qwen3-8B in bf16
BLOCK = 32


@dataclass(frozen=True)
class KernelShape:
    """A call: ``requests`` with ``context`` past tokens per request, and ``tokens`` new tokens of all requests."""

    requests: int
    context: int
    tokens: int

    @property
    def kv_bytes(self) -> int:
        return self.requests * self.context * KV_HEADS * HEAD_DIM * 2 * ELEMENT

    @property
    def other_bytes(self) -> int:
        """Bytes of queries and outputs, and of new keys and values, which are read and written into the cache."""
        return self.tokens * HEAD_DIM * ELEMENT * (2 * KV_HEADS * GROUP + 4 * KV_HEADS)

    @property
    def flops(self) -> int:
        """Operations of two products a query head, token and key, over the past and the request's new tokens."""
        return 4 * self.tokens * KV_HEADS * GROUP * HEAD_DIM * (self.context + self.tokens // self.requests)

    @property
    def plan(self) -> KernelPlan:
        entries = self.requests * -(-(self.context + self.tokens // self.requests) // BLOCK)
        return plan(self.tokens, self.requests, entries, KV_HEADS, GROUP)


SHAPES = (KernelShape(1, 32768, 64), KernelShape(32, 2048, 256), KernelShape(256, 1024, 512))


def bytes_of_a_step(kernel: CompiledKernel) -> int:
    """Count the bytes of keys and values that all threads copy from the pools in one step of the loop over the past.

    That is the first loop of the PTX with asynchronous copies, which are of 16 bytes.
    """
    for body in _loops(kernel.ptx):
        copies = len(re.findall(r"cp\.async\.cg\.shared\.global .*?, (?:0x10|16),", body))
        if copies:
            return copies * 16 * kernel.threads
    raise ValueError("no loop with asynchronous copies")


def _loops(ptx: str) -> list[str]:
    """Return the texts of innermost loops, from a label to the branch back to it."""
    index = {match[1]: match.start() for match in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    branches = re.finditer(r"bra(?:\.uni)?\s+(\$\w+);", ptx)
    spans = sorted((index[b[1]], b.end()) for b in branches if index[b[1]] < b.start())
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [ptx[start:end] for start, end in inner]


def table() -> list[str]:
    """Write a Markdown table of floor and kernel, one line a shape."""
    lines = [
        "| B, context, N | KV, MB | q, out, new, MB | GFLOP | floor, us (memory / products) | tile, splits, programs "
        "| KV copied, MB | of it again, from L2 | products with padding, GFLOP | partial results, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [_line(shape) for shape in SHAPES]


def _line(shape: KernelShape) -> str:
    made = shape.plan
    kernel = compiled(f"attention_{made.rows}", 90, "bf16", HEAD_DIM, GROUP)
    tiles = -(-(shape.tokens // shape.requests) // (made.rows // GROUP))
    past_steps = -(-shape.context // STEPS.keys)
    splits = made.wanted_splits if shape.context > MIN_SPLIT_KEYS else 1
    steps = shape.requests * tiles * KV_HEADS * past_steps
    copied = steps * bytes_of_a_step(kernel)
    products = steps * STEPS.keys * 4 * made.rows * HEAD_DIM
    partial = 8 * shape.tokens * KV_HEADS * GROUP * splits * (HEAD_DIM + 1) if splits > 1 else 0
    memory, compute = (shape.kv_bytes + shape.other_bytes) / BANDWIDTH, shape.flops / FLOPS
    cells = (
        f"{shape.requests}, {shape.context}, {shape.tokens}",
        f"{shape.kv_bytes / 1e6:.1f}",
        f"{shape.other_bytes / 1e6:.1f}",
        f"{shape.flops / 1e9:.1f}",
        f"{memory * 1e6:.1f} / {compute * 1e6:.1f}",
        f"{made.rows}, {splits}, {shape.requests * tiles * KV_HEADS * splits}",
        f"{copied / 1e6:.1f}",
        f"{(copied - shape.kv_bytes) / 1e6:.1f}",
        f"{products / 1e9:.1f}",
        f"{partial / 1e6:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(table()))
