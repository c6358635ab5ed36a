"""Block drafters: a whole block of draft tokens in one pass over masked rows.

DFlash: the context of a layer is ``hidden_norm(fc(features))`` of the committed tokens, whose keys and values are
cached; the block's rows are the embeddings of the root and of masks. P-EAGLE: an EAGLE-3 head, whose masked rows have a
learnt hidden state in the features' place.

Packed rows say by ``state_rows`` which *state* they are: R states of the block's rows, then M of features. In a block
whose rows all see each other, each row stands twice: kernels only look back, so that rows that look stand behind rows
that are looked at (``speculation.pack.pack_blocks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from echo_trt.models.config import BlockConfig
from echo_trt.models.decoder import DecoderLayer
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.layers import Attend, Linear, ReadBlocks, RMSNorm, Rotary, widened


class DFlash(nn.Module):
    """DFlash and DSpark. ``embed`` may be the target's table; ``stored`` as a ``Decoder``'s."""

    stored: Mapping[str, ReadBlocks] = MappingProxyType({})
    combining = ("fc", "hidden_norm")  # the modules of ``combine``

    def __init__(self, config: BlockConfig, positions: int, embed: nn.Embedding):
        super().__init__()
        self.config = config
        self.embed = embed
        self.fc = Linear(config.feature_size, config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config, positions)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size)
        self.register_buffer("target_ids", torch.arange(config.draft_vocab_size))
        #: What the confidence head takes from a hidden state; the runtime adds the previous token's part.
        self.confidence = nn.Linear(config.hidden_size, 1, bias=False) if config.confidence else None

    def forward(
        self,
        token_ids: Tensor,
        features: Tensor,
        positions: Tensor,
        state_rows: Tensor,
        logit_rows: Tensor,
        attend: Attend,
        combined: bool = False,
    ) -> Tensor:
        """Compute the block's rows: [R, H], normed.

        token_ids   int [N], packed tokens; only those of ``logit_rows`` count
        features    float [M, L * H_target], the target's, of committed tokens
        positions   int [N]
        state_rows  int [N], a packed row's state: R of the block's rows, then M of features
        logit_rows  int [R], packed rows that look at the others, one for each of the block's rows
        combined    whether ``features`` are what ``combine`` has made of them: [M, H]
        """
        context = features if combined else self.combine(features)
        x = widened(self.embed(token_ids[logit_rows]), self.norm.weight)
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            states = torch.cat((layer.attention_norm(x), context), dim=0)
            x, normed = layer.mlp_norm.add(x, layer.attention(states, cos, sin, attend, (state_rows, logit_rows)))
            x = x + layer.mlp(normed)
        return self.norm(x)

    def combine(self, features: Tensor) -> Tensor:
        """Compute the context [M, H] of a layer from the target's ``features`` [M, L * H_target]."""
        return self.hidden_norm(self.fc(features))


class ParallelEagle(Eagle3Head):
    """P-EAGLE: an EAGLE-3 head of one or more layers, with ``mask_state`` [H] as the hidden state of masked rows."""

    confidence = None

    def __init__(self, config: BlockConfig, positions: int, embed: nn.Embedding):
        super().__init__(config, positions, embed)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(1, config.num_layers))
        self.mask_state = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(
        self,
        token_ids: Tensor,
        features: Tensor,
        positions: Tensor,
        state_rows: Tensor,
        logit_rows: Tensor,
        attend: Attend,
        combined: bool = False,
    ) -> Tensor:
        """Compute the block's rows, as ``DFlash.forward``; the tokens of all rows count."""
        masks = self.mask_state.expand(logit_rows.shape[0], -1)
        state = torch.cat((masks, features if combined else self.combine(features)), dim=0)[state_rows]
        cos, sin = self.rotary(positions)
        state = self.advance(token_ids, state, cos, sin, attend)
        for layer in self.layers:
            state = layer(state, cos, sin, attend)
        return self.norm(state[logit_rows])


BlockNetwork = DFlash | ParallelEagle


def block_network(config: BlockConfig, positions: int, embed: nn.Embedding) -> BlockNetwork:
    return (ParallelEagle if config.anchored else DFlash)(config, positions, embed)
