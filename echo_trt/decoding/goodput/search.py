"""What expanding a part of the frontier would be worth, before its children are known.

The calibration knows how children's values are distributed. Those foreseen and those that there are make a histogram,
over which the best number of nodes to verify is searched: for each portion of the frontier, one or two levels ahead.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from echo_trt.decoding.arrays import compiled

BINS = 64  # of a histogram over values, the best first


@cache
def portions(count: int) -> np.ndarray:
    """The sizes to which a set of ``count`` grows, 1, 2, 4, ... or, if it is large, 1, 4, 16, ..., and all: int64."""
    factor = 2 if count <= 16 else 4
    return np.append(factor ** np.arange(np.ceil(np.log(count) / np.log(factor) - 1e-9)), count).astype(np.int64)


@compiled()
def _add(histogram: np.ndarray, value: float, number: float) -> None:
    """Count ``number`` nodes of ``value`` in: histogram [2, BINS], numbers and sums of values."""
    cell = int((1.0 - min(value, 1.0)) * (BINS - 1e-6))
    histogram[0, cell] += number
    histogram[1, cell] += number * value


@compiled()
def _best_value(histogram: np.ndarray, verification: np.ndarray) -> float:
    """The most that verifying the best of these nodes, any number that has a price, is worth."""
    most = len(verification) - 1
    count, total = 0.0, 0.0
    best: float = -verification[0]
    for cell in range(BINS):
        number, value = histogram[0, cell], histogram[1, cell]
        if count + number >= most:  # as many of them as have one
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
def _foresee(more: np.ndarray, parents: np.ndarray, children: np.ndarray) -> None:
    """Add to ``more`` [levels, 2, BINS] what expanding ``parents``, best first, is expected to bring.

    Of more than BINS those of one bin are taken together: of a large batch's values there are few.
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
                _add(more[level], min(value * share, 1.0), number)
        begin = end


@compiled("i8(f8[::1], i8[::1], f8[::1], f8, f8[:, :, ::1], f8[::1], f8[::1], f8[::1], b1[::1], f8[::1])")
def best_portion(
    frontier: np.ndarray,
    ends: np.ndarray,
    level: np.ndarray,
    first: float,
    children: np.ndarray,
    brought: np.ndarray,
    known: np.ndarray,
    going_on: np.ndarray,
    moved: np.ndarray,
    verification: np.ndarray,
) -> int:
    """Of ``ends`` [P], the number of the frontier's best to expand; 0 if none pays. All values in tokens.

    frontier [F]: values, best first; level [P]: the price of a draft level over each portion, and ``first`` once;
    children [levels, w, quantiles] and brought [levels] as in ``Acceptance``; known [n]: values of the candidates that
    there are; going_on [m]: of those that n-grams put under them, of which the ``moved`` [m], bool, would stand under a
    level's children; verification: the price of 0, 1, ... nodes, as far as they can pay. ``ends`` int64, else float64.
    """
    plan, more = np.zeros((2, BINS)), np.zeros((len(children), 2, BINS))
    for value in known:
        _add(plan, value, 1.0)
    now = plan.copy()
    for node in range(len(going_on)):
        _add(now, going_on[node], 1.0)
        # Under children they go on as well as under what is expanded, as far as those are right.
        _add(plan, going_on[node] * brought[0] if moved[node] else going_on[node], 1.0)
    before = _best_value(now, verification)
    best, choice, begin, total = 0.0, 0, 0, 0.0
    for portion in range(len(ends)):
        end = ends[portion]
        total += frontier[begin:end].sum()
        _foresee(more, frontier[begin:end], children)
        begin, grown = end, plan.copy()
        for depth in range(len(children)):
            grown += more[depth]
            cost = level[portion] * (depth + 1) + first
            if total * brought[depth] > cost:  # else it does not pay even if verification were free
                net = _best_value(grown, verification) - before - cost
                if net > best:
                    best, choice = net, end
    return choice
