"""Attention over super-trees in a paged pool: a node's keys in the order of its path, tile by tile.

Key p of a path is summed in lane p % 32 of block p // 32 of its sequence, whether it stands in a committed block, in a
chain, or in a tree, whose nodes' own blocks are gathered. Eight blocks are a tile: it has one largest score, and its
values are summed in registers. So a node has the bits of plain decoding.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from echo_trt.backends.cpu.operators import LOWEST, ONE, ZERO, operator, part
from echo_trt.backends.cpu.row_sums import HALVES, HAS_PAIRS, PAIRS, ROWS, WIDE, adding, nothing, reading, writing
from echo_trt.backends.cpu.vectors import (
    add,
    exp,
    larger,
    largest,
    leading,
    load,
    move,
    mul,
    number,
    prefetch,
    put,
    put_word,
    same,
    store,
    store_bf16,
    total,
    within,
    word,
)
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.pack import BLOCK

JOB = 16  # tokens of a request that one thread attends with; larger: their sums leave the nearest cache
FEW = 64  # tokens of a pass, up to which jobs are a quarter, so that each thread has as much to do
TILE = 8  # blocks of a sequence that a row reads between two looks at its largest score
SCORES = 4 * TILE * BLOCK + 64  # bytes of a row's scores of a tile; a power of two would be one set of the cache
#: Words of a job: its first token, its tokens, where the request's blocks begin, the request's cached tokens, and
#: whether its tokens are a tree's, so that behind whole tiles of cached tokens keys are gathered token by token.
JOB_WORDS = 5
#: Words of a pass's cells: counts, and addresses of what is planned for it.
TOKENS, LOGIT_ROWS, JOB_COUNT, JOBS, COSTS, LIMITS, TABLE, PATHS, PATH_BEGINS, FEATURE_ROWS = range(10)


def scratch_bytes(group: int, dim: int) -> int:
    """Return what a thread needs for a job of ``group`` query heads: see ``_unit``."""
    rows = JOB * group + ROWS
    return 16 * TILE + ROWS * (SCORES + 64) + 2 * TILE * BLOCK * dim * 4 + rows * (8 * dim + 8)


def kind_of(wide: bool) -> int:
    """Return how a pool of float32, or of bf16, is multiplied on this CPU."""
    return WIDE if wide else PAIRS if HAS_PAIRS else HALVES


@part
def _soften(scores, kind, scale, low, high, vectors, state):
    """Turn a row's scores into weights, 0 but for keys ``low`` to ``high`` - 1; returns the factor of earlier ones.

    vectors  of 16 scores in the tile; weights are bf16 where they are multiplied as pairs
    state    the largest score so far, and the sum of weights
    """
    begin, end, kept, size = low // 16, (high + 15) // 16, ONE, 32 if kind == PAIRS else 64
    if high > low:
        factor, peaks = same(scale), same(LOWEST)
        for i in range(begin, end):
            x = mul(load(scores + 64 * i), factor)
            if i == begin or i == end - 1:
                x = within(x, low - 16 * i, high - 16 * i, LOWEST)
            store(scores + 64 * i, x)
            peaks = larger(peaks, x)
        before = number(state)
        peak = max(before, largest(peaks))
        minus, sums = same(-peak), same(ZERO)
        for i in range(begin, end):
            x = exp(add(load(scores + 64 * i), minus))
            if i == begin or i == end - 1:
                x = within(x, low - 16 * i, high - 16 * i, ZERO)
            sums = add(sums, x)
            if kind == PAIRS:
                store_bf16(scores + 32 * i, x)
            else:
                store(scores + 64 * i, x)
        if before != peak:
            kept = leading(exp(same(before - peak))) if before > LOWEST else ZERO
        put(state, peak)
        put(state + 4, number(state + 4) * kept + total(sums))
    else:
        begin = end = 0
    for i in range(begin):
        _clear(scores + size * i, size)
    for i in range(end, vectors):
        _clear(scores + size * i, size)
    return kept


@part
def _clear(at, size):
    if size == 64:
        store(at, same(ZERO))
    else:
        store_bf16(at, same(ZERO))


def _tile_of(rows: int, kind: int) -> Any:
    """Make a function that attends with ``rows`` query rows to a tile: see ``_attend_tile``."""
    added, read, write, none = adding(rows, kind), reading(rows), writing(rows), nothing(rows)
    pair, step, query_bytes = 1 if kind == WIDE else 2, 8 if kind == HALVES else 4, 2 if kind == PAIRS else 4
    block_numbers = BLOCK * (2 if kind == PAIRS else 4)

    @njit
    def attend_tile(sizes, queries, outputs, state, scratch, row, count, limits, first, blocks, fetched):
        group, dim, scale, window = sizes
        scores, factors = scratch + 16 * TILE, scratch + 16 * TILE + ROWS * SCORES
        stride, out = query_bytes * dim, outputs + row * dim * 4
        for i in range(blocks):
            keys = word(scratch, i)
            if not fetched:  # blocks stand anywhere, so that no CPU predicts the next one
                after, values = word(scratch, min(i + 1, blocks - 1)), word(scratch, TILE + i)
                for line in range(0, BLOCK * dim * 4 // pair, 64):
                    prefetch(after + line)
                    prefetch(values + line)
            sums, at = none(), queries + row * stride
            for j in range(dim // pair):
                sums = added(sums, keys + 128 * j, at + step * j, stride)
            write(sums, scores + 128 * i, SCORES)
        end = 0
        for i in range(rows):
            low = high = 0
            if i < count:
                limit = word(limits, (row + i) // group) - first * BLOCK
                high = max(min(limit, blocks * BLOCK), 0)
                low = min(max(limit - window, 0), high) if window else 0
            kept = _soften(scores + SCORES * i, kind, scale, low, high, 2 * blocks, state + 8 * (row + i))
            put(factors + 4 * i, kept)
            end = max(end, high)
        for i in range(0, 4 * dim, 128):
            sums = read(out + i, 4 * dim, factors)
            for block in range((end + BLOCK - 1) // BLOCK):
                values, weights = word(scratch, TILE + block) + i, scores + block_numbers * block
                for j in range((min(end - block * BLOCK, BLOCK) + pair - 1) // pair):
                    sums = added(sums, values + j * dim * 4, weights + step * j, SCORES)
            write(sums, out + i, 4 * dim)

    return attend_tile


_many_pairs, _few_pairs = (_tile_of(rows, PAIRS if HAS_PAIRS else HALVES) for rows in (ROWS, ROWS // 2))
_many_halves, _few_halves = (_tile_of(rows, HALVES) for rows in (ROWS, ROWS // 2))
_many_wide, _few_wide = (_tile_of(rows, WIDE) for rows in (ROWS, ROWS // 2))


@part
def _attend_tile(kind, sizes, queries, outputs, state, scratch, begin, end, limits, first, blocks):
    """Attend with query rows ``begin`` to ``end`` - 1 of a unit to a tile's blocks, whose addresses are in ``scratch``.

    first  the number of the first block in its sequence
    """
    for row in range(begin, end, ROWS):
        count, fetched = min(end - row, ROWS), row > begin
        few = count <= ROWS // 2
        given = sizes, queries, outputs, state, scratch, row, count, limits, first, blocks, fetched
        if kind == PAIRS:
            _few_pairs(*given) if few else _many_pairs(*given)
        elif kind == HALVES:
            _few_halves(*given) if few else _many_halves(*given)
        else:
            _few_wide(*given) if few else _many_wide(*given)


@part
def _copy(target, source, size):
    for i in range(0, size, 64):
        store(target + i, load(source + i))


@part
def _gather(keys, values, dim, pair, cached, lanes, from_keys, from_values, jump, paths):
    """Put the keys and values of a path's tokens behind those of ``cached`` ones into one block.

    pair                    numbers of a sum that stand beside each other: see ``KVArrays``
    from_keys, from_values  the KV head's part of the pool's first block; ``jump`` bytes lead to the next block's
    paths                   address of the pool rows of the block's tokens behind the cached ones
    """
    size = 4 // pair
    for lane in range(cached, lanes):
        row = word(paths, lane - cached)
        at, inside = row // BLOCK * jump, row % BLOCK
        for i in range(0, dim // pair * 4 * BLOCK, 4 * BLOCK):
            move(keys + i + 4 * lane, from_keys + at + i + 4 * inside, 4)
        target = values + lane // pair * dim * 4 + lane % pair * size
        source = from_values + at + inside // pair * dim * 4 + inside % pair * size
        for i in range(0, 4 * dim, 4):
            move(target + i, source + i, size)


@part
def _tile_of_path(scratch, own, dim, pair, past, limit, keys, values, table, jump, path, first, last):
    """Let a tile have a path's blocks: those of cached tokens where they are, others gathered in ``own``."""
    size = BLOCK * dim * 4 // pair
    for block in range(first, last):
        i = block - first
        cached, lanes = max(past - block * BLOCK, 0), min(limit - block * BLOCK, BLOCK)
        if cached >= BLOCK:
            put_word(scratch + 8 * i, keys + word(table, block) * jump)
            put_word(scratch + 8 * (TILE + i), values + word(table, block) * jump)
            continue
        own_keys, own_values = own + 2 * i * size, own + (2 * i + 1) * size
        if cached:
            _copy(own_keys, keys + word(table, block) * jump, size)
            _copy(own_values, values + word(table, block) * jump, size)
        seen = path + max(block * BLOCK - past, 0) * 8
        _gather(own_keys, own_values, dim, pair, cached, lanes, keys, values, jump, seen)
        put_word(scratch + 8 * i, own_keys)
        put_word(scratch + 8 * (TILE + i), own_values)


