"""Records of engines: what they cost to read, and an engine of another package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from layers import HEAVY
from pairs import recipe_of
from refusal import refused

from echo_trt import LLM, SamplingParams
from echo_trt.backends.kind import engine_kinds
from echo_trt.bundle.manifest import read_manifest
from echo_trt.cli.build import build
from echo_trt.files.extras import registered
from echo_trt.sizing.needs import recipe_needs

OTHER = """
from dataclasses import replace

from echo_trt.backends.kind import engine_kind

opened = []
torch = engine_kind("torch")


def _open(file, **given):
    opened.append((file.name, given["facts"]))
    return torch.open(file, **given)


def _compiler(recipe, folder, detail):
    return torch.compiler(recipe, folder, detail)[0], {"version": "7"}


KIND = replace(torch, name="other", precisions=("fp32",), card=None, tools=(), open=_open, compiler=_compiler)
"""


@pytest.fixture
def other(installed) -> Path:
    """Install a package that has an engine: another one."""
    return installed("other_engine", OTHER, "[echo_trt.engines]\nother = other_engine:KIND\n")


def test_an_engine_of_another_package_builds_and_answers(other, networks, bundle_of, tmp_path):
    recipe = recipe_of("close", networks, engine="other")
    assert recipe_needs(recipe, networks).reserved.total == 0  # it has no card
    with refused("precision is 'bf16', which other does not have", "use one of fp32"):
        build(recipe_of("close", networks, engine="other", precision="bf16"), networks, tmp_path / "bf16")
    build(recipe, networks, tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").engine_facts == {"version": "7"}
    prompts, params = [[7, 8, 9], [*range(40, 60)]], SamplingParams(max_tokens=12)
    own = [answer.token_ids for answer in LLM(tmp_path / "bundle").generate(prompts, params)]
    assert own == [answer.token_ids for answer in LLM(bundle_of("close")).generate(prompts, params)]
    opened = sys.modules["other_engine"].opened
    assert opened == [(f"{name}.safetensors", {"version": "7"}) for name in ("target", "draft")]


def test_the_command_line_offers_it(other):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(other)!r}); from echo_trt.cli.app import main; "
         "sys.argv[1:] = ['build', '--help']; main()"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "openvino, other, tensorrt, torch" in " ".join(done.stdout.split())


def test_an_engine_whose_modules_are_missing_says_which_extra_brings_them(bundle_of, tmp_path, monkeypatch):
    bundle = shutil.copytree(bundle_of("lookup"), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["engine"] = manifest["recipe"]["engine"] = "torch"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("echo_trt.files.extras.find_spec", lambda name: None)
    with refused("engine torch needs safetensors, torch, transformers, not installed", "'echo-trt[torch]'"):
        LLM(bundle)


def test_a_record_imports_no_engine():
    code = f"import sys; from echo_trt.backends.kind import *; engine_kinds(); print({HEAVY!r} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_records_have_the_names_by_which_they_are_found():
    assert [kind.name for kind in engine_kinds()] == list(registered("engines"))
    assert all(kind.card or kind.host for kind in engine_kinds())
