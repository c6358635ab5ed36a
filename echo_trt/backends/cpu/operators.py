"""The steps of a network between its products: native functions of numba, over packed tokens.

An operator takes the address of its record, the number of the thread that calls it and how many do. Its record is of
int64 numbers: addresses, sizes, and float32 numbers in their lower halves. Threads divide rows and heads; a sum is one
thread's, in an order that depends on nothing but the row's own text. So a row has the same bits in any company.

Rows are padded to multiples of 16 numbers, with zeros. A head's first half and its second half are padded apart.
"""

from __future__ import annotations

from collections.abc import Callable
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
    larger,
    largest,
    load,
    load_bf16,
    move,
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
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.pack import BLOCK

ROWS = 4  # query rows that share what is read of keys and values; larger: more registers than a CPU has
JOB = 16  # tokens of a request that one thread attends with; larger: their sums leave the nearest cache
LOWEST = np.float32(-1e30)  # a score that is not seen
_ZERO, _ONE = np.float32(0), np.float32(1)
#: Words of a job: its first token, its tokens, where the request's blocks begin, the request's cached tokens, and
#: whether its tokens are a tree's, so that behind whole blocks of cached tokens keys are gathered token by token.
JOB_WORDS = 5
#: Words of a pass's cells: counts, and addresses of what is planned for it.
TOKENS, LOGIT_ROWS, JOB_COUNT, JOBS, COSTS, LIMITS, TABLE, PATHS, PATH_BEGINS, FEATURE_ROWS = range(10)


def operator(function: Callable[..., None]) -> Any:
    """Compile an operator; its ``address`` is the native function's."""
    try:
        return cfunc("void(int64, int64, int64)", cache=True)(function)
    except RuntimeError:  # no folder of numba's can be written
        return cfunc("void(int64, int64, int64)")(function)


part: Any = njit(forceinline=True)


