"""Sampling (``echo_trt.speculation.sampling``) as Triton kernels: penalties; limits and the race in one kernel.

A row's draw is a program's work, which reads the row a few times and keeps nothing of it in memory.

1. The k-th largest logit is searched for from the k-th largest of the lanes' maxima, which k or more tokens reach.
2. Tokens from there on race. Arrivals are bounded from above in float32; the few that may win arrive in float64.
3. A winner beyond top-k or the nucleus is shut out with all tokens that rank behind it, and the race is run again.
   The first one within the limits is who wins among the tokens within them, and no nucleus has to be found.
"""

from __future__ import annotations

import triton
import triton.language as tl

_CALLS = tl.constexpr(128)  # of Philox, for a block of tokens (speculation.sampling.draw)
_MAX_NOISE = tl.constexpr(37.0)
_ROUNDING = tl.constexpr(1e-3)  # above the error of an arrival in float32; larger: more float64
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _sum(x):
    return tl.reduce(x, None, tl.standard._sum_combine)


@triton.jit
def _max(x):
    return tl.reduce(x, None, tl.standard._elementwise_max)


@triton.jit
def _min(x):
    return tl.reduce(x, None, tl.standard._elementwise_min)


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
def _noise(seed, position, calls, half: tl.constexpr):
    """Return the four words of Philox's ``calls`` uint32 [n]; ``half`` says which part of a number they are."""
    zero = calls * 0
    low, high = zero + (position & 0xFFFFFFFF).to(tl.uint32), zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key0, key1 = zero + (seed & 0xFFFFFFFF).to(tl.uint32), zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _philox(key0, key1, low, high, calls, zero + half)


@triton.jit
def _word(index, w0, w1, w2, w3):
    return tl.where(index == 0, w0, tl.where(index == 1, w1, tl.where(index == 2, w2, w3)))


