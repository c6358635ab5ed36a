"""Peaks of an accelerator, and what a network reads and multiplies on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.sizing.networks import KV_BYTES, WEIGHT_BYTES, Sizes


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


def share_of(sizes: Sizes, precision: str, routed: bool = True) -> NetworkShare:
    """Return a network's share on one of ``sizes.gpus``. Without ``routed`` every expert computes every token."""
    dense = sizes.router + sizes.norms + sizes.attention_share + sizes.output_share + sizes.mlp / sizes.gpus
    expert = sizes.expert / sizes.gpus
    if not routed:
        dense, expert = dense + expert * sizes.experts, 0.0
    return NetworkShare(
        dense=dense,
        parameter_bytes=WEIGHT_BYTES[precision],
        active=dense + expert * sizes.experts_per_token,
        kv_bytes=sizes.kv_values * KV_BYTES[precision],
        expert=expert,
        experts=sizes.experts if expert else 0,
        experts_per_token=sizes.experts_per_token,
    )


def active_parameters(sizes: Sizes) -> int:
    """Count the parameters that one token needs: of the experts, only the chosen ones."""
    return sizes.total - sizes.expert * (sizes.experts - sizes.experts_per_token)
