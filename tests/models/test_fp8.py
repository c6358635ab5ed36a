"""FP8 checkpoints against the same network with the dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import qwen3, qwen3_moe
from refusal import refused
from safetensors.torch import load_file, save_file

from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.ranks import Shard
from echo_trt.models.weights import load_decoder

LARGEST = 448.0  # of e4m3
BLOCK = (8, 16)
QUERY = "model.layers.0.self_attn.q_proj.weight"


def quantise(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint's projections in FP8, "tensor", "channel" or "block"; returns what they stand for."""
    held = load_file(folder / "model.safetensors")
    meant = dict(held)
    for name in [n for n in held if n.endswith("_proj.weight")]:
        weight = held[name].float()
        if kind == "block":
            rows, columns = BLOCK
            scale = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
            spread = torch.zeros_like(weight)
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                    scale[i, j] = spread[part] = weight[part].abs().max() / LARGEST
            held[name + "_scale_inv"] = scale
        else:
            spread = weight.abs().amax(*([1, True] if kind == "channel" else [])) / LARGEST
            held[name + "_scale"] = spread.squeeze()
            held[name.replace("weight", "input_scale")] = torch.tensor(0.25)
        held[name] = (weight / spread).to(torch.float8_e4m3fn)
        meant[name] = held[name].float() * spread
    held["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    held["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor(0.5)
    save_file(held, folder / "model.safetensors")
    return meant


def configure(folder: Path, **scheme: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": scheme}))


def beside(folder: Path, **quantization: object) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))


@pytest.fixture(params=[qwen3, qwen3_moe], ids=["dense", "experts"])
def folder(request, tmp_path) -> Path:
    request.param(tie_word_embeddings=False).save_pretrained(tmp_path, save_original_format=True)
    return tmp_path


SCHEMES = {
    "ModelOpt": ("tensor", lambda f: configure(f, quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"])),
    "ModelOpt, by its own file": ("tensor", lambda f: beside(f, quant_algo="FP8", exclude_modules=["lm_head"])),
    "ModelOpt, a channel": ("channel", lambda f: beside(f, quant_algo="FP8_PER_CHANNEL_PER_TOKEN")),
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
            "norm" in name or "embed" in name or name == "lm_head.weight" or "router" in name
        )


@pytest.mark.parametrize(("kind", "declare"), SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_part_with_its_scales(rank, kind, declare, tmp_path):
    """Of widths that no block ends at: what it has of each tensor is that part of the whole one."""
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


def test_an_unquantised_checkpoint_is_left_alone(folder):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.get(QUERY).dtype == torch.float32
    assert type(checkpoint).__name__ == "SafetensorsCheckpoint"


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda f: beside(f, quant_algo="NVFP4"), ("hf_quant_config.json", "NVFP4", "use an FP8")),
        (lambda f: beside(f), ("hf_quant_config.json", "None")),
        (lambda f: configure(f, quant_method="modelopt", quant_algo="W4A8"), ("quantization_config", "W4A8")),
        (lambda f: configure(f, quant_method="awq", bits=4), ("quantization_config", "quant_method awq")),
    ],
)
def test_other_quantisations_are_refused(declare, words, folder):
    declare(folder)
    with refused(folder, *words):
        open_checkpoint(folder)


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
