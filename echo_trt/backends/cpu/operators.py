"""The steps of a network between its products: native functions of numba, over packed tokens.

An operator takes the address of its record, the number of the thread that calls it and how many do. Its record is of
int64 numbers: addresses, sizes, and float32 numbers in their lower halves. Threads divide rows and heads; a sum is one
thread's, in an order that depends on nothing but the row's own text. So a row has the same bits in any company.

Rows are padded to multiples of 16 numbers, with zeros. A head's first half and its second half are padded apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import cfunc, njit

from echo_trt.backends.cpu.formats import GROUP, SUPER
from echo_trt.backends.cpu.vectors import (
    add,
    divide,
    exp,
    fma,
    integer,
    largest,
    load,
    mul,
    number,
    put,
    put_bf16,
    same,
    store,
    store_bf16,
    total,
    value_of,
    within,
    word,
)
from echo_trt.speculation.arrays import compiled_once
from echo_trt.speculation.pack import BLOCK

LOWEST = np.float32(-1e30)  # a score that is not seen
ZERO, ONE = np.float32(0), np.float32(1)


def operator(function: Callable[..., None]) -> Any:
    """Compile an operator; its ``address`` is the native function's."""
    return compiled_once(partial(cfunc, "void(int64, int64, int64)"), function)


part: Any = njit(forceinline=True)


@part
def four(args, index):
    """Return four words of a record."""
    return word(args, index), word(args, index + 1), word(args, index + 2), word(args, index + 3)


