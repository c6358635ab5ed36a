"""The small steps of a layer as Triton kernels: a step of several operators is one launch, and rounds as these do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from super_tree_attention.kernel_plan import ROUNDING

_COLUMNS = 1024  # of a program that activates; larger: fewer programs


@triton.jit
def _sum(x):
    return tl.reduce(x, 0, tl.standard._sum_combine)


@triton.jit
def add_norm_kernel(x, delta, weight, total, normed, size, eps, BLOCK: tl.constexpr):
    """Add row ``delta`` to row ``x`` and norm the sum. Grid: (N)."""
    i = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0).to(tl.int64) * size + i, i < size
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(
        tl.float32
    )
    added = added.to(total.dtype.element_ty)
    tl.store(total + at, added, mask=inside)
    value = added.to(tl.float32)
    scale = tl.rsqrt(_sum(value * value) / size + eps)
    weights = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (value * scale * weights).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr):
    """Activate the first half of a row and multiply it by the second. Grid: (N, parts of a row)."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * size + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + i, mask=i < size, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + i, (gate * up).to(out.dtype.element_ty), mask=i < size)


@triton.jit
def rotated_kernel(
    projected, query_weight, key_weight, cos, sin, query, key, value, heads, kv_heads, eps,
    DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Norm and rotate a head of query or key, or copy one of value. Grid: (N, heads + 2 * kv_heads)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, DIM)
    other = (i + DIM // 2) % DIM
    source = projected + (row * (heads + 2 * kv_heads) + head) * DIM
    x = tl.load(source + i)
    if head >= heads + kv_heads:
        tl.store(value + (row * kv_heads + head - heads - kv_heads) * DIM + i, x)
    else:
        y = tl.load(source + other)
        if NORM:
            scale = tl.rsqrt(_sum(x.to(tl.float32) * x.to(tl.float32)) / DIM + eps)
            weight = query_weight if head < heads else key_weight
            x = (x.to(tl.float32) * scale * tl.load(weight + i).to(tl.float32)).to(x.dtype)
            y = (y.to(tl.float32) * scale * tl.load(weight + other).to(tl.float32)).to(x.dtype)
        angle = row * DIM + i
        y = tl.where(i < DIM // 2, -y.to(tl.float32), y.to(tl.float32))
        x = (x.to(tl.float32) * tl.load(cos + angle) + y * tl.load(sin + angle)).to(x.dtype)
        if head < heads:
            tl.store(query + (row * heads + head) * DIM + i, x)
        else:
            tl.store(key + (row * kv_heads + head - heads) * DIM + i, x)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta and its RMS norm, [N, H] all."""
    total, normed, size = torch.empty_like(x), torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(size)
    add_norm_kernel[len(x),](
        x, delta, weight, total, normed, size, eps,
        BLOCK=block, num_warps=8 if block > 2048 else 4, **ROUNDING,
    )  # fmt: skip
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of ``gate_up`` [N, 2 * I], gates first: [N, I]."""
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), size)
    silu_mul_kernel[len(gate_up), triton.cdiv(size, _COLUMNS)](gate_up, out, size, BLOCK=_COLUMNS, **ROUNDING)
    return out


def rotated(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide ``projected`` [N, (heads + 2 * kv_heads) * D] into query, key and value, the first two rotated.

    cos, sin  float32, D of each row, as ``Rotary`` looks them up
    norms     weights [D] of query and key, and eps, where the network norms them before
    """
    count, size = len(projected), projected.shape[1] // (heads + 2 * kv_heads)
    query, key, value = (projected.new_empty(count, n * size) for n in (heads, kv_heads, kv_heads))
    weights, eps = (norms[:2], norms[2]) if norms else ((projected, projected), 0.0)
    rotated_kernel[count, heads + 2 * kv_heads](
        projected, *weights, cos, sin, query, key, value, heads, kv_heads, eps,
        DIM=size, NORM=norms is not None, num_warps=1, **ROUNDING,
    )  # fmt: skip
    return query, key, value
