"""The drafter of examples/mlp_drafter, as somebody else's package: no attention, no norm, and texts stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from batches import REQUESTS, assert_same
from pairs import SIZES, recipe_of
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

from echo_trt import LLM
from echo_trt.cli.build import build
from echo_trt.errors import UserError
from echo_trt.sizing.shapes import shapes

EXAMPLE = Path(__file__).parents[2] / "examples" / "mlp_drafter"
WIDTH, VOCABULARY = SIZES["hidden_size"], SIZES["vocab_size"]


@pytest.fixture
def recipe(installed, networks, tmp_path, monkeypatch):
    """Return what makes a recipe for an engine, with a drafter that hands on the last token's embedding."""
    entry_points = (EXAMPLE / "pyproject.toml").read_text().partition('."echo_trt.drafts"]\n')[2].partition("\n\n")[0]
    installed("mlp_facts", "", f"[echo_trt.drafts]\n{entry_points.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(EXAMPLE)

    target = Qwen3ForCausalLM.from_pretrained(networks / "plain_target")
    folder = tmp_path / "drafter"
    folder.mkdir()
    raw = {"architectures": ["MlpDrafter"], "hidden_size": WIDTH, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(raw))
    embedding = target.model.embed_tokens.weight.detach()
    ahead = torch.cat((torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)), dim=1)
    tensors = {"embed.weight": embedding, "up.weight": 4 * ahead, "down.weight": 4 * torch.eye(WIDTH)}
    tensors["lm_head.weight"] = (target.lm_head.weight * target.model.norm.weight).detach()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    draft = {"kind": "mlp", "source": {"path": str(folder)}, "top_k": 5}
    return lambda engine: recipe_of("close", networks, draft=draft, engine=engine)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_drafter_without_attention_changes_no_text(engine, recipe, networks, plain, tmp_path):
    manifest = build(recipe(engine), networks, tmp_path / "bundle")
    assert (manifest.draft.num_layers, manifest.checks["draft"].tree_error < 1e-4) == (0, True)
    prompts, params = REQUESTS["mixed"]()
    for policy in ("static", "goodput"):
        llm = LLM(tmp_path / "bundle", policy, 3)
        assert_same(llm.generate(prompts, params), plain("close", "mixed"))
        assert llm.counters.drafted_tokens > 0


def test_an_engine_that_has_no_program_for_it_says_so(recipe, networks, tmp_path):
    with pytest.raises(UserError, match=r"draft.kind is mlp, which engine cpu does not run; build with --engine open"):
        build(recipe("cpu"), networks, tmp_path / "bundle")


def test_its_sizes_are_counted(recipe, networks):
    _, own = shapes(recipe("openvino"), networks)
    assert own.sizes.kv_values == 0
