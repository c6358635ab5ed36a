"""The sizes of a decoder with delta-net layers (Qwen3.5, dense) and of its MTP head."""

from __future__ import annotations

from dataclasses import dataclass, fields

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig
from echo_trt.speculation.paths import CONV_PAST

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
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        """Columns of the output of all heads."""
        return self.value_heads * self.value_dim

    @property
    def projected(self) -> list[int]:
        """Columns of the merged projection: query, key and value; the output's gate; write strength; decay."""
        return [self.channels, self.values, self.value_heads, self.value_heads]


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


def mtp_config(target: DecoderConfig, where: str) -> MtpConfig:
    """Return the sizes of the MTP head in a target's checkpoint. Raises UserError where none is known."""
    if not isinstance(target, HybridConfig):
        raise UserError(
            f"draft.kind is mtp, but {where} has no MTP head that is known (mtp.fc.weight of Qwen3.5); use another "
            "kind of draft."
        )
    return MtpConfig(**{field.name: getattr(target, field.name) for field in fields(target)})


def state_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a request's states, float32 whatever the precision, by name; of a hybrid alone."""
    if not isinstance(config, HybridConfig):
        return {}
    sizes, layers = config.delta_net, range(len(config.linear_layers))
    kinds = {
        "conv_state": (CONV_PAST, sizes.channels),
        "delta_state": (sizes.value_heads, sizes.key_dim, sizes.value_dim),
    }
    return {f"{kind}.{layer}": shape for kind, shape in kinds.items() for layer in layers}
