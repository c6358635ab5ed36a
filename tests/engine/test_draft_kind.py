"""Records of drafters: what they cost to read, how they know a checkpoint, and a drafter of another package."""

from __future__ import annotations

import subprocess
import sys

import pytest
from layers import HEAVY
from pairs import FOLDERS, recipe_of

from echo_trt import LLM, SamplingParams
from echo_trt.cli.build import build
from echo_trt.engine.drafters.kind import draft_kinds
from echo_trt.files.extras import registered
from echo_trt.models.checkpoint import read_json
from echo_trt.sizing.shapes import shapes

OTHER = """
from echo_trt.engine.drafters.kind import ModelKind


class Other(ModelKind):
    name, made = "other", []

    def drafter(self, manifest, batch, engine, folder):
        self.made.append(manifest.draft.file)
        return super().drafter(manifest, batch, engine, folder)


KIND = Other()
"""


def test_a_drafter_of_another_package_builds_and_drafts(installed, networks, bundle_of, tmp_path):
    installed("other_draft", OTHER, "[echo_trt.drafts]\nother = other_draft:KIND\n")
    draft = {"kind": "other", "source": {"path": str(networks / "target")}, "top_k": 5}
    recipe = recipe_of("self", networks, draft=draft)
    target, own = shapes(recipe, networks)
    assert own.sizes == target.sizes
    build(recipe, networks, tmp_path / "bundle")
    llm = LLM(tmp_path / "bundle", "echo")
    prompts, params = [[7, 8, 9], [*range(40, 60)]], SamplingParams(max_tokens=12)
    plain = [answer.token_ids for answer in LLM(bundle_of("self"), "autoregressive").generate(prompts, params)]
    assert [answer.token_ids for answer in llm.generate(prompts, params)] == plain
    assert sys.modules["other_draft"].KIND.made == ["draft.onnx"]
    assert llm.counters.iterations < len(plain[0])  # it drafts what its target says


@pytest.mark.parametrize("pair", ["model", "eagle3", "dflash", "peagle"])
def test_one_record_knows_a_checkpoint(pair, networks):
    _, kind, folder = FOLDERS[pair]
    raw = read_json(networks / folder / "config.json")
    assert [each.name for each in draft_kinds() if each.knows(raw)] == [kind]


def test_a_record_imports_no_network():
    code = (
        f"import sys; from echo_trt.engine.drafters.kind import *; draft_kinds(); print({HEAVY!r} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_records_have_the_names_by_which_they_are_found():
    assert [kind.name for kind in draft_kinds()] == list(registered("drafts"))
