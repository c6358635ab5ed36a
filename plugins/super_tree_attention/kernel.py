"""The Triton kernels: attention over a super-tree, the merge of its splits, and the move of KV rows.

docs/internals/gpu.md explains the algorithm. The launch follows from shapes alone (``kernel_plan``), so a program
searches for its request itself.
"""

import triton
import triton.language as tl

_METADATA = (
    "past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins",
    "num_requests", "wanted_splits", "num_tokens", "num_blocks", "num_entries", "mask_bytes",
)  # fmt: skip

_SPAN = tl.constexpr(64)  # keys of which a split has a multiple; larger: splits of short pasts differ more in length
_MIN_SPLIT_KEYS = tl.constexpr(128)  # least keys of a split; smaller: more programs, whose merge does not pay


@triton.jit
def _sum(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _max(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def _dot(a, b, acc):
    """Compute a @ b + acc in float32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _request_of(slot, seq_begins, num_requests, TOKENS: tl.constexpr, SPARE: tl.constexpr):
    """Return the last request i whose first slot, seq_begins[i] // TOKENS + SPARE * i, is not after ``slot``."""
    earlier = tl.full([256], 0, tl.int32)
    for start in range(0, num_requests, 256):
        i = start + tl.arange(0, 256)
        begin = tl.load(seq_begins + i, mask=i < num_requests, other=2147483647)
        earlier += tl.where((i < num_requests) & (begin // TOKENS + SPARE * i <= slot), 1, 0)
    return _sum(earlier, 0) - 1


@triton.jit
def _within(value, minimum, maximum):
    """``value`` within bounds, which it always is but for the made-up inputs that a builder may time kernels with."""
    return tl.minimum(tl.maximum(value, minimum), maximum)


@triton.jit
def _extent(request, past_lens, seq_begins, block_begins, num_tokens, num_entries, BLOCK: tl.constexpr):
    """Return a request's first token, its tokens, its first table entry and its past keys, within the arguments'
    memory.
    """
    begin = _within(tl.load(seq_begins + request), 0, num_tokens)
    count = _within(tl.load(seq_begins + request + 1), begin, num_tokens) - begin
    entry = _within(tl.load(block_begins + request), 0, num_entries)
    count = tl.minimum(count, (num_entries - entry) * BLOCK)
    past = _within(tl.load(past_lens + request), 0, (num_entries - entry) * BLOCK - count)
    return begin, count, entry, past


@triton.jit
def _section(request, count, tree_mask_begins, mask_bytes):
    """Return where a request's mask begins, and the bytes of a row: fewer than ``count`` where it has no mask."""
    section = _within(tl.load(tree_mask_begins + request), 0, mask_bytes)
    return section, (_within(tl.load(tree_mask_begins + request + 1), section, mask_bytes) - section) // count


@triton.jit
def _unseen(past, WINDOW: tl.constexpr):
    """Return how many keys at the beginning of a past no token sees, as a multiple of _SPAN."""
    unseen = past * 0
    if WINDOW > 0:
        unseen = tl.maximum(past + 1 - WINDOW, 0) // _SPAN * _SPAN
    return unseen


@triton.jit
def _split_span(
    past, block_begins, num_requests, num_entries, wanted, num_splits, BLOCK: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Past keys of a split, of which ``num_splits`` hold the ``past`` keys that are seen.

    A request of the mean length gets ``wanted`` splits; with 1 wanted, only a past of over twice the mean is split, and
    with 0 wanted all are. The mean is of the table's true length, which a padded table does not show.
    """
    entries = _within(tl.load(block_begins + num_requests), 0, num_entries)
    mean = (entries * BLOCK + num_requests - 1) // tl.maximum(num_requests, 1)
    if WINDOW > 0:
        mean = tl.minimum(mean, WINDOW)
    share = tl.where(wanted == 1, 2 * mean, (mean + wanted - 1) // tl.maximum(wanted, 1))
    minimum = tl.maximum((share + _SPAN - 1) // _SPAN * _SPAN, _MIN_SPLIT_KEYS)
    minimum = tl.where(wanted == 0, _SPAN, minimum)
    steps = (past + _SPAN - 1) // _SPAN
    return tl.maximum(minimum, (steps + num_splits - 1) // num_splits * _SPAN)


@triton.jit
def _attend(q, k, v, visible, peak, total, acc, SCALE: tl.constexpr):
    """One step of the online softmax, base 2: q [ROWS, D], k and v [KEYS, D], visible [ROWS or 1, KEYS]."""
    scores = _dot(q, tl.trans(k), tl.full([q.shape[0], k.shape[0]], 0.0, tl.float32))
    scores = tl.where(visible, scores * SCALE, float("-inf"))
    new_peak = tl.maximum(peak, _max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + _sum(weights, 1)
    acc = _dot(weights.to(v.dtype), v, acc * decay[:, None])
    return new_peak, total, acc


@triton.jit(do_not_specialize=_METADATA, do_not_specialize_on_alignment=_METADATA)
def attention(
    query, key, value, key_cache, value_cache,
    past_lens, seq_begins, block_indices, block_begins, tree_mask, tree_mask_begins,
    num_requests, wanted_splits, num_tokens, num_blocks, num_entries, mask_bytes,
    output, partial, partial_lse,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, NEW_KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of one request's query tokens and the heads of one KV head, over one split of the past.

    Grid: (tiles, Hk, splits). Split 0 also attends the new tokens and writes the tile's KV rows into the caches. A
    request of one split writes ``output``; a request of several splits leaves their results to ``combine``. Whatever
    the metadata holds, nothing outside of the arguments' memory is read or written.

    num_tokens, num_blocks, num_entries, mask_bytes  sizes of query, of the pools, of the block table and of the mask
    partial                                          float32 [N, Hq, splits, D], a split's mean of values
    partial_lse                                      float32 [N, Hq, splits], log2 of the sum of a split's softmax
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    SCALE: tl.constexpr = 1.4426950408889634 * HEAD_DIM**-0.5
    slot, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)

    request = tl.maximum(_request_of(slot, seq_begins, num_requests, TOKENS, 1), 0)
    begin, count, entry, past = _extent(request, past_lens, seq_begins, block_begins, num_tokens, num_entries, BLOCK)
    first = (slot - begin // TOKENS - request) * TOKENS
    unseen = _unseen(past, WINDOW)
    seen_past = past - unseen
    span = _split_span(
        seen_past, block_begins, num_requests, num_entries, wanted_splits, num_splits, BLOCK, WINDOW
    )  # fmt: skip
    low = unseen + split * span
    if (first < 0) | (first >= count) | ((split > 0) & (low >= past)):
        return

    rows, keys, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    token = first + rows // GROUP
    live = (rows < TOKENS * GROUP) & (token < count)
    query_row = (begin + token).to(tl.int64) * (kv_heads * GROUP) + kv_head * GROUP + rows % GROUP
    q = tl.load(query + query_row[:, None] * HEAD_DIM + dims[None, :], mask=live[:, None], other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, HEAD_DIM], 0.0, tl.float32)

    lowest = token * 0  # the first past key in a token's window
    if WINDOW > 0:
        section, per_row = _section(request, count, tree_mask_begins, mask_bytes)
        new_keys = token + 1
        if per_row >= count:
            new_keys = token * 0
            mask_row = (section + token * per_row)[:, None]
            for start in tl.range(0, per_row, NEW_KEYS):
                other = (start + tl.arange(0, NEW_KEYS))[None, :]
                drawn = tl.load(tree_mask + (mask_row + other), mask=live[:, None] & (other < per_row), other=0)
                new_keys += _sum((drawn != 0).to(tl.int32), 1)
        lowest = past + new_keys - WINDOW

    # The loop begins at a constant: from another lower bound Triton infers no alignment, so loads come two bytes at a
    # time, unpipelined. The blocks of a step are fetched a step ahead, so that no load of keys waits for one of them.
    table = block_indices + entry
    high = tl.minimum(low + span, past)
    next_block = tl.load(table + (low + keys) // BLOCK, mask=low + keys < high, other=0)
    for done in tl.range(0, high - low, KEYS):
        position = low + done + keys
        seen = position < high
        block = _within(next_block, 0, num_blocks - 1).to(tl.int64)
        next_block = tl.load(table + (position + KEYS) // BLOCK, mask=position + KEYS < high, other=0)
        at = ((block * kv_heads + kv_head) * BLOCK + position % BLOCK) * HEAD_DIM
        at = at[:, None] + dims[None, :]
        k = tl.load(key_cache + at, mask=seen[:, None], other=0.0)
        v = tl.load(value_cache + at, mask=seen[:, None], other=0.0)
        visible = seen[None, :]
        if WINDOW > 0:
            visible &= position[None, :] >= lowest[:, None]
        peak, total, acc = _attend(q, k, v, visible, peak, total, acc, SCALE)

    if split == 0:
        section, per_row = _section(request, count, tree_mask_begins, mask_bytes)
        has_tree = per_row >= count
        # Tree keys of earlier calls are in the cache behind the past; the call's rows are written behind them.
        earlier = tl.where(has_tree, tl.minimum(per_row - count, (num_entries - entry) * BLOCK - past - count), 0)
        mask_row = section + token * per_row
        for start in tl.range(0, earlier, NEW_KEYS):
            other = start + tl.arange(0, NEW_KEYS)
            there = other < earlier
            block = tl.load(table + (past + other) // BLOCK, mask=there, other=0)
            block = _within(block, 0, num_blocks - 1).to(tl.int64)
            at = ((block * kv_heads + kv_head) * BLOCK + (past + other) % BLOCK) * HEAD_DIM
            at = at[:, None] + dims[None, :]
            k = tl.load(key_cache + at, mask=there[:, None], other=0.0)
            v = tl.load(value_cache + at, mask=there[:, None], other=0.0)
            in_mask = live[:, None] & there[None, :]
            drawn = tl.load(tree_mask + (mask_row[:, None] + other[None, :]), mask=in_mask, other=0)
            peak, total, acc = _attend(q, k, v, drawn != 0, peak, total, acc, SCALE)

        drawn_end = tl.where(has_tree, count, 0)
        causal = tl.where(has_tree, -1, token)[:, None]
        end = tl.where(has_tree, count, tl.minimum(first + TOKENS, count))
        for start in tl.range(0, end, NEW_KEYS):
            other = start + tl.arange(0, NEW_KEYS)
            new = other < count
            at = ((begin + other).to(tl.int64) * kv_heads + kv_head) * HEAD_DIM
            at = at[:, None] + dims[None, :]
            k = tl.load(key + at, mask=new[:, None], other=0.0)
            v = tl.load(value + at, mask=new[:, None], other=0.0)
            in_mask = live[:, None] & (other < drawn_end)[None, :]
            drawn = tl.load(tree_mask + (mask_row[:, None] + earlier + other[None, :]), mask=in_mask, other=0)
            earlier_or_same = other[None, :] <= causal
            if WINDOW > 0:
                earlier_or_same &= other[None, :] > causal - WINDOW
            visible = new[None, :] & ((drawn != 0) | earlier_or_same)
            peak, total, acc = _attend(q, k, v, visible, peak, total, acc, SCALE)

        own = first + tl.arange(0, triton.next_power_of_2(TOKENS))
        mine = ((own < first + TOKENS) & (own < count))[:, None]
        source = (((begin + own).to(tl.int64) * kv_heads + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
        row = past + earlier + own
        block = tl.load(table + row // BLOCK, mask=own < count, other=0)
        block = _within(block, 0, num_blocks - 1).to(tl.int64)
        at = (((block * kv_heads + kv_head) * BLOCK + row % BLOCK) * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(key_cache + at, tl.load(key + source, mask=mine), mask=mine)
        tl.store(value_cache + at, tl.load(value + source, mask=mine), mask=mine)

    mean = acc / tl.where(total > 0, total, 1.0)[:, None]
    if seen_past <= span:
        tl.store(output + query_row[:, None] * HEAD_DIM + dims[None, :], mean.to(q.dtype), mask=live[:, None])
    else:
        part = query_row * num_splits + split
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mean, mask=live[:, None])
        tl.store(partial_lse + part, peak + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=(*_METADATA, "num_splits"), do_not_specialize_on_alignment=(*_METADATA, "num_splits"))
def combine(
    past_lens, seq_begins, block_begins, partial, partial_lse,
    num_requests, wanted_splits, num_entries, num_splits, output,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, MAX_SPLITS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query token and head. Grid: (N, Hq). A request of one split is left as it is."""
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(seq_begins + num_requests):
        return
    request = tl.maximum(_request_of(token, seq_begins, num_requests, 1, 0), 0)
    num_tokens = tl.num_programs(0)
    _, _, _, past = _extent(request, past_lens, seq_begins, block_begins, num_tokens, num_entries, BLOCK)
    past -= _unseen(past, WINDOW)
    span = _split_span(past, block_begins, num_requests, num_entries, wanted_splits, num_splits, BLOCK, WINDOW)
    if past <= span:
        return
    row = token.to(tl.int64) * tl.num_programs(1) + head
    splits, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, HEAD_DIM)
    used = splits * span < past
    lse = tl.load(partial_lse + row * num_splits + splits, mask=used, other=float("-inf"))
    weights = tl.exp2(lse - _max(lse, 0))
    at = (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    means = tl.load(partial + at, mask=used[:, None], other=0.0)
    merged = _sum(means * weights[:, None], 0) / _sum(weights, 0)
    tl.store(output + row * HEAD_DIM + dims, merged.to(output.dtype.element_ty))


_ROWS = ("source_rows", "target_rows", "kv_heads", "num_blocks")


@triton.jit(do_not_specialize=_ROWS, do_not_specialize_on_alignment=_ROWS)
def copy_rows(
    source, target, source_rows, target_rows, kv_heads, num_blocks,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Copy one KV row, all heads, of one pool. Grid: (m, pools).

    GATHER copies row source_rows[j] of the pools ``source`` [pools, num_blocks, Hk, BLOCK, D] to ``target``
    [pools, m, Hk, D]; otherwise such a ``source`` is copied to rows target_rows[j] of the pools ``target``.
    """
    STEP: tl.constexpr = 1024
    j, pool = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load((source_rows if GATHER else target_rows) + j).to(tl.int64)
    paged = ((pool * num_blocks + row // BLOCK) * kv_heads * BLOCK + row % BLOCK) * HEAD_DIM
    dense = (pool * tl.num_programs(0) + j) * kv_heads * HEAD_DIM
    for start in range(0, kv_heads * HEAD_DIM, STEP):
        i = start + tl.arange(0, STEP)
        inside = i < kv_heads * HEAD_DIM
        in_pool = paged + i // HEAD_DIM * (BLOCK * HEAD_DIM) + i % HEAD_DIM
        in_dense = dense + i
        if GATHER:
            tl.store(target + in_dense, tl.load(source + in_pool, mask=inside), mask=inside)
        else:
            tl.store(target + in_pool, tl.load(source + in_dense, mask=inside), mask=inside)
