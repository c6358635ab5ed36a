"""The EAGLE-3 head (arXiv 2503.01840): a one-layer draft over the target's features.

Entry j of a request is the pair (token j+1, feature j) and predicts token j+2. Feature j comes from the target, or from
the head where the target has not seen token j yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from echo_trt.models.config import Eagle3Config
from echo_trt.models.layers import MLP, Attend, Attention, Linear, ReadBlocks, RMSNorm, Rotary, widened


class Eagle3Head(nn.Module):
    """The head as a network. ``embed`` may be the target's table, which a head without embeddings shares.

    stored  as a ``Decoder``'s
    """

    stored: Mapping[str, ReadBlocks] = MappingProxyType({})
    combining = ("fc_norms", "fc")  # the modules of ``combine``

    def __init__(self, config: Eagle3Config, positions: int, embed: nn.Embedding):
        super().__init__()
        hidden, features = config.hidden_size, 3 * config.target_hidden_size
        self.config = config
        self.embed = embed
        norms = 3 if config.fc_norm else 0
        self.fc_norms = nn.ModuleList(RMSNorm(config.target_hidden_size, config.norm_eps) for _ in range(norms))
        self.fc = Linear(features, hidden)
        self.rotary = Rotary(config, positions)
        self.embed_norm = RMSNorm(hidden, config.norm_eps)
        self.hidden_norm = RMSNorm(hidden, config.norm_eps)
        self.attention = Attention(config, 0, 2 * hidden, qk_norm=False)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.norm = RMSNorm(hidden, config.norm_eps)
        self.lm_head = Linear(hidden, config.draft_vocab_size)
        self.register_buffer("target_ids", torch.arange(config.draft_vocab_size))

    def forward(
        self,
        token_ids: Tensor,
        features: Tensor,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        state_rows: Tensor | None = None,
        combined: bool = False,
    ) -> Tensor:
        """Compute the outputs of N = M + P entries: [N, H], read by ``logits`` and by children as their ``hidden``.

        token_ids   int [N]
        features    float [M, 3*H_target], the target's, of the first M entries
        hidden      float [P, H], this head's outputs for the parents of the other P entries
        positions   int [N]
        state_rows  int [N], an entry's row of features and hidden end to end, where entries come in another order
        combined    whether ``features`` are what ``combine`` has made of them: [M, H]
        """
        if combined and not (len(features) and len(hidden)):
            state = features if len(features) else hidden
        else:
            state = torch.cat((features if combined else self.combine(features), hidden), dim=0)
        if state_rows is not None:
            state = state[state_rows]
        state = self.advance(token_ids, state, *self.rotary(positions), attend)
        return self.norm(state) if self.config.norm_output else state

    def combine(self, features: Tensor) -> Tensor:
        """Compute entries' hidden states [M, H] from the target's ``features`` [M, 3*H_target]."""
        if self.config.fc_norm:
            parts = zip(self.fc_norms, features.chunk(3, dim=-1), strict=True)
            features = torch.cat([norm(part) for norm, part in parts], dim=-1)
        return self.fc(features)

    def advance(self, token_ids: Tensor, state: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Run the head's layer over entries of ``token_ids`` int [N] and hidden ``state`` [N, H]."""
        normed = self.hidden_norm(state)
        x = torch.cat((self.embed_norm(widened(self.embed(token_ids), self.norm.weight)), normed), dim=-1)
        state = normed if self.config.norm_before_residual else state
        state, normed = self.mlp_norm.add(state, self.attention(x, cos, sin, attend))
        return state + self.mlp(normed)

    def logits(self, state: Tensor) -> Tensor:
        """Compute scores over the draft vocabulary [R, draft_vocab_size] from outputs [R, H]."""
        return self.lm_head(state if self.config.norm_output else self.norm(state))


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [R, k] and indices [R, k] of a row's k best next tokens, best first."""
    logits = logits.float()  # a half-precision graph's log-probabilities would tie and drift
    best, index = logits.topk(k, dim=-1)
    return best - logits.logsumexp(dim=-1, keepdim=True), index
