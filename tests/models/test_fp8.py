"""FP8 checkpoints against the same network with the dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import qwen2, qwen3, qwen3_moe
from fp8_checkpoints import BLOCK, configure, quantise
from refusal import refused
from safetensors.torch import load_file, save_file

from echo_trt.models.fp8_linear import E4M3, Fp8Linear, dequantise
from echo_trt.models.layers import Linear
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.ranks import Shard
from echo_trt.models.weights import load_decoder

WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
QUERY = "model.layers.0.self_attn.q_proj.weight"


def compressed(folder: Path, strategy: str, **weights: object) -> None:
    """Declare compressed-tensors' scheme: scales of channels are columns, and the names of blocks' have no "inv"."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True, "strategy": "token"}}
    configure(folder, quant_method="compressed-tensors", format="float-quantized", config_groups={"group_0": group})
    held = load_file(folder / "model.safetensors")
    scales = {n: s for n, s in held.items() if n.endswith("_scale") and s.ndim < 2 and not n.endswith("input_scale")}
    inverse = {n: s for n, s in held.items() if n.endswith("_scale_inv")}
    held |= {name: scale.reshape(-1, 1) for name, scale in scales.items()}
    held |= {name.removesuffix("_inv"): scale for name, scale in inverse.items()}
    save_file({name: tensor for name, tensor in held.items() if name not in inverse}, folder / "model.safetensors")


def beside(folder: Path, **quantization: object) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))


@pytest.fixture(params=[qwen3, qwen2, qwen3_moe], ids=["dense", "a bias", "experts"])
def folder(request, tmp_path) -> Path:
    request.param(tie_word_embeddings=False).save_pretrained(tmp_path, save_original_format=True)
    return tmp_path


SCHEMES = {
    "ModelOpt": ("tensor", lambda f: configure(f, quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"])),
    "ModelOpt, by its own file": ("tensor", lambda f: beside(f, quant_algo="FP8", exclude_modules=["lm_head"])),
    "ModelOpt, a channel": ("channel", lambda f: beside(f, quant_algo="FP8_PER_CHANNEL_PER_TOKEN")),
    "compressed-tensors, a tensor": ("tensor", lambda f: compressed(f, "tensor")),
    "compressed-tensors, a channel": ("channel", lambda f: compressed(f, "channel")),
    "compressed-tensors, blocks": ("block", lambda f: compressed(f, "block", block_structure=list(BLOCK))),
    "blocks": ("block", lambda f: configure(f, quant_method="fp8", weight_block_size=list(BLOCK))),
}


@pytest.mark.parametrize(("kind", "declare"), SCHEMES.values(), ids=SCHEMES.keys())
def test_weights_are_read_as_what_they_stand_for(kind, declare, folder, tmp_path_factory):
    plain = tmp_path_factory.mktemp("dequantised")
    (plain / "config.json").write_text((folder / "config.json").read_text())
    original = load_decoder(open_checkpoint(folder), positions=8).state_dict()
    save_file(quantise(folder, kind), plain / "model.safetensors")
    declare(folder)
    expected = load_decoder(open_checkpoint(plain), positions=8).state_dict()
    got = load_decoder(open_checkpoint(folder), positions=8).state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name
        # e4m3 has 3 bits of mantissa: quantised weights are near the original ones, and not equal to them.
        assert (tensor - original[name]).abs().max() <= original[name].abs().max() / 16
        assert torch.equal(tensor, original[name]) == (
            "norm" in name or "bias" in name or "embed" in name or name == "lm_head.weight" or "router" in name
        )


@pytest.mark.parametrize(("kind", "declare"), SCHEMES.values(), ids=SCHEMES.keys())
def test_a_rank_reads_its_part_with_its_scales(kind, declare, tmp_path):
    """Of widths that no block ends at: what it has of each tensor is that part of the whole one."""
    rank = 1
    sizes = {"intermediate_size": 36, "moe_intermediate_size": 10, "mlp_only_layers": [0], "tie_word_embeddings": False}
    qwen3_moe(**sizes).save_pretrained(tmp_path, save_original_format=True)
    quantise(tmp_path, kind)
    declare(tmp_path)
    whole = load_decoder(open_checkpoint(tmp_path), positions=8).state_dict()
    own = load_decoder(open_checkpoint(tmp_path), positions=8, shard=Shard(rank, 2)).state_dict()
    half = slice(30 * rank, 30 * rank + 30)  # of 6 query heads of 10
    assert torch.equal(own["layers.0.attention.out.weight"], whole["layers.0.attention.out.weight"][:, half])
    assert torch.equal(own["layers.0.attention.qkv.weight"][:30], whole["layers.0.attention.qkv.weight"][:60][half])
    for layer, size in ((0, 36), (1, 10)):
        gate_up, down = (f"layers.{layer}.mlp.{part}{'.weight' * (layer == 0)}" for part in ("gate_up", "down"))
        part = slice(size // 2 * rank, size // 2 * (rank + 1))
        assert torch.equal(own[down], whole[down][..., part])
        halves = [w[..., part, :] for w in whole[gate_up].chunk(2, -2)]
        assert torch.equal(own[gate_up], torch.cat(halves, -2))


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda f: beside(f, quant_algo="NVFP4"), ("hf_quant_config.json", "NVFP4", "use an FP8")),
        (lambda f: beside(f), ("hf_quant_config.json", "None")),
        (lambda f: configure(f, quant_method="modelopt", quant_algo="W4A8"), ("quantization_config", "W4A8")),
        (lambda f: configure(f, quant_method="awq", bits=4), ("quantization_config", "quant_method awq")),
        (
            lambda f: compressed(f, "group", num_bits=4, type="int"),
            ("weights of 4 bits (int)",),
        ),
        (lambda f: compressed(f, "group"), ("compressed-tensors with weights group",)),
    ],
)
def test_other_quantisations_are_refused(declare, words, folder):
    declare(folder)
    with refused(folder, *words):
        open_checkpoint(folder)


