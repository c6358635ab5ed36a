"""Draft levels of an EAGLE-3 head in a row, without a return to the host: beams are chosen where their scores are.

A level expands the best new nodes of every request, its beams, by the draft's own path probability. Only they pass
through the head: the KV rows of the nodes above them stay in the cache. On a GPU the levels between two gates are one
CUDA graph. What further levels need stays on the device, so they may run for a part of the requests.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda.calls import MAX_GRAPHS, Graphs, Staging, unowned
from echo_trt.backends.cuda.sizes import Arrays, CallBounds, bucket
from echo_trt.backends.cuda.transfers import fetch
from echo_trt.speculation.pack import ForwardBatch, LevelShape

LevelPass = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]  # to scores, candidates, states

MAX_NODES = 256  # children that a draft may return beside beams; larger: a longer sort, a longer copy if all are wanted


class Beams(NamedTuple):
    """The ``w`` nodes of each of A requests that the next level expands, the best first.

    score   float32 [A, w], log-probabilities of their paths
    token   int64 [A, w]
    number  int64 [A, w], see ``Levels.run``
    state   [A, w, H], the head's states of their parents
    above   uint8 [A, w, n], which of the request's n expanded nodes are their ancestors
    """

    score: Tensor
    token: Tensor
    number: Tensor
    state: Tensor
    above: Tensor


class Children(NamedTuple):
    """All C children that a level drafts for each of A requests, [A, C] each.

    order   float32, the largest are returned to the host: infinite for beams, the score for others
    score, token, parent  log-probabilities of their paths, tokens, and the numbers of their parents
    """

    order: Tensor
    score: Tensor
    token: Tensor
    parent: Tensor


class Levels:
    """The levels of one head's drafts.

    forward  the head, by the inputs of a call
    states   float [any, H], states of the head, whose width and type are taken
    top_k    children of a root
    bounds   the largest calls
    graphs   whether a draft of a shape is captured as a CUDA graph, once for each number of requests
    """

    def __init__(self, forward: LevelPass, states: Tensor, top_k: int, bounds: CallBounds, graphs: bool):
        self._forward, self._bounds, self._top_k = unowned(forward), bounds, top_k
        count, width, device = bounds.requests, states.shape[1], states.device
        self._device = device
        self._root_scores = torch.zeros(count, top_k, device=device)
        self._root_tokens = torch.zeros(count, top_k, dtype=torch.int64, device=device)
        self._root_states = states.new_zeros(count, width)
        # The newest beams, flat, since their number differs from policy to policy.
        size = count * top_k
        self._newest = Beams(
            torch.zeros(size, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
            states.new_zeros(size * width),
            torch.zeros(size * max(bounds.tree, top_k), dtype=torch.uint8, device=device),
        )
        self._sizes = sorted({min(bucket(n), count) for n in range(1, count + 1)})
        self._graphs = Graphs(self._draft, device, sealed=True) if graphs else None  # its captures spoil beams
        self._captured: set[tuple[int, LevelShape]] = set()

    def padded(self, requests: int) -> int:
        """Return the number of requests to which a level's call is padded."""
        return next(size for size in self._sizes if size >= requests) if self._graphs else requests

    def capture(self, shapes: Callable[[int], Collection[LevelShape]]) -> None:
        """Capture the shapes of drafts that the planner asks for; ``shapes`` returns them for a number of requests.

        Other drafts run by plain launches from then on. Beyond the engine's limit of graphs, the smallest batches get
        graphs: launches take a larger share of a small batch's draft.
        """
        if not self._graphs:
            return
        wanted: dict[tuple[int, LevelShape], None] = {}  # in order
        for count in range(1, self._bounds.requests + 1):
            found = ((self.padded(count), shape) for shape in shapes(count) if shape.levels)
            wanted |= dict.fromkeys(each for each in found if each not in self._captured)
        room = MAX_GRAPHS - len(self._captured)
        if len(wanted) > room:
            warnings.warn(
                f"drafts of {[*wanted][room][0]} requests and more run without a CUDA graph: an engine captures "
                f"{MAX_GRAPHS}, and the policy needs {len(wanted) - room} more; lower decoding.max_depth or "
                "limits.batch",
                stacklevel=2,
            )
        self._graphs.sealed = False
        none, begin = np.zeros(0, np.int32), np.zeros(1, np.int32)
        for size, shape in reversed([*wanted][:room]):
            arrays = self._padded({"past_lens": none, "block_begins": begin, "block_indices": none}, none, size)
            self._graphs.run(arrays, self._capacity(size), *shape)
            self._captured.add((size, shape))
        self._graphs.sealed = True

    def begin(self, scores: Tensor, candidates: Tensor, states: Tensor) -> None:
        """Take the roots of A requests: float32 [A, k], log-probabilities of their children, the children int64 [A, k],
        and the roots' states [A, H].
        """
        roots = (self._root_scores, scores), (self._root_tokens, candidates), (self._root_states, states)
        for kept, new in roots:
            kept[: len(new)].copy_(new)

    def run(
        self, below: ForwardBatch, rows: np.ndarray, shape: LevelShape, max_nodes: int, roots: Tensor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draft ``shape.levels`` levels, from the level ``shape.first`` on.

        below      what ``pack_levels`` returns for A requests
        rows       int64 [A], the requests' rows in the previous call: in ``begin``'s, or in the levels above
        max_nodes  children of a request that are returned: the beams of all levels, and the best others
        roots      int32 [A, c], the roots' packed results, which one copy brings to the host with the children

        Returns those results, and int32 [A, 4, m]: m children's numbers, those of their parents, their tokens, and the
        bits of their paths' log-probabilities, float32. Numbers count a request's children in the order in which they
        are drafted, the roots' ``width`` children first.
        """
        parts, count = [] if roots is None else [roots], len(rows)
        if shape.levels:
            found = self._run(below, rows, shape)[:count]
            parts.append(found[:, :, : max(max_nodes, shape.beams * shape.levels)].flatten(1))
        table = fetch(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        columns = 0 if roots is None else roots.shape[1]
        return table[:, :columns], table[:, columns:].reshape(count, 4, -1)

    def _run(self, below: ForwardBatch, rows: np.ndarray, shape: LevelShape) -> Tensor:
        arrays = {name: getattr(below, name) for name in ("past_lens", "block_begins", "block_indices")}
        size = self.padded(len(rows))
        padded = self._padded(arrays, rows, size)
        found = self._graphs.run(padded, self._capacity(size), *shape) if self._graphs else None
        if found is None:
            found = self._draft(Staging(padded, self._device).upload(padded), *shape)
        return found[0]

    def _capacity(self, size: int) -> dict[str, int]:
        blocks = size * self._bounds.blocks
        return {"block_indices": min(blocks, self._bounds.table) if self._bounds.table else blocks}

    @staticmethod
    def _padded(arrays: Arrays, rows: np.ndarray, size: int) -> Arrays:
        """Add requests without tokens behind the ``live`` ones."""
        past, ends = arrays["past_lens"], arrays["block_begins"]
        more = size - len(past)
        return {
            "past_lens": np.concatenate((past, np.zeros(more, past.dtype))),
            "block_begins": np.concatenate((ends, np.full(more, ends[-1]))),
            "block_indices": arrays["block_indices"],
            "rows": np.concatenate((rows, np.zeros(more))).astype(np.int64),
            "live": np.array([len(past)], np.int32),
        }

    def _draft(self, call: dict[str, Tensor], *numbers: int) -> tuple[Tensor, ...]:
        """Draft levels below the newest beams, and keep the last level's. Returns the best children [A, 4, m]."""
        shape = LevelShape(*numbers)
        beams, drafted = self._beams(shape, call["rows"]), []
        for level in range(shape.first, shape.first + shape.levels):
            beams, children = expand(self._forward, call, level, beams, shape.width)
            drafted.append(children)
        for kept, new in zip(self._newest, beams, strict=True):
            kept[: new.numel()].copy_(new.flatten())
        return (best_children(drafted, shape),)

    def _beams(self, shape: LevelShape, rows: Tensor) -> Beams:
        """Return the beams that the level ``shape.first`` expands, of the requests in ``rows`` int64 [A]."""
        requests, width = len(rows), shape.beams
        if shape.first == 1:
            score, token = self._root_scores[rows, :width], self._root_tokens[rows, :width]
            number = torch.arange(width, device=self._device).expand(requests, -1)
            state = self._root_states[rows][:, None].expand(-1, width, -1)
            return Beams(score, token, number, state, self._newest.above.new_zeros(requests, width, 0))
        count, columns = self._bounds.requests, (self._root_states.shape[1], width * (shape.first - 1))
        score, token, number = (part[: count * width].view(count, width)[rows] for part in self._newest[:3])
        state, above = (
            part[: count * width * c].view(count, width, c)[rows]
            for part, c in zip(self._newest[3:], columns, strict=True)
        )
        return Beams(score, token, number, state, above)


def expand(forward: LevelPass, call: dict[str, Tensor], level: int, beams: Beams, width: int) -> tuple[Beams, Children]:
    """Run the ``level``-th level, from 1 on, for ``beams``. Returns the next level's beams, and all children."""
    requests, count = beams.token.shape
    itself = torch.eye(count, dtype=torch.uint8, device=beams.token.device).expand(requests, -1, -1)
    above = torch.cat((beams.above, itself), dim=2)
    inputs = level_call(level, count, call) | {
        "token_ids": beams.token.reshape(-1),
        "hidden": beams.state.reshape(requests * count, -1),
        "tree_mask": above.reshape(-1),
    }
    found, offered, states, *_ = forward(inputs)
    score = (beams.score[:, :, None] + found[:, :width].float().view(requests, count, -1)).flatten(1)
    token = offered[:, :width].reshape(requests, -1)
    best, chosen = score.topk(count, dim=1)
    parent = chosen // width
    number = width + (level - 1) * count * width + chosen
    newest = Beams(
        best, token.gather(1, chosen), number, _at(states.view(requests, count, -1), parent), _at(above, parent)
    )
    order, parents = score.scatter(1, chosen, math.inf), beams.number[:, :, None].expand(-1, -1, width).flatten(1)
    return newest, Children(order, score, token, parents)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows`` [A, w, c] at ``index`` int64 [A, m]: [A, m, c]."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))


def best_children(drafted: list[Children], shape: LevelShape) -> Tensor:
    """Return the beams and the best others of the children of levels, as ``Levels.run`` does: int32 [A, 4, m]."""
    order, score, token, parent = (torch.cat(parts, dim=1) for parts in zip(*drafted, strict=True))
    chosen = order.topk(min(max(MAX_NODES, shape.beams * shape.levels), order.shape[1]), dim=1).indices
    score, token, parent = (part.gather(1, chosen) for part in (score, token, parent))
    number = chosen + shape.width * (1 + shape.beams * (shape.first - 1))
    return torch.stack([number.int(), parent.int(), token.int(), score.contiguous().view(torch.int32)], dim=1)


def level_call(level: int, beams: int, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the arrays of the ``level``-th call, from 1 on, but for tokens, states and mask; see ``ForwardBatch``.

    call  past_lens int32 [A], block_begins and block_indices of all requests, and ``live`` int32 [1]: requests behind
          the first ones have no tokens, though rows
    """
    past, device = call["past_lens"], call["past_lens"].device
    order = torch.arange(len(past) + 1, dtype=torch.int32, device=device)
    begins = torch.minimum(order, call["live"]) * beams
    return {
        "features": torch.zeros(0, dtype=torch.int64, device=device),
        "positions": (past.long() + (level - 1))[:, None].expand(-1, beams).flatten(),
        "past_lens": past,
        "seq_begins": begins,
        "block_indices": call["block_indices"],
        "block_begins": call["block_begins"],
        "tree_mask_begins": begins * (beams * level),
        "logit_rows": torch.arange(len(past) * beams, device=device),
    }


def parts_of_level(inputs: dict[str, Tensor], maximum: int) -> Iterator[dict[str, Tensor]]:
    """Divide a level's call into calls of at most ``maximum`` tokens; every request has the same number of rows.

    The parts share the block table, and their other tensors are new ones, aligned as TensorRT asks.
    """
    requests, tokens = len(inputs["past_lens"]), len(inputs["token_ids"])
    rows, columns = tokens // requests, len(inputs["tree_mask"]) // tokens
    parts = -(-requests // max(maximum // rows, 1))
    if parts == 1:
        yield inputs
        return
    begins = [requests * part // parts for part in range(parts + 1)]
    each = {**dict.fromkeys(("token_ids", "positions", "hidden"), rows), "past_lens": 1, "tree_mask": rows * columns}
    for first, last in itertools.pairwise(begins):
        part = inputs | {name: inputs[name][first * n : last * n].clone() for name, n in each.items()}
        part["logit_rows"] = inputs["logit_rows"][: (last - first) * rows].clone()
        part["block_begins"] = inputs["block_begins"][first : last + 1].clone()
        for name in ("seq_begins", "tree_mask_begins"):
            begin = inputs[name][first : last + 1]
            part[name] = begin - begin[:1]
        yield part
