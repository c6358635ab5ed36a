"""Quantisation of activations to FP8, a scale per row, as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from super_tree_attention.kernel_plan import ROUNDING

_WIDTH = 1024  # columns of a row that a program reads at once; larger: more registers


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
        quantise[(len(x),)](x, rows, scales, x.shape[1], WIDTH=_WIDTH, **ROUNDING)
    return rows, scales
