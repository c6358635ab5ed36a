"""The roles of a network in an engine: target, standalone draft, EAGLE-3 head, block drafter.

A role takes its named ``inputs``, the rows of logits that are wanted, and the attention. An exporter turns it into a
graph and the reference engine calls it directly, so both have the same inputs and outputs by name.

Of a role, engines read ``name``, ``inputs``, ``outputs``, ``num_layers`` (of KV rows; 0: it has no attention) and
``network``. Of a network they read

config  vocab_size, hidden_size, num_kv_heads, head_dim; window_of(layer) with attention, feature_size with features
norm    where matrices may be stored in a narrower type than the one that is computed in: a norm, which has that
rotary  with attention: ``layers.Rotary``
stored  where matrices may stay in their file: ``Decoder.stored``
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from echo_trt.files.extras import DRAFTS, extra
from echo_trt.models.block import BlockNetwork, block_network
from echo_trt.models.config import BlockConfig, DecoderConfig, Eagle3Config
from echo_trt.models.decoder import Decoder
from echo_trt.models.delta_net import COMMIT_OUTPUTS, RecurrentCall
from echo_trt.models.eagle3 import Eagle3Head, top_candidates
from echo_trt.models.hybrid_config import MtpConfig
from echo_trt.models.layers import Attend, Embedding
from echo_trt.models.mtp import MtpHead


class TargetModule(nn.Module):
    """The target: logits [R, V] and, where ``feature_layers`` names layers, features [N, len * H] for a head.

    A hybrid has further inputs and outputs (``models.delta_net``): its states, and what a commit of them takes.

    ``projection``: a draft's, which makes features [N, H] of them.
    """

    name = "target"
    inputs: tuple[str, ...] = ("token_ids", "positions")

    def __init__(self, decoder: Decoder, feature_layers: tuple[int, ...] = ()):
        super().__init__()
        self.network, self.feature_layers = decoder, feature_layers
        self.projection: FeatureProjection | None = None
        self.num_layers = decoder.config.attention_layers
        self.outputs = ("logits", "features") if feature_layers else ("logits",)
        self.states = decoder.config.states.shapes
        if self.states:
            self.inputs = (*self.inputs, "parents", *self.states)
            self.outputs = (*self.outputs, *COMMIT_OUTPUTS)

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        tokens, positions = inputs["token_ids"], inputs["positions"]
        states = {name: inputs[name] for name in self.states}
        call = RecurrentCall(attend, inputs["parents"], states) if states else attend
        logits, features = self.network(tokens, positions, logit_rows, call, self.feature_layers)
        if features is not None and self.projection is not None:
            features = self.projection(features)
        outputs = (logits,) if features is None else (logits, features)
        return (*outputs, *call.stacked()) if isinstance(call, RecurrentCall) else outputs


class FeatureProjection(nn.Module):
    """What an EAGLE-3 head or a block drafter makes of the target's features before it reads them: its ``combine``.

    Its modules are copies over the draft's parameters, so that either network's weights can be released alone.
    """

    def __init__(self, draft: Eagle3Head | BlockNetwork):
        super().__init__()
        network = copy.copy(draft)
        kept = *draft.combining, "norm"  # which has the type that is computed in
        network._modules = {name: module for name, module in network._modules.items() if name in kept}
        self.network = copy.deepcopy(network, {id(each): each for each in network.parameters()})

    def forward(self, features: Tensor) -> Tensor:
        """Return hidden states [N, H] of features [N, F]."""
        return self.network.combine(features.to(computed_in(self.network)))


def _features(role: HeadModule | BlockModule, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Return a draft's features, and whether they are combined, by the target or by the engine that keeps them."""
    combined = "combined" in inputs
    return inputs["combined" if combined else "features"], combined or role.projected


class DraftModule(nn.Module):
    """A draft: log-probabilities [R, k] and token ids [R, k] of the ``top_k`` best next tokens of every wanted row."""

    name, inputs, outputs = "draft", ("token_ids", "positions"), ("scores", "candidates")

    def __init__(self, decoder: Decoder, top_k: int):
        super().__init__()
        self.network, self.top_k = decoder, top_k
        self.num_layers = decoder.config.num_layers

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        logits, _ = self.network(inputs["token_ids"], inputs["positions"], logit_rows, attend)
        return top_candidates(logits, self.top_k)