@part
def _share(count, thread, threads):
    return range(count * thread // threads, count * (thread + 1) // threads)


@part
def _squares(at, size):
    squares = same(_ZERO)
    for i in range(0, 4 * size, 64):
        x = load(at + i)
        squares = fma(x, x, squares)
    return total(squares)


@part
def _inverse_root(squares, size, eps):
    return _ONE / np.sqrt(squares / np.float32(size) + eps)


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
    tokens, quants, scales, out, size = word(args, 1), word(args, 2), word(args, 3), word(args, 4), word(args, 5)
    factor, lanes, bits, offset, has_minimum = (
        number(args + 48),
        word(args, 7),
        word(args, 8),
        word(args, 9),
        word(args, 10),
    )
    integers, kind = word(args, 11), word(args, 12)
    for row in _share(word(word(args, 0), 0), thread, threads):
        token, target = word(tokens, row), out + row * size * 4
        block, lane = token // lanes, token % lanes
        if kind:
            bytes_ = 4 if kind == 1 else 2
            at = quants + (block * size * lanes + lane) * bytes_
            for i in range(size):
                put(target + 4 * i, value_of(at + i * lanes * bytes_, kind) * factor)
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
def add_norm(args, thread, threads):
    """Add to the residual and norm the sum: see ``Norm`` in ``network``."""
    x, delta, post, weight = word(args, 1), word(args, 2), word(args, 3), word(args, 4)
    out, stride, size, true_size = word(args, 5), word(args, 6), word(args, 7), word(args, 8)
    eps, kept, kept_stride, index, x_stride = (
        number(args + 72),
        word(args, 10),
        word(args, 11),
        word(args, 12),
        word(args, 13),
    )
    for row in _share(word(word(args, 0), 0), thread, threads):
        source = word(index, row) if index else row
        at, target = x + source * x_stride, out + row * stride
        summed = target if index else at
        if delta:
            more, factor = delta + source * size * 4, same(_ONE)
            if post:
                factor = same(_inverse_root(_squares(more, size), true_size, eps))
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
            factor = same(_inverse_root(_squares(summed, size), true_size, eps))
            for i in range(0, 4 * size, 64):
                store(target + i, mul(mul(load(summed + i), factor), load(weight + i)))


@operator
def activate(args, thread, threads):
    """Multiply an activated gate by what is beside it: rows, gate and up, out, size, whether GELU."""
    source, out, size, gelu = word(args, 1), word(args, 2), word(args, 3), word(args, 4)
    one, parts = same(_ONE), size // 16
    for unit in _share(word(word(args, 0), 0) * parts, thread, threads):
        row, i = unit // parts, unit % parts * 64
        gate, up = load(source + row * size * 8 + i), load(source + row * size * 8 + size * 4 + i)
        if gelu:  # by tanh, which is 2 sigmoid(2 x) - 1, so that the whole is x sigmoid(2 x)
            inner = fma(mul(gate, gate), mul(gate, same(np.float32(0.044715))), gate)
            power = mul(inner, same(np.float32(-2 * 0.7978845608028654)))
        else:
            power = mul(gate, same(np.float32(-1)))
        store(out + row * size * 4 + i, mul(divide(gate, add(one, exp(power))), up))


@operator
def place(args, thread, threads):
    """Norm and rotate queries and keys, in place, and write keys and values to the pool.

    rows, projected, positions, cos, sin, norms of queries and of keys, eps, heads, KV heads, a head's size and its true
    one, the rows' places in the pool, keys, values, whether these are float32
    """
    projected, positions, cos, sin = word(args, 1), word(args, 2), word(args, 3), word(args, 4)
    query_norm, key_norm, eps, heads, kv_heads = (
        word(args, 5),
        word(args, 6),
        number(args + 56),
        word(args, 8),
        word(args, 9),
    )
    dim, true_dim, places, keys, values, wide = (
        word(args, 10),
        word(args, 11),
        word(args, 12),
        word(args, 13),
        word(args, 14),
        word(args, 15),
    )
    count, half, bytes_ = heads + 2 * kv_heads, 2 * dim, 4 if wide else 2
    for unit in _share(word(word(args, 0), 0) * count, thread, threads):
        row, head = unit // count, unit % count
        at = projected + unit * dim * 4
        pool_row = word(places, row)
        kv_head = head - heads - (kv_heads if head >= heads + kv_heads else 0)
        block = (pool_row // BLOCK * kv_heads + kv_head) * BLOCK * dim * bytes_
        if head >= heads + kv_heads:
            target = values + block + pool_row % BLOCK * dim * bytes_
            for i in range(0, dim, 16):
                if wide:
                    store(target + 4 * i, load(at + 4 * i))
                else:
                    store_bf16(target + 2 * i, load(at + 4 * i))
            continue
        norm = query_norm if head < heads else key_norm
        if norm:
            factor = same(_inverse_root(_squares(at, dim), true_dim, eps))
            for i in range(0, 4 * dim, 64):
                store(at + i, mul(mul(load(at + i), factor), load(norm + i)))
        if cos:
            angle = word(positions, row) * half
            for i in range(0, half, 64):
                first, second = load(at + i), load(at + half + i)
                c, s = load(cos + angle + i), load(sin + angle + i)
                store(at + i, fma(first, c, mul(mul(second, s), same(np.float32(-1)))))
                store(at + half + i, fma(second, c, mul(first, s)))
        if head >= heads:  # of keys the numbers of a block's rows stand beside each other
            target = keys + block + pool_row % BLOCK * bytes_
            for i in range(dim):
                if wide:
                    put(target + i * BLOCK * 4, number(at + 4 * i))
                else:
                    put_bf16(target + i * BLOCK * 2, number(at + 4 * i))


@part
def _two(at, wide):
    """Read 32 numbers of keys or values."""
    if wide:
        return load(at), load(at + 64)
    return load_bf16(at), load_bf16(at + 32)


@part
def _scores(q0, q1, q2, q3, keys, dim, out, wide):
    """Write products of four queries with the 32 keys of a block to ``out``."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = same(_ZERO)
    step = BLOCK * (4 if wide else 2)
    for i in range(dim):
        x, y = _two(keys + i * step, wide)
        a, b, c, d = (
            same(number(q0 + 4 * i)),
            same(number(q1 + 4 * i)),
            same(number(q2 + 4 * i)),
            same(number(q3 + 4 * i)),
        )
        a0, a1, b0, b1 = fma(a, x, a0), fma(a, y, a1), fma(b, x, b0), fma(b, y, b1)
        c0, c1, d0, d1 = fma(c, x, c0), fma(c, y, c1), fma(d, x, d0), fma(d, y, d1)
    store(out, a0)
    store(out + 64, a1)
    store(out + 128, b0)
    store(out + 192, b1)
    store(out + 256, c0)
    store(out + 320, c1)
    store(out + 384, d0)
    store(out + 448, d1)


@part
def _mix(o0, o1, o2, o3, f0, f1, f2, f3, weights, values, count, dim, wide):
    """Scale four outputs by factors and add ``count`` values of a block to them, by ``weights``."""
    size = 4 if wide else 2
    for i in range(0, dim, 32):
        at = 4 * i
        a0, a1, b0, b1 = (
            mul(load(o0 + at), f0),
            mul(load(o0 + at + 64), f0),
            mul(load(o1 + at), f1),
            mul(load(o1 + at + 64), f1),
        )
        c0, c1, d0, d1 = (
            mul(load(o2 + at), f2),
            mul(load(o2 + at + 64), f2),
            mul(load(o3 + at), f3),
            mul(load(o3 + at + 64), f3),
        )
        for key in range(count):
            x, y = _two(values + (key * dim + i) * size, wide)
            w = weights + 4 * key
            a, b, c, d = same(number(w)), same(number(w + 128)), same(number(w + 256)), same(number(w + 384))
            a0, a1, b0, b1 = fma(a, x, a0), fma(a, y, a1), fma(b, x, b0), fma(b, y, b1)
            c0, c1, d0, d1 = fma(c, x, c0), fma(c, y, c1), fma(d, x, d0), fma(d, y, d1)
        store(o0 + at, a0)
        store(o0 + at + 64, a1)
        store(o1 + at, b0)
        store(o1 + at + 64, b1)
        store(o2 + at, c0)
        store(o2 + at + 64, c1)
        store(o3 + at, d0)
        store(o3 + at + 64, d1)


@part
def _soften(scores, scale, low, high, state):
    """Turn a row's 32 scores into weights, 0 but for keys ``low`` to ``high`` - 1; returns the factor of earlier ones.

    state  the largest score so far, and the sum of weights
    """
    if high <= low:
        store(scores, same(_ZERO))
        store(scores + 64, same(_ZERO))
        return _ONE
    factor, unseen = same(scale), LOWEST
    x = within(mul(load(scores), factor), low, high, unseen)
    y = within(mul(load(scores + 64), factor), low - 16, high - 16, unseen)
    before = number(state)
    peak = max(before, largest(larger(x, y)))
    x = within(exp(add(x, same(-peak))), low, high, _ZERO)
    y = within(exp(add(y, same(-peak))), low - 16, high - 16, _ZERO)
    store(scores, x)
    store(scores + 64, y)
    kept = largest(exp(same(before - peak))) if before > LOWEST else _ZERO
    put(state, peak)
    put(state + 4, number(state + 4) * kept + total(add(x, y)))
    return kept


@njit(cache=True)
def _step(sizes, queries, outputs, state, scratch, row, rows, limits, block, keys, values):
    """Attend with four query rows of a unit, from ``row`` on, to the 32 keys of one block of the sequence."""
    group, dim, jump, out_jump, scale, window, wide = sizes
    r1, r2, r3 = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
    h0, h1, h2, h3 = row % group * dim * 4, r1 % group * dim * 4, r2 % group * dim * 4, r3 % group * dim * 4
    t0, t1, t2, t3 = row // group, r1 // group, r2 // group, r3 // group
    q0, q1, q2, q3 = (
        queries + t0 * jump + h0,
        queries + t1 * jump + h1,
        queries + t2 * jump + h2,
        queries + t3 * jump + h3,
    )
    _scores(q0, q1, q2, q3, keys, dim, scratch, wide)
    most, factors, spare = 0, scratch + 512, scratch + 576
    for i in range(ROWS):
        high = low = 0
        if row + i < rows:
            limit = word(limits, (row + i) // group)
            high = min(limit - block * BLOCK, BLOCK)
            low = max(limit - window - block * BLOCK, 0) if window else 0
        put(factors + 4 * i, _soften(scratch + 128 * i, scale, low, high, state + 8 * (row + i)))
        most = max(most, high)
    o0, o1 = outputs + t0 * out_jump + h0, outputs + t1 * out_jump + h1
    o2, o3 = outputs + t2 * out_jump + h2, outputs + t3 * out_jump + h3
    o1, o2, o3 = o1 if row + 1 < rows else spare, o2 if row + 2 < rows else spare, o3 if row + 3 < rows else spare
    f0, f1, f2, f3 = (
        same(number(factors)),
        same(number(factors + 4)),
        same(number(factors + 8)),
        same(number(factors + 12)),
    )
    _mix(o0, o1, o2, o3, f0, f1, f2, f3, scratch, values, most, dim, wide)


@part
def _copy(target, source, size):
    for i in range(0, size, 64):
        store(target + i, load(source + i))


@part
def _gather(keys, values, dim, size, cached, lanes, from_keys, from_values, jump, paths):
    """Put the keys and values of a path's tokens behind those of ``cached`` ones into one block.

    from_keys, from_values  the KV head's part of the pool's first block; ``jump`` bytes lead to the next block's
    paths                   address of the pool rows of the block's tokens behind the cached ones
    """
    for lane in range(cached, lanes):
        row = word(paths, lane - cached)
        source = from_keys + row // BLOCK * jump + row % BLOCK * size
        for i in range(dim):
            move(keys + (i * BLOCK + lane) * size, source + i * BLOCK * size, size)
        _copy(values + lane * dim * size, from_values + row // BLOCK * jump + row % BLOCK * dim * size, dim * size)


@njit(cache=True)
def _unit(args, job, head, scratch):
    """Attend with the tokens of a job and the query heads of a KV head.

    ``scratch``: of weights, 576 bytes, of an output that nobody reads, of a gathered block, and of rows' states
    """
    cells, tokens, kv_heads, dim = word(args, 0), word(job, 1), word(args, 7), word(args, 8)
    heads, window, wide = word(args, 6), word(args, 10), word(args, 11)
    group, size = heads // kv_heads, 4 if wide else 2
    first, past, is_tree = word(job, 0), word(job, 3), word(job, 4)
    rows, bytes_ = tokens * group, BLOCK * dim * size
    sizes = group, dim, (heads + 2 * kv_heads) * dim * 4, heads * dim * 4, number(args + 72), window, wide != 0
    limits = word(cells, LIMITS) + first * 8
    queries = word(args, 1) + first * sizes[2] + head * group * dim * 4
    outputs = word(args, 2) + first * sizes[3] + head * group * dim * 4
    table = word(cells, TABLE) + word(job, 2) * 8
    keys, values, jump = word(args, 3) + head * bytes_, word(args, 4) + head * bytes_, kv_heads * bytes_
    own_keys = scratch + 576 + dim * 4
    own_values = own_keys + bytes_
    state = own_values + bytes_
    least = most = word(limits, 0)
    for row in range(rows):
        token = row // group
        least, most = min(least, word(limits, token)), max(most, word(limits, token))
        put(state + 8 * row, LOWEST)
        put(state + 8 * row + 4, _ZERO)
        out = outputs + token * sizes[3] + row % group * dim * 4
        for i in range(0, 4 * dim, 64):
            store(out + i, same(_ZERO))
    begin = max(least - window, 0) // BLOCK if window else 0
    shared = past // BLOCK if is_tree else (most + BLOCK - 1) // BLOCK
    for block in range(begin, shared):
        at = word(table, block) * jump
        for row in range(0, rows, ROWS):
            _step(sizes, queries, outputs, state, scratch, row, rows, limits, block, keys + at, values + at)
    if is_tree:
        for token in range(tokens):
            limit, path = word(limits, token), word(cells, PATHS) + word(word(cells, PATH_BEGINS), first + token) * 8
            for block in range(shared, (limit + BLOCK - 1) // BLOCK):
                cached = max(past - block * BLOCK, 0)
                if cached:
                    at = word(table, block) * jump
                    _copy(own_keys, keys + at, bytes_)
                    _copy(own_values, values + at, cached * dim * size)
                seen = path + max(block * BLOCK - past, 0) * 8
                lanes = min(limit - block * BLOCK, BLOCK)
                _gather(own_keys, own_values, dim, size, cached, lanes, keys, values, jump, seen)
                q, o, own = queries + token * sizes[2], outputs + token * sizes[3], state + 8 * token * group
                for row in range(0, group, ROWS):
                    _step(sizes, q, o, own, scratch, row, group, limits + 8 * token, block, own_keys, own_values)
    for row in range(rows):
        out = outputs + row // group * sizes[3] + row % group * dim * 4
        factor = same(_ONE / number(state + 8 * row + 4))
        for i in range(0, 4 * dim, 64):
            store(out + i, mul(load(out + i), factor))


@operator
def attend(args, thread, threads):
    """Attend with all tokens to what is in the pool: see ``Network``.

    cells, projected, out, keys, values, scratch of a thread, heads, KV heads, a head's size, scale, window, whether
    keys are float32, bytes of scratch
    """
    cells, kv_heads = word(args, 0), word(args, 7)
    scratch = word(args, 5) + thread * word(args, 12)
    jobs, costs = word(cells, JOBS), word(cells, COSTS)
    count = word(cells, JOB_COUNT)
    whole = word(costs, count) * kv_heads
    for index in range(count):
        cost = word(costs, index + 1) - word(costs, index)
        for head in range(kv_heads):
            middle = word(costs, index) * kv_heads + head * cost + cost // 2
            if middle * threads // whole == thread:
                _unit(args, jobs + 8 * JOB_WORDS * index, head, scratch)


@operator
def candidates(args, thread, threads):
    """Find a row's best next tokens and their log-probabilities: rows, logits, bytes of a row, vocabulary, k, out.

    Of a row of ``out``, k float32 log-probabilities come first, best first, then k int32 tokens as float32 numbers.
    """
    logits, stride, vocab, k, out = word(args, 1), word(args, 2), word(args, 3), word(args, 4), word(args, 5)
    for row in _share(word(word(args, 0), 0), thread, threads):
        at, target, found, least = logits + row * stride, out + row * k * 8, 0, LOWEST
        for i in range(0, vocab, 16):
            x = within(load(at + 4 * i), 0, vocab - i, LOWEST)
            if found == k and not largest(x) > least:
                continue
            for token in range(i, min(i + 16, vocab)):
                value = number(at + 4 * token)
                if found == k and not value > least:
                    continue
                place_ = found if found < k else k - 1
                while place_ > 0 and number(target + 4 * (place_ - 1)) < value:
                    put(target + 4 * place_, number(target + 4 * (place_ - 1)))
                    put(target + 4 * (k + place_), number(target + 4 * (k + place_ - 1)))
                    place_ -= 1
                put(target + 4 * place_, value)
                put(target + 4 * (k + place_), np.float32(token))
                found = min(found + 1, k)
                least = number(target + 4 * (k - 1)) if found == k else LOWEST
        peak, sums = number(target), same(_ZERO)
        for i in range(0, vocab, 16):
            weights = exp(add(load(at + 4 * i), same(-peak)))
            sums = add(sums, within(weights, 0, vocab - i, _ZERO))
        logsum = np.float32(np.log(total(sums))) + peak
        for i in range(k):
            put(target + 4 * i, number(target + 4 * i) - logsum)


_PLANNED = ", ".join(["i8[::1]"] * 7)


@compiled(f"i8(i4[::1], i4[::1], i4[::1], i4[::1], u1[::1], i4[::1], {_PLANNED})")
def plan_pass(
    past_lens,
    seq_begins,
    block_indices,
    block_begins,
    mask,
    mask_begins,
    places,
    limits,
    jobs,
    costs,
    table,
    paths,
    path_begins,
):
    """Plan a pass: see ``attend``; returns the number of jobs.

    places       int64 [N], of the tokens' rows in the pool
    limits       int64 [N], keys that a token sees, without a window
    jobs, costs  int64 [J * JOB_WORDS] and [J + 1], the sums of what they cost
    table        int64 of the blocks
    paths        int64, pool rows of the tokens of its tree that a token sees, end to end; where a token's begin
    """
    count = end = 0
    costs[0] = 0
    table[: len(block_indices)] = block_indices
    for request in range(len(past_lens)):
        past, begin, blocks = past_lens[request], seq_begins[request], block_begins[request]
        tokens, section = seq_begins[request + 1] - begin, mask_begins[request]
        width = (mask_begins[request + 1] - section) // max(tokens, 1)
        earlier, is_tree = max(width - tokens, 0), False
        for token in range(tokens):
            row = past + earlier + token
            places[begin + token] = table[blocks + row // BLOCK] * BLOCK + row % BLOCK
            limits[begin + token] = row + 1
            if width:
                seen = mask[section + token * width : section + (token + 1) * width]
                for column in range(width):
                    is_tree |= (seen[column] != 0) != (column <= earlier + token)
        for token in range(tokens if is_tree else 0):
            path_begins[begin + token] = end
            for column in range(width):
                if mask[section + token * width + column]:
                    row = past + column
                    paths[end] = table[blocks + row // BLOCK] * BLOCK + row % BLOCK
                    end += 1
            limits[begin + token] = past + end - path_begins[begin + token]
        for first in range(begin, begin + tokens, JOB):
            last = min(first + JOB, begin + tokens)
            job = jobs[count * JOB_WORDS : (count + 1) * JOB_WORDS]
            job[0], job[1], job[2], job[3], job[4] = first, last - first, blocks, past, is_tree
            costs[count + 1] = costs[count] + limits[first:last].sum()
            count += 1
    return count
