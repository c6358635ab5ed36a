"""LFM2: two or more layers of gated short convolutions to one layer of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echo_trt.models.decoder import Decoder
from echo_trt.models.delta_net import RecurrentCall, convolved
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


class ShortConvDecoder(Decoder):
    """A decoder with short convolutions; its ``attend`` is a ``RecurrentCall``."""

    def __init__(self, config: ShortConvConfig, positions: int):
        super().__init__(config, positions)
        convolutions = full = 0
        for i, layer in enumerate(self.layers):
            if i in config.recurrent_layers:
                layer.attention = ShortConv(config, convolutions)
                convolutions += 1
            else:
                layer.attention = Attention(config, full, config.hidden_size, config.qk_norm)
                full += 1


def short_conv_sources(ours: str, theirs: str) -> dict[str, list[str]]:
    """Return the tensors of a short convolution, by our parameters."""
    theirs, ours = f"{theirs}conv.", f"{ours}attention."
    return {
        ours + "project.weight": [theirs + "in_proj.weight"],
        ours + "conv": [theirs + "conv.weight"],
        ours + "output.weight": [theirs + "out_proj.weight"],
    }
