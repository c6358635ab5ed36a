"""Attention over super-trees in a paged pool: a node's keys in the order of its path, block by block.

Key p of a path is summed in lane p % 32 of block p // 32 of its sequence, whether it stands in a committed block, in a
chain, or in a tree, whose nodes' own blocks are gathered. So a node has the bits of plain decoding.
"""

from __future__ import annotations

from echo_trt.backends.cpu.operators import LOWEST, ONE, ZERO, operator, part
from echo_trt.backends.cpu.vectors import (
    add,
    exp,
    fma,
    larger,
    largest,
    leading,
    load,
    load_bf16,
    move,
    mul,
    number,
    prefetch,
    put,
    same,
    store,
    total,
    within,
    word,
)
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.pack import BLOCK

ROWS = 4  # query rows that share what is read of keys and values; larger: more registers than a CPU has
JOB = 16  # tokens of a request that one thread attends with; larger: their sums leave the nearest cache
#: Words of a job: its first token, its tokens, where the request's blocks begin, the request's cached tokens, and
#: whether its tokens are a tree's, so that behind whole blocks of cached tokens keys are gathered token by token.
JOB_WORDS = 5
#: Words of a pass's cells: counts, and addresses of what is planned for it.
TOKENS, LOGIT_ROWS, JOB_COUNT, JOBS, COSTS, LIMITS, TABLE, PATHS, PATH_BEGINS, FEATURE_ROWS = range(10)


@part
def _two(at, wide):
    """Read 32 numbers of keys or values."""
    if wide:
        return load(at), load(at + 64)
    return load_bf16(at), load_bf16(at + 32)


@part
def _four_numbers(at, step):
    """Return vectors of one number each, of four at ``step`` bytes from each other."""
    second, third, fourth = number(at + step), number(at + 2 * step), number(at + 3 * step)
    return same(number(at)), same(second), same(third), same(fourth)


@part
def _scaled(at, factor):
    return mul(load(at), factor), mul(load(at + 64), factor)


@part
def _put_two(at, x, y):
    store(at, x)
    store(at + 64, y)


@part
def _row(base, row, group, jump, dim):
    """Return the address of a query row: of the tokens of a unit, ``group`` heads each."""
    return base + row // group * jump + row % group * dim * 4


