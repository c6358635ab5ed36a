"""Draft levels of an EAGLE-3 head in a row, without a return to the host: beams are chosen where their scores are.

After the pass over the roots each level expands the best new nodes of every request by the draft's own path
probability, and the best children of all levels come back at once. On a GPU the levels of a draft are one CUDA graph.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda.calls import MAX_GRAPHS, Graphs, Staging, unowned
from echo_trt.backends.cuda.sizes import Arrays, CallBounds, bucket
from echo_trt.backends.cuda.transfers import fetch, send
from echo_trt.speculation.pack import ROOT, ForwardBatch, LevelShape
from echo_trt.speculation.synthetic import SyntheticText, TextPositions

Forward = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]  # to scores, candidates, states

_LATER = 1e-5  # taken off a path's score for each level, so that a sure child comes after its parent


class Levels:
    """The levels of one head's drafts.

    forward  the head, by the inputs of a call; ``hidden`` are rows of ``states``
    states   float [n, H], hidden states: row a is that of request a's root, and levels write the rows behind the roots
    top_k    children of a root
    bounds   the largest calls
    graphs   whether a draft of a shape is captured as a CUDA graph, once for each number of requests
    """

    #: Takes the place of the head's proposals; set before a draft is captured.
    synthetic: SyntheticText | None = None

    def __init__(self, forward: Forward, states: Tensor, top_k: int, bounds: CallBounds, graphs: bool):
        self._forward, self._states, self._bounds, device = unowned(forward), states, bounds, states.device
        self._scores = torch.zeros(bounds.requests, top_k, device=device)  # of the roots' children
        self._candidates = torch.zeros(bounds.requests, top_k, dtype=torch.int64, device=device)
        self._keys = torch.zeros(bounds.requests, dtype=torch.int64, device=device)  # of synthetic texts
        self._sizes = sorted({min(bucket(n), bounds.requests) for n in range(1, bounds.requests + 1)})
        self._graphs = Graphs(self._draft, device) if graphs else None

    def capture(self, shapes: Iterable[LevelShape]) -> None:
        """Capture the drafts of ``shapes``; all others are run by plain launches from then on.

        Beyond the engine's limit of graphs, the smallest batches get graphs: launches take a larger share of a small
        batch's draft.
        """
        shapes = tuple(shapes)
        if not self._graphs or not shapes:
            return
        captured = self._sizes[: MAX_GRAPHS // len(shapes)]
        if len(captured) < len(self._sizes):
            warnings.warn(
                f"drafts of more than {captured[-1]} requests run without a CUDA graph: an engine "
                f"captures {MAX_GRAPHS}, and {len(shapes)} depths of {len(self._sizes)} batch sizes are "
                f"{len(shapes) * len(self._sizes)}; lower decoding.max_depth or limits.batch",
                stacklevel=2,
            )
        for size in reversed(captured):
            for shape in shapes:
                none = np.zeros(0, np.int32)
                arrays = {"past_lens": none, "block_begins": np.zeros(1, np.int32), "block_indices": none}
                self._graphs.run(self._padded(arrays, size), self._capacity(size), *shape)
        self._graphs.sealed = True

    def run(
        self,
        call: ForwardBatch,
        below: ForwardBatch,
        shape: LevelShape,
        max_nodes: int,
        roots: tuple[Tensor, Tensor],
        states: Tensor,
        keys: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draft ``shape.levels`` levels below the roots' children.

        call       the pass over the roots, whose logit rows are theirs
        below      what ``pack_levels`` returns for A requests
        max_nodes  children of a request that are returned, the best ones
        roots      float32 [A, k], log-probabilities of the roots' children, and the children int64 [A, k]
        states     float [A, H], of the roots
        keys       int64 [A], of the requests' synthetic texts

        Returns int32 [A, 4, most]: a child's number, its parent's (ROOT: the root), its token, and the bits of its
        path's log-probability, float32. Numbers count a request's children in the order in which they are drafted.
        """
        requested = len(states)
        if self.synthetic:
            entries = np.stack((keys, call.token_ids[call.logit_rows], call.positions[call.logit_rows]))
            placed = send(entries.astype(np.int64), self._states.device)
            self._keys[:requested].copy_(placed[0])
            roots = self._proposed(roots, *placed, 1)
        self._states[:requested].copy_(states)
        self._scores[:requested].copy_(roots[0])
        self._candidates[:requested].copy_(roots[1])
        arrays = {name: getattr(below, name) for name in ("past_lens", "block_begins", "block_indices")}
        size = next(size for size in self._sizes if size >= requested) if self._graphs else requested
        padded = self._padded(arrays, size)
        pool = self._graphs.run(padded, self._capacity(size), *shape) if self._graphs else None
        if pool is None:
            pool = self._draft(Staging(padded, self._states.device).upload(padded), *shape)
        return fetch(best_children(*(part[:requested] for part in pool), max_nodes))

    def _capacity(self, size: int) -> dict[str, int]:
        blocks = size * self._bounds.blocks
        return {"block_indices": min(blocks, self._bounds.table) if self._bounds.table else blocks}

    @staticmethod
    def _padded(arrays: Arrays, size: int) -> Arrays:
        """Add requests without tokens behind the ``live`` ones."""
        past, ends = arrays["past_lens"], arrays["block_begins"]
        more = size - len(past)
        return {
            "past_lens": np.concatenate((past, np.zeros(more, past.dtype))),
            "block_begins": np.concatenate((ends, np.full(more, ends[-1]))),
            "block_indices": arrays["block_indices"],
            "live": np.array([len(past)], np.int32),
        }

    def _draft(self, call: dict[str, Tensor], *shape: int) -> tuple[Tensor, ...]:
        requests, depth = len(call["past_lens"]), itertools.count(2)
        roots = self._scores[:requests], self._candidates[:requests]

        def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            scores, candidates, *rest = self._forward(inputs)
            if self.synthetic:
                rows = inputs["logit_rows"]
                keys = self._keys[:requests, None].expand(-1, len(rows) // requests).flatten()
                beams = inputs["token_ids"][rows], inputs["positions"][rows]
                scores, candidates = self._proposed((scores, candidates), keys, *beams, next(depth))
            return scores, candidates, *rest

        return draft_levels(forward, call, self._states, *roots, LevelShape(*shape))

    def _proposed(
        self, proposals: tuple[Tensor, Tensor], keys: Tensor, tokens: Tensor, entries: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Replace ``proposals`` at a ``depth``, both [n, k], below ``tokens`` [n] at the head's ``entries`` [n]."""
        assert self.synthetic
        # An entry is numbered by the token before its own.
        where = TextPositions(keys, tokens.long(), entries.long() + 2)
        log_q, candidates = self.synthetic.propose(where, torch.full_like(keys, depth), proposals[0].shape[1])
        return log_q.float(), candidates


def level_call(level: int, beams: int, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the arrays of the ``level``-th call, from 1 on, but for tokens, states and mask; see ``ForwardBatch``.

    call  past_lens int32 [A], block_begins and block_indices of all requests, and ``live`` int32 [1]: requests behind
          the first ones have no tokens, though rows
    """
    past, rows, device = call["past_lens"], beams * level, call["past_lens"].device
    row = torch.arange(rows, device=device)
    order = torch.arange(len(past) + 1, dtype=torch.int32, device=device)
    return {
        "features": torch.zeros(0, dtype=torch.int64, device=device),
        "positions": (past[:, None] + row // beams).flatten(),
        "past_lens": past,
        "seq_begins": torch.minimum(order, call["live"]) * rows,
        "block_indices": call["block_indices"],
        "block_begins": call["block_begins"],
        "tree_mask_begins": torch.minimum(order, call["live"]) * (rows * rows),
        "logit_rows": (order[:-1, None] * rows + row[rows - beams :]).flatten(),
    }


def parts_of_level(inputs: dict[str, Tensor], maximum: int) -> Iterator[dict[str, Tensor]]:
    """Divide a level's call into calls of at most ``maximum`` tokens; every request has the same number of rows.

    The parts share the block table, and their other tensors are new ones, aligned as TensorRT asks.
    """
    requests = len(inputs["past_lens"])
    rows, requested = (len(inputs[name]) // requests for name in ("token_ids", "logit_rows"))
    parts = -(-requests // max(maximum // rows, 1))
    if parts == 1:
        yield inputs
        return
    begins = [requests * part // parts for part in range(parts + 1)]
    for first, last in itertools.pairwise(begins):
        part = dict(inputs)
        for name, each in (("token_ids", rows), ("positions", rows), ("hidden", rows), ("past_lens", 1)):
            part[name] = inputs[name][first * each : last * each].clone()
        part["tree_mask"] = inputs["tree_mask"][first * rows * rows : last * rows * rows].clone()
        part["logit_rows"] = inputs["logit_rows"][first * requested : last * requested] - first * rows
        part["block_begins"] = inputs["block_begins"][first : last + 1].clone()
        for name in ("seq_begins", "tree_mask_begins"):
            begin = inputs[name][first : last + 1]
            part[name] = begin - begin[:1]
        yield part


def draft_levels(
    forward: Forward, call: dict[str, Tensor], states: Tensor, scores: Tensor, candidates: Tensor, shape: LevelShape
) -> tuple[Tensor, ...]:
    """Draft levels below the roots' children, whose log-probabilities and tokens are given, both [A, k].

    Returns all C children of each request in the order in which they are drafted, [A, C] each: the scores that tell the
    best ones, log-probabilities of their paths, tokens, and the indices of their parents (ROOT: the root).
    """
    _, beams, width = shape
    requests = len(scores)
    path, tokens = scores[:, :width], candidates[:, :width]  # of the newest level's children
    pool = [(path, path, tokens, torch.full_like(tokens, ROOT))]
    chosen_tokens: list[Tensor] = []
    parents: list[Tensor] = []  # of the parents' states
    above = torch.ones(requests, 0, 0, dtype=torch.uint8, device=scores.device)
    own = torch.eye(beams, dtype=torch.uint8, device=scores.device).expand(requests, -1, -1)
    root = torch.arange(requests, device=scores.device)[:, None]
    begin = 0  # number of the newest level's first child
    for level in range(1, shape.levels + 1):
        value, chosen = path.topk(beams, dim=1)
        parent = chosen // width  # beam of the level before
        chosen_tokens.append(tokens.gather(1, chosen))
        first = requests + (level - 2) * requests * beams
        parents.append(root.expand(-1, beams) if level == 1 else first + root * beams + parent)
        above = _ancestors(above, own, parent, beams)
        inputs = level_call(level, beams, call) | {
            "token_ids": torch.cat(chosen_tokens, dim=1).reshape(-1),
            "hidden": torch.cat(parents, dim=1).reshape(-1),
            "tree_mask": above.reshape(-1),
        }
        found, offered, state, *_ = forward(inputs)
        states[first + requests * beams :][: requests * beams] = state[inputs["logit_rows"]].to(states.dtype)
        number, begin = begin + chosen, begin + path.shape[1]
        path = (value[:, :, None] + found[:, :width].float().view(requests, beams, -1)).flatten(1)
        tokens = offered[:, :width].reshape(requests, -1)
        pool.append((path - _LATER * level, path, tokens, number[:, :, None].expand(-1, -1, width).flatten(1)))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*pool, strict=True))


def best_children(late: Tensor, path: Tensor, tokens: Tensor, parent: Tensor, max_nodes: int) -> Tensor:
    """Pick ``max_nodes`` of the children that ``draft_levels`` returns, as ``Levels.run`` does."""
    number = late.topk(min(max_nodes, late.shape[1]), dim=1).indices
    path, tokens, parent = (part.gather(1, number) for part in (path, tokens, parent))
    bits = path.float().contiguous().view(torch.int32)
    return torch.stack([number.int(), parent.int(), tokens.int(), bits], dim=1)


def _ancestors(above: Tensor, own: Tensor, parent: Tensor, beams: int) -> Tensor:
    """Add a level's rows to masks of ancestors, uint8 [A, n, n]: a node sees what its parent sees, and itself."""
    requests, known = above.shape[:2]
    grown = above.new_zeros(requests, known + beams, known + beams)
    grown[:, :known, :known] = above
    grown[:, known:, known:] = own
    if known:
        rows = (known - beams + parent)[:, :, None].expand(-1, -1, known)
        grown[:, known:, :known] = above.gather(1, rows)
    return grown
