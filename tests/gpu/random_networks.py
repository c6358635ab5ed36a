"""Networks of a given shape with random weights, made where they run."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import nn

from echo_trt.engine.drafters.kind import HEAD_VOCABULARY
from echo_trt.models.config import DecoderConfig, Eagle3Config, NetworkConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.layers import Rotary

#: Qwen3-8B's config.json
QWEN3_8B = DecoderConfig(
    family="qwen3",
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_position=40_960,
    qk_norm=True,
)
#: Small, and large enough that a GPU's kernels are those of a real network.
SMALL = replace(
    QWEN3_8B, vocab_size=4096, hidden_size=512, intermediate_size=1024, num_layers=6, num_heads=8, num_kv_heads=2,
    head_dim=64, max_position=4096,
)  # fmt: skip
TINY = replace(
    SMALL, vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, head_dim=16, rope_theta=1e4,
    max_position=512,
)  # fmt: skip


@torch.no_grad()
def random_decoder(config: DecoderConfig, positions: int, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Activations near 1, norms away from 1, so that every part counts."""
    with torch.device("meta"):
        model = Decoder(config, positions).to(dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.7, 1.3, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    model.rotary = Rotary(config, positions).to(device)
    return model.eval()


def head_config(config: DecoderConfig) -> Eagle3Config:
    """Return the shape of an EAGLE-3 head for a target: a layer of the same widths, as published heads have."""
    shared = {field.name: getattr(config, field.name) for field in fields(NetworkConfig)}
    vocabulary = min(HEAD_VOCABULARY, config.vocab_size)
    return Eagle3Config(**shared, draft_vocab_size=vocabulary, target_hidden_size=config.hidden_size)


def random_head(target: Decoder, dtype: torch.dtype) -> Eagle3Head:
    """Return an EAGLE-3 head of random weights, with an embedding of its own, as a bundle's has."""
    config = head_config(target.config)
    torch.manual_seed(7)
    with target.embed.weight.device:
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        head = Eagle3Head(config, config.max_position, embedding).to(dtype)
        head.rotary = Rotary(config, config.max_position)
    return head.requires_grad_(False).eval()
