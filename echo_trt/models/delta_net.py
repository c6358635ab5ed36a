"""Gated delta-net layers (Qwen3.5, arXiv 2412.06464) over trees, token by token: the reference of the CPU engine's.

A head's state S [dk, dv] holds the text before a token, which has q, k [dk], v [dv], a write strength beta and a log
decay g. Its own state and output are

    S_t = exp(g) S + k (outer) u    where u = beta (v - exp(g) S^T k)
    o_t = S_t^T q

so that each node of a tree goes on from its parent's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_trt.models.decoder import Decoder
from echo_trt.models.hybrid_config import CONV_PAST, HybridConfig, RecurrentConfig
from echo_trt.models.layers import Attend, Linear

#: Outputs of a network that a commit of states takes, each with a first axis of layers.
COMMIT_OUTPUTS = ("delta_keys", "delta_updates", "delta_fades", "conv_inputs")


@dataclass
class RecurrentCall:
    """What the recurrent layers of one call share, N packed rows of B requests, and what they return.

    attend   for the layers with full attention
    parents  int [N], as of ``backends.states.parents``
    states   float32 [B, ...] by name (``HybridConfig.states``)
    results  filled by the layers: keys [N, Hv, dk], u [N, Hv, dv], exp(g) [N, Hv], convolution inputs [N, C]
    """

    attend: Attend
    parents: Tensor
    states: Mapping[str, Tensor]
    results: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(layer, query, key, value)

    def stacked(self) -> list[Tensor]:
        """Return the ``COMMIT_OUTPUTS``."""
        return [torch.stack(parts) for parts in zip(*self.results, strict=True)]


class RecurrentDecoder(Decoder):
    """A decoder with recurrent layers; its ``attend`` is a ``RecurrentCall``.

    mixers  make a recurrent layer's mixer and another's, each of the configuration and of its index among its kind
    """

    mixers: tuple[Callable[[Any, int], nn.Module], Callable[[Any, int], nn.Module]]

    def __init__(self, config: RecurrentConfig, positions: int):
        super().__init__(config, positions)
        counts = [0, 0]
        for i, layer in enumerate(self.layers):
            kind = int(i not in config.recurrent_layers)
            layer.attention = self.mixers[kind](config, counts[kind])
            counts[kind] += 1


class DeltaNet(nn.Module):
    """A gated delta-net layer, the ``layer``-th of its kind."""

    def __init__(self, config: HybridConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.project = Linear(config.hidden_size, sum(config.linear_projected))
        self.conv = nn.Parameter(torch.empty(config.linear_channels, 1, CONV_PAST + 1))
        self.decay_log = nn.Parameter(torch.empty(config.linear_value_heads))
        self.decay_bias = nn.Parameter(torch.empty(config.linear_value_heads))
        self.norm = nn.Parameter(torch.ones(config.linear_value_dim))
        self.output = Linear(config.linear_values, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, call: RecurrentCall) -> Tensor:
        """Mix x [N, H] along the paths of ``call``, without positions; returns [N, H]."""
        mixed, gate, write, decay = self.project(x).split(self.config.linear_projected, dim=-1)
        key, update, fade, heads = self._along_paths(
            F.silu(convolved(mixed, self.conv, self.layer, call)), write, decay, call
        )
        call.results.append((key, update, fade, mixed))
        normed = F.rms_norm(heads, (self.config.linear_value_dim,), self.norm.to(heads.dtype), self.config.norm_eps)
        return self.output(normed.flatten(1).to(gate.dtype) * F.silu(gate))

    def _along_paths(
        self, mixed: Tensor, write: Tensor, decay: Tensor, call: RecurrentCall
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute keys, u, exp(g) and outputs of packed rows [N, ...], in float32."""
        config, states = self.config, call.states[f"delta_state.{self.layer}"].float()
        heads, keys = config.linear_key_heads, config.linear_key_heads * config.linear_key_dim
        query, key, value = mixed.float().split((keys, keys, config.linear_values), dim=-1)
        query, key = (_unit(each.unflatten(-1, (heads, -1)))[:, config.key_head] for each in (query, key))
        query = query * config.linear_key_dim**-0.5
        value = value.unflatten(-1, (config.linear_value_heads, -1))
        beta = write.float().sigmoid().unsqueeze(-1)
        fade = (-self.decay_log.float().exp() * F.softplus(decay.float() + self.decay_bias)).exp()
        after, updates, outputs = list[Tensor](), list[Tensor](), list[Tensor]()
        for row, parent in enumerate(call.parents.tolist()):
            faded = fade[row, :, None, None] * (states[-1 - parent] if parent < 0 else after[parent])
            own_key = key[row].unsqueeze(-1)  # [Hv, dk, 1]
            updates.append(beta[row] * (value[row] - (own_key * faded).sum(1)))
            after.append(faded + own_key * updates[-1].unsqueeze(1))
            outputs.append((query[row].unsqueeze(-1) * after[-1]).sum(1))
        return key, torch.stack(updates), fade, torch.stack(outputs)


def convolved(mixed: Tensor, conv: Tensor, layer: int, call: RecurrentCall) -> Tensor:
    """Convolve ``mixed`` [N, C] with a token's predecessors on its path by ``conv`` [C, 1, taps]: [N, C]."""
    past = call.states[f"conv_state.{layer}"].to(mixed.dtype)
    taps, windows = conv.squeeze(1).t().to(mixed.dtype), list[Tensor]()  # the token's own is the last
    for row, parent in zip(mixed, call.parents.tolist(), strict=True):
        before = past[-1 - parent] if parent < 0 else windows[parent][1:]
        windows.append(torch.cat((before, row[None])))
    return (torch.stack(windows)[:, -len(taps) :] * taps).sum(1)


def _unit(rows: Tensor) -> Tensor:
    return rows * (rows.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
