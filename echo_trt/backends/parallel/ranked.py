"""An engine whose network is divided among processes, one a GPU (tensor parallelism). This process is rank 0."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from echo_trt.backends.base import Engine
from echo_trt.backends.parallel.rank_group import HOST, RankGroup, check_gpus, join
from echo_trt.backends.parallel.rank_processes import (
    CALL_SECONDS,
    HERE,
    IMPORT_SECONDS,
    OPEN_SECONDS,
    READY,
    RankProcesses,
)
from echo_trt.decoding.pack import Packed

#: One rank's engine; it is sent to the other processes, so it must be a function of a module, or a partial of one.
OpenRank = Callable[[RankGroup], Engine]


class RankedEngine:
    """All ranks make each call, and each on the same inputs; rank 0's outputs are the engine's.

    A rank that is lost, in whatever way, is a UserError of this and every later call, after ``patience`` seconds at
    most.
    """

    def __init__(self, open_rank: OpenRank, ranks: int, patience: float = CALL_SECONDS):
        check_gpus(ranks)
        store = dist.TCPStore(HOST, 0, ranks, True, timedelta(seconds=IMPORT_SECONDS), wait_for_workers=False)
        self._others = RankProcesses(ranks, store.port, patience)
        self._end = weakref.finalize(self, self._others.close)
        try:
            self._others.hear(HERE, IMPORT_SECONDS)
            self._others.tell((open_rank, patience))
            with self._others.in_flight():
                group = join(store, 0, ranks, patience)
            self._others.abort = group.abort
            self._end.detach()
            self._end = weakref.finalize(self, _part, self._others, group)
            self._own = open_rank(group)
            self._others.hear(READY, OPEN_SECONDS)
        except BaseException:
            self._end()
            raise
        self.num_blocks, self.sizes = self._own.num_blocks, self._own.sizes

    def run(self, call: Packed, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self._others.tell(("run", (call,), inputs))
        with self._others.in_flight():
            return self._own.run(call, **inputs)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self._others.tell(("move", (source, target), {}))
        with self._others.in_flight():
            self._own.move(source, target)


def _part(others: RankProcesses, group: RankGroup) -> None:
    others.close()
    group.abort()
    group.leave()
