"""The head before and after training: its warm start from the target's last layer, and its export."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from echo_trt.backends.cpu.formats import GROUP, quantised
from echo_trt.models.block import ParallelEagle
from echo_trt.models.checkpoint import SafetensorsCheckpoint
from echo_trt.models.config import BlockConfig, DecoderConfig, Eagle3Config
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.layers import MLP
from echo_trt_lab.training.corpus import Corpus

MASSIVE = 20.0  # a position whose features are so many times the median is an attention sink, not a word
SMALL = 0.02  # of the stream's size: what the features other than the highest bring before training
MASK_TOKEN = 0  # any one: a masked row is told by its learnt state


def head_config(target: DecoderConfig, draft_vocab_size: int, target_sha256: str, intermediate: int) -> Eagle3Config:
    """Return a head of the target's layer shape but for its MLP's ``intermediate`` size, over default
    ``feature_layers``.
    """
    return Eagle3Config(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=intermediate,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        norm_eps=target.norm_eps,
        rope_theta=target.rope_theta,
        rope_scaling=target.rope_scaling,
        max_position=target.max_position,
        target_sha256=target_sha256,
    )


def block_config_of(head: Eagle3Config, rows: int) -> BlockConfig:
    """Return the configuration of a one-layer P-EAGLE drafter of ``rows`` rows per pass, in the shape of ``head``."""
    shape = {f.name: getattr(head, f.name) for f in fields(head) if f.name in {g.name for g in fields(BlockConfig)}}
    kind = {"causal": True, "predicts_next": True, "anchored": True, "qk_norm": False}
    return BlockConfig(family="p-eagle", num_layers=1, block_size=rows, mask_token=MASK_TOKEN, **kind, **shape)


def feature_scale(corpus: Corpus, samples: int = 200) -> Tensor:
    """Return the RMS [3H] of each feature dimension over ordinary positions.

    The first position and a few delimiters carry activations a thousand times larger, which would drown the rest.
    """
    spread = corpus.training[:: max(len(corpus.training) // samples, 1)]
    known = torch.cat([corpus.known(s)[1:-2] for s in spread]).float()
    features = known[:, : known.shape[1] // 4 * 3]
    size = features.pow(2).mean(dim=-1).sqrt()
    return features[size < MASSIVE * size.median()].pow(2).mean(dim=0).sqrt().clamp(min=1e-6)


@torch.no_grad()
def warm_start(
    config: Eagle3Config | BlockConfig, target: Decoder, target_ids: Tensor, scale: Tensor, positions: int
) -> Eagle3Head:
    """Return a head that begins as the target's last layer on its highest feature, for features divided by
    ``scale``.
    """
    network = ParallelEagle if isinstance(config, BlockConfig) else Eagle3Head
    head, last = network(config, positions, target.embed), target.layers[-1]
    hidden = config.hidden_size
    for norm in (head.hidden_norm, head.mlp_norm, head.norm, head.embed_norm):
        nn.init.ones_(norm.weight)
    stream = scale[2 * hidden :]
    nn.init.normal_(head.fc.weight, std=SMALL * stream.mean().item() / hidden**0.5)
    head.fc.weight[:, 2 * hidden :] += torch.diag(stream)
    nn.init.normal_(head.attention.qkv.weight, std=SMALL)
    head.attention.qkv.weight[:, hidden:] = last.attention.qkv.weight
    head.attention.out.weight.copy_(last.attention.out.weight)
    head.hidden_norm.weight.copy_(last.attention_norm.weight)
    head.mlp_norm.weight.copy_(last.mlp_norm.weight)
    head.norm.weight.copy_(target.norm.weight)
    head.lm_head.weight.copy_(output_rows(target, target_ids))
    if isinstance(last.mlp, MLP):
        _keep_units(head.mlp, last.mlp)
    head.target_ids = target_ids.clone()
    if isinstance(head, ParallelEagle):
        head.mask_state.copy_(torch.randn(hidden) * stream)
    return head


def _keep_units(mlp: MLP, larger: MLP) -> None:
    """Begin as the units of a ``larger`` MLP that have the largest weights, or as all of them."""
    gate, up = larger.gate_up.weight.float().chunk(2)
    size = gate.norm(dim=1) * up.norm(dim=1) * larger.down.weight.float().norm(dim=0)
    units = size.topk(min(mlp.down.weight.shape[1], len(size))).indices.sort().values
    mine = mlp.gate_up.weight.chunk(2)
    for part, its in zip((*mine, mlp.down.weight.T), (gate, up, larger.down.weight.T), strict=True):
        part[: len(units)] = its[units]


@torch.no_grad()
def start_from(head: Eagle3Head, earlier: Eagle3Head, scale: Tensor) -> None:
    """Go on from an ``earlier`` head of the same shape, or a smaller MLP: what that has not, begins without a say.

    Tokens that are new to the draft vocabulary keep their rows.
    """
    other = ("embed.", "lm_head.", "target_", "mlp.")
    known = {name: w for name, w in earlier.state_dict().items() if not name.startswith(other)}
    head.load_state_dict({**known, "fc.weight": known["fc.weight"] * scale}, strict=False)
    units = earlier.config.intermediate_size
    for mine, its in zip(head.mlp.gate_up.weight.chunk(2), earlier.mlp.gate_up.weight.chunk(2), strict=True):
        mine[:units] = its
    head.mlp.down.weight.zero_()
    head.mlp.down.weight[:, :units] = earlier.mlp.down.weight
    row = {token: i for i, token in enumerate(earlier.target_ids.tolist())}
    pairs = [(i, row[token]) for i, token in enumerate(head.target_ids.tolist()) if token in row]
    mine, its = torch.tensor(pairs).T
    head.lm_head.weight[mine] = earlier.lm_head.weight[its].to(head.lm_head.weight.dtype)


def output_rows(target: Decoder, target_ids: Tensor) -> Tensor:
    """Return the rows [V, H] of the target's output matrix that belong to a draft vocabulary."""
    return (target.embed if target.lm_head is None else target.lm_head).weight[target_ids].float()