@compiled()
def _unit(args, job, head, scratch):
    """Attend with the tokens of a job and the query heads of a KV head.

    ``scratch``: addresses of a tile's keys and values, scores of rows, factors, gathered blocks, and of all rows the
    queries, outputs and states
    """
    cells, tokens, kv_heads, dim = word(args, 0), word(job, 1), word(args, 7), word(args, 8)
    heads, window, kind, stride = word(args, 6), word(args, 10), word(args, 11), word(args, 13)
    group, pair = heads // kv_heads, 1 if kind == WIDE else 2
    first, past, is_tree = word(job, 0), word(job, 3), word(job, 4)
    rows, size, query_bytes = tokens * group, BLOCK * dim * 4 // pair, 2 if kind == PAIRS else 4
    sizes = group, dim, number(args + 72), window
    limits = word(cells, LIMITS) + first * 8
    table = word(cells, TABLE) + word(job, 2) * 8
    keys, values, jump = word(args, 3) + head * size, word(args, 4) + head * size, word(args, 14)
    own = scratch + 16 * TILE + ROWS * (SCORES + 64)
    queries = own + 2 * TILE * BLOCK * dim * 4
    outputs = queries + (JOB * group + ROWS) * dim * 4
    state = outputs + (JOB * group + ROWS) * dim * 4
    minimum = maximum = word(limits, 0)
    for row in range(rows):
        token = row // group
        minimum, maximum = min(minimum, word(limits, token)), max(maximum, word(limits, token))
        put(state + 8 * row, LOWEST)
        put(state + 8 * row + 4, ZERO)
        source = word(args, 1) + (first + token) * stride + (head * group + row % group) * dim * 4
        for i in range(0, dim, 16):
            store(outputs + (row * dim + i) * 4, same(ZERO))
            x = load(source + 4 * i)
            if kind == PAIRS:
                store_bf16(queries + (row * dim + i) * query_bytes, x)
            else:
                store(queries + (row * dim + i) * query_bytes, x)
    begin = max(minimum - window, 0) // BLOCK if window else 0
    shared = past // BLOCK // TILE * TILE if is_tree else (maximum + BLOCK - 1) // BLOCK
    for tile in range(begin // TILE * TILE, shared, TILE):
        from_, to = max(tile, begin), min(tile + TILE, shared)
        for block in range(from_, to):
            put_word(scratch + 8 * (block - from_), keys + word(table, block) * jump)
            put_word(scratch + 8 * (TILE + block - from_), values + word(table, block) * jump)
        _attend_tile(kind, sizes, queries, outputs, state, scratch, 0, rows, limits, from_, to - from_)
    for token in range(tokens if is_tree else 0):
        limit, path = word(limits, token), word(cells, PATHS) + word(word(cells, PATH_BEGINS), first + token) * 8
        end, row = (limit + BLOCK - 1) // BLOCK, token * group
        low = max(limit - window, 0) // BLOCK if window else 0
        for tile in range(max(shared, low // TILE * TILE), end, TILE):
            from_, to = max(tile, low), min(tile + TILE, end)
            _tile_of_path(scratch, own, dim, pair, past, limit, keys, values, table, jump, path, from_, to)
            _attend_tile(kind, sizes, queries, outputs, state, scratch, row, row + group, limits, from_, to - from_)
    for row in range(rows):
        token, factor = row // group, same(ONE / number(state + 8 * row + 4))
        out = word(args, 2) + ((first + token) * heads + head * group + row % group) * dim * 4
        for i in range(0, 4 * dim, 64):
            store(out + i, mul(load(outputs + row * dim * 4 + i), factor))


@operator
def attend(args, thread, threads):
    """Attend with all tokens to what is in the pool: see ``Network``.

    cells, projected, out, keys, values, scratch of a thread, heads, KV heads, a head's size, scale, window, the pool's
    kind (``row_sums``), bytes of scratch, of a projected row, and to the pool's next block
    """
    cells, kv_heads = word(args, 0), word(args, 7)
    scratch = word(args, 5) + thread * word(args, 12)
    jobs, costs = word(cells, JOBS), word(cells, COSTS)
    count = word(cells, JOB_COUNT)
    whole = word(costs, count)
    for head in range(kv_heads):  # its jobs one after the other, which may read the same keys
        for index in range(count):
            middle = head * whole + (word(costs, index) + word(costs, index + 1)) // 2
            if middle * threads // (whole * kv_heads) == thread:
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
    size = JOB if seq_begins[-1] > FEW else JOB // 4
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
        for first in range(begin, begin + tokens, size):
            last = min(first + size, begin + tokens)
            job = jobs[count * JOB_WORDS : (count + 1) * JOB_WORDS]
            job[0], job[1], job[2], job[3], job[4] = first, last - first, blocks, past, is_tree
            costs[count + 1] = costs[count] + limits[first:last].sum()
            count += 1
    return count
