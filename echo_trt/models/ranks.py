"""A decoder divided among ranks (tensor parallelism): the sizes of one rank's part, and how the parts come together.

As in Megatron-LM (arXiv 1909.08053): the heads and the width of the MLP are divided, so that two matrices of each layer
give a part of its output on each rank, and ``all_reduce`` adds the parts. Of a mixture each expert's width is divided,
and not the experts: then all ranks have the same work, whichever experts the tokens choose. The output matrix is
divided by rows of the vocabulary, where their number allows it, and ``all_gather`` puts the logits together. Embedding,
norms and routers stand whole on each rank, so the residual, and with it an EAGLE-3 head's features, is the same on all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Collectives(Protocol):
    """How the ranks exchange what they have; all make the same calls, and get the same tensors."""

    def all_reduce(self, part: Tensor, ranks: int) -> Tensor:
        """The sum of all ranks' parts, in a new tensor."""

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        """All ranks' parts [n, ...] in their order [ranks * n, ...]."""


class Alone:
    """What one rank can compute without the others, for checking it by itself: its part stands for theirs."""

    def all_reduce(self, part: Tensor, ranks: int) -> Tensor:
        return part.clone()

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        return torch.cat([part] * ranks)


_current: ContextVar[Collectives] = ContextVar("collectives")


@contextmanager
def among(collectives: Collectives) -> Iterator[None]:
    """Within, the networks of this thread reach the other ranks so."""
    token = _current.set(collectives)
    try:
        yield
    finally:
        _current.reset(token)


@torch.library.custom_op("echo::all_reduce", mutates_args=())
def all_reduce(part: Tensor, ranks: int) -> Tensor:
    """Exported as the operator echo::AllReduce."""
    return _current.get().all_reduce(part, ranks)


@all_reduce.register_fake
def _(part: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(part)


@torch.library.custom_op("echo::all_gather", mutates_args=())
def all_gather(part: Tensor, ranks: int) -> Tensor:
    """Exported as the operator echo::AllGather."""
    return _current.get().all_gather(part, ranks)


@all_gather.register_fake
def _(part: Tensor, ranks: int) -> Tensor:
    return part.new_empty((ranks * part.shape[0], *part.shape[1:]))


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``ranks``."""

    rank: int = 0
    ranks: int = 1

    def place(self, whole: int, own: int) -> slice:
        """Which part of an axis of ``whole`` is this rank's ``own``; neighbours may share one (KV heads)."""
        start = self.rank * whole // self.ranks // own * own
        return slice(start, start + own)
