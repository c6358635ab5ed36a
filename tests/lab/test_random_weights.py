"""Shapes without weights: every shipped recipe has one, a bundle of one answers, and every output says what it is."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from engine.service.served import free_ports
from pairs import recipe_of
from refusal import refused
from rich.console import Console

from echo_trt.cli.build import build
from echo_trt.cli.generate import run as generate
from echo_trt.cli.options import GenerateOptions
from echo_trt.cli.recipes import RECIPES, recipe_for
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.sizing.shapes import shapes
from echo_trt_lab.benchmark.command import run as bench
from echo_trt_lab.benchmark.options import BenchOptions
from echo_trt_lab.random_weights import random_checkpoint, with_random_weights
from echo_trt_lab.synthetic_engine import rates_given
from echo_trt_lab.synthetic_text import VARIABLE


@pytest.fixture
def shape_only(networks, tmp_path) -> Path:
    """Return the networks' configurations and tokenizers, without weights; of the hybrid, as few layers as can be."""
    shapes = Path(shutil.copytree(networks, tmp_path / "shapes", ignore=shutil.ignore_patterns("*.safetensors")))
    hybrid = json.loads((shapes / "hybrid/config.json").read_text())
    hybrid |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    (shapes / "hybrid/config.json").write_text(json.dumps(hybrid))
    return shapes


def parameters(checkpoint) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names() if name != "d2t")


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_every_shipped_recipe_has_a_shape(name):
    recipe = with_random_weights(recipe_for(name)[0])
    assert recipe.name == f"{name}-random"
    target, draft = shapes(recipe, RECIPES)
    assert parameters(random_checkpoint(recipe.target, RECIPES, "")) == target.sizes.total
    opened = random_checkpoint(recipe.draft.source, RECIPES, recipe.draft.kind)
    assert not opened.config["target_sha256"]
    shared = draft.sizes.embedding * (recipe.draft.kind in ("eagle3", "block"))
    assert parameters(opened) >= draft.sizes.total - shared - draft.sizes.output * (recipe.draft.kind == "block")


@pytest.mark.parametrize(
    ("pair", "kind"),
    [
        ("lookup", "eagle3"),
        ("mtp", "mtp"),
        ("dspark", "block"),
    ],
)
def test_a_bundle_of_a_shape_answers_with_synthetic_text(pair, kind, shape_only, tmp_path):
    bundle = tmp_path / "bundle"
    manifest = build(with_random_weights(recipe_of(pair, shape_only, precision="bf16")), shape_only, bundle)
    assert manifest.recipe.draft.kind == kind
    assert manifest.recipe.target.random_weights
    assert manifest.tokenizer.startswith(str(shape_only))
    prompts, params = [[5, 6, 7], [9]], SamplingParams(max_tokens=20)
    with rates_given("0.9"):
        plain, drafted = (LLM(bundle, policy, 2) for policy in ("autoregressive", "static"))
    wanted = [completion.token_ids for completion in plain.generate(prompts, params)]
    assert [completion.token_ids for completion in drafted.generate(prompts, params)] == wanted
    assert drafted.counters.accepted_length > 1.5


def test_without_a_tokenizer_at_hand_bytes_stand_in(shape_only, tmp_path):
    (shape_only / "target" / "tokenizer.json").unlink()
    recipe = with_random_weights(recipe_of("eagle3", shape_only))  # of a vocabulary that the default's does not fit
    assert build(recipe, shape_only, tmp_path / "bundle").tokenizer == "bytes"
    with rates_given("0.5"):
        llm = LLM(tmp_path / "bundle", "static", 1)
    [completion] = llm.chat([{"role": "user", "content": "né"}], SamplingParams(max_tokens=12))
    assert len(completion.token_ids) == 12
    assert completion.text


def test_every_output_says_that_the_text_is_synthetic(shape_only, tmp_path, capsys):
    bundle, prompts = tmp_path / "bundle", tmp_path / "prompts.jsonl"
    build(with_random_weights(recipe_of("eagle3", shape_only)), shape_only, bundle)
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": f"the {i}"}) + "\n" for i in range(3)))
    says, out = "synthetic text, whose drafts are accepted at 0.8,0.6", Console(width=200)
    options = GenerateOptions(bundle, prompts=prompts, max_tokens=8, policy="static")
    with rates_given("0.8,0.6"):
        generate(options, Console(quiet=True), out)
    assert says in capsys.readouterr().out
    given = {"prompts": [prompts], "policies": ("static",), "batches": (1,), "max_tokens": 8, "requests": 2}
    job = BenchOptions(bundle, html_file=tmp_path / "report.html", synthetic_text="0.8,0.6", rounds=1, **given)
    result = bench(job, out, Console(quiet=True))
    assert result["synthetic_text"].startswith(says)
    assert says in " ".join(capsys.readouterr().out.split())
    assert f"S{says[1:]}" in (tmp_path / "report.html").read_text()
    for changes in ({"peers": ("transformers",)}, {"record_file": tmp_path / "trees"}):
        with refused("needs a model's text", "--synthetic-text", "leave one of them out"):
            bench(replace(job, **changes), out, out)


def test_a_server_of_synthetic_text_says_so(shape_only, tmp_path):
    build(with_random_weights(recipe_of("eagle3", shape_only)), shape_only, tmp_path / "bundle")
    (tmp_path / "rates.json").write_text("[[0.8, 0.1], [0.6]]")
    [port] = free_ports(1)
    words = ["--openai-port", str(port), "--policy", "static"]
    command, environment = [sys.executable, "-m", "echo_trt", "serve", "bundle", *words], {VARIABLE: "rates.json"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, **pipes) as server:
        try:
            assert server.stdout
            lines = iter(server.stdout.readline, "")
            assert any("synthetic text, whose drafts are accepted at rates.json" in line for line in lines)
            assert any("serving" in line for line in lines)
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            chat = {"model": "echo", "messages": [{"role": "user", "content": "the"}], "max_tokens": 9}
            greedy = chat | {"temperature": 0}
            answers = [client.post("/v1/chat/completions", json=greedy).json() for _ in range(2)]
            assert answers[0]["usage"]["completion_tokens"] == 9
            assert answers[0]["choices"] == answers[1]["choices"]
        finally:
            server.terminate()
