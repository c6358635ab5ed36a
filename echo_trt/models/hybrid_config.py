"""The sizes of a decoder with delta-net layers (Qwen3.5, dense) and of its MTP head, and their reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig
from echo_trt.speculation.paths import CONV_PAST

ARCHITECTURES = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
#: Tensors of a published checkpoint that a text decoder does not read: images, and the MTP head.
OTHERS = ("mtp.", "model.visual.")


@dataclass(frozen=True, kw_only=True)
class DeltaNetSizes:
    """The sizes of a delta-net layer: heads of keys and of values, and their widths."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Columns of query, key and value side by side, which the convolution mixes along the text."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a request's states in one layer, by kind."""
        return {
            "conv_state": (CONV_PAST, self.channels),
            "delta_state": (self.value_heads, self.key_dim, self.value_dim),
        }


@dataclass(frozen=True, kw_only=True)
class HybridConfig(DecoderConfig):
    """A decoder some of whose layers are gated delta nets.

    linear_layers  indices of the delta-net layers
    rotary_dim     numbers of a head that are rotated, the first ones
    """

    linear_layers: tuple[int, ...]
    rotary_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int

    @property
    def delta_net(self) -> DeltaNetSizes:
        return DeltaNetSizes(
            key_heads=self.linear_key_heads,
            value_heads=self.linear_value_heads,
            key_dim=self.linear_key_dim,
            value_dim=self.linear_value_dim,
        )

    @property
    def attention_layers(self) -> int:
        """Number of layers that have KV rows."""
        return self.num_layers - len(self.linear_layers)


@dataclass(frozen=True, kw_only=True)
class MtpConfig(HybridConfig):
    """The sizes of an MTP head, which are those of its target."""

    @property
    def feature_size(self) -> int:
        """Numbers of a token's features, which are the target's last hidden state."""
        return self.hidden_size


def hybrid_config(raw: dict[str, Any], where: str, shape: dict[str, Any], rotary_share: float) -> HybridConfig:
    """Read what ``shape`` does not have, from a configuration of text alone."""
    kinds = raw.get("layer_types") or []
    if len(kinds) != shape["num_layers"] or not set(kinds) <= {"linear_attention", "full_attention"}:
        raise UserError(
            f"{where}: layer_types must name linear_attention or full_attention for each of {shape['num_layers']} "
            "layers; take the checkpoint's own config.json."
        )
    if raw.get("linear_conv_kernel_dim", 4) != CONV_PAST + 1:
        raise UserError(f"{where}: linear_conv_kernel_dim is {raw['linear_conv_kernel_dim']}, but must be 4.")
    eos = raw.get("eos_token_id")
    return HybridConfig(
        family="qwen3_5",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=True,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        linear_layers=tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention"),
        rotary_dim=int(shape["head_dim"] * rotary_share),
        linear_key_heads=raw["linear_num_key_heads"],
        linear_value_heads=raw["linear_num_value_heads"],
        linear_key_dim=raw["linear_key_head_dim"],
        linear_value_dim=raw["linear_value_head_dim"],
        **shape,
    )


def state_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a request's states, float32 whatever the precision, by name; of a hybrid alone."""
    if not isinstance(config, HybridConfig):
        return {}
    kinds, layers = config.delta_net.state_shapes, range(len(config.linear_layers))
    return {f"{kind}.{layer}": shape for kind, shape in kinds.items() for layer in layers}
