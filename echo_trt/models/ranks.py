"""Tensor parallelism: how a decoder is divided among ranks, and how the ranks put their results together.

As in Megatron-LM (arXiv 1909.08053), attention heads and the MLP's width are divided. Two matrices of a layer then give
a part of its output on every rank, and ``all_reduce`` adds the parts. In a mixture the width of every expert is
divided, so that all ranks have the same work, whichever experts the tokens choose. The output matrix is divided by rows
of the vocabulary where their number allows it, and ``all_gather`` puts the logits together. Embedding, norms and
routers are whole on every rank, so the residual and an EAGLE-3 head's features are the same on all.
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
    """The exchange between ranks; all ranks make the same calls, and get the same tensors."""

    def all_reduce(self, part: Tensor, ranks: int) -> Tensor:
        """Add all ranks' parts; ``part`` may be written, since nobody reads it afterwards."""

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        """Put all ranks' parts [n, ...] end to end, in the order of the ranks: [ranks * n, ...]."""


class Alone:
    """The exchange of a rank that is checked by itself: its part stands for those of the other ranks."""

    def all_reduce(self, part: Tensor, ranks: int) -> Tensor:
        return part

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        return torch.cat([part] * ranks)


_current: ContextVar[Collectives] = ContextVar("collectives")


@contextmanager
def among(collectives: Collectives) -> Iterator[None]:
    """Set how the networks of this thread reach the other ranks, for a block of code."""
    token = _current.set(collectives)
    try:
        yield
    finally:
        _current.reset(token)


def all_reduce(part: Tensor, ranks: int) -> Tensor:
    """Add all ranks' parts of a layer's output, which is nobody else's; exported as the operator echo::AllReduce."""
    return _all_reduce(part, ranks) if torch.compiler.is_exporting() else _current.get().all_reduce(part, ranks)


@torch.library.custom_op("echo::all_reduce", mutates_args=())
def _all_reduce(part: Tensor, ranks: int) -> Tensor:
    return _current.get().all_reduce(part.clone(), ranks)  # an operator may return none of its inputs


@_all_reduce.register_fake
def _(part: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(part)


@torch.library.custom_op("echo::all_gather", mutates_args=())
def all_gather(part: Tensor, ranks: int) -> Tensor:
    """Put all ranks' parts end to end; exported as the operator echo::AllGather."""
    return _current.get().all_gather(part, ranks)


@all_gather.register_fake
def _(part: Tensor, ranks: int) -> Tensor:
    return part.new_empty((ranks * part.shape[0], *part.shape[1:]))


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``ranks``."""

    rank: int = 0
    ranks: int = 1

    def slice_of(self, total: int, size: int) -> slice:
        """Return this rank's ``size`` indices on an axis of ``total``; neighbouring ranks may share them (KV heads)."""
        start = self.rank * total // self.ranks // size * size
        return slice(start, start + size)
