"""Tiny random networks of transformers, and the EAGLE-3 heads that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11}


def llama(**changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, **changes}
    sizes["hidden_size"] = 4 * sizes["num_attention_heads"]  # transformers asks for a multiple
    return randomise(LlamaForCausalLM(LlamaConfig(**sizes)))


def mistral(**changes: Any) -> PreTrainedModel:
    return randomise(MistralForCausalLM(MistralConfig(**{**SIZES, **changes})))


#: Of Granite, none of them what its place has without it.
FACTORS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}


def granite(**changes: Any) -> PreTrainedModel:
    return randomise(GraniteForCausalLM(GraniteConfig(**{**SIZES, **FACTORS, **changes})))


def granitemoehybrid(**changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, **FACTORS, **changes}
    sizes["hidden_size"] = 8 * sizes["num_attention_heads"]
    kinds = {"layer_types": ["full_attention"] * sizes["num_hidden_layers"], "num_local_experts": 0}
    dense = {"shared_intermediate_size": sizes["intermediate_size"], "position_embedding_type": "rope"}
    mamba = {"mamba_n_heads": 2}  # of which there are none
    del sizes["head_dim"]
    return randomise(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**sizes, **kinds, **dense, **mamba)))


def phi3(**changes: Any) -> PreTrainedModel:
    """Return a network of which three quarters of a head are rotated, with factors of its own for each frequency."""
    sizes = {**SIZES, "pad_token_id": None, **changes}
    del sizes["head_dim"]
    length, sizes["hidden_size"] = sizes["max_position_embeddings"], 16 * sizes["num_attention_heads"]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 3.0],
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": length,
    }
    sizes |= {"max_position_embeddings": 4 * length, "original_max_position_embeddings": length}
    return randomise(Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rope)))


def qwen2(**changes: Any) -> PreTrainedModel:
    return randomise(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})))


def smollm3(**changes: Any) -> PreTrainedModel:
    return randomise(SmolLM3ForCausalLM(SmolLM3Config(**{**SIZES, "pad_token_id": None, **changes})))


def qwen3(**changes: Any) -> PreTrainedModel:
    return randomise(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **changes})))


def gemma3(**changes: Any) -> PreTrainedModel:
    """Return a network in which the second layer of three sees all tokens, and the others see a window."""
    sizes = {**SIZES, "query_pre_attn_scalar": 7, "sliding_window": 6, **changes}
    kinds = ["full_attention" if layer % 3 == 1 else "sliding_attention" for layer in range(sizes["num_hidden_layers"])]
    sizes = {"layer_types": kinds, **sizes, "hidden_size": 4 * sizes["num_attention_heads"]}
    return randomise(Gemma3ForCausalLM(Gemma3TextConfig(**sizes)), norm=0.0)


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    config = Qwen3MoeConfig(**{**SIZES, **EXPERTS, **changes})
    config._experts_implementation = "eager"  # the grouped one asks for sizes that are multiples of 16 bytes
    return randomise(Qwen3MoeForCausalLM(config))


#: A hybrid as small as one can be that has two layers of one kind: a trace takes seconds for each delta-net layer.
HYBRID_LAYERS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}


def qwen3_5(**changes: Any) -> PreTrainedModel:
    linear = {f"linear_num_{kind}_heads": heads for kind, heads in (("key", 2), ("value", 4))}
    linear |= {"linear_key_head_dim": 32, "linear_value_head_dim": 64}
    sizes = SIZES | {"num_attention_heads": 4, "head_dim": 16} | linear
    model = randomise(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**sizes, **changes})))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a state that lasts for some tokens
            parameter.data.sub_(2)
        if name.endswith("out_proj.weight"):  # whose inputs are normed by head, unlike attention's
            parameter.data.mul_(0.3)
    model.get_output_embeddings().weight.data.mul_(0.2)  # norms of 1 + w
    return model


def lfm2(**changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, "hidden_size": 32, "block_auto_adjust_ff_dim": False, **changes}
    full = [i for i in range(sizes["num_hidden_layers"]) if i % 3 == 2]
    return randomise(Lfm2ForCausalLM(Lfm2Config(full_attn_idxs=full, norm_eps=sizes.pop("rms_norm_eps"), **sizes)))


def mtp_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return an MTP head for ``model``, of a full-attention layer's shapes, by the names of published checkpoints."""
    full = f"layers.{model.config.layer_types.index('full_attention')}."
    own = {name.replace(full, "layers.0."): p for name, p in model.model.named_parameters() if name.startswith(full)}
    generator, hidden = torch.Generator().manual_seed(19), model.config.hidden_size
    tensors = {f"mtp.{name}": torch.randn(p.shape, generator=generator) * 0.1 for name, p in own.items()}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        tensors[f"mtp.{name}.weight"] = 0.3 * torch.randn(hidden, generator=generator)
    tensors["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * (2 * hidden) ** -0.5
    return tensors


def add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put further ``tensors`` into the one file of a checkpoint."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})


#: family -> what makes a network of it
BUILDERS = {
    "gemma3": gemma3,
    "granite": granite,
    "granitemoehybrid": granitemoehybrid,
    "lfm2": lfm2,
    "llama": llama,
    "mistral": mistral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_5": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}


@torch.no_grad()
def randomise(model: PreTrainedModel, norm: float = 1.0) -> PreTrainedModel:
    """Weights under which every part counts: norms' weights away from ``norm``, activations near 1, logits near 10."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(norm + 0.3 * noise if noise.dim() == 1 else noise * noise.shape[-1] ** -0.5)
    model.get_output_embeddings().weight.mul_(6)
    return model.eval()


def head_config(**changes: Any) -> dict[str, Any]:
    """Return a head for a network of SIZES, with other shapes of its own, as SpecForge writes it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "vocab_size": SIZES["vocab_size"],
        "draft_vocab_size": 31,
        "hidden_size": SIZES["hidden_size"],
        "intermediate_size": 28,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "max_position_embeddings": 64,
        **changes,
    }


def head_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a head, with its own embeddings, in EAGLE's spelling."""
    hidden, size = config["hidden_size"], config["intermediate_size"]
    features = config.get("target_hidden_size") or hidden
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes = {
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "fc.weight": (hidden, 3 * features),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.mlp.gate_proj.weight": (size, hidden),
        "midlayer.mlp.up_proj.weight": (size, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, size),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
    }
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (features,) for i in range(3)}
    generator = torch.Generator().manual_seed(17)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
    tensors["lm_head.weight"] *= 6
    chosen = torch.randperm(config["vocab_size"], generator=generator)[: config["draft_vocab_size"]].sort().values
    tensors["d2t"] = chosen - torch.arange(len(chosen))
    tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill(0, chosen, True)
    return tensors


def write_head(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
