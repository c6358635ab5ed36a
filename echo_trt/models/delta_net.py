"""Gated delta-net layers (Qwen3.5, arXiv 2412.06464) over trees, in ordinary matrix products.

A head's state S [dk, dv] holds the committed text. Token t of a tree has q, k [dk], v [dv], a write strength beta and a
log decay g; G_t is the sum of g along t's path. With A[t, j] = 1 where j is a strict ancestor of t:

    L[t, j] = A[t, j] * beta_t * exp(G_t - G_j) * (k_j . k_t)
    (I + L) U = R    where R_t = beta_t * (v_t - exp(G_t) * S^T k_t)
    o_t = exp(G_t) * S^T q_t + sum over j = t and its ancestors of exp(G_t - G_j) * (k_j . q_t) * U_j

Parents stand before children, so L is strictly lower triangular. ``inverse`` therefore works for trees, chains and
prompts alike, and a text does not depend on how its tokens were divided into passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_trt.models.hybrid_config import HybridConfig
from echo_trt.models.layers import Attend, Linear
from echo_trt.speculation.paths import CONV_PAST, MAX_ROWS


@dataclass
class DeltaCall:
    """What the delta-net layers of one call share, N packed rows of B trees padded to T rows, and what they return.

    ``attend`` is for the layers with full attention.

    tree_rows    int [B, T], a padded row's packed row; padding names any
    row_places   int [N], a packed row's place among the B * T padded rows
    ancestors    float [B, T, T], 1 where the column's node is a strict ancestor of the row's
    conv_rows    int [N, 3], a token's three predecessors on its path, nearest first: packed rows, or N + 3 b + i for
                 row i of tree b's convolution state
    states       float32 [B, ...] by name (``HybridConfig.states``)
    steps        float [T, T], masks of ``inverse``
    between      float [B, T, T * T], 1 where the row's node is on the path behind j up to t; the column is t * T + j
    results      filled by the layers: keys [B, H, T, dk], U [B, H, T, dv], G [B, H, T], convolution inputs [N, C]
    """

    attend: Attend
    tree_rows: Tensor
    row_places: Tensor
    ancestors: Tensor
    conv_rows: Tensor
    states: dict[str, Tensor]
    steps: list[Tensor] = field(init=False)
    between: Tensor = field(init=False)
    results: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = step_masks(self.ancestors)
        paths = (self.ancestors + identity(self.ancestors)).transpose(1, 2)
        self.between = (paths.unsqueeze(3) - paths.unsqueeze(2)).flatten(2)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(layer, query, key, value)

    def padded(self, rows: Tensor) -> Tensor:
        """Take the padded trees [B, T, n] out of packed ``rows`` [N, n]."""
        return rows.index_select(0, self.tree_rows.flatten()).unflatten(0, self.tree_rows.shape)

    def stacked(self) -> list[Tensor]:
        """Return the ``COMMIT_OUTPUTS``, with a first axis of layers."""
        return [torch.stack(parts) for parts in zip(*self.results, strict=True)]


def step_masks(ancestors: Tensor) -> list[Tensor]:
    """Return the masks [T, T] of ``inverse``: for blocks of 1, 2, 4, ... rows, block pairs' lower left quarters."""
    row = torch.arange(ancestors.shape[-1], device=ancestors.device)
    masks, size = [], 1
    while size < MAX_ROWS:
        block, pair = row // size, row // (2 * size)
        same, other = pair[:, None] == pair[None], block[:, None] != block[None]
        masks.append((same & other).to(ancestors.dtype))
        size *= 2
    return masks


def identity(like: Tensor) -> Tensor:
    """Return the identity matrix [T, T] for ``like`` [..., T, T]."""
    row = torch.arange(like.shape[-1], device=like.device)
    return (row[:, None] == row[None]).to(like.dtype)


