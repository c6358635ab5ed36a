"""The decoder against transformers' own implementation, on checkpoints that transformers writes."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import BUILDERS, lfm2, llama, qwen3, qwen3_5, qwen3_moe, smollm3
from paged import assert_same_network
from transformers import Qwen3ForCausalLM

from echo_trt.models import layers
from echo_trt.models.decoder import Decoder
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.weights import load_decoder


def rope(kind: str, **parameters: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def load(folder: Path) -> Decoder:
    return load_decoder(open_checkpoint(folder), positions=64)


@pytest.mark.parametrize("build", [build for build in BUILDERS.values() if build not in (lfm2, qwen3_5)])  # with states
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(3, 3, True), (16, 2, False)], ids=str)
def test_logits_and_features_equal_transformers(build, heads, kv_heads, tied, tmp_path):
    theirs = build(num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    decoder = load(tmp_path)
    assert (decoder.lm_head is None) == tied
    assert_same_network(decoder, theirs)


@pytest.mark.parametrize(
    "scaling",
    [
        rope("default", rope_theta=500000.0),
        rope("linear", factor=2.5),
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        rope("yarn", factor=4.0, original_max_position_embeddings=32),
        rope(
            "yarn", factor=3.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=0.5, attention_factor=1.5
        ),
    ],
    ids=["theta", "linear", "llama3", "yarn", "yarn with all of its numbers"],
)
def test_rope_scaling_equals_transformers(scaling, tmp_path):
    theirs = llama(**scaling)
    theirs.save_pretrained(tmp_path)
    assert_same_network(load(tmp_path), theirs)


@pytest.mark.parametrize("layers", [{}, {"no_rope_layers": [1, 0, 0, 1, 1]}, {"no_rope_layer_interval": 2}], ids=str)
def test_layers_without_rotary_positions_equal_transformers(layers, tmp_path):
    theirs = smollm3(**layers)
    theirs.save_pretrained(tmp_path)
    decoder = load(tmp_path)
    assert [layer.attention.rotated for layer in decoder.layers] == list(map(bool, theirs.config.no_rope_layers))
    assert_same_network(decoder, theirs)


@pytest.mark.parametrize(
    ("layout", "normalised", "routed"),
    [({}, False, True), ({"decoder_sparse_step": 2}, True, False), ({"mlp_only_layers": [0, 3]}, True, True)],
    ids=["all", "every second", "some dense"],
)
def test_experts_equal_transformers(layout, normalised, routed, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "has_grouped_products", lambda x, down: routed)
    theirs = qwen3_moe(norm_topk_prob=normalised, moe_intermediate_size=12, **layout)
    theirs.save_pretrained(tmp_path)
    assert_same_network(load(tmp_path), theirs)


@pytest.mark.parametrize("per_expert", [True, False], ids=["a tensor per expert", "all experts in one tensor"])
def test_both_expert_layouts_load(per_expert, tmp_path):
    theirs = qwen3_moe()
    theirs.save_pretrained(tmp_path, save_original_format=per_expert)
    names = open_checkpoint(tmp_path).names()
    assert ("model.layers.0.mlp.experts.gate_up_proj" in names) != per_expert
    assert_same_network(load(tmp_path), theirs)


def test_config_of_earlier_transformers_loads(tmp_path):
    theirs = qwen3_moe(**rope("yarn", factor=4.0, original_max_position_embeddings=32))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_network(load(tmp_path), theirs)


def test_weights_take_the_asked_type(tmp_path):
    qwen3().to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_network(load_decoder(open_checkpoint(tmp_path), 64, torch.float32), theirs)
    assert load_decoder(open_checkpoint(tmp_path), 64, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