def save_head(head: Eagle3Head, scale: Tensor, folder: Path) -> None:
    """Write config.json and model.safetensors (bfloat16), each of which appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "model.safetensors": save(_eagle_tensors(head, scale), metadata={"format": "pt"}),
        "config.json": json.dumps(_raw_config(head.config), indent=2).encode() + b"\n",
    }
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)


def write_in_blocks(folder: Path, out: Path) -> None:
    """Write a saved head once more, with its matrices in blocks of 4 bits."""
    stored = SafetensorsCheckpoint(folder)
    matrices = [name for name in stored.names() if len(stored.shape(name)) == 2]
    tensors = {name: stored.get(name) for name in stored.names() if name != "t2d"}
    for name in matrices:
        rounded = quantised(tensors[name].float().numpy(), "q4_0")
        values = rounded.values.reshape(len(rounded.values), -1, GROUP)
        packed = values[..., :16] | values[..., 16:] << 4
        scale = rounded.scale.view(np.uint8).reshape(*values.shape[:2], 2)
        tensors[name] = torch.from_numpy(np.concatenate([scale, packed], axis=2).reshape(len(values), -1))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(
        json.dumps(stored.config | {"block_types": dict.fromkeys(matrices, "q4_0")}, indent=2) + "\n"
    )


def _eagle_tensors(head: Eagle3Head, scale: Tensor) -> dict[str, Tensor]:
    """EAGLE's names; the scaling of the features goes into fc."""
    config, layer = head.config, "midlayer."
    sizes = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    weights = {
        "fc.weight": head.fc.weight / scale.to(head.fc.weight.device),
        layer + "input_layernorm.weight": head.embed_norm.weight,
        layer + "hidden_norm.weight": head.hidden_norm.weight,
        layer + "post_attention_layernorm.weight": head.mlp_norm.weight,
        layer + "self_attn.o_proj.weight": head.attention.out.weight,
        layer + "mlp.down_proj.weight": head.mlp.down.weight,
        "norm.weight": head.norm.weight,
        "lm_head.weight": head.lm_head.weight,
    }
    for letter, part in zip("qkv", head.attention.qkv.weight.split(sizes), strict=True):
        weights[f"{layer}self_attn.{letter}_proj.weight"] = part
    for word, part in zip(("gate", "up"), head.mlp.gate_up.weight.chunk(2), strict=True):
        weights[f"{layer}mlp.{word}_proj.weight"] = part
    if isinstance(head, ParallelEagle):
        weights["mask_hidden"] = head.mask_state
    tensors = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()}
    ids = head.target_ids.cpu()
    tensors["d2t"] = ids - torch.arange(ids.numel())
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return tensors


def _raw_config(config: Eagle3Config | BlockConfig) -> dict:
    block = isinstance(config, BlockConfig)
    kind = {"mask_token_id": config.mask_token, "block_size": config.block_size} if block else {}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.target_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling or None,
        "max_position_embeddings": config.max_position,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "target_sha256": config.target_sha256,
        **kind,
    }
