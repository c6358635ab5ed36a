"""Peaks of an accelerator, and what a network reads and multiplies on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chip:
    """An accelerator's peaks, bytes/s and FLOP/s, bytes of memory, and the shares of the peaks that kernels reach."""

    bandwidth: float
    flops: float
    memory: float
    bandwidth_share: float = 0.8
    flops_share: float = 0.6


@dataclass(frozen=True)
class NetworkShare:
    """The share of a network on one chip.

    dense            parameters that a pass of any size reads
    parameter_bytes  bytes of a parameter
    active           parameters that one token multiplies
    kv_bytes         KV bytes of a cached token
    expert           parameters of one expert, over all layers
    """

    dense: float
    parameter_bytes: float
    active: float
    kv_bytes: float
    expert: float = 0.0
    experts: int = 0
    experts_per_token: int = 0

    def bytes_read(self, tokens: np.ndarray) -> np.ndarray:
        distinct = distinct_experts(tokens, self.experts, self.experts_per_token) if self.experts else 0.0
        return self.parameter_bytes * (self.dense + self.expert * distinct)


def distinct_experts(tokens: np.ndarray, experts: int, per_token: int) -> np.ndarray:
    """Estimate how many of a layer's experts ``tokens`` tokens touch, if a token picks ``per_token`` at random."""
    return experts * (1 - (1 - per_token / experts) ** np.asarray(tokens, np.float64))
