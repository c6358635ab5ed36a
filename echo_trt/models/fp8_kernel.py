"""Triton kernels of FP8: activations are quantised, a scale per row, and multiplied by matrices with block scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from super_tree_attention.kernel_plan import ROUNDING

_WIDTH = 1024  # most columns of a row that a program reads at once; larger: more registers
#: Tokens of a tile of ``multiply`` -> its rows of the matrix, warps, and steps whose loads are in flight. Few tokens
#: wait for the matrix alone: fewer rows fill more of the card, and more steps in flight hide the memory.
TILES = {16: (32, 4, 5), 64: (64, 4, 3), 128: (64, 8, 3)}


@triton.jit
def quantise(x, rows, scales, width, WIDTH: tl.constexpr):
    """Quantise one row per program.

    x       bfloat16 or float32 [n, width]
    rows    e4m3 [n, width], written
    scales  float32 [n], written: a row's largest magnitude over e4m3's largest number, 448
    """
    row = tl.program_id(0)
    begin = row.to(tl.int64) * width
    lanes = tl.arange(0, WIDTH)
    largest = tl.full([WIDTH], 0.0, tl.float32)
    for first in range(0, width, WIDTH):
        value = tl.load(x + begin + first + lanes, mask=first + lanes < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    scale = tl.maximum(tl.reduce(largest, 0, tl.standard._elementwise_max), 1e-12) / 448.0
    tl.store(scales + row, scale)
    for first in range(0, width, WIDTH):
        inside = first + lanes < width
        value = tl.load(x + begin + first + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(rows + begin + first + lanes, (value / scale).to(rows.dtype.element_ty), mask=inside)


def quantise_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x [n, k] as ``fp8_linear.quantise_rows``."""
    x = x.contiguous()
    rows, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty((len(x), 1), dtype=torch.float32)
    if len(x):
        width = min(triton.next_power_of_2(x.shape[1]), _WIDTH)
        quantise[(len(x),)](x, rows, scales, x.shape[1], WIDTH=width, **ROUNDING)
    return rows, scales


@triton.jit(do_not_specialize=("n",))
def multiply(
    x, x_scales, weight, scales, out, n, outputs, inputs,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of tokens by a tile of the matrix's rows. Grid: (tiles of tokens, tiles of rows).

    x         e4m3 [n, inputs]
    x_scales  float32 [n, inputs / COLUMNS]
    weight    e4m3 [outputs, inputs]
    scales    float32 [outputs / ROWS, inputs / COLUMNS]
    out       bfloat16 [n, outputs], written: sums in float32
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    live, there, lanes, blocks = token < n, row < outputs, tl.arange(0, COLUMNS), inputs // COLUMNS
    inputs = blocks * COLUMNS  # the same, and known to be aligned: loads come 16 bytes at a time, ahead
    of_x = token.to(tl.int64)[:, None] * inputs + lanes[None, :]
    of_weight = row.to(tl.int64)[None, :] * inputs + lanes[:, None]
    total = tl.full([TOKENS, OUTPUTS], 0.0, tl.float32)
    for block in range(0, blocks):
        a = tl.load(x + of_x + block * COLUMNS, mask=live[:, None], other=0.0)
        b = tl.load(weight + of_weight + block * COLUMNS, mask=there[None, :], other=0.0)
        of_token = tl.load(x_scales + token * blocks + block, mask=live, other=0.0)
        of_row = tl.load(scales + row // ROWS * blocks + block, mask=there, other=0.0)
        total += tl.dot(a, b, out_dtype=tl.float32) * (of_token[:, None] * of_row[None, :])
    at = token.to(tl.int64)[:, None] * outputs + row[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live[:, None] & there[None, :])


def multiply_by_kernel(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Multiply as ``multiply``; returns bfloat16 [n, outputs]."""
    (n, inputs), outputs = x.shape, len(weight)
    tokens = next((size for size in TILES if size >= n), max(TILES))
    rows, warps, stages = TILES[tokens]
    blocks = {"ROWS": outputs // len(scales), "COLUMNS": inputs // scales.shape[1]}
    out = x.new_empty((n, outputs), dtype=torch.bfloat16)
    if n:
        multiply[(triton.cdiv(n, tokens), triton.cdiv(outputs, rows))](
            x, x_scales, weight, scales, out, n, outputs, inputs,
            TOKENS=tokens, OUTPUTS=rows, **blocks, num_warps=warps, num_stages=stages, **ROUNDING,
        )  # fmt: skip
    return out
