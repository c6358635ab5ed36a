"""Ranks as threads of this process, which add up over gloo as processes do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from echo_trt.backends.parallel.rank_group import RankGroup, join_gloo

Result = TypeVar("Result")


def on_ranks(ranks: int, work: Callable[[RankGroup], Result]) -> list[Result]:
    """``work`` of every rank, at the same time."""
    store = dist.HashStore()

    def one(rank: int) -> Result:
        return work(join_gloo(store, rank, ranks, timedelta(seconds=60)))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))
