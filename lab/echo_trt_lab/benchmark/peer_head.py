"""An EAGLE-3 head of transformers' modules, under the names that OpenVINO GenAI looks for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from echo_trt.errors import UserError
from echo_trt.models.config import Eagle3Config
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.read_config import decoder_config, eagle3_config
from echo_trt.models.weights import head_tensor_name


class EagleHead(nn.Module):
    """One layer over a token's embedding and the target's features; GenAI feeds its output back as features.

    GenAI moves ``fc`` to the target, copies the target's embeddings here, and reads the output of ``midlayer``.
    """

    def __init__(self, config: LlamaConfig, head: Eagle3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(head.vocab_size, head.hidden_size)
        self.fc = nn.Linear(3 * head.target_hidden_size, head.hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.midlayer = _MidLayer(config, head.norm_before_residual)
        self.norm = LlamaRMSNorm(head.hidden_size, eps=head.norm_eps)
        self.lm_head = nn.Linear(head.hidden_size, head.draft_vocab_size, bias=False)
        self.offsets = torch.zeros(head.draft_vocab_size, dtype=torch.long)  # target token - draft token

    def forward(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, features: Tensor, cache: object) -> Tensor:
        """Compute logits [B, T, V_draft].

        input_ids, position_ids  int64 [B, T]
        mask                     bool [B, 1, T, past + T]
        features                 float32 [B, T, 3 * H_target]
        """
        hidden = self.fc(features)
        angles = self.rotary(hidden, position_ids)
        return self.lm_head(self.norm(self.midlayer(self.embed_tokens(input_ids), hidden, angles, mask, cache)))


class _MidLayer(nn.Module):
    def __init__(self, config: LlamaConfig, norm_before_residual: bool):
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            height = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(2 * config.hidden_size, height, bias=False))
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, embeds: Tensor, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: object):
        normed = self.hidden_norm(hidden)
        pair = torch.cat((self.input_layernorm(embeds), normed), dim=-1)
        attended, _ = self.self_attn(pair, angles, mask, cache)
        hidden = (normed if self.norm_before_residual else hidden) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def load_head(checkpoint: Path, target: Path) -> EagleHead:
    """Load a head in EAGLE's or vLLM's spelling, in fp32, with the embeddings of its target."""
    source = open_checkpoint(checkpoint)
    head = eagle3_config(source.config, str(checkpoint))
    if head.fc_norm or head.norm_output:
        raise UserError(f"{checkpoint}: OpenVINO GenAI takes no head with fc_norm or norm_output; leave it out.")
    network = EagleHead(_llama_config(head), head)
    weights = {head_tensor_name(name): source.get(name).float() for name in source.names()}
    network.offsets = weights.pop("d2t", network.offsets).long()
    weights.pop("t2d", None)
    weights["embed_tokens.weight"] = open_checkpoint(target).get("model.embed_tokens.weight").float()
    network.load_state_dict(weights)
    return network


def hidden_layers(checkpoint: Path, target: Path) -> list[int]:
    """Return the target's layers whose *outputs* are the features, which GenAI counts; we count their inputs."""
    head = eagle3_config(open_checkpoint(checkpoint).config, str(checkpoint))
    inputs = head.feature_layers or decoder_config(open_checkpoint(target).config, str(target)).feature_layers
    if min(inputs) < 1 or len(set(inputs)) < 3:
        raise UserError(f"{target}: OpenVINO GenAI reads no inputs of layers {list(inputs)}; leave it out.")
    return [layer - 1 for layer in inputs]


def _llama_config(head: Eagle3Config) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=head.vocab_size,
        hidden_size=head.hidden_size,
        intermediate_size=head.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=head.num_heads,
        num_key_value_heads=head.num_kv_heads,
        head_dim=head.head_dim,
        rms_norm_eps=head.norm_eps,
        max_position_embeddings=head.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": head.rope_theta, **head.rope_scaling},
        attn_implementation="sdpa",
    )
