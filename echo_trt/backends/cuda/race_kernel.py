"""The exponential race of ``speculation.sampling.draw`` as a Triton kernel: noise never reaches memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _philox(key0, key1, c0, c1, c2, c3):
    """Ten rounds of Philox4x32, which ``tl.philox`` would be, but Triton's interpreter refuses that one."""
    for _ in tl.static_range(10):
        old0, old2 = c0, c2
        c0 = tl.umulhi(old2, tl.full(c0.shape, 0xCD9E8D57, tl.uint32)) ^ c1 ^ key0
        c2 = tl.umulhi(old0, tl.full(c0.shape, 0xD2511F53, tl.uint32)) ^ c3 ^ key1
        c1 = old2 * 0xCD9E8D57
        c3 = old0 * 0xD2511F53
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def race(
    logits, top, inverse, seed, position, arrivals, tokens, size, span,
    CALLS: tl.constexpr,
):  # fmt: skip
    """Find who arrives first in a part of a row, for each of CALLS lanes.

    Program (row, part) goes over ``span`` tokens, whole blocks of 4 * CALLS.

    logits            float32 [n, size], -inf for tokens that are out
    top, inverse      float64 [n]: the largest logit, and 1 / temperature
    seed, position    int64 [n]
    arrivals, tokens  float64 and int64 [n, parts * CALLS], written
    """
    row, part = tl.program_id(0), tl.program_id(1)
    peak, scale = tl.load(top + row), tl.load(inverse + row)
    key, where = tl.load(seed + row), tl.load(position + row)
    lanes = tl.arange(0, CALLS)
    zero = tl.full([CALLS], 0, tl.uint32)
    low, high = zero + (where & 0xFFFFFFFF).to(tl.uint32), zero + ((where >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key0, key1 = zero + (key & 0xFFFFFFFF).to(tl.uint32), zero + ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first = tl.full([CALLS], float("-inf"), tl.float64)
    winner = tl.full([CALLS], 0, tl.int64)
    begin = part * span
    while begin < tl.minimum(size, (part + 1) * span):
        calls = (begin // 4 + lanes).to(tl.uint32)
        a0, a1, a2, a3 = _philox(key0, key1, low, high, calls, zero)
        b0, b1, b2, b3 = _philox(key0, key1, low, high, calls, zero + 1)
        for word in tl.static_range(4):
            if word == 0:
                upper, lower = a0, b0
            elif word == 1:
                upper, lower = a1, b1
            elif word == 2:
                upper, lower = a2, b2
            else:
                upper, lower = a3, b3
            token = begin + word * CALLS + lanes
            number = (upper.to(tl.int64) << 20) | (lower.to(tl.int64) >> 12)
            v = (number.to(tl.float64) + 0.5) * (1.0 / 4503599627370496.0)  # 2^-52
            # -log(1 - v), whose subtraction loses the bits of a small v
            exponential = tl.where(v < 1e-6, v + v * v * (0.5 + v * (1.0 / 3.0)), -tl.log(1.0 - v))
            logit = tl.load(logits + row.to(tl.int64) * size + token, mask=token < size, other=float("-inf"))
            arrival = (logit.to(tl.float64) - peak) * scale - tl.log(exponential)
            ahead = arrival > first
            first = tl.where(ahead, arrival, first)
            winner = tl.where(ahead, token.to(tl.int64), winner)
        begin += 4 * CALLS
    index_of = (row * tl.num_programs(1) + part) * CALLS + lanes
    tl.store(arrivals + index_of, first)
    tl.store(tokens + index_of, winner)