@part
def share(count, thread, threads):
    return range(count * thread // threads, count * (thread + 1) // threads)


@part
def squares(at, size):
    sums = same(ZERO)
    for i in range(0, 4 * size, 64):
        x = load(at + i)
        sums = fma(x, x, sums)
    return total(sums)


@part
def _inverse_root(sums, size, eps):
    return ONE / np.sqrt(sums / np.float32(size) + eps)


@part
def _quad(quants, lanes, lane, bits, index):
    """Return four integers of a column, a byte each, from 4 ``index`` on in a group (``formats.PackedWeights``)."""
    step = lanes * 4
    if bits == 8:
        return integer(quants + index * step + lane * 4)
    low = (integer(quants + index // 2 * step + lane * 4) >> (index % 2 * 4)) & 0x0F0F0F0F
    if bits == 4:
        return low
    above = bits - 4
    high = integer(quants + (4 + index * above // 8) * step + lane * 4) >> (index * above % 8)
    return low | (high & (0x01010101 if above == 1 else 0x03030303)) << 4


@operator
def embed(args, thread, threads):
    """Look up embeddings in packed weights: see ``Network``.

    rows, tokens, integers, scales, out, size, factor, lanes, bits, offset, whether there are minimums, integer scales
    of a group, kind (0: integers, 1: float32, 2: bf16, 3: float16)
    """
    tokens, quants, scales, out = four(args, 1)
    size, factor, lanes, bits = word(args, 5), number(args + 48), word(args, 7), word(args, 8)
    offset, has_minimum, integers, kind = four(args, 9)
    for row in share(word(word(args, 0), 0), thread, threads):
        token, target = word(tokens, row), out + row * size * 4
        block, lane = token // lanes, token % lanes
        if kind:
            pair, bytes_ = 2 if kind == 2 else 1, 4 if kind == 1 else 2
            at = quants + (block * size * lanes + lane * pair) * bytes_
            for i in range(size):
                put(target + 4 * i, value_of(at + (i // pair * pair * lanes + i % pair) * bytes_, kind) * factor)
            continue
        count, parts = size // GROUP, max(integers, 1)
        every = SUPER if integers else 1
        group_bytes = GROUP * bits * lanes // 8
        step = lanes * ((2 + 2 * has_minimum) + (SUPER * (integers + has_minimum) if integers else 0))
        for group in range(count):
            at = quants + (block * count + group) * group_bytes
            above = scales + (block * (count // every) + group // every) * step
            own = above + lanes * (2 + 2 * has_minimum) + group % every * (integers + has_minimum) * lanes + lane
            low = np.float32(0)
            if has_minimum:
                low = value_of(above + 2 * (lanes + lane), 3)
                if integers:
                    low = low * np.float32(integer(own + integers * lanes) & 0xFF)
            for index in range(8):
                scale = value_of(above + 2 * lane, 3)
                if integers:
                    whole = integer(own + index * parts // 8 * lanes) & 0xFF
                    scale = scale * np.float32(whole - 256 if integers == 2 and whole > 127 else whole)
                quad = _quad(at, lanes, lane, bits, index)
                for i in range(4):
                    value = np.float32(((quad >> (8 * i)) & 0xFF) - offset) * scale - low
                    put(target + 4 * (group * GROUP + 4 * index + i), value * factor)


@operator
def round_bf16(args, thread, threads):
    """Round float32 rows to bf16: rows, source, bytes of its rows, out, bytes of its rows, size."""
    (source, stride, out, out_stride), size = four(args, 1), word(args, 5)
    for row in share(word(word(args, 0), 0), thread, threads):
        for i in range(0, size, 16):
            store_bf16(out + row * out_stride + 2 * i, load(source + row * stride + 4 * i))


@operator
def add_norm(args, thread, threads):
    """Add to the residual and norm the sum: see ``Norm`` in ``network``."""
    x, delta, post, weight = four(args, 1)
    out, stride, size, true_size = four(args, 5)
    eps, (kept, kept_stride, index, x_stride) = number(args + 72), four(args, 10)
    for row in share(word(word(args, 0), 0), thread, threads):
        source = word(index, row) if index else row
        at, target = x + source * x_stride, out + row * stride
        summed = target if index else at
        if delta:
            more, factor = delta + source * size * 4, same(ONE)
            if post:
                factor = same(_inverse_root(squares(more, size), true_size, eps))
            for i in range(0, 4 * size, 64):
                value = load(more + i)
                if post:
                    value = mul(mul(value, factor), load(post + i))
                store(summed + i, add(load(at + i), value))
        elif index:
            for i in range(0, 4 * size, 64):
                store(summed + i, load(at + i))
        if kept:
            for i in range(0, 4 * size, 64):
                store(kept + row * kept_stride + i, load(summed + i))
        if weight:
            factor = same(_inverse_root(squares(summed, size), true_size, eps))
            for i in range(0, 4 * size, 64):
                store(target + i, mul(mul(load(summed + i), factor), load(weight + i)))


@operator
def activate(args, thread, threads):
    """Multiply an activated gate by what is beside it: rows, gate and up, out, size, whether GELU."""
    source, out, size, gelu = four(args, 1)
    one, parts = same(ONE), size // 16
    for unit in share(word(word(args, 0), 0) * parts, thread, threads):
        row, i = unit // parts, unit % parts * 64
        gate, up = load(source + row * size * 8 + i), load(source + row * size * 8 + size * 4 + i)
        if gelu:  # by tanh, which is 2 sigmoid(2 x) - 1, so that the whole is x sigmoid(2 x)
            inner = fma(mul(gate, gate), mul(gate, same(np.float32(0.044715))), gate)
            power = mul(inner, same(np.float32(-2 * 0.7978845608028654)))
        else:
            power = mul(gate, same(np.float32(-1)))
        store(out + row * size * 4 + i, mul(divide(gate, add(one, exp(power))), up))


@part
def _put_number(at, value, wide):
    if wide:
        put(at, value)
    else:
        put_bf16(at, value)


@operator
def keep(args, thread, threads):
    """Norm and rotate queries and keys, in place, and write keys and values to the pool.

    rows, projected, positions, cos, sin, norms of queries and of keys, eps, heads, KV heads, a head's size and its true
    one, pool rows, keys, values, whether these are float32, bytes of a projected row, and to the pool's next block
    """
    projected, positions, cos, sin = four(args, 1)
    query_norm, key_norm, eps, heads = word(args, 5), word(args, 6), number(args + 56), word(args, 8)
    kv_heads, dim, true_dim, pool_rows = four(args, 9)
    keys, values, wide, stride = four(args, 13)
    count, half, bytes_, pair = heads + 2 * kv_heads, 2 * dim, 4 if wide else 2, 1 if wide else 2
    for unit in share(word(word(args, 0), 0) * count, thread, threads):
        row, head = unit // count, unit % count
        at = projected + row * stride + head * dim * 4
        pool_row = word(pool_rows, row)
        kv_head = head - heads - (kv_heads if head >= heads + kv_heads else 0)
        block = pool_row // BLOCK * word(args, 17) + kv_head * BLOCK * dim * bytes_
        if head >= heads + kv_heads:  # two rows' numbers stand beside each other
            target = values + block + pool_row % BLOCK // pair * dim * 4 + pool_row % pair * bytes_
            for i in range(dim):
                _put_number(target + 4 * i, number(at + 4 * i), wide)
            continue
        norm = query_norm if head < heads else key_norm
        if norm:
            factor = same(_inverse_root(squares(at, dim), true_dim, eps))
            for i in range(0, 4 * dim, 64):
                store(at + i, mul(mul(load(at + i), factor), load(norm + i)))
        if cos:
            angle = word(positions, row) * half
            for i in range(0, half, 64):
                first, second = load(at + i), load(at + half + i)
                c, s = load(cos + angle + i), load(sin + angle + i)
                store(at + i, fma(first, c, mul(mul(second, s), same(np.float32(-1)))))
                store(at + half + i, fma(second, c, mul(first, s)))
        if head >= heads:  # a number of all of a block's rows, and of a pair the next one, stand beside each other
            target = keys + block + pool_row % BLOCK * 4
            for i in range(dim):
                _put_number(target + i // pair * BLOCK * 4 + i % pair * bytes_, number(at + 4 * i), wide)


@operator
def candidates(args, thread, threads):
    """Find a row's best next tokens and their log-probabilities: rows, logits, bytes of a row, vocabulary, k, out.

    Of a row of ``out``, k float32 log-probabilities come first, best first, then k int32 tokens as float32 numbers.
    """
    (logits, stride, vocab, k), out = four(args, 1), word(args, 5)
    for row in share(word(word(args, 0), 0), thread, threads):
        at, target, found, minimum = logits + row * stride, out + row * k * 8, 0, LOWEST
        for i in range(0, vocab, 16):
            x = within(load(at + 4 * i), 0, vocab - i, LOWEST)
            if found == k and not largest(x) > minimum:
                continue
            for token in range(i, min(i + 16, vocab)):
                value = number(at + 4 * token)
                if found == k and not value > minimum:
                    continue
                slot = found if found < k else k - 1
                while slot > 0 and number(target + 4 * (slot - 1)) < value:
                    put(target + 4 * slot, number(target + 4 * (slot - 1)))
                    put(target + 4 * (k + slot), number(target + 4 * (k + slot - 1)))
                    slot -= 1
                put(target + 4 * slot, value)
                put(target + 4 * (k + slot), np.float32(token))
                found = min(found + 1, k)
                minimum = number(target + 4 * (k - 1)) if found == k else LOWEST
        peak, sums = number(target), same(ZERO)
        for i in range(0, vocab, 16):
            weights = exp(add(load(at + 4 * i), same(-peak)))
            sums = add(sums, within(weights, 0, vocab - i, ZERO))
        logsum = np.float32(np.log(total(sums))) + peak
        for i in range(k):
            put(target + 4 * i, number(target + 4 * i) - logsum)
