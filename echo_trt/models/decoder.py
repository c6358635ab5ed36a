"""The decoder of all families (``models.families``), which differ in configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from echo_trt.models.config import DecoderConfig, Eagle3Config
from echo_trt.models.layers import (
    MLP,
    Attend,
    Attention,
    Embedding,
    Experts,
    Linear,
    ReadBlocks,
    RMSNorm,
    Rotary,
    widened,
)
from echo_trt.models.ranks import all_gather


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig | Eagle3Config, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer, config.hidden_size, config.qk_norm)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if config.has_experts(layer):
            self.mlp = Experts(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.ranks, config.gelu)
        norm = RMSNorm if config.post_norms else (lambda size, eps: nn.Identity())
        self.attention_post_norm = norm(config.hidden_size, config.norm_eps)
        self.mlp_post_norm = norm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x, delta = self.advance(x, None, cos, sin, attend)
        return x + delta

    def advance(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output in two parts whose sum it is; its input comes in two as well, or in one.

        So that a sum and the norm behind it are one step on a GPU.
        """
        x, normed = self.attention_norm.add(x, delta)
        x, normed = self.mlp_norm.add(x, self.attention_post_norm(self.attention(normed, cos, sin, attend)))
        return x, self.mlp_post_norm(self.mlp(normed))


class Decoder(nn.Module):
    """A decoder over packed tokens; ``positions``, the rotary table's length, covers context and deepest tree.

    stored  reads the matrices, by name, that the checkpoint has in blocks of few bits
    """

    stored: Mapping[str, ReadBlocks] = MappingProxyType({})

    def __init__(self, config: DecoderConfig, positions: int):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config, positions)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.output_rows)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        attend: Attend,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of some rows, and the features of all.

        token_ids   int [N], packed tokens
        positions   int [N], a token's position in its text
        logit_rows  int [R], rows whose next token is wanted
        Returns logits [R, V] and the inputs of ``feature_layers`` side by side [N, len * H], or None without layers.
        """
        x, scale = widened(self.embed(token_ids), self.norm.weight), self.config.embedding_scale
        x = x if scale == 1 else x * scale
        angles = self.rotary(positions)
        local = self.rotary.local(positions) if self.rotary.local else angles
        features, delta = {}, None
        for i, layer in enumerate(self.layers):
            if i in feature_layers:
                x, delta = x if delta is None else x + delta, None
                features[i] = x
            x, delta = layer.advance(x, delta, *(local if self.config.window_of(i) else angles), attend)
        x = x if delta is None else x + delta
        if self.config.num_layers in feature_layers:  # of an MTP head: the last hidden states, behind the norm
            features[self.config.num_layers] = x = self.norm(x)
            rows = x[logit_rows]
        else:
            rows = self.norm(x[logit_rows])
        logits = self.logits(rows)
        return logits, torch.cat([features[i] for i in feature_layers], dim=-1) if feature_layers else None

    def logits(self, rows: Tensor) -> Tensor:
        """Multiply normed hidden states [R, H] by the output matrix: [R, V]."""
        head = widened(self.embed.weight if self.lm_head is None else self.lm_head.weight, rows)
        if len(head) < self.config.vocab_size:
            return all_gather(torch.nn.functional.linear(head, rows), self.config.ranks).t()
        return torch.nn.functional.linear(rows, head)
