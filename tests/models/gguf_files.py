"""GGUF files of transformers' networks, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from echo_trt.models.gguf_checkpoint import NEXTN

#: transformers' class -> llama.cpp's architecture, and whether its converter interleaves rows of query and key
ARCHITECTURES = {
    "Gemma3ForCausalLM": (gguf.MODEL_ARCH.GEMMA3, False),
    "GraniteForCausalLM": (gguf.MODEL_ARCH.GRANITE, True),
    "Lfm2ForCausalLM": (gguf.MODEL_ARCH.LFM2, False),
    "LlamaForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "Phi3ForCausalLM": (gguf.MODEL_ARCH.PHI3, False),
    "SmolLM3ForCausalLM": (gguf.MODEL_ARCH.SMOLLM3, True),
    "Qwen2ForCausalLM": (gguf.MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": (gguf.MODEL_ARCH.QWEN3, False),
    "Qwen3MoeForCausalLM": (gguf.MODEL_ARCH.QWEN3MOE, False),
    "Qwen3_5ForCausalLM": (gguf.MODEL_ARCH.QWEN35, False),
}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRAINING_TEXT = "the cat and the hat, the year 2024 and the café; it's what they say, and they'll say 1234567 things."


class Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    merges: list[str]


@cache
def vocabulary() -> Vocabulary:
    """Return a byte-level BPE vocabulary with control and user-defined tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TRAINING_TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = gguf.TokenType
    return Vocabulary(
        tokens=[*CONTROL, *learned, *USER_DEFINED],
        types=[kinds.CONTROL] * len(CONTROL) + [kinds.NORMAL] * len(learned) + [kinds.USER_DEFINED] * len(USER_DEFINED),
        merges=[" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
    )


#: Ends of matrices that llama.cpp's converter leaves in float32.
IN_FLOATS = ("conv1d.weight", "conv.conv.weight", "in_proj_a.weight", "in_proj_b.weight")

#: Of small networks. Quantised rows come in blocks of 32.
GGUF_SIZES = {
    "vocab_size": len(vocabulary().tokens),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "head_dim": 12,
    "num_hidden_layers": 4,
}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    storage: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre_tokenizer: str = "smollm",
    without: str = "",
    recommended: dict[str, float] | None = None,
    mtp: dict[str, torch.Tensor] | None = None,
    name: str = "",
) -> Path:
    """Write ``model``, and give it the weights that the file now holds.

    without      a field or a tensor that is left out
    recommended  sampling parameters, by their names behind general.sampling
    mtp          an MTP head, which is the block behind the last layer
    name         of the model
    """
    config, (kind, interleaved) = model.config, ARCHITECTURES[type(model).__name__]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers + bool(mtp))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    is_convolved = kind == gguf.MODEL_ARCH.LFM2
    kv_heads = config.num_key_value_heads
    writer.add_head_count_kv([kv_heads * ("full" in kind) for kind in config.layer_types] if is_convolved else kv_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps if is_convolved else config.rms_norm_eps)
    if kind == gguf.MODEL_ARCH.QWEN3MOE:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == gguf.MODEL_ARCH.GRANITE:
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    is_gemma = kind == gguf.MODEL_ARCH.GEMMA3
    if is_gemma:
        writer.add_sliding_window(config.sliding_window)
    _add_rope(writer, config.rope_parameters["full_attention"] if is_gemma else config.rope_parameters, head_dim)
    _add_tokenizer(writer, pre_tokenizer)
    for key, value in (recommended or {}).items():
        getattr(writer, f"add_sampling_{key}")(value)
    is_hybrid = kind == gguf.MODEL_ARCH.QWEN35
    if is_convolved:
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if is_hybrid:
        _add_delta_net(writer, config, bool(mtp))
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers + 1)
    for name, values in (mtp or {}).items():
        layer = name.replace("mtp.layers.0.", f"model.layers.{config.num_hidden_layers}.")
        own = f"blk.{config.num_hidden_layers}.nextn.{NEXTN.get(name.split('.')[1])}.weight"
        whole = values.detach().numpy() + np.float32("norm" in name)
        writer.add_tensor(own if layer == name else names.get_name(layer, (".weight",)), np.ascontiguousarray(whole))
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy()
        small = data.ndim == 1 or name.endswith(IN_FLOATS)
        stored = gguf.GGMLQuantizationType.F32 if small else storage
        data = quantize(data, stored)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(dequantize(data, stored))))
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        if is_gemma and data.ndim == 1:
            data = data + np.float32(1)
        if is_hybrid:
            data = _tiled(name, data, config)
            name = name.replace("dt_bias", "dt_proj.bias")
            if data.ndim == 1 and name.endswith("norm.weight") and "linear_attn" not in name:
                data = data + np.float32(1)
        parts = {name: data.squeeze(1) if name.endswith("conv.conv.weight") else data}
        if name.endswith("experts.gate_up_proj"):  # gate over up in each expert, which are two tensors of a file
            gate, up = np.split(data, 2, axis=1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        for name, data in parts.items():
            if not name.endswith((".weight", ".bias", "A_log")):
                name += ".weight"
            name = names.get_name(name, (".weight", ".bias"))
            if name != without:
                writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=stored)
    writer.kv_data[0].pop(without, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_delta_net(writer: gguf.GGUFWriter, config: Any, mtp: bool) -> None:
    keys = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope.dimension_count": config.head_dim // 4,
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "nextn_predict_layers": int(mtp),
    }
    for key, value in keys.items():
        writer.add_uint32(f"qwen35.{key}", value)


def _tiled(name: str, data: np.ndarray, config: Any) -> np.ndarray:
    """Put heads of values where llama.cpp's converter does: in turns with the heads of keys; and convert A_log."""
    heads, size = config.linear_num_key_heads, config.linear_value_head_dim

    def turned(rows: np.ndarray, size: int) -> np.ndarray:
        return rows.reshape(heads, -1, size, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        keys = 2 * heads * config.linear_key_head_dim
        data = data.squeeze(1) if data.ndim == 3 else data
        return np.concatenate((data[:keys], turned(data[keys:], size)))
    if name.endswith("in_proj_z.weight"):
        return turned(data, size)
    if name.endswith((*IN_FLOATS[2:], "dt_bias")):
        return turned(data, 1)
    if name.endswith("A_log"):
        return -np.exp(turned(data, 1))
    if name.endswith("linear_attn.out_proj.weight"):  # columns, in whole blocks
        columns = data.reshape(len(data), heads, -1, data.shape[1] // config.linear_num_value_heads)
        return columns.swapaxes(1, 2).reshape(data.shape)
    return data


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    """Write the rotary base and its scaling, which of Llama 3.1 and later is a divisor for each frequency."""
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clip(0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32))
    elif rope["rope_type"] == "longrope":
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
        factor = 1 + np.log(4) / np.log(rope["original_max_position_embeddings"])  # as long as four originals
        writer.add_rope_scaling_attn_factors(float(factor**0.5))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    tokens, types, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
