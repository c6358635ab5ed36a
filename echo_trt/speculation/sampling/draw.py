"""Seeded sampling: an exponential race whose noise is a function of (seed, position in the text, token) alone.

A token of weight w = exp(logit / temperature) arrives after E / w, where E is exponential noise of the token's own. The
first to arrive is an exact draw (the Gumbel-max trick: argmax of log w - log E). The noise does not depend on batch,
tree or policy, so a seed gives one text wherever logits are the same. Where they differ by rounding, a draw changes
only if two arrivals are within that rounding; inverting the cumulative distribution would move every boundary behind a
token.

The noise is Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator: it is keyed by the seed, and it counts
positions and tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.sampling.logprobs import reached
from echo_trt.speculation.sampling.penalties import penalise

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_FIRST_HALF, _SECOND_HALF = np.uint64(0), np.uint64(1)
_SHORT, _LONG = np.uint64(12), np.uint64(20)  # 64 bits of noise less 12 are 32 bits and 20 more

#: Calls of Philox that are made at once: more fill the vector unit better, fewer are wasted less often.
CALLS = 128
BLOCK = 4 * CALLS  # tokens that they make noise for
_MAX_NOISE = 37.0  # above -log E of any E: that of the smallest, 2^-53, is 36.74
GREEDY = 1e-6  # temperatures up to it are greedy: they would blow rounding up to the noise; larger: more are greedy
_BINS = 2048  # of a weight's first 13 bits, as far as they occur: those of 1.0 are 2032


@compiled("u8[:, ::1](u8[:, ::1], u8)")
def philox4x32(counter: np.ndarray, key: np.uint64) -> np.ndarray:
    """Ten rounds of Philox.

    counter  uint64 [4, n], 32 bits each; overwritten
    key      64 bits, its low word first
    returns  ``counter``, now random bits
    """
    key0, key1 = key & _LOW, key >> _WORD
    for _ in range(10):
        for i in range(counter.shape[1]):
            product0, product1 = _MULTIPLIERS[0] * counter[0, i], _MULTIPLIERS[1] * counter[2, i]
            counter[0, i] = (product1 >> _WORD) ^ counter[1, i] ^ key0
            counter[1, i] = product1 & _LOW
            counter[2, i] = (product0 >> _WORD) ^ counter[3, i] ^ key1
            counter[3, i] = product0 & _LOW
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return counter


@compiled("u8[:, ::1](u8, u8, i8, i8, u8)")
def _noise(seed: np.uint64, position: np.uint64, first: int, calls: int, half: np.uint64) -> np.ndarray:
    """Make noise by ``calls`` calls of Philox from number ``first`` on: uint64 [4, calls], 32 bits each.

    In a block of tokens, token w * CALLS + i reads word w of call i. ``half`` says which part of a number it is.
    """
    counter = np.empty((4, calls), np.uint64)
    for i in range(calls):
        counter[0, i] = position & _LOW
        counter[1, i] = position >> _WORD
        counter[2, i] = np.uint64(first + i)
        counter[3, i] = half
    return philox4x32(counter, seed)


@compiled("f8(u8, u8, i8)")
def uniform(seed: np.uint64, position: np.uint64, token: int) -> float:
    """Draw the number of (seed, position, token) in (0, 1): a multiple of 2^-52, plus 2^-53."""
    call, word = token // BLOCK * CALLS + token % CALLS, token // CALLS % 4
    high = _noise(seed, position, call, 1, _FIRST_HALF)[word, 0]
    low = _noise(seed, position, call, 1, _SECOND_HALF)[word, 0]
    return float((np.float64((high << _LONG) | (low >> _SHORT)) + 0.5) * 2.0**-52)


def sample(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
    min_p: np.ndarray | None = None,
) -> np.ndarray:
    """Choose a token per row: the argmax at temperature 0, else a draw among the tokens that ``limited`` keeps.

    logits       float [n, V]
    temperature  float [n], 0 is greedy
    top_k        int [n], 0 is off
    top_p        float [n], 1 is off
    seed         int [n]
    position     int [n], of the token in its text, prompt included
    min_p        float [n], 0 is off
    returns      int64 [n]
    """
    tokens: np.ndarray = logits.argmax(axis=1)
    drawn = np.flatnonzero((temperature > GREEDY) & (top_k != 1))
    if len(drawn) == 0:
        return tokens
    rows = np.require(logits if len(drawn) == len(logits) else logits[drawn], np.float32, ["C", "W"])
    seeds, positions = seed[drawn].astype(np.uint64), position[drawn].astype(np.uint64)
    for i, (row, key, counter) in enumerate(zip(rows, seeds, positions, strict=True)):
        n = drawn[i]
        running = limited(row, temperature[n], top_k[n], top_p[n], 0.0 if min_p is None else min_p[n])
        tokens[n] = _race(running, temperature[n], tokens[n], key, counter)
    return tokens


def limited(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """Exclude tokens by the distribution at ``temperature``, in this order.

    min_p (arXiv 2407.01082): those whose share is below min_p times the best one's; top_k: those beyond the top_k best;
    top_p: those beyond the nucleus, the fewest that weigh top_p of what is left. Of tokens that tie at a limit the
    lowest ids are kept, so top_k tokens are no more than that.

    logits   float32 [V]
    returns  float32 [V], -inf for tokens that are out
    """
    if min_p > 0:
        minimum = logits.max() + np.float32(temperature * math.log(min_p))
        logits = np.where(logits < minimum, np.float32(-np.inf), logits)
    size = len(logits)
    shortened = 0 < top_k < size
    if not shortened and top_p >= 1:
        return logits
    tokens = _largest(logits, top_k) if shortened else None
    if top_p < 1:
        values = logits if tokens is None else logits[tokens]
        weights = np.exp((values - values.max()) / np.float32(temperature))
        nucleus = _largest(values, _nucleus_size(weights, top_p))
        tokens = nucleus if tokens is None else tokens[nucleus]
    kept = np.full(size, -np.inf, np.float32)
    kept[tokens] = logits[tokens]
    return kept


@compiled("i8(f4[::1], f8)")
def _nucleus_size(weights: np.ndarray, top_p: float) -> int:
    """Count the fewest of ``weights``, float32 [m] up to 1, that weigh the share top_p of all together; at least 1."""
    # A histogram by the first 13 bits, which ascend with the weight, so that only one bin need be sorted.
    bins = np.minimum(weights.view(np.uint32) >> np.uint32(19), np.uint32(_BINS - 1))
    mass, size = np.zeros(_BINS), np.zeros(_BINS, np.int64)
    for i in range(len(weights)):
        mass[bins[i]] += weights[i]
        size[bins[i]] += 1
    enough, above, count, edge = top_p * mass.sum(), 0.0, 0, _BINS - 1
    while edge > 0 and above + mass[edge] < enough:
        above += mass[edge]
        count += size[edge]
        edge -= 1
    for weight in np.sort(weights[bins == edge])[::-1]:
        if above >= enough:
            break
        above += weight
        count += 1
    return max(count, 1)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Find the ``count`` largest of ``values`` [m], the first ones of those that tie: indices, ascending."""
    pool = values[~(values < reached(values[None], count))]  # so put, NaN is kept
    last = np.partition(pool, -count)[-count]
    found = np.flatnonzero(~(values < last))
    surplus = len(found) - count
    return np.delete(found, np.flatnonzero(values[found] == last)[-surplus:]) if surplus > 0 else found