@pytest.mark.parametrize(("kind", "declare"), SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize(("rank", "build"), [(0, qwen3), (1, qwen2)])
def test_matrices_in_fp8_stand_for_the_same_weights(kind, declare, rank, build, tmp_path):
    """Of stored scales exactly, whether of rows or blocks; of each rank, its part."""
    build(**WIDE).save_pretrained(tmp_path, save_original_format=True)
    quantise(tmp_path, kind)
    declare(tmp_path)
    shard = Shard(rank, 2)
    expected = load_decoder(open_checkpoint(tmp_path), 8, shard=shard).state_dict()
    network = load_decoder(open_checkpoint(tmp_path), 8, E4M3, shard)
    assert {n for n, m in network.named_modules() if isinstance(m, Fp8Linear)} == {
        f"layers.{i}.{part}" for i in range(5) for part in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    }
    dequantise(network, torch.float32)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("size", [40, 80], ids=["of no multiple of 16", "that ends within a block"])
def test_matrices_that_fp8_products_do_not_suit_are_dequantised(size, tmp_path):
    qwen3(**WIDE | {"intermediate_size": size}).save_pretrained(tmp_path, save_original_format=True)
    quantise(tmp_path, "block")
    configure(tmp_path, quant_method="fp8", weight_block_size=list(BLOCK))
    network = load_decoder(open_checkpoint(tmp_path), 8, E4M3)
    plain = {n.split(".", 2)[2] for n, m in network.named_modules() if type(m) is Linear and n.startswith("layers")}
    assert plain == {"mlp.down"}
    expected = load_decoder(open_checkpoint(tmp_path), 8).state_dict()
    assert torch.equal(network.layers[0].mlp.down.weight, expected["layers.0.mlp.down.weight"])


def test_scales_that_are_missing_or_of_another_tensor(folder):
    quantise(folder, "tensor")
    configure(folder, quant_algo="FP8")
    held = load_file(folder / "model.safetensors")
    for scale, words in ((torch.ones(7), ("[7]", QUERY, "[60, 20]")), (None, ("missing", QUERY))):
        changed = {k: v for k, v in held.items() if k != QUERY + "_scale"} | (
            {} if scale is None else {QUERY + "_scale": scale}
        )
        save_file(changed, folder / "model.safetensors")
        with refused(QUERY + "_scale", *words):
            load_decoder(open_checkpoint(folder), positions=8)


def test_scales_of_blocks_of_another_size(folder):
    quantise(folder, "block")
    configure(folder, quant_method="fp8", weight_block_size=[16, 16])
    with refused("weight_scale_inv", "does not belong to", "download"):
        load_decoder(open_checkpoint(folder), positions=8)
