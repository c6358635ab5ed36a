"""What the package knows of a kind of decoder, and the reading of counts in a checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig

if TYPE_CHECKING:  # a configuration is read without it
    import torch

#: (config.json, its number of layers, its name in errors) -> fields of DecoderConfig beside the sizes.
ReadOptions = Callable[[dict[str, Any], int, str], dict[str, Any]]

#: Our name of a layer's norm -> the usual one of checkpoints.
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the registry: how checkpoints of a kind of decoder are told and read, and what its models can do.

    name          transformers' model_type
    architecture  in config.json; transformers' class of this name is what the network is compared with
    gguf          general.architecture of its GGUF files; "": none are read. Files of one that two families name are
                  read as the first family's
    interleaved   whether llama.cpp's converter interleaves the two halves of each head's rotary dimensions
    completed     returns config.json, or what takes its place, with what it leaves out; it takes the file's name, too
    gguf_options  reads keys of config.json from a GGUF file, by a function of a field's key and default, and the sizes
    renamed       what a tensor's usual name has in it -> what the checkpoint's has
    gguf_values   what a tensor's name ends with -> what makes its values of the file's
    fixed         switches of config.json that change the arithmetic, with the one value that is implemented
    options       reads what is more than sizes
    norms         our name of a layer's norm -> the checkpoint's
    merged        the checkpoint's name of a merged matrix of a layer -> the usual ones of its parts
    rotated       returns how many of a head's numbers are rotated, of config.json and the head's size
    config        what it is read into
    end_of_turn   token that ends an answer, beside those that a checkpoint names; "": none
    sampling      what requests that say nothing get of a GGUF file that recommends nothing

    For readers of docs/models.md: published ``models``, the ``drafts`` that there are, how they call ``tools`` and
    whether they are ``thinking``. What a served model does is told by its own chat
    template and tokenizer.
    """

    name: str
    architecture: str
    models: str
    gguf: str = ""
    interleaved: bool = False
    completed: Callable[[dict[str, Any], str], dict[str, Any]] = lambda raw, where: raw
    gguf_options: Callable[[Callable[..., Any], dict[str, Any]], dict[str, Any]] = lambda field, config: {}
    renamed: Mapping[str, str] = field(default_factory=dict)
    gguf_values: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: ReadOptions = lambda raw, layers, where: {}
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rotated: Callable[[dict[str, Any], int], int] = lambda raw, head_dim: head_dim
    config: type[DecoderConfig] = DecoderConfig
    end_of_turn: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    drafts: str = "a smaller model"
    tools: str = "as text"
    thinking: str = "no"


def count(raw: dict[str, Any], key: str, where: str) -> int:
    """Read a positive integer of config.json. Raises UserError."""
    value = raw.get(key)
    if value is None:
        raise UserError(f"{where}: {key} is missing; take the config.json that belongs to the checkpoint.")
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}, not a positive integer; take the checkpoint's own config.json.")
    return value
