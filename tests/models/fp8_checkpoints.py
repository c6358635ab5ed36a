"""Checkpoints whose projections are rewritten in FP8."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LARGEST = 448.0  # of e4m3
BLOCK = (8, 32)


def quantise(folder: Path, kind: str, block: tuple[int, int] = BLOCK) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint's projections in FP8, "tensor", "channel" or "block"; returns what they stand for."""
    held = load_file(folder / "model.safetensors")
    meant = dict(held)
    for name in [n for n in held if n.endswith("_proj.weight")]:
        weight = held[name].float()
        if kind == "block":
            rows, columns = block
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
