"""The self-check of a build reaches a window: a wrong one is refused, and a small one no obstacle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from models.checkpoints import BUILDERS
from pairs import LIMITS, SIZES, recipe_of, write_tokenizer
from refusal import refused

from echo_trt.backends.self_check import check_engine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.cli.build import build
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder


def target(folder: Path, window: int = 0) -> TargetModule:
    """Load a target; ``window`` replaces its own."""
    role = TargetModule(load_decoder(open_checkpoint(folder), 256))
    role.network.config = replace(role.network.config, window=window or role.network.config.window)
    return role


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_an_engine_with_another_window_is_refused(family, networks):
    """Both windows are beyond what a prompt and a tree of the check reach."""
    role = target(networks / family, 56)
    assert check_engine(role, lambda blocks: TorchEngine(target(networks / family, 56), blocks), "fp32").error == 0
    with refused("self-check failed", "--precision or --engine"):
        check_engine(role, lambda blocks: TorchEngine(target(networks / family, 57), blocks), "fp32")


@pytest.mark.parametrize("window", [20, 40])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_window_shorter_than_the_checks_prompt_is_built(window, precision, tmp_path):
    folder = tmp_path / "gemma3"
    write_tokenizer(folder)
    BUILDERS["gemma3"](**SIZES, sliding_window=window, eos_token_id=0).save_pretrained(folder)
    recipe = recipe_of("gemma3", tmp_path, precision=precision, limits=LIMITS)
    manifest = build(recipe, tmp_path, tmp_path / "bundle")
    assert manifest.checks["target"].error <= manifest.checks["target"].bound
