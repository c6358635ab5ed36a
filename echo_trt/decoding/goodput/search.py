"""Values portions of the frontier, before their children are known.

The calibration knows how children's values are distributed. Foreseen and present candidates make a histogram, over
which the best number of nodes to verify is searched: for every portion of the frontier, one or two levels ahead.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from echo_trt.decoding.arrays import compiled

BINS = 64  # of a histogram over values, the best first; larger: finer, and slower


@cache
def portions(count: int) -> np.ndarray:
    """Return the sizes tried of ``count`` nodes: 1, 2, 4, ... or, of many, 1, 4, 16, ..., and all: int64."""
    factor = 2 if count <= 16 else 4
    return np.append(factor ** np.arange(np.ceil(np.log(count) / np.log(factor) - 1e-9)), count).astype(np.int64)


@compiled()
def _add(histogram: np.ndarray, value: float, number: float) -> None:
    """Add ``number`` nodes of ``value`` to ``histogram`` float64 [2, BINS]: numbers, and sums of values."""
    cell = int((1.0 - min(value, 1.0)) * (BINS - 1e-6))
    histogram[0, cell] += number
    histogram[1, cell] += number * value


@compiled()
def _best_value(histogram: np.ndarray, verification: np.ndarray) -> float:
    """Return the largest net value over all numbers of verified nodes.

    That is summed node values minus the price of ``verification``, in tokens.
    """
    most = len(verification) - 1
    count, total = 0.0, 0.0
    best: float = -verification[0]
    for cell in range(BINS):
        number, value = histogram[0, cell], histogram[1, cell]
        if count + number >= most:  # as many of them as have a price
            share = (most - count) / number if number > 0 else 0.0
            best = max(best, total + share * value - verification[most])
            break
        count += number
        total += value
        low = int(count)
        price = verification[low] + (count - low) * (verification[low + 1] - verification[low])
        best = max(best, total - price)
    return best


@compiled()
def _foresee(foreseen: np.ndarray, parents: np.ndarray, children: np.ndarray) -> None:
    """Add to ``foreseen`` float64 [levels, 2, BINS] the expected descendants of ``parents`` float64 [m], best first.

    children float64 [levels, width, quantiles], as ``Forecast.child_shares``. With more than BINS parents, the
    parents of one bin share one computation: a large batch has few different values.
    """
    merge, begin = len(parents) > BINS, 0
    while begin < len(parents):
        end = begin + 1
        if merge:
            floor = 1.0 - (int((1.0 - min(parents[begin], 1.0)) * (BINS - 1e-6)) + 1) / (BINS - 1e-6)
            while end < len(parents) and parents[end] > floor:
                end += 1
        value, number = parents[begin:end].mean(), (end - begin) / children.shape[2]
        for level in range(len(children)):
            for share in children[level].flat:
                _add(foreseen[level], min(value * share, 1.0), number)
        begin = end


@compiled(
    "Tuple((i8, f8))(f8[::1], i8[::1], f8[::1], f8, f8[:, :, ::1], f8[::1], f8[::1], f8[::1], b1[::1], f8[::1], b1)"
)
def best_portion(
    frontier: np.ndarray,
    ends: np.ndarray,
    level_price: np.ndarray,
    first_price: float,
    children: np.ndarray,
    added_tokens: np.ndarray,
    known: np.ndarray,
    continued: np.ndarray,
    below_level: np.ndarray,
    verification: np.ndarray,
    one_pass: bool,
) -> tuple[int, float]:
    """Return the number of the frontier's best nodes to expand, one of ``ends`` or 0 if none pays, and its net value.

    All but ``ends`` and ``below_level`` are float64; values and prices are in tokens.

    frontier      [F], values, best first
    ends          int64 [P], portions of the frontier, ascending
    level_price   [P], price of a draft level over a portion
    first_price   additional price of the first level
    children      [levels, width, quantiles], as ``Forecast.child_shares``
    added_tokens  [levels], as ``Forecast.added_tokens``
    known         [n], values of the present candidates
    continued     [m], values of n-gram continuations
    below_level   bool [m], whether the leaf of a continuation is in the frontier
    verification  [nodes + 1], price of verifying 0, 1, ... nodes, as far as they can pay
    one_pass      bool, whether the first level's price buys all levels
    """
    # Histograms: what is known with this draft and without it, and what each level of the draft adds.
    drafted, foreseen = np.zeros((2, BINS)), np.zeros((len(children), 2, BINS))
    for value in known:
        _add(drafted, value, 1.0)
    undrafted = drafted.copy()
    for node in range(len(continued)):
        _add(undrafted, continued[node], 1.0)
        # A continuation of an expanded leaf moves under its new children. It then holds only if a child is accepted.
        _add(drafted, continued[node] * added_tokens[0] if below_level[node] else continued[node], 1.0)
    net_undrafted = _best_value(undrafted, verification)
    best_net, best_end, begin, expanded = 0.0, 0, 0, 0.0
    for portion in range(len(ends)):
        end = ends[portion]
        expanded += frontier[begin:end].sum()
        _foresee(foreseen, frontier[begin:end], children)
        begin, grown = end, drafted.copy()
        for depth in range(len(children)):
            grown += foreseen[depth]
            cost = level_price[portion] * (1 if one_pass else depth + 1) + first_price
            if expanded * added_tokens[depth] > cost:  # else it does not pay even if verification were free
                net = _best_value(grown, verification) - net_undrafted - cost
                if net > best_net:
                    best_net, best_end = net, end
    return best_end, best_net
