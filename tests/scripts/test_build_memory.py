"""The script that measures a build, on a small shape; and what a bundle holds of a checkpoint in bf16."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file

from echo_trt.backends.kind import built_as, engine_kind
from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.cli import build

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "build_memory.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sizes")
    command = [sys.executable, SCRIPT, "tiny", "--engine", "openvino", "--folder", folder]
    return folder, subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_rows_are_those_of_a_real_build(measured):
    folder, printed = measured
    rows = {cells[1].strip(): cells[2].strip() for line in printed.splitlines() if len(cells := line.split("|")) == 5}
    assert rows["build"].endswith(" s")
    assert rows["load"].endswith(" s")
    maximum, own = (float(rows[name].split()[0]) for name in ("most memory of the build", "most memory of its own"))
    assert 0 < own < maximum
    tokens = json.loads(printed.rpartition("Tokens: ")[2])
    assert len(tokens) == 8
    assert json.loads((folder / "bundle-openvino-bf16" / "manifest.json").read_text())["draft"]["file"] == "draft.onnx"


def test_bundle_holds_a_matrix_in_the_type_of_the_checkpoint(measured):
    folder, _ = measured
    graph = onnx.load(folder / "bundle-openvino-bf16" / "target.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    embedding = stored["role.network.embed.weight"]
    assert embedding.data_type == TensorProto.BFLOAT16
    theirs = load_file(folder / "target" / "model.safetensors")["model.embed_tokens.weight"]
    assert (numpy_helper.to_array(embedding).astype("float32") == theirs.float().numpy()).all()
    assert sum(tensor.name.endswith("embed.weight") for tensor in graph.initializer) == 1  # tied: one copy


@pytest.mark.parametrize("engine", ["torch", "tensorrt"])
def test_a_build_for_a_gpu_holds_weights_in_the_type_of_the_checkpoint(engine, measured, tmp_path, monkeypatch):
    """In fp32 they would take twice the memory of the host, and four times beside their copy in bf16."""
    folder, held = measured[0], []

    class Compiling(Exception):
        pass

    def compile_role(role, name, precision):
        held.extend({p.dtype for p in role.parameters() if p.ndim == 2})
        raise Compiling

    changes = {"compiler": lambda *_: (compile_role, {}), "check": lambda recipe: None}  # TensorRT is not installed
    monkeypatch.setattr(build, "engine_kind", lambda name: replace(engine_kind(name), **changes))
    recipe = built_as(load_recipe(folder / "recipe.yaml"), engine, "bf16")
    with pytest.raises(Compiling):
        build.build(recipe, folder, tmp_path / "bundle")
    assert held == [torch.bfloat16]
