"""The self-check of a build reaches a window: a wrong one is refused, and a small one no obstacle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from models.checkpoints import BUILDERS
from models.gguf_files import GGUF_SIZES, write_gguf
from pairs import LIMITS, SIZES, recipe_of, write_tokenizer
from refusal import refused

from echo_trt.backends import first_layers
from echo_trt.backends.cpu.build import compile_role
from echo_trt.backends.kind import CompiledRole
from echo_trt.backends.self_check import check_compiled, check_engine
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


def test_few_bits_that_lose_three_per_cent_of_a_text_are_refused(networks):
    """By the target's own text. The networks are nearly the same: 30 % would pass."""
    role, other = target(networks / "plain_target"), target(networks / "plain_target")
    same = CompiledRole("", lambda blocks: TorchEngine(target(networks / "plain_target"), blocks))
    assert check_compiled(role, same, "int4").error == 0
    other.network.lm_head.weight.data *= 1.3
    role, coarse = target(networks / "plain_target"), CompiledRole("", lambda blocks: TorchEngine(other, blocks))
    with refused("self-check failed: the int4 engine has a perplexity of +", "bound +3%"):
        check_compiled(role, coarse, "int4")


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3_moe", False)])
def test_matrices_that_stayed_in_their_file_are_checked_in_its_first_layers(family, tied, tmp_path, monkeypatch):
    """And another file's are not these. Of a mixture all experts are chosen, since rounding may choose others."""
    experts = {"num_experts_per_tok": 7, "moe_intermediate_size": 32, "norm_topk_prob": True}
    sizes = GGUF_SIZES | (experts if family == "qwen3_moe" else {})
    model = BUILDERS[family](**sizes, tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType.Q8_0)

    def role() -> TargetModule:
        return TargetModule(load_decoder(open_checkpoint(file), 256, in_blocks=True))

    whole = check_compiled(role(), compile_role(role(), tmp_path / "target.cpu", "int4"), "int4")
    assert (whole.layers, 0 < whole.error < 0.05) == (None, True)
    monkeypatch.setattr(first_layers, "CHECKED", 1)
    compiled = compile_role(role(), tmp_path / "target.cpu", "int4")
    check = check_compiled(role(), compiled, "int4")
    assert (compiled.layers, check.layers, 0 < check.error < 0.05) == (1, 1, True)
    assert "in its first 1 layers" in check.sentence
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.flip(0)
    file = write_gguf(tmp_path / "other.gguf", model, GGMLQuantizationType.Q8_0)
    with refused("self-check failed: the int4 engine has an error of"):
        check_compiled(role(), compiled, "int4")
