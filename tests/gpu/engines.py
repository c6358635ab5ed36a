"""Calls of random trees for engines of random networks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from echo_trt.backends.base import Engine
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask


@dataclass(frozen=True)
class Card:
    """``operator``: the kernel for an engine on a CPU, where Triton interprets it; None: an engine's own choice."""

    device: torch.device
    operator: Callable | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the size of a test: ``tiny`` on a CPU."""
        return full if self.cuda else tiny

    def free(self) -> int:
        """Return free bytes of the card's memory; 0 on a CPU."""
        if not self.cuda:
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def call_of(batch: int, count: int, context: int, vocab: int, rng: np.random.Generator) -> ForwardBatch:
    """``batch`` requests of ``context`` cached tokens, each of which verifies a random tree of ``count`` tokens."""
    tree, none = SuperTree.from_roots(rng.integers(0, vocab, batch)), np.zeros(batch)
    for step in range(1, count):
        tree.add(batch * rng.integers(0, step, batch) + np.arange(batch), rng.integers(0, vocab, batch), none)
    tree, _ = tree.sorted_by_request(np.arange(len(tree)))
    past, counts, blocks = np.full(batch, context), np.full(batch, count), -(-(context + count) // BLOCK)
    table = rng.permutation(batch * blocks).reshape(batch, blocks)
    mask = ancestor_mask(tree) if count > 1 else None
    return pack(tree.token, context + tree.depth, past, counts, table, np.arange(len(tree)), mask)


def seconds_of(engine: Engine, call: ForwardBatch, runs: int = 9) -> float:
    """Median seconds of a run with its best tokens on the host."""
    taken = []
    for _ in range(runs + 2):
        begin = time.perf_counter()
        engine.run(call)["logits"].argmax(axis=1)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken[2:]))


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference, over the largest magnitude."""
    return float(abs(got - wanted).max() / abs(wanted).max())
