"""Qwen3.5, dense: three gated delta-net layers to one layer of gated attention."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_trt.models.delta_net import DeltaNet, RecurrentDecoder
from echo_trt.models.hybrid_config import HybridConfig
from echo_trt.models.layers import Attend, Attention, Linear, sum_ranks


class GatedAttention(Attention):
    """Attention whose output is gated: a query head's rows of the projection are followed by those of its gate."""

    def __init__(self, config: HybridConfig, layer: int):
        super().__init__(config, layer, config.hidden_size, qk_norm=True)
        self.qkv = Linear(config.hidden_size, 2 * (self.heads + self.kv_heads) * self.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: None = None) -> Tensor:
        queries, others = 2 * self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        both, rest = self.qkv(x).split((queries, others), dim=-1)
        query, gate = both.unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, dim=-1)
        projected = torch.cat((query.flatten(1), rest), dim=-1)
        output = attend(self.layer, *self._divided(projected, cos, sin))
        return sum_ranks(self.out(output * gate.flatten(1).sigmoid()), self.ranks)


class HybridDecoder(RecurrentDecoder):
    """A decoder with delta-net layers."""

    mixers = DeltaNet, GatedAttention


def delta_net_sources(ours: str, theirs: str) -> dict[str, list[str]]:
    """Return the tensors of a delta-net layer, by our parameters."""
    theirs, ours = f"{theirs}linear_attn.", f"{ours}attention."
    return {
        ours + "project.weight": [f"{theirs}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")],
        ours + "conv": [theirs + "conv1d.weight"],
        ours + "decay_log": [theirs + "A_log"],
        ours + "decay_bias": [theirs + "dt_bias"],
        ours + "norm": [theirs + "norm.weight"],
        ours + "output.weight": [theirs + "out_proj.weight"],
    }