@triton.jit
def _arrival(lead, seed, position, token):
    """Compute when a token of ``lead`` float64 arrives, in float64, as ``speculation.sampling.draw`` does."""
    calls = tl.full([1], 0, tl.uint32) + (token // (4 * _CALLS) * _CALLS + token % _CALLS).to(tl.uint32)
    index = token // _CALLS % 4
    a0, a1, a2, a3 = _noise(seed, position, calls, 0)
    b0, b1, b2, b3 = _noise(seed, position, calls, 1)
    number = (_word(index, a0, a1, a2, a3).to(tl.int64) << 20) | (_word(index, b0, b1, b2, b3).to(tl.int64) >> 12)
    v = (number.to(tl.float64) + 0.5) * (1.0 / 4503599627370496.0)  # 2^-52
    # -log(1 - v), whose subtraction loses the bits of a small v
    exponential = tl.where(v < 1e-6, v + v * v * (0.5 + v * (1.0 / 3.0)), -tl.log(1.0 - v))
    return _max(lead - tl.log(exponential))


@triton.jit
def _key(x):
    """Map float32 to int32 in the same order; keys to bits of float32."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight(key, peak, heat):
    """Return the weight, float64, of a token whose logit has ``key`` int32."""
    return tl.exp((_key(key).to(tl.float32, bitcast=True) - peak) / heat).to(tl.float64)


@triton.jit
def _tile(logits, masks, begin, size, MASKED: tl.constexpr, LANES: tl.constexpr):
    """Read 4 * LANES tokens from ``begin`` on: their ids and logits, int32 and float32 [4, LANES]."""
    lanes, words = tl.arange(0, LANES)[None, :], tl.arange(0, 4)[:, None]
    token = begin + lanes // _CALLS * (4 * _CALLS) + words * _CALLS + lanes % _CALLS
    x = tl.load(logits + token, mask=token < size, other=float("-inf")).to(tl.float32)
    if MASKED:
        allowed = tl.load(masks + token // 8, mask=token < size, other=0).to(tl.int32)
        x = tl.where((allowed >> (token % 8)) & 1 != 0, x, float("-inf"))
    return token, x + 0.0  # of -0.0 and 0.0 none is larger


@triton.jit
def _rank(logits, masks, size, peak, heat, floor, at, last, MASKED: tl.constexpr, LANES: tl.constexpr):
    """Count and weigh tokens with keys above ``at`` int32, and count those with this key whose ids are below ``last``.

    Returns both counts, the weight float64, and the next keys from ``floor`` on above and below ``at``.
    """
    above, equal = tl.full([4, LANES], 0, tl.int32), tl.full([4, LANES], 0, tl.int32)
    up, down = tl.full([4, LANES], 0x7FFFFFFF, tl.int32), tl.full([4, LANES], -0x80000000, tl.int32)
    mass = tl.full([4, LANES], 0.0, tl.float64)
    for begin in range(0, size, 4 * LANES):
        token, x = _tile(logits, masks, begin, size, MASKED, LANES)
        key = _key(x)
        higher = key > at
        equal += ((key == at) & (token < last)).to(tl.int32)
        down = tl.maximum(down, tl.where((key < at) & (key >= floor), key, -0x80000000))
        if _max(key) > at:
            above += higher.to(tl.int32)
            up = tl.minimum(up, tl.where(higher, key, 0x7FFFFFFF))
            mass += tl.where(higher, tl.exp((x - peak) / heat), 0.0).to(tl.float64)
    return _sum(above), _sum(equal), _sum(mass), _min(up), _max(down)


@triton.jit
def _race(
    logits, masks, size, peak, inverse, seed, position, best, floor, at, last,
    MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Find who arrives first among tokens with keys from ``floor`` on that rank before token ``last`` of key ``at``.

    ``best`` is the token of the largest logit, which ranks before all others.
    """
    first = _arrival(0.0, seed, position, best)
    top = _key(peak)
    for begin in range(0, size, 4 * LANES):
        token, x = _tile(logits, masks, begin, size, MASKED, LANES)
        key = _key(x)
        lead = (x - peak) * inverse.to(tl.float32)
        runs = (key >= floor) & ((key > at) | ((key == at) & (token < last)))
        runs &= (lead + _MAX_NOISE > first.to(tl.float32)) & (token < size)
        if _max(runs.to(tl.int32)) > 0:
            calls = (begin // 4 + tl.arange(0, LANES)).to(tl.uint32)
            w0, w1, w2, w3 = _noise(seed, position, calls, 0)
            number = _word(tl.arange(0, 4)[:, None], w0[None, :], w1[None, :], w2[None, :], w3[None, :])
            v = number.to(tl.float32) * (1.0 / 4294967296.0)  # rounded down: the token's number
            rest = ((0xFFFFFFFF - number).to(tl.float32) + 1.0) * (1.0 / 4294967296.0)
            exponential = tl.where(v < 0.01, v + v * v * (0.5 + v * (1.0 / 3.0)), -tl.log(rest))
            bound = (
                tl.where(exponential > 0, lead - tl.log(tl.where(exponential > 0, exponential, 1.0)), float("inf"))
                + _ROUNDING
            )
            bound = tl.where(runs, bound, float("-inf"))
            highest = _max(bound)
            while (highest >= first.to(tl.float32)) & (highest > float("-inf")):
                one = _min(tl.where(bound == highest, token, _LAST))
                own = _max(tl.where(token == one, x, float("-inf")))
                arrival = _arrival((own.to(tl.float64) - peak.to(tl.float64)) * inverse, seed, position, one)
                ahead = (arrival > first) | ((arrival == first) & (one < best))
                best, first = tl.where(ahead, one, best), tl.where(ahead, arrival, first)
                top = tl.where(ahead, _key(own), top)
                bound = tl.where(token == one, float("-inf"), bound)
                highest = _max(bound)
    return best, top


@triton.jit
def _threshold(
    logits, masks, size, peak, heat, minimum, maxima, top_k,
    MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the key of the top_k-th largest logit, or ``minimum`` int32 if larger, and the weight of so many tokens.

    maxima  int32 [4, LANES], keys of the lanes' largest logits
    """
    low, high = tl.full([], -0x80000000, tl.int64), _key(peak).to(tl.int64)
    end = high
    if top_k <= 4 * LANES:
        while low < end:
            middle = (low + end + 1) >> 1
            enough = _sum((maxima >= middle.to(tl.int32)).to(tl.int32)) >= top_k
            low, end = tl.where(enough, middle, low), tl.where(enough, end, middle - 1)
    low = tl.maximum(low, minimum.to(tl.int64))
    key, first = low.to(tl.int32), low.to(tl.int32)
    above, equal, mass, up, down = _rank(logits, masks, size, peak, heat, first, key, _LAST, MASKED, LANES)
    # There may be fewer tokens from the first key on only where min-p has shut out the rest.
    while (above >= top_k) | ((above + equal < top_k) & (key > first)):
        low, high = tl.where(above >= top_k, up, low), tl.where(above >= top_k, high, down)
        key = ((low + high) >> 1).to(tl.int32)
        above, equal, mass, up, down = _rank(logits, masks, size, peak, heat, first, key, _LAST, MASKED, LANES)
    return key, mass + tl.minimum(top_k - above, equal).to(tl.float64) * _weight(key, peak, heat)


_FACTS = ("size", "mask_size")
_ROWS = ("row", "index", "parent", "drafted", "inverse", "heat", "gap", "top_k", "top_p", "seed", "position")


@triton.jit(do_not_specialize=_FACTS, do_not_specialize_on_alignment=(*_FACTS, *_ROWS))
def sample(
    logits, masks, row, index, parent, drafted, inverse, heat, gap, top_k, top_p, seed, position, tokens,
    size, mask_size, MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Choose a node's token as ``speculation.sampling.draw.sample`` does. Grid: (n); LANES is a multiple of 128.

    logits           float [m, size]; masks uint8 [n, mask_size], of allowed tokens, where MASKED
    row, index       int64 [n]: a node's row of logits, and its index of ``tokens``
    parent, drafted  int64 [n]: a node's parent, an index of ``tokens`` or -1, and the node's own token; where another
                     one was chosen at the parent, the node cannot be visited and is left out
    inverse          float64 [n], 1 / temperature; 0: the best token is chosen
    heat, gap        float32 [n]: the temperature, and how far below the best a logit may be by min-p, -inf: any
    top_k            int64 [n], from 1 to ``size``, or more: all, for which no threshold is searched; top_p float64 [n]
    seed, position   int64 [n]
    tokens           int64 [N], written; -1 where nothing is chosen yet, and -2 where a node is left out
    """
    node = tl.program_id(0)
    own, above = tl.load(index + node), tl.load(parent + node)
    # Programs of one launch begin in order, parents first, and none waits: a parent may have no token yet.
    chosen = tl.load(tokens + tl.maximum(above, 0), volatile=True)
    if (above >= 0) & (chosen != -1) & (chosen != tl.load(drafted + node)):
        tl.store(tokens + own, tl.full([], -2, tl.int64))
        return
    logits += tl.load(row + node) * size
    masks += node.to(tl.int64) * mask_size
    maxima = tl.full([4, LANES], float("-inf"), tl.float32)
    owner, x = _tile(logits, masks, 0, 0, False, LANES)
    for begin in range(0, size, 4 * LANES):
        token, x = _tile(logits, masks, begin, size, MASKED, LANES)
        owner = tl.where(x > maxima, token, owner)
        maxima = tl.maximum(maxima, x)
    peak = _max(maxima)
    best = _min(tl.where(maxima == peak, owner, _LAST))
    winner = best
    scale, kept, share = tl.load(inverse + node), tl.load(top_k + node), tl.load(top_p + node)
    if (scale > 0) & (peak > float("-inf")):
        warmth, key, number = tl.load(heat + node), tl.load(seed + node), tl.load(position + node)
        floor = _key(peak + tl.load(gap + node))
        limited, total = (kept < size) | (share < 1), tl.full([], 0.0, tl.float64)
        if limited:
            floor, total = _threshold(logits, masks, size, peak, warmth, floor, _key(maxima), kept, MASKED, LANES)
        at, last, inside = tl.full([], -0x80000000, tl.int32), tl.full([], 0x7FFFFFFF, tl.int32), scale < 0
        while not inside:
            winner, at = _race(
                logits, masks, size, peak, scale, key, number, best, floor, at, last, MASKED, LANES
            )  # fmt: skip
            last, inside = winner, winner == best
            if limited & (winner != best):
                ahead, same, mass, _up, _down = _rank(logits, masks, size, peak, warmth, floor, at, last, MASKED, LANES)
                mass += same.to(tl.float64) * _weight(at, peak, warmth)
                inside = (ahead + same < kept) & ((share >= 1) | (mass < share * total))
            inside |= limited == 0
    tl.store(tokens + own, winner.to(tl.int64))


_ENTRIES = ("count", "size")


@triton.jit(do_not_specialize=_ENTRIES, do_not_specialize_on_alignment=(*_ENTRIES, "row", "token", "amount"))
def add_at(target, row, token, amount, count, size, BLOCK: tl.constexpr):
    """Add ``amount`` [count] to target[row, token], [m, size]; row and token int64 [count], in any order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    at = tl.load(row + i, mask=inside, other=0) * size + tl.load(token + i, mask=inside, other=0)
    tl.atomic_add(target + at, tl.load(amount + i, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=_ENTRIES, do_not_specialize_on_alignment=(*_ENTRIES, "row", "token", "rows"))
def penalise(
    logits, rows, out, row, token, times, repetition, presence, frequency, count, size, BLOCK: tl.constexpr
):  # fmt: skip
    """Penalise as ``speculation.sampling.penalties`` does: write logits[rows[row], token] to out[row, token].

    An entry [count] may stand there twice. times int32 like ``out``: how often a token was generated before.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    own = tl.load(row + i, mask=inside, other=0)
    word = tl.load(token + i, mask=inside, other=0)
    value = tl.load(logits + tl.load(rows + own) * size + word, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    factor = tl.maximum(tl.load(repetition + own), 1e-6)
    value = tl.where(value > 0, value / factor, value * factor).to(tl.float32).to(tl.float64)  # x / 1 is x
    count_of = tl.load(times + own * size + word, mask=inside, other=0).to(tl.float64)
    less = tl.where(count_of > 0, tl.load(presence + own) + tl.load(frequency + own) * count_of, 0.0)
    tl.store(out + own * size + word, (value - less).to(tl.float32), mask=inside)