@compiled()
def _may_win(deficit: np.float64, high: np.uint64) -> np.bool_:
    """Test without a logarithm whether a token can arrive first. False is always right, True seldom.

    deficit  what -log E must exceed for that, above -64
    high     the first 32 bits of the token's number v
    """
    # It must be that v < E < exp(-deficit), and (1 + x / 64)^64 is below exp(x).
    power = 1.0 + deficit / 64
    power *= power
    power *= power
    power *= power
    power *= power
    power *= power
    power *= power
    return power * (np.float64(high) + 2.0**-21) < 2.0**32 * (1 + 1e-9)


@compiled("i8(f4[::1], f8, i8, u8, u8)")
def _race(logits: np.ndarray, temperature: float, best: int, seed: np.uint64, position: np.uint64) -> int:
    """Find the argmax of (logit - largest logit) / temperature - log E, E = -log(1 - v), over ``logits`` [V].

    ``best`` is the argmax of the logits. A block of tokens is skipped if no token of it can win: without making noise
    if even the largest noise would not suffice, and without a logarithm if the block's own noise does not.
    """
    top, inverse = np.float64(logits[best]), 1 / temperature
    best_arrival = np.float64(-math.log(-math.log1p(-uniform(seed, position, best))))
    for begin in range(0, len(logits), BLOCK):
        block = logits[begin : begin + BLOCK]
        possible = 0
        for i in range(len(block)):
            if (np.float64(block[i]) - top) * inverse > best_arrival - _MAX_NOISE:
                possible += 1
        if possible == 0:
            continue
        high = _noise(seed, position, begin // 4, CALLS, _FIRST_HALF).reshape(BLOCK)
        possible = 0
        for i in range(len(block)):
            if _may_win(best_arrival - (np.float64(block[i]) - top) * inverse, high[i]):
                possible += 1
        if possible == 0:
            continue
        for i in range(len(block)):
            lead = (np.float64(block[i]) - top) * inverse
            if _may_win(best_arrival - lead, high[i]):
                token = begin + i
                arrival = lead - math.log(-math.log1p(-uniform(seed, position, token)))
                if arrival > best_arrival or (arrival == best_arrival and token < best):
                    best_arrival, best = arrival, token
    return best


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters and token history of n rows of logits. Engines that keep logits on a device sample there
    (backends.cuda.choose).

    temperature, top_p, min_p         float64 [n]; top_k, seed, position int64 [n], as of ``draw.sample``
    repetition, presence, frequency   float64 [n], as of ``penalties.penalise``
    history_row, history_token        int64 [k]: tokens that penalties of a row look at; history_generated bool [k]
    logit_bias_row, logit_bias_token  int64 [j], and logit_bias float32 [j]: added to logits; -inf shuts a token out
    masks                             uint8 [n, ceil(V / 8)], of allowed tokens, the first in the lowest bit; None: all
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    history_row: np.ndarray
    history_token: np.ndarray
    history_generated: np.ndarray
    logit_bias_row: np.ndarray
    logit_bias_token: np.ndarray
    logit_bias: np.ndarray
    masks: np.ndarray | None = None


def part_of(choice: SamplingBatch, part: np.ndarray) -> SamplingBatch:
    """Return the choice at rows ``part`` int64 [m], of which none is there twice."""
    index_of = np.full(len(choice.seed), -1)
    index_of[part] = np.arange(len(part))
    values = {field.name: getattr(choice, field.name) for field in fields(choice)}
    for kind in ("history", "logit_bias"):
        row = index_of[values[f"{kind}_row"]]
        inside = row >= 0
        values |= {name: value[inside] for name, value in values.items() if name.startswith(kind)}
        values[f"{kind}_row"] = row[inside]
    values |= {n: v[part] for n, v in values.items() if v is not None and not n.startswith(("history", "logit_bias"))}
    return SamplingBatch(**values)


def choose(logits: np.ndarray, choice: SamplingBatch) -> np.ndarray:
    """Choose a token per row of ``logits`` float [n, V], which stay as they are: int64 [n]."""
    c = choice
    if len(c.history_row) or len(c.logit_bias_row):
        history = c.history_row, c.history_token, c.history_generated
        logits = penalise(logits, *history, c.repetition, c.presence, c.frequency)
        np.add.at(logits, (c.logit_bias_row, c.logit_bias_token), c.logit_bias)  # a stop token may be biased, too
    if c.masks is not None:
        bits = np.unpackbits(c.masks, axis=1, bitorder="little", count=logits.shape[1])
        logits = np.where(bits == 0, np.float32(-np.inf), np.asarray(logits, np.float32))
    return sample(logits, c.temperature, c.top_k, c.top_p, c.seed, c.position, c.min_p)
