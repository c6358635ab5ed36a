"""The drafter's network, and its role in an engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echo_trt.models.eagle3 import top_candidates


class Network(nn.Module):
    """A token's embedding beside the hidden state before it, through two matrices: Hydra's head (arXiv 2402.05109)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.down = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, state: Tensor) -> Tensor:
        """Compute states [N, H] behind ``token_ids`` int [N], from the ``state`` [N, H] before each."""
        x = torch.cat((self.embed(token_ids), state), dim=-1)
        return state + self.down(nn.functional.silu(self.up(x)))

    def combine(self, features: Tensor) -> Tensor:
        """Return what a GPU keeps of the target's ``features`` [M, H]: they are hidden states already."""
        return features


class MlpRole(nn.Module):
    """Candidates of the rows that are wanted, and every row's ``state``, which is the ``hidden`` of its children."""

    name, num_layers = "mlp", 0  # of KV rows
    inputs = ("token_ids", "positions", "features", "hidden")
    outputs = ("scores", "candidates", "state")

    def __init__(self, network: Network, top_k: int):
        super().__init__()
        self.network, self.top_k = network, top_k

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend) -> tuple[Tensor, ...]:
        features = inputs["combined"] if "combined" in inputs else inputs["features"]
        state = self.network(inputs["token_ids"], torch.cat((features, inputs["hidden"])))
        return *top_candidates(self.network.lm_head(state[logit_rows]), self.top_k), state
