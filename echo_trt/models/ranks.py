"""A decoder divided among ranks (tensor parallelism): the sizes of one rank's part, and the sum over all of them.

As in Megatron-LM (arXiv 1909.08053): the heads and the width of the MLP are divided, so that two matrices of each layer
give a part of its output on each rank, and ``all_reduce`` adds the parts. Of a mixture each expert's width is divided,
and not the experts: then all ranks have the same work, whichever experts the tokens choose. Embedding, norms, router
and output matrix stand whole on each rank, so the residual, and with it an EAGLE-3 head's features, is the same on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig

#: A rank's part to the sum of all ranks' parts, in a new tensor.
AllReduce = Callable[[Tensor], Tensor]

_current: ContextVar[AllReduce] = ContextVar("all_reduce")


@contextmanager
def adding_by(sum_over_ranks: AllReduce) -> Iterator[None]:
    """Within, networks of this thread add their parts so."""
    token = _current.set(sum_over_ranks)
    try:
        yield
    finally:
        _current.reset(token)


@torch.library.custom_op("echo::all_reduce", mutates_args=())
def all_reduce(part: Tensor, ranks: int) -> Tensor:
    """The sum of ``part`` [N, H] over all ``ranks``, by the means of ``adding_by``. Exported as echo::AllReduce."""
    return _current.get()(part)


@all_reduce.register_fake
def _(part: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(part)


def own_part(part: Tensor) -> Tensor:
    """An AllReduce that leaves the others out: what one rank computes, for checking it alone."""
    return part.clone()


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``ranks``."""

    rank: int = 0
    ranks: int = 1

    def place(self, whole: int, own: int) -> slice:
        """Which part of an axis of ``whole`` is this rank's ``own``; neighbours may share one (KV heads)."""
        start = self.rank * whole // self.ranks // own * own
        return slice(start, start + own)


def rank_config(config: DecoderConfig, ranks: int) -> DecoderConfig:
    """The sizes of one rank's part; where a network has fewer KV heads than ranks, neighbours hold the same one."""
    check_division(config, ranks)
    if ranks == 1:
        return config
    return replace(
        config,
        ranks=ranks,
        num_heads=config.num_heads // ranks,
        num_kv_heads=max(config.num_kv_heads // ranks, 1),
        intermediate_size=config.intermediate_size // ranks,
        expert_size=config.expert_size // ranks,
    )


def check_division(config: DecoderConfig, ranks: int) -> None:
    """Refuse a number of ranks that the target cannot be divided among."""
    has_dense = any(not config.has_experts(layer) for layer in range(config.num_layers))
    sizes = [("attention heads", config.num_heads)]
    sizes += [("intermediate_size", config.intermediate_size)] if has_dense else []
    sizes += [("moe_intermediate_size", config.expert_size)] if config.num_experts else []
    for name, value in sizes:
        if value % ranks:
            raise UserError(f"tensor_parallel is {ranks}, which does not divide the target's {value} {name}; lower it.")
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        raise UserError(
            f"tensor_parallel is {ranks}, which neither divides the target's {config.num_kv_heads} KV heads nor is a "
            "multiple of them; lower it."
        )