def inverse(lower: Tensor, steps: list[Tensor]) -> Tensor:
    """Invert I + ``lower`` [..., T, T], strictly lower triangular, by inverting larger and larger diagonal blocks.

    All intermediate results are inverses of blocks, so that nothing grows where keys are alike, unlike the powers of
    ``lower`` in (I - L)(I + L^2)(I + L^4)...
    """
    inverted = identity(lower) - lower * steps[0]
    for step in steps[1:]:
        inverted = inverted - inverted @ (lower * step) @ inverted
    return inverted


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
        self.out = Linear(config.linear_values, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, call: DeltaCall) -> Tensor:
        """Mix x [N, H] along the paths of ``call``, without positions; returns [N, H]."""
        mixed, gate, write, decay = self.project(x).split(self.config.linear_projected, dim=-1)
        key, update, total, output = self._trees(self._convolve(mixed, call), write, decay, call)
        call.results.append((key, update, total, mixed))
        heads = output.transpose(1, 2).flatten(0, 1).index_select(0, call.row_places)  # [N, Hv, dv]
        normed = F.rms_norm(heads, (self.config.linear_value_dim,), self.norm.to(heads.dtype), self.config.norm_eps)
        return self.out(normed.flatten(1).to(gate.dtype) * F.silu(gate))

    def _convolve(self, mixed: Tensor, call: DeltaCall) -> Tensor:
        """Convolve ``mixed`` [N, C] with a token's predecessors on its path: [N, C]."""
        past = call.states[f"conv_state.{self.layer}"].flatten(0, 1)
        rows = torch.cat((mixed, past.to(mixed.dtype)), dim=0)
        taps = self.conv.squeeze(1).t().to(mixed.dtype)  # [4, C], the token's own last
        total = mixed * taps[CONV_PAST]
        for back in range(CONV_PAST):
            total = total + rows.index_select(0, call.conv_rows[:, back]) * taps[CONV_PAST - 1 - back]
        return F.silu(total)

    def _trees(
        self, mixed: Tensor, write: Tensor, decay: Tensor, call: DeltaCall
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute keys, U, G and outputs [B, H, T, ...] of padded trees from packed rows [N, ...], in float32."""
        config, state = self.config, call.states[f"delta_state.{self.layer}"].float()
        mixed, write, decay = mixed.float(), write.float(), decay.float()
        keys, ancestors = config.linear_key_heads * config.linear_key_dim, call.ancestors.unsqueeze(1)  # [B, 1, T, T]
        query, key, value = call.padded(mixed).split((keys, keys, mixed.shape[-1] - 2 * keys), dim=-1)
        query, key = self._unit(query, config.linear_key_dim**-0.5), self._unit(key)
        value = value.unflatten(-1, (config.linear_value_heads, config.linear_value_dim)).transpose(1, 2)
        beta = call.padded(write.sigmoid()).transpose(1, 2).unsqueeze(-1)  # [B, H, T, 1]
        step = -self.decay_log.float().exp() * F.softplus(decay + self.decay_bias)
        own = call.ancestors + identity(call.ancestors)
        total = (own @ call.padded(step)).transpose(1, 2)  # G, [B, H, T]
        # The decay from j to t is added up by itself: bf16 has 8 bits of G_t, too few for the difference G_t - G_j.
        faded_since = call.padded(step).transpose(1, 2) @ call.between
        kept = faded_since.unflatten(-1, ancestors.shape[-2:]).clamp(max=0).exp()  # of j's writing at t
        faded, keys_seen = total.exp().unsqueeze(-1), key.transpose(-1, -2)
        lower = beta * ancestors * kept * (key @ keys_seen)
        update = inverse(lower, call.steps) @ (beta * (value - faded * (key @ state)))
        output = faded * (query @ state) + (own.unsqueeze(1) * kept * (query @ keys_seen)) @ update
        return key, update, total, output

    def _unit(self, rows: Tensor, length: float = 1.0) -> Tensor:
        """Return heads of ``length``, one per head of values: [B, T, Hk * dk] to [B, Hv, T, dk]."""
        width = self.config.linear_key_dim
        heads = rows.unflatten(-1, (self.config.linear_key_heads, width)).transpose(1, 2)
        scale = torch.full((width,), length * width**-0.5)
        heads = F.rms_norm(heads, (width,), scale, 1e-6 / width)  # for which compilers have a kernel
        repeats = self.config.linear_value_heads // self.config.linear_key_heads
        return heads.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) if repeats > 1 else heads
