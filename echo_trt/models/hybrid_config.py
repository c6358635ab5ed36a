"""The sizes of decoders with recurrent layers: delta nets (Qwen3.5, and its MTP head) and short convolutions (LFM2)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig, StateLayout

#: Tokens before a token that a convolution reads, besides the token, at most.
CONV_PAST = 3

#: The sizes of delta-net heads and of short convolutions are multiples of it.
UNIT = 32

#: Tensors of a published checkpoint that a text decoder does not read: images, and the MTP head.
OTHERS = ("mtp.", "model.visual.")


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(DecoderConfig):
    """A decoder that has ``recurrent_layers``, which keep states, between layers of attention."""

    recurrent_layers: tuple[int, ...]

    @property
    def attention_layers(self) -> int:
        return self.num_layers - len(self.recurrent_layers)


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(RecurrentConfig):
    """A decoder some of whose layers are gated short convolutions over ``taps`` tokens."""

    taps: int

    @property
    def other_parameters(self) -> int:
        """Parameters of the convolutions and of the projections around them."""
        return len(self.recurrent_layers) * self.hidden_size * (4 * self.hidden_size + self.taps)

    @property
    def states(self) -> StateLayout:
        kinds: dict[str, tuple[int, ...]] = {"conv_state": (CONV_PAST, self.hidden_size), "delta_state": (0, 0, 0)}
        layers = range(len(self.recurrent_layers))
        shapes = {f"{kind}.{layer}": shape for kind, shape in kinds.items() for layer in layers}
        return StateLayout(shapes, len(layers) * self.hidden_size)


@dataclass(frozen=True, kw_only=True)
class HybridConfig(RecurrentConfig):
    """A decoder whose ``recurrent_layers`` are gated delta nets; names that begin with linear are of their heads.

    rotary_dim     numbers of a head that are rotated, the first ones
    tiled_heads    whether heads of values take turns with the heads of keys, as in GGUF files; else those of one head
                   of keys stand together
    """

    rotary_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    tiled_heads: bool = False
    gated: ClassVar[bool] = True

    @property
    def linear_channels(self) -> int:
        """Columns of query, key and value side by side, which the convolution mixes along the text."""
        return 2 * self.linear_key_heads * self.linear_key_dim + self.linear_values

    @property
    def linear_values(self) -> int:
        """Columns of the output of all heads."""
        return self.linear_value_heads * self.linear_value_dim

    @property
    def key_head(self) -> list[int]:
        """The head of keys of each head of values."""
        keys, heads = self.linear_key_heads, range(self.linear_value_heads)
        return [head % keys if self.tiled_heads else head // (len(heads) // keys) for head in heads]

    @property
    def linear_projected(self) -> list[int]:
        """Columns of the merged projection: query, key and value; the output's gate; write strength; decay."""
        return [self.linear_channels, self.linear_values, self.linear_value_heads, self.linear_value_heads]

    @property
    def other_parameters(self) -> int:
        """Parameters of the delta-net layers: projections, the convolution of four, decays and the norm of heads."""
        small = 4 * self.linear_channels + 2 * self.linear_value_heads + self.linear_value_dim
        projections = self.hidden_size * (sum(self.linear_projected) + self.linear_values)
        return len(self.recurrent_layers) * (projections + small)

    @property
    def states(self) -> StateLayout:
        delta_state = self.linear_value_heads, self.linear_key_dim, self.linear_value_dim
        kinds = {"conv_state": (CONV_PAST, self.linear_channels), "delta_state": delta_state}
        layers = range(len(self.recurrent_layers))
        shapes = {f"{kind}.{layer}": shape for kind, shape in kinds.items() for layer in layers}
        keys = self.linear_key_heads * self.linear_key_dim
        row = len(layers) * (self.linear_channels + keys + self.linear_values + self.linear_value_heads)
        return StateLayout(shapes, row)


@dataclass(frozen=True, kw_only=True)
class MtpConfig(HybridConfig):
    """The sizes of an MTP head, which are those of its target."""

    @property
    def feature_size(self) -> int:
        """Numbers of a token's features, which are the target's last hidden state."""
        return self.hidden_size


def mtp_config(target: DecoderConfig | None, where: str) -> MtpConfig:
    """Return the sizes of the MTP head in a target's checkpoint; None: it has none. Raises UserError then."""
    if not isinstance(target, HybridConfig):
        raise UserError(
            f"draft.kind is mtp, but {where} has no MTP head that is known (mtp.fc.weight of Qwen3.5); use another "
            "kind of draft."
        )
    return MtpConfig(**{field.name: getattr(target, field.name) for field in fields(target)})
