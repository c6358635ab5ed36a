"""What an engine computes with a network: the target's part, a standalone draft's, an EAGLE-3 head's.

A role takes its named ``inputs``, the rows asked for, and how to attend. An exporter turns it into a graph, the
reference engine calls it as it is; so both have the same inputs and outputs by name.
"""

from __future__ import annotations

from torch import Tensor, nn

from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head, top_candidates
from echo_trt.models.layers import Attend


class TargetRole(nn.Module):
    """logits [R, V] and, where ``feature_layers`` names layers, the features [N, len * H] for an EAGLE-3 head."""

    inputs = ("token_ids", "positions")

    def __init__(self, decoder: Decoder, feature_layers: tuple[int, ...] = ()):
        super().__init__()
        self.network, self.feature_layers = decoder, feature_layers
        self.num_layers = decoder.config.num_layers
        self.outputs = ("logits", "features") if feature_layers else ("logits",)

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        logits, features = self.network(
            inputs["token_ids"], inputs["positions"], logit_rows, attend, self.feature_layers
        )
        return (logits,) if features is None else (logits, features)


class DraftRole(nn.Module):
    """The best ``top_k`` next tokens of each row asked for: log-probabilities [R, k] and token ids [R, k]."""

    inputs = ("token_ids", "positions")
    outputs = ("scores", "candidates")

    def __init__(self, decoder: Decoder, top_k: int):
        super().__init__()
        self.network, self.top_k = decoder, top_k
        self.num_layers = decoder.config.num_layers

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        logits, _ = self.network(inputs["token_ids"], inputs["positions"], logit_rows, attend)
        return top_candidates(logits, self.top_k)


class HeadRole(nn.Module):
    """As a draft, with the head's state [N, H] of every row, which the row's children take as their ``hidden``."""

    inputs = ("token_ids", "positions", "features", "hidden")
    outputs = ("scores", "candidates", "state")
    num_layers = 1

    def __init__(self, head: Eagle3Head, top_k: int):
        super().__init__()
        self.network, self.top_k = head, top_k

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        entries = inputs["token_ids"], inputs["features"], inputs["hidden"], inputs["positions"]
        state = self.network(*entries, attend, inputs.get("state_rows"))
        scores, index = top_candidates(self.network.logits(state[logit_rows]), self.top_k)
        return scores, self.network.target_ids[index], state


Role = TargetRole | DraftRole | HeadRole