class HeadModule(nn.Module):
    """An EAGLE-3 head: a draft's outputs, and the state [N, H] of every row for its children's ``hidden``.

    ``projected``: whether a FeatureProjection of the target's has combined the features.
    """

    name, num_layers, projected = "head", 1, False
    inputs = ("token_ids", "positions", "features", "hidden")
    outputs = ("scores", "candidates", "state")

    def __init__(self, head: Eagle3Head | MtpHead, top_k: int):
        super().__init__()
        self.network, self.top_k = head, top_k

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        tokens, positions, rows = inputs["token_ids"], inputs["positions"], inputs.get("state_rows")
        features, combined = _features(self, inputs)
        state = self.network(tokens, features, inputs["hidden"], positions, attend, rows, combined)
        scores, index = top_candidates(self.network.logits(state[logit_rows]), self.top_k)
        return scores, self.network.target_ids[index], state


class MtpModule(HeadModule):
    """An MTP head, which proposes any token of the vocabulary."""

    name = "mtp"

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        tokens, positions = inputs["token_ids"], inputs["positions"]
        state = self.network(tokens, inputs["features"], inputs["hidden"], positions, attend)
        return *top_candidates(self.network.logits(state[logit_rows]), self.top_k), state


class BlockModule(nn.Module):
    """A block drafter: a draft's outputs for each of the block's rows, and ``confidence`` [R, 1] with such a head."""

    name, inputs, projected = "block", ("token_ids", "positions", "features", "state_rows"), False

    def __init__(self, drafter: BlockNetwork, top_k: int):
        super().__init__()
        self.network, self.top_k = drafter, top_k
        self.num_layers = drafter.config.num_layers
        self.outputs = ("scores", "candidates", *(("confidence",) if drafter.confidence is not None else ()))

    def forward(self, inputs: dict[str, Tensor], logit_rows: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        tokens, positions, states = inputs["token_ids"], inputs["positions"], inputs["state_rows"]
        features, combined = _features(self, inputs)
        rows = self.network(tokens, features, positions, states, logit_rows, attend, combined)
        scores, index = top_candidates(self.network.lm_head(rows), self.top_k)
        confidence = () if self.network.confidence is None else (self.network.confidence(rows),)
        return scores, self.network.target_ids[index], *confidence


Role = TargetModule | DraftModule | HeadModule | BlockModule


def feature_size(draft: Role) -> int:
    """Return the numbers of a token's features that a draft reads."""
    config: Any = draft.network.config
    return int(config.hidden_size if getattr(draft, "projected", False) else config.feature_size)


def project_in_target(draft: Role | None) -> FeatureProjection | None:
    """Let a draft read features that its target projects; returns what does. None: this draft projects none."""
    if type(draft) not in (HeadModule, BlockModule):  # others may read features in a way of their own
        return None
    draft.projected = True
    return FeatureProjection(draft.network)


def _decoder(config: DecoderConfig, positions: int) -> Decoder:
    from echo_trt.models.weights import decoder_class  # a bare machine with a card reads no checkpoints

    return decoder_class(config)(config, positions)


def _embedding(config: Eagle3Config) -> nn.Embedding:
    return Embedding(config.vocab_size, config.hidden_size)


#: A role, its network's configuration, and what makes the network of a configuration and of rotary positions.
RoleMaker = tuple[type, type, Callable[[Any, int], nn.Module]]
ROLES: dict[str, RoleMaker] = {  # by name
    "target": (TargetModule, DecoderConfig, _decoder),
    "draft": (DraftModule, DecoderConfig, _decoder),
    "mtp": (MtpModule, MtpConfig, MtpHead),
    "head": (HeadModule, Eagle3Config, lambda config, length: Eagle3Head(config, length, _embedding(config))),
    "block": (BlockModule, BlockConfig, lambda config, length: block_network(config, length, _embedding(config))),
}


def role_named(name: str) -> RoleMaker:
    """Return what makes a role of a name: of ROLES, or of the drafter of that name, which brings it."""
    made: RoleMaker = ROLES[name] if name in ROLES else extra(DRAFTS, name).role()
    return made


def computed_in(network: nn.Module) -> torch.dtype:
    """Return the type of a network's activations."""
    norm = getattr(network, "norm", None)
    return (next(network.parameters()) if norm is None else norm.weight).dtype
