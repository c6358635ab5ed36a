"""Qwen3.5's MTP head: one layer of gated attention over a token's embedding and the target's last hidden state.

Entry j of a request is the pair (token j+1, hidden state j) and predicts token j+2, as of an EAGLE-3 head. Hidden state
j is the target's behind its last norm or, where the target has not seen token j yet, this head's own output.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_trt.models.decoder import DecoderLayer
from echo_trt.models.hybrid_config import MtpConfig
from echo_trt.models.layers import Attend, Embedding, Linear, ReadBlocks, RMSNorm, Rotary, widened
from echo_trt.models.qwen3_5 import GatedAttention


class MtpHead(nn.Module):
    """The head as a network, with the inputs and outputs of ``eagle3.Eagle3Head``.

    stored  as a ``Decoder``'s
    """

    stored: Mapping[str, ReadBlocks] = MappingProxyType({})

    def __init__(self, config: MtpConfig, positions: int):
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.config = config
        self.embed = Embedding(config.vocab_size, hidden)
        self.rotary = Rotary(config, positions)
        self.embed_norm, self.hidden_norm, self.norm = (RMSNorm(hidden, eps) for _ in range(3))
        self.fc = Linear(2 * hidden, hidden)
        self.layer = DecoderLayer(config, 0)
        self.layer.attention = GatedAttention(config, 0)
        self.lm_head = None if config.tie_embeddings else Linear(hidden, config.vocab_size)

    def forward(self, token_ids: Tensor, features: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute the outputs [N, H] of N entries; see ``Eagle3Head.forward`` for the inputs."""
        state = torch.cat((features, hidden), dim=0)
        embedded = self.embed_norm(widened(self.embed(token_ids), self.norm.weight))
        x = self.fc(torch.cat((embedded, self.hidden_norm(state)), dim=-1))
        return self.norm(self.layer(x, *self.rotary(positions), attend))

    def logits(self, state: Tensor) -> Tensor:
        """Compute scores over the vocabulary [R, V] from outputs [R, H]."""
        head = self.embed.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(state, widened(head, state))
