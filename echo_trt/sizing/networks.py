"""Counts of a network's parameters by place, and of the parameters that one GPU holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from echo_trt.models.config import BlockConfig, DecoderConfig, Eagle3Config, StateLayout
from echo_trt.models.hybrid_config import MtpConfig

#: Bytes of a weight and of a KV value, by the recipe's precision. int8 concerns weights alone, fp8 a layer's matrices
#: alone (``Sizes.weight_bytes``): there both reading and arithmetic take half the time, so that K_max is bf16's.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "int8": 1, "int4": 0.625}
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "int8": 2, "int4": 2}
SizedConfig = DecoderConfig | Eagle3Config | BlockConfig


@dataclass(frozen=True)
class Sizes:
    """Parameters of a network by their place, over all layers; ``expert`` counts one expert.

    ``gpus`` share the network by tensor parallelism, which divides matrices. Embedding, norms and routers are whole on
    every GPU, and so are KV heads that are fewer than ``gpus`` and an output whose rows ``gpus`` do not divide.
    """

    embedding: int
    output: int  # 0 where it is tied to the embedding
    attention: int
    kv_matrices: int  # part of ``attention``
    mlp: int
    norms: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # columns of the logits
    hidden_size: int
    intermediate_size: int  # of the widest MLP, with all experts together
    num_layers: int = 1
    router: int = 0
    expert: int = 0
    experts: int = 0
    experts_per_token: int = 0
    gpus: int = 1
    feature_size: int = 0  # numbers of the target's features that a draft reads of a token
    states: StateLayout = field(default_factory=StateLayout)

    @property
    def total(self) -> int:
        """Parameters as model cards count them: a tied embedding once."""
        matrices = self.embedding + self.output + self.attention + self.mlp
        return matrices + self.expert * self.experts + self.router + self.norms

    @property
    def stored(self) -> int:
        """Parameters that an engine holds on one GPU: a tied embedding twice, as table of rows and as matrix."""
        divided = (self.mlp + self.expert * self.experts) // self.gpus
        return self.embedding + self.router + self.norms + self.attention_share + self.output_share + divided

    def weight_bytes(self, precision: str) -> float:
        """Return the bytes of the weights that one GPU holds. In fp8, matrices of layers but experts are in FP8."""
        in_fp8 = self.attention_share + self.mlp // self.gpus if precision == "fp8" else 0
        return self.stored * WEIGHT_BYTES[precision] - in_fp8

    @property
    def attention_share(self) -> int:
        """Attention's parameters on one GPU."""
        kv = self.kv_matrices // min(self.gpus, self.num_kv_heads)
        return (self.attention - self.kv_matrices) // self.gpus + kv

    @property
    def output_share(self) -> int:
        return (self.output or self.embedding) // (1 if self.vocab_size % self.gpus else self.gpus)

    @property
    def kv_values(self) -> int:
        """Values that one cached token takes on one GPU."""
        return 2 * self.num_layers * -(-self.num_kv_heads // self.gpus) * self.head_dim


def decoder_sizes(config: DecoderConfig, gpus: int = 1) -> Sizes:
    hidden, layers = config.hidden_size, config.num_layers
    sparse = sum(config.has_experts(i) for i in range(layers))
    table, norms = config.vocab_size * hidden, 4 if config.post_norms else 2
    full = config.attention_layers
    return Sizes(
        embedding=table,
        output=0 if config.tie_embeddings else table,
        attention=full * _attention(config, hidden) + config.other_parameters,
        kv_matrices=full * _kv_matrices(config, hidden),
        mlp=(layers - sparse) * 3 * hidden * config.intermediate_size,
        router=sparse * hidden * config.num_experts,
        norms=hidden + layers * norms * hidden + (full * 2 * config.head_dim if config.qk_norm else 0),
        num_layers=full,
        states=config.states,
        **_heads(config),
        vocab_size=config.vocab_size,
        intermediate_size=config.num_experts * config.expert_size if sparse else config.intermediate_size,
        expert=sparse * 3 * hidden * config.expert_size,
        experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        gpus=gpus,
    )


def head_sizes(config: Eagle3Config) -> Sizes:
    """Count an EAGLE-3 head, with the embedding that its engine holds; it is whole on the first GPU."""
    hidden, features = config.hidden_size, 3 * config.target_hidden_size
    return Sizes(
        embedding=config.vocab_size * hidden,
        output=config.draft_vocab_size * hidden,
        attention=features * hidden + _attention(config, 2 * hidden),
        kv_matrices=_kv_matrices(config, 2 * hidden),
        mlp=3 * hidden * config.intermediate_size,
        norms=4 * hidden + (features if config.fc_norm else 0),
        **_heads(config),
        vocab_size=config.draft_vocab_size,
        intermediate_size=config.intermediate_size,
        feature_size=features,
    )


def mtp_sizes(config: DecoderConfig) -> Sizes:
    """Count an MTP head, with the embedding and the output matrix that its engine holds, which are the target's."""
    hidden, table = config.hidden_size, config.vocab_size * config.hidden_size
    return Sizes(
        embedding=table,
        output=0 if config.tie_embeddings else table,
        attention=2 * hidden * hidden + _attention(config, hidden),
        kv_matrices=_kv_matrices(config, hidden),
        mlp=3 * hidden * config.intermediate_size,
        norms=5 * hidden + 2 * config.head_dim,
        **_heads(config),
        vocab_size=config.vocab_size,
        intermediate_size=config.intermediate_size,
        feature_size=hidden,
    )


def block_sizes(config: BlockConfig) -> Sizes:
    """Count a block drafter, with the embedding and the output matrix that its engine holds, own or the target's."""
    hidden, layers, first = config.hidden_size, config.num_layers, config.hidden_size * (2 if config.anchored else 1)
    features, inputs = config.feature_size, config.feature_size * hidden
    hidden_states = hidden if config.anchored or config.confidence else 0  # P-EAGLE: the mask's hidden state
    norms = 4 * hidden + (features if config.fc_norm else 0) if config.anchored else 2 * hidden
    norms += (layers - config.anchored) * 2 * hidden + (layers * 2 * config.head_dim if config.qk_norm else 0)
    return Sizes(
        embedding=config.vocab_size * hidden,
        output=config.draft_vocab_size * hidden,
        attention=inputs + _attention(config, first) + (layers - 1) * _attention(config, hidden),
        kv_matrices=_kv_matrices(config, first) + (layers - 1) * _kv_matrices(config, hidden),
        mlp=layers * 3 * hidden * config.intermediate_size,
        norms=norms + hidden_states,
        num_layers=layers,
        **_heads(config),
        vocab_size=config.draft_vocab_size,
        intermediate_size=config.intermediate_size,
        feature_size=features,
    )


def draft_sizes(config: SizedConfig, projected: bool = False) -> Sizes:
    """Count a draft's network; ``projected``: whether the target's graph makes the hidden states of its features."""
    kinds: dict[type, Any] = {Eagle3Config: head_sizes, MtpConfig: mtp_sizes, BlockConfig: block_sizes}
    sizes: Sizes = kinds.get(type(config), decoder_sizes)(config)
    return replace(sizes, feature_size=config.hidden_size) if projected and sizes.feature_size else sizes


def _heads(config: SizedConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "head_dim", "hidden_size")}


def _kv_matrices(config: SizedConfig, inputs: int) -> int:
    return 2 * (inputs + config.attention_bias) * config.num_kv_heads * config.head_dim


def _attention(config: SizedConfig, inputs: int) -> int:
    gates = config.num_heads if config.gated else 0
    heads = (config.num_heads + gates + 2 * config.num_kv_heads) * config.head_dim
    return (inputs + config.attention_bias) * heads + config.num_heads * config.head_dim * config.hidden_size
