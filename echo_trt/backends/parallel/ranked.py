"""An engine over processes with one rank of a divided network (tensor parallelism). This process is rank 0."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from echo_trt.backends.base import Engine
from echo_trt.backends.parallel.rank_group import HOST, RankGroup, check_gpus, join
from echo_trt.backends.parallel.rank_processes import (
    CALL_SECONDS,
    HERE,
    IMPORT_SECONDS,
    LOADED,
    OPEN_SECONDS,
    READY,
    RankProcesses,
)
from echo_trt.speculation.pack import ForwardBatch

#: Opens one rank's engine. It is sent to other processes, so it must be picklable.
OpenRank = Callable[[RankGroup], Engine]


class RankedEngine(Engine):
    """An engine whose ranks all make the same calls; the outputs are rank 0's.

    A lost rank is a UserError of this call and all later ones, after ``patience`` seconds at most.
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
                group = join(store, 0, ranks, patience, partial(_wait_for_weights, self._others))
            self._others.abort = group.abort
            self._end.detach()
            engines: list[Engine] = []  # the finalizer's, which drops the engine before its communicator
            self._end = weakref.finalize(self, _leave, self._others, group, engines)
            engines.append(open_rank(group))
            self._engines = engines
            self._others.hear(READY, OPEN_SECONDS)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold an engine that did not open, and its graphs
            self._end()
            raise
        self.num_blocks, self.sizes = engines[0].num_blocks, engines[0].sizes
        self.prefill_alone = engines[0].prefill_alone

    def overlap(self, work: Callable[[], None]) -> bool:
        return self._engines[0].overlap(work)

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self._others.tell(("run", (call,), inputs))
        with self._others.in_flight():
            return self._engines[0].run(call, **inputs)

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        self._others.tell(("compact_kv", (source, target), {}))
        with self._others.in_flight():
            self._engines[0].compact_kv(source, target)


def of_rank(files: Sequence[Path], open_file: Callable[..., Engine], group: RankGroup) -> Engine:
    """Open this rank's engine from its file among ``files``."""
    return open_file(files[group.rank], group=group)


def _wait_for_weights(others: RankProcesses) -> None:
    """Wait until all other ranks have loaded theirs, and let them go on."""
    others.hear(LOADED, OPEN_SECONDS)
    others.tell(LOADED)


def _leave(others: RankProcesses, group: RankGroup, engines: list[Engine]) -> None:
    """End the ranks. TensorRT's contexts and CUDA graphs hold the communicator, which must outlive them."""
    others.close()
    engines.clear()
    group.abort()
    group.leave()