@part
def _scores(q0, q1, q2, q3, keys, dim, out, wide):
    """Write products of four queries with the 32 keys of a block to ``out``."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = same(ZERO)
    step = BLOCK * (4 if wide else 2)
    for i in range(dim):
        x, y = _two(keys + i * step, wide)
        a, b = same(number(q0 + 4 * i)), same(number(q1 + 4 * i))
        c, d = same(number(q2 + 4 * i)), same(number(q3 + 4 * i))
        a0, a1, b0, b1 = fma(a, x, a0), fma(a, y, a1), fma(b, x, b0), fma(b, y, b1)
        c0, c1, d0, d1 = fma(c, x, c0), fma(c, y, c1), fma(d, x, d0), fma(d, y, d1)
    _put_two(out, a0, a1)
    _put_two(out + 128, b0, b1)
    _put_two(out + 256, c0, c1)
    _put_two(out + 384, d0, d1)


@part
def _mix(o0, o1, o2, o3, factors, weights, values, count, dim, wide):
    """Scale four outputs by factors and add ``count`` values of a block to them, by ``weights``."""
    size = 4 if wide else 2
    f0, f1, f2, f3 = _four_numbers(factors, 4)
    for i in range(0, dim, 32):
        at = 4 * i
        (a0, a1), (b0, b1) = _scaled(o0 + at, f0), _scaled(o1 + at, f1)
        (c0, c1), (d0, d1) = _scaled(o2 + at, f2), _scaled(o3 + at, f3)
        for key in range(count):
            x, y = _two(values + (key * dim + i) * size, wide)
            a, b, c, d = _four_numbers(weights + 4 * key, 128)
            a0, a1, b0, b1 = fma(a, x, a0), fma(a, y, a1), fma(b, x, b0), fma(b, y, b1)
            c0, c1, d0, d1 = fma(c, x, c0), fma(c, y, c1), fma(d, x, d0), fma(d, y, d1)
        _put_two(o0 + at, a0, a1)
        _put_two(o1 + at, b0, b1)
        _put_two(o2 + at, c0, c1)
        _put_two(o3 + at, d0, d1)


@part
def _soften(scores, scale, low, high, state):
    """Turn a row's 32 scores into weights, 0 but for keys ``low`` to ``high`` - 1; returns the factor of earlier ones.

    state  the largest score so far, and the sum of weights
    """
    if high <= low:
        store(scores, same(ZERO))
        store(scores + 64, same(ZERO))
        return ONE
    factor, unseen = same(scale), LOWEST
    x = within(mul(load(scores), factor), low, high, unseen)
    y = within(mul(load(scores + 64), factor), low - 16, high - 16, unseen)
    before = number(state)
    peak = max(before, largest(larger(x, y)))
    x = within(exp(add(x, same(-peak))), low, high, ZERO)
    y = within(exp(add(y, same(-peak))), low - 16, high - 16, ZERO)
    store(scores, x)
    store(scores + 64, y)
    kept = ONE if before == peak else leading(exp(same(before - peak))) if before > LOWEST else ZERO
    put(state, peak)
    put(state + 4, number(state + 4) * kept + total(add(x, y)))
    return kept


@compiled()
def _step(sizes, queries, outputs, state, scratch, row, rows, limits, block, keys, values):
    """Attend with four query rows of a unit, from ``row`` on, to the 32 keys of one block of the sequence."""
    group, dim, jump, out_jump, scale, window, wide = sizes
    r1, r2, r3 = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
    q0, q1 = _row(queries, row, group, jump, dim), _row(queries, r1, group, jump, dim)
    q2, q3 = _row(queries, r2, group, jump, dim), _row(queries, r3, group, jump, dim)
    _scores(q0, q1, q2, q3, keys, dim, scratch, wide)
    maximum, factors, spare = 0, scratch + 512, scratch + 576
    for i in range(ROWS):
        high = low = 0
        if row + i < rows:
            limit = word(limits, (row + i) // group)
            high = min(limit - block * BLOCK, BLOCK)
            low = max(limit - window - block * BLOCK, 0) if window else 0
        put(factors + 4 * i, _soften(scratch + 128 * i, scale, low, high, state + 8 * (row + i)))
        maximum = max(maximum, high)
    o0 = _row(outputs, row, group, out_jump, dim)
    o1 = _row(outputs, r1, group, out_jump, dim) if row + 1 < rows else spare
    o2 = _row(outputs, r2, group, out_jump, dim) if row + 2 < rows else spare
    o3 = _row(outputs, r3, group, out_jump, dim) if row + 3 < rows else spare
    _mix(o0, o1, o2, o3, factors, scratch, values, maximum, dim, wide)


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


@compiled()
def _unit(args, job, head, scratch):
    """Attend with the tokens of a job and the query heads of a KV head.

    ``scratch``: of weights, 576 bytes, of an output that nobody reads, of a gathered block, and of rows' states
    """
    cells, tokens, kv_heads, dim = word(args, 0), word(job, 1), word(args, 7), word(args, 8)
    heads, window, wide = word(args, 6), word(args, 10), word(args, 11)
    group, size = heads // kv_heads, 4 if wide else 2
    first, past, is_tree = word(job, 0), word(job, 3), word(job, 4)
    rows, bytes_ = tokens * group, BLOCK * dim * size
    sizes = group, dim, word(args, 13), heads * dim * 4, number(args + 72), window, wide != 0
    limits = word(cells, LIMITS) + first * 8
    queries = word(args, 1) + first * sizes[2] + head * group * dim * 4
    outputs = word(args, 2) + first * sizes[3] + head * group * dim * 4
    table = word(cells, TABLE) + word(job, 2) * 8
    keys, values, jump = word(args, 3) + head * bytes_, word(args, 4) + head * bytes_, word(args, 14)
    own_keys = scratch + 576 + dim * 4
    own_values = own_keys + bytes_
    state = own_values + bytes_
    minimum = maximum = word(limits, 0)
    for row in range(rows):
        token = row // group
        minimum, maximum = min(minimum, word(limits, token)), max(maximum, word(limits, token))
        put(state + 8 * row, LOWEST)
        put(state + 8 * row + 4, ZERO)
        out = _row(outputs, row, group, sizes[3], dim)
        for i in range(0, 4 * dim, 64):
            store(out + i, same(ZERO))
    begin = max(minimum - window, 0) // BLOCK if window else 0
    shared = past // BLOCK if is_tree else (maximum + BLOCK - 1) // BLOCK
    for block in range(begin, shared):
        at, after = word(table, block) * jump, word(table, min(block + 1, shared - 1)) * jump
        for i in range(0, bytes_, 64):  # the blocks stand anywhere, so that no CPU predicts the next one
            prefetch(keys + after + i)
            prefetch(values + after + i)
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
        out = _row(outputs, row, group, sizes[3], dim)
        factor = same(ONE / number(state + 8 * row + 4))
        for i in range(0, 4 * dim, 64):
            store(out + i, mul(load(out + i), factor))


@operator
def attend(args, thread, threads):
    """Attend with all tokens to what is in the pool: see ``Network``.

    cells, projected, out, keys, values, scratch of a thread, heads, KV heads, a head's size, scale, window, whether
    keys are float32, bytes of scratch, of a projected row, and to the pool's next block
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


_PLANNED = ", ".join(["i8[::1]"] * 7)


@compiled(f"i8(i4[::1], i4[::1], i4[::1], i4[::1], u1[::1], i4[::1], {_PLANNED})")
def plan_pass(
    past_lens,
    seq_begins,
    block_indices,
    block_begins,
    mask,
    mask_begins,
    pool_rows,
    limits,
    jobs,
    costs,
    table,
    paths,
    path_begins,
):
    """Plan a pass: see ``attend``; returns the number of jobs.

    pool_rows       int64 [N], of the tokens' rows in the pool
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
            pool_rows[begin + token] = table[blocks + row // BLOCK] * BLOCK + row % BLOCK
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
