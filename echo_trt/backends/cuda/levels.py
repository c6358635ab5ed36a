"""Draft levels of an EAGLE-3 head in a row, without a return to the host: beams are chosen where their scores are.

After the pass over the roots each level expands the ``beams`` best new nodes of every request by the draft's own path
probability, and the best children of all levels come back at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echo_trt.decoding.pack import ROOT

Forward = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, Tensor]]  # to scores, candidates, states

_LATER = 1e-5  # taken off a path's score for each level, so that a sure child comes after its parent


def draft_levels(
    forward: Forward,
    calls: Sequence[dict[str, Tensor]],
    states: Tensor,
    scores: Tensor,
    candidates: Tensor,
    beams: int,
    width: int,
    most: int,
) -> Tensor:
    """Draft ``len(calls)`` levels below the roots' children.

    forward     the head, by the inputs of a call; ``hidden`` are rows of ``states``
    calls       the arrays of ``level_calls``, on the device
    states      float [n, H], of which row a is the root's of request a; rows behind are written
    scores      float32 [A, k], log-probabilities of the roots' children, and their ``candidates`` int64 [A, k]
    width       children of an expanded node, the best ones
    most        children of a request that are returned, the best ones

    Returns int32 [4, A, most]: a child's number, its parent's (ROOT: the root), its token, and the bits of its path's
    log-probability, float32. Numbers count a request's children in the order in which they are drafted.
    """
    requests = len(scores)
    path, tokens = scores[:, :width], candidates[:, :width]  # of the newest level's children
    pool = [(path, tokens, torch.full_like(tokens, ROOT))]
    chosen_tokens: list[Tensor] = []
    places: list[Tensor] = []  # of the parents' states
    above = torch.ones(requests, 0, 0, dtype=torch.uint8, device=scores.device)
    own = torch.eye(beams, dtype=torch.uint8, device=scores.device).expand(requests, -1, -1)
    root = torch.arange(requests, device=scores.device)[:, None]
    begin = 0  # number of the newest level's first child
    for level, call in enumerate(calls, start=1):
        value, chosen = path.topk(beams, dim=1)
        parent = chosen // width  # beam of the level before
        chosen_tokens.append(tokens.gather(1, chosen))
        first = requests + (level - 2) * requests * beams
        places.append(root.expand(-1, beams) if level == 1 else first + root * beams + parent)
        above = _ancestors(above, own, parent, beams)
        inputs = call | {
            "token_ids": torch.cat(chosen_tokens, dim=1).reshape(-1),
            "hidden": torch.cat(places, dim=1).reshape(-1),
            "tree_mask": above.reshape(-1),
        }
        found, offered, state = forward(inputs)
        states[first + requests * beams :][: requests * beams] = state[call["logit_rows"]].to(states.dtype)
        number, begin = begin + chosen, begin + path.shape[1]
        path = (value[:, :, None] + found[:, :width].float().view(requests, beams, -1)).flatten(1)
        tokens = offered[:, :width].reshape(requests, -1)
        pool.append((path, tokens, number[:, :, None].expand(-1, -1, width).flatten(1)))
    late = torch.cat([p - _LATER * level for level, (p, _, _) in enumerate(pool)], dim=1)
    number = late.topk(min(most, late.shape[1]), dim=1).indices
    path, tokens, parent = (torch.cat(parts, dim=1).gather(1, number) for parts in zip(*pool, strict=True))
    bits = path.float().contiguous().view(torch.int32)
    return torch.stack([number.int(), parent.int(), tokens.int(), bits])


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
