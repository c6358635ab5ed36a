"""LFM2: two or more layers of gated short convolutions to one layer of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echo_trt.models.delta_net import RecurrentCall, RecurrentDecoder, convolved
from echo_trt.models.hybrid_config import ShortConvConfig
from echo_trt.models.layers import Attention, Linear


class ShortConv(nn.Module):
    """A gated short convolution, the ``layer``-th of its kind: out(after * conv(before * x))."""

    def __init__(self, config: ShortConvConfig, layer: int):
        super().__init__()
        self.layer, hidden = layer, config.hidden_size
        self.project = Linear(hidden, 3 * hidden)
        self.conv = nn.Parameter(torch.empty(hidden, 1, config.taps))
        self.output = Linear(hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, call: RecurrentCall) -> Tensor:
        """Mix x [N, H] along the paths of ``call``, without positions; returns [N, H]."""
        before, after, inner = self.project(x).chunk(3, dim=-1)
        mixed, none = before * inner, x.new_zeros(len(x), 0, 0)
        call.results.append((none, none, none.flatten(1), mixed))
        return self.output(after * convolved(mixed, self.conv, self.layer, call))


class ShortConvDecoder(RecurrentDecoder):
    """A decoder with short convolutions."""

    mixers = ShortConv, lambda config, layer: Attention(config, layer, config.hidden_size, config.qk_norm)


def short_conv_sources(ours: str, theirs: str) -> dict[str, list[str]]:
    """Return the tensors of a short convolution, by our parameters."""
    theirs, ours = f"{theirs}conv.", f"{ours}attention."
    return {
        ours + "project.weight": [theirs + "in_proj.weight"],
        ours + "conv": [theirs + "conv.weight"],
        ours + "output.weight": [theirs + "out_proj.weight"],
    }
