"""Which levels to draft: values expansion sizes, before the children are known.

The calibration knows how children's values are distributed. Forecast and present candidates make a histogram, over
which the best number of nodes to verify is searched: for every expansion size, one or more levels ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.goodput.model.iteration import IterationModel
from echo_trt.speculation.goodput.optimiser.candidates import Candidates

BINS = 64  # of a histogram over values, the best first; larger: finer, and slower


@dataclass(frozen=True)
class LevelSearch:
    """Draft levels of one iteration, weighed against each other.

    candidates    nodes that may be verified, so far
    verification  float64 [n], additional seconds of verifying 0, 1, ..., n - 1 nodes
    time_price    tokens that a second is worth
    """

    model: IterationModel
    candidates: Candidates
    verification: np.ndarray
    time_price: float

    def requests_to_draft(self, looks_ahead: bool) -> tuple[np.ndarray, int]:
        """Return the requests to draft for, int64 [A], ascending, and the levels to draft below the roots' children.

        Levels below are chosen beforehand where the draft ``looks_ahead`` (``Draft.look_ahead``).
        """
        model, load = self.model, self.model.load
        open_ = np.flatnonzero(load.max_draft_len > 0)
        value = self.candidates.weights[open_]
        best = np.argsort(-value, kind="stable")
        # A catch-up of more than a few tokens, of a prompt for instance, is paid over the iterations that it serves: a
        # request writes some eight tokens for an iteration that drafts for it.
        draft_lag, serves = (
            load.draft_lag[open_],
            np.clip(load.max_draft_len[open_] / 8, 1, model.settings.tuning.catch_up_iterations),
        )
        in_step = np.minimum(draft_lag, 8)
        entries = np.cumsum((in_step + (draft_lag - in_step) / serves + model.block)[best])
        if looks_ahead:
            count, levels = self._worth_looking_ahead(value[best], entries)
        else:
            count, levels = self.worth_expanding(value[best], 0, entries), 0
        return np.sort(open_[best[:count]]), levels

    def worth_expanding(self, frontier: np.ndarray, depth: int, entries: np.ndarray) -> int:
        """Return the number of frontier nodes to expand; 0 stops drafting.

        frontier float64 [F]: values in tokens, best first. entries float64 [F]: tokens of the draft pass that expands
        the first 1, 2, ... nodes.
        """
        model = self.model
        forecast = model.forecast(model.settings.max_depth if model.block else model.settings.tuning.horizon)
        if depth >= len(forecast.child_shares):
            return 0
        seconds = model.draft_passes(entries, expansion_sizes(len(frontier))) + model.level_seconds
        levels = forecast.child_shares[depth], forecast.added_tokens[depth]
        return self._best_expansion(frontier, depth, seconds, levels, model.block > 0)[0]

    def _worth_looking_ahead(self, frontier: np.ndarray, entries: np.ndarray) -> tuple[int, int]:
        """Return the number of requests to draft for, and levels below the roots' children to draft with them.

        frontier, entries  as of ``worth_expanding``, of the roots
        """
        settings, ends = self.model.settings, expansion_sizes(len(frontier))
        forecast = self.model.forecast(settings.max_depth)
        seconds, best = np.zeros(len(ends)), (0, 0.0, 0)
        for level in range(len(forecast.child_shares[0])):
            rows = settings.level_rows(np.arange(1, len(frontier) + 1)).astype(np.float64)
            seconds = seconds + self.model.draft_passes(rows if level else entries, ends) + self.model.level_seconds
            levels = forecast.child_shares[0][: level + 1], forecast.added_tokens[0][: level + 1]
            count, net = self._best_expansion(frontier, 0, seconds, levels, True)
            if net > best[1]:
                best = count, net, level
        return best[0], best[2]

    def _best_expansion(
        self,
        frontier: np.ndarray,
        depth: int,
        seconds: np.ndarray,
        levels: tuple[np.ndarray, np.ndarray],
        one_pass: bool,
    ) -> tuple[int, float]:
        """See ``best_expansion``; ``seconds``: of a level, or of all, planning included."""
        candidates, time_price = self.candidates, self.time_price
        continued = candidates.continuations()
        count, net = best_expansion(
            frontier,
            expansion_sizes(len(frontier)),
            time_price * seconds,
            time_price * self.model.costs.cold if depth == 0 else 0.0,
            *levels,
            candidates.value[candidates.tree.num_requests :],
            continued.probability * candidates.weights[continued.request],
            candidates.tree.depth[continued.above] == depth,
            time_price * self.verification,
            one_pass,
        )
        return int(count), float(net)


@cache
def expansion_sizes(count: int) -> np.ndarray:
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
    maximum = len(verification) - 1
    count, total = 0.0, 0.0
    best: float = -verification[0]
    for cell in range(BINS):
        number, value = histogram[0, cell], histogram[1, cell]
        if count + number >= maximum:  # up to the last size with a known price
            share = (maximum - count) / number if number > 0 else 0.0
            best = max(best, total + share * value - verification[maximum])
            break
        count += number
        total += value
        low = int(count)
        cost = verification[low] + (count - low) * (verification[low + 1] - verification[low])
        best = max(best, total - cost)
    return best


@compiled()
def _predict(predicted: np.ndarray, parents: np.ndarray, children: np.ndarray) -> None:
    """Add to ``predicted`` float64 [levels, 2, BINS] the expected descendants of ``parents`` float64 [m], best first.

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
                _add(predicted[level], min(value * share, 1.0), number)
        begin = end


@compiled(
    "Tuple((i8, f8))(f8[::1], i8[::1], f8[::1], f8, f8[:, :, ::1], f8[::1], f8[::1], f8[::1], b1[::1], f8[::1], b1)"
)
def best_expansion(
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
    ends          int64 [P], expansion sizes, ascending
    level_price   [P], price of a draft level of an expansion size
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
    drafted, predicted = np.zeros((2, BINS)), np.zeros((len(children), 2, BINS))
    for value in known:
        _add(drafted, value, 1.0)
    undrafted = drafted.copy()
    for node in range(len(continued)):
        _add(undrafted, continued[node], 1.0)
        # A continuation of an expanded leaf moves under its new children. It then holds only if a child is accepted.
        _add(drafted, continued[node] * added_tokens[0] if below_level[node] else continued[node], 1.0)
    net_undrafted = _best_value(undrafted, verification)
    best_net, best_end, begin, expanded = 0.0, 0, 0, 0.0
    for expansion_size in range(len(ends)):
        end = ends[expansion_size]
        expanded += frontier[begin:end].sum()
        _predict(predicted, frontier[begin:end], children)
        begin, grown = end, drafted.copy()
        for depth in range(len(children)):
            grown += predicted[depth]
            cost = level_price[expansion_size] * (1 if one_pass else depth + 1) + first_price
            if expanded * added_tokens[depth] > cost:  # else it does not pay even if verification were free
                net = _best_value(grown, verification) - net_undrafted - cost
                if net > best_net:
                    best_net, best_end = net, end
    return best_end, best_net
