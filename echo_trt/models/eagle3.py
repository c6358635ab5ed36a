"""The EAGLE-3 head (arXiv 2503.01840): a one-layer draft over the target's features.

Entry j of a request is the pair (token j+1, feature j): the embedding of a token beside what the target, or for a token
the target has not seen yet the head itself, knew one position earlier. It predicts token j+2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echo_trt.models.config import Eagle3Config
from echo_trt.models.layers import MLP, Attend, Attention, RMSNorm, Rotary


class Eagle3Head(nn.Module):
    """``embed`` may be the target's own table: a head that brings none shares it."""

    def __init__(self, config: Eagle3Config, positions: int, embed: nn.Embedding):
        super().__init__()
        hidden, features = config.hidden_size, 3 * config.target_hidden_size
        self.config = config
        self.embed = embed
        norms = 3 if config.fc_norm else 0
        self.fc_norms = nn.ModuleList(RMSNorm(config.target_hidden_size, config.norm_eps) for _ in range(norms))
        self.fc = nn.Linear(features, hidden, bias=False)
        self.rotary = Rotary(config, positions)
        self.embed_norm = RMSNorm(hidden, config.norm_eps)
        self.hidden_norm = RMSNorm(hidden, config.norm_eps)
        self.attention = Attention(config, 0, 2 * hidden, qk_norm=False)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.norm = RMSNorm(hidden, config.norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("target_ids", torch.arange(config.draft_vocab_size))

    def forward(
        self,
        token_ids: Tensor,
        features: Tensor,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        state_rows: Tensor | None = None,
    ) -> Tensor:
        """One layer over N = M + P entries.

        features [M, 3*H_target] are the target's, of the first M entries; hidden [P, H] is this head's own output for
        the parents of the other P. Where entries come in another order, ``state_rows`` [N] gives each one's row of
        those M + P. Returns each entry's output [N, H], from which ``logits`` reads and which its children take as
        their ``hidden``.
        """
        if self.config.fc_norm:
            parts = zip(self.fc_norms, features.chunk(3, dim=-1), strict=True)
            features = torch.cat([norm(part) for norm, part in parts], dim=-1)
        state = torch.cat((self.fc(features), hidden), dim=0)
        if state_rows is not None:
            state = state[state_rows]
        normed = self.hidden_norm(state)
        cos, sin = self.rotary(positions)
        x = torch.cat((self.embed_norm(self.embed(token_ids)), normed), dim=-1)
        state = (normed if self.config.norm_before_residual else state) + self.attention(x, cos, sin, attend)
        state = state + self.mlp(self.mlp_norm(state))
        return self.norm(state) if self.config.norm_output else state

    def logits(self, state: Tensor) -> Tensor:
        """Scores over the draft vocabulary [R, draft_vocab_size] from outputs [R, H]."""
        return self.lm_head(state if self.config.norm_output else self.norm(state))


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best next tokens of each row: log-probabilities [R, k] and their indices [R, k], best first."""
    logits = logits.float()  # a half-precision graph's log-probabilities would tie and drift
    best, index = logits.topk(k, dim=-1)
    return best - logits.logsumexp(dim=-1, keepdim=True), index
