"""What the target computes over the generated text, once, on disk: the head's inputs and its training signal.

``shard-00000.features.npy`` is [tokens, 4H], bfloat16 stored as uint16: the inputs of the three feature layers, low to
high, and the normed last state, from which the target's distribution over any vocabulary is one product away.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from echo_trt.errors import UserError
from echo_trt.models.decoder import Decoder
from echo_trt_lab.training.corpus import features_path, shard_paths


def missing_features(folder: Path) -> list[Path]:
    return [path for path in shard_paths(folder) if not features_path(path).exists()]


@torch.inference_mode()
def write_features(target: Decoder, shard: Path) -> None:
    """Run the target over every sample of a shard."""
    if target.config.window:
        raise UserError(
            f"{shard}: features of a target with a sliding window are recorded while it answers, and are not there; "
            "generate the answers again with a bundle whose draft is eagle3."
        )
    with np.load(shard) as stored:
        samples = np.split(stored["tokens"].astype(np.int64), np.cumsum(stored["lengths"])[:-1])
    known = [_known(target, torch.from_numpy(tokens)) for tokens in samples]
    partial = shard.with_name("partial-" + shard.name).with_suffix(".npy")
    np.save(partial, torch.cat(known).view(torch.uint16).numpy())
    os.replace(partial, features_path(shard))


def _known(target: Decoder, token_ids: Tensor) -> Tensor:
    device = target.embed.weight.device
    x = target.embed(token_ids.to(device)) * target.config.embedding_scale
    cos, sin = target.rotary(torch.arange(token_ids.numel(), device=device))
    kept = {}
    for i, layer in enumerate(target.layers):
        if i in target.config.feature_layers:
            kept[i] = x
        x = layer(x, cos, sin, _causal(target.config.head_dim))
    features = [kept[i] for i in target.config.feature_layers]
    return torch.cat((*features, target.norm(x)), dim=-1).to("cpu", torch.bfloat16)


def _causal(head_dim: int):
    def attend(_layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The rotary table is float32 and lifts query and key to it.
        q, k, v = (t.to(value.dtype).unflatten(-1, (-1, head_dim)).transpose(0, 1) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)

    return attend
