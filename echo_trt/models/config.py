"""The sizes and switches of a network; ``read_config`` and ``block_config`` read them from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What all networks have: RMS norm, rotary positions, grouped-query attention, a gated MLP.

    ranks             among which the network is divided; heads, KV heads and widths are those of one rank
    attention_bias    whether query, key and value have a bias
    unrotated_layers  layers whose query and key have no rotary positions
    local_rope_theta  rotary base of the layers with a window, without scaling; 0: that of the others
    gelu              whether the MLP's activation is GELU, approximated by tanh, and not SiLU
    post_norms        whether attention's and the MLP's outputs have a norm before they are added
    gated             whether attention's output is multiplied by gates, of which a query head has as many as numbers
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    attention_bias: bool = False
    unrotated_layers: tuple[int, ...] = ()
    local_rope_theta: float = 0.0
    gelu: bool = False
    post_norms: bool = False
    gated: ClassVar[bool] = False

    def window_of(self, layer: int) -> int:
        """Return how many tokens, itself among them, a token of ``layer`` sees; 0: all before it."""
        return 0


@dataclass(frozen=True)
class StateLayout:
    """What a decoder keeps of a request beside its KV rows, in float32: ``shapes`` by input name; mostly nothing.

    row  numbers that a pass keeps of each of its rows until it is committed
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    row: int = 0

    @property
    def values(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(NetworkConfig):
    """A decoder-only transformer, dense or with experts.

    family           name of its row in ``models.families``
    window           tokens that a token sees, itself among them, but in ``full_layers``; 0: all before it
    full_layers      layers without a window
    norm_offset      what norms' weights are stored without
    query_scale      factor on queries beside head_dim ** -0.5, which the query's norm takes
    embedding_scale  factor on embeddings, where they are no output matrix
    logit_scale      factor on logits, which the last norm takes
    """

    family: str
    num_layers: int
    tie_embeddings: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_expert_weights: bool = False
    dense_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    window: int = 0
    full_layers: tuple[int, ...] = ()
    norm_offset: float = 0.0
    query_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    def window_of(self, layer: int) -> int:
        return 0 if layer in self.full_layers else self.window

    @property
    def feature_layers(self) -> tuple[int, int, int]:
        """The layers whose *inputs* are EAGLE-3's features, low to high (arXiv 2503.01840)."""
        last = self.num_layers - 1
        return min(2, last), self.num_layers // 2, max(self.num_layers - 3, 0)

    @property
    def output_rows(self) -> int:
        """Rows of this rank's output matrix: all rows where the vocabulary cannot be divided."""
        return self.vocab_size if self.vocab_size % self.ranks else self.vocab_size // self.ranks

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def attention_layers(self) -> int:
        """Number of layers that have KV rows."""
        return self.num_layers

    @property
    def other_parameters(self) -> int:
        """Parameters of what stands in attention's place in the other layers."""
        return 0

    @property
    def states(self) -> StateLayout:
        return StateLayout()


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(NetworkConfig):
    """An EAGLE-3 head (arXiv 2503.01840): one decoder layer over a token's embedding and the target's features.

    fc_norm               EAGLE-3.1: every one of the three features has a norm before fc
    norm_before_residual  the residual starts from the normed hidden state
    norm_output           EAGLE-3.1: children take this head's output after ``norm``
    feature_layers        layers of the target whose *inputs* are the features, low to high; empty: by default
    layer_key             key of config.json that names them
    target_layers         layers of the target as the checkpoint states them; 0: it does not
    target_sha256         of the weights that it was trained for, as the checkpoint states it; "": it does not
    """

    draft_vocab_size: int
    target_hidden_size: int
    fc_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    feature_layers: tuple[int, ...] = ()
    layer_key: str = "eagle_aux_hidden_state_layer_ids"
    target_layers: int = 0
    target_sha256: str = ""

    @property
    def feature_size(self) -> int:
        """Numbers of a token's features."""
        return 3 * self.target_hidden_size


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Eagle3Config):
    """A block drafter: layers over masked rows, which see the target's features of the committed tokens.

    block_size             rows of one pass for each request, the root's included
    mask_token             token id of the other rows
    causal                 whether a row of the block sees only the rows before it
    predicts_next          whether a row predicts the token behind its position, else the one at it
    anchored               P-EAGLE: entries are EAGLE-3's, and the newest one is the block's first row
    confidence             whether a confidence head says how likely a row's best token is accepted
    confidence_sees_token  whether that head sees an embedding of the previous token, too
    """

    family: str
    num_layers: int
    block_size: int
    mask_token: int
    causal: bool = False
    predicts_next: bool = False
    anchored: bool = False
    qk_norm: bool = True
    confidence: bool = False
    confidence_sees_token: bool = False

    @property
    def feature_size(self) -> int:
        """Numbers of a token's features."""
        return len(self.feature_layers) * self.target_hidden_size

    def has_experts(self, layer: int) -> bool:
        return False
