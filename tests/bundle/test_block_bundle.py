"""Bundles with a block drafter: what is refused before weights are read, and what a damaged one says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from models.block_checkpoints import block_raw, write_block
from models.checkpoints import BUILDERS
from models.gguf_files import GGUF_SIZES, write_gguf
from pairs import BLOCK, DECODING, LIMITS, VOCAB, layers, recipe_of
from refusal import refused

from echo_trt.bundle.calibration import read_calibration
from echo_trt.bundle.manifest import CONFIDENCE, read_manifest, sha256
from echo_trt.bundle.read_recipe import parse_recipe
from echo_trt.cli import build as building
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.models.checkpoint import weights_sha256


def drafter(folder: Path, **changes) -> dict:
    write_block(folder, block_raw("dflash", **BLOCK | layers([0, 1]) | changes))
    return {"kind": "block", "source": {"path": str(folder)}, "top_k": 5}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: drafter(f, **layers([0, 2])), ("target_layer_ids", "[0, 2]", "3 layers", "use a drafter")),
        (lambda f: drafter(f, block_size=9), ("9 rows", "18 KV rows", "16", "per_request", "draft.block")),
        (lambda f: drafter(f) | {"block": 8}, ("8 rows", "16 KV rows", "17 or more")),
    ],
)
def test_a_wrong_drafter_is_refused_before_weights_are_read(make, words, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "load_decoder", None)
    recipe = recipe_of("dflash", networks, draft=make(tmp_path / "drafter"))
    with refused(*words):
        build(recipe, networks, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        ({"kind": "block"}, ("draft", "source", "missing")),
        ({"kind": "lookup", "block": 8}, ("block is 8", "lookup", "leave it out")),
        ({"kind": "block", "source": {"path": "here"}, "block": 1}, ("draft.block is 1", "2")),
        ({"kind": "block", "source": {"path": "here"}, "top_k": 3}, ("draft.top_k is 3", "decoding.width 4")),
    ],
)
def test_recipes_that_are_refused(draft, words):
    raw = {"name": "mine", "target": {"path": "there"}, "draft": draft, "decoding": DECODING}
    with refused(*words):
        parse_recipe(raw, "mine.yaml")


def test_fewer_rows_than_the_checkpoints_draft_less_deep(networks, tmp_path):
    draft = drafter(tmp_path / "drafter") | {"block": 3}
    manifest = build(recipe_of("dflash", networks, draft=draft), networks, tmp_path / "bundle")
    assert manifest.draft.block.rows == 3
    llm = LLM(tmp_path / "bundle", "static")
    llm.generate(["the theme"])
    assert llm.counters.reached[2] > 0 == llm.counters.reached[3]


@pytest.mark.parametrize("tied", [False, True])
def test_a_drafter_shares_the_matrices_of_a_gguf_file(tied, tmp_path):
    model = BUILDERS["llama"](**GGUF_SIZES, tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType.Q8_0)
    own = {"hidden_size": GGUF_SIZES["hidden_size"], "vocab_size": GGUF_SIZES["vocab_size"]}
    raw = {"name": "mine", "target": {"path": "m.gguf"}, "draft": drafter(tmp_path / "drafter", **own)}
    raw["draft"]["source"]["path"] = "drafter"
    recipe = parse_recipe(
        raw | {"engine": "cpu", "precision": "int8", "limits": LIMITS | {"context": 40}, "decoding": DECODING},
        "mine.yaml",
    )
    build(recipe, tmp_path, tmp_path / "bundle")
    texts = []
    for policy in ("autoregressive", "static"):
        llm = LLM(tmp_path / "bundle", policy)
        texts.append(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids)
    assert texts[0] == texts[1]
    assert llm.counters.drafted_tokens > 0


@pytest.fixture
def bundle(bundle_of, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_of("dspark"), tmp_path / "bundle"))


def edit(bundle: Path, change) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    change(raw)
    (bundle / "manifest.json").write_text(json.dumps(raw))


def test_a_calibration_of_another_drafter_is_refused(bundle, networks, tmp_path):
    manifest = read_manifest(bundle)
    other = weights_sha256(networks / "dflash")
    assert manifest.draft_sha256 == weights_sha256(networks / "dspark") != other
    stored = {
        "target_sha256": manifest.target_sha256,
        "draft_sha256": other,
        "positions": 1,
        "gates": [],
        "fixed_threshold": 0.2,
        "acceptance": {name: [[0.5] * 65] for name in ("head", "lookup", "both")},
        "children": [[[0.5]]],
        "lookup": [0.5],
    }
    (bundle / "calibration.json").write_text(json.dumps(stored))
    read_calibration(bundle / "calibration.json", manifest.target_sha256, other)
    with refused("calibration.json", "another draft", other[:12], manifest.draft_sha256[:12], "echo-trt calibrate"):
        LLM(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["draft"].update(block=None), ("draft.block is missing", "block", "build the bundle again")),
        (lambda raw: raw["files"].pop(CONFIDENCE), ("files has no hash of", CONFIDENCE)),
        (lambda raw: raw["draft"]["block"].update(mask_token=VOCAB), ("mask_token", str(VOCAB))),
        (lambda raw: raw["draft"].update(feature_size=100), ("feature_size is 100",)),
        (lambda raw: raw["draft"].update(feature_size=64), ("draft.feature_size is 64", "128")),
    ],
)
def test_a_manifest_that_does_not_fit(change, words, bundle):
    edit(bundle, change)
    with refused(*words):
        LLM(bundle)


@pytest.mark.parametrize("spoil", ["damaged", "short"])
def test_a_confidence_that_does_not_fit(spoil, bundle):
    path = bundle / CONFIDENCE
    if spoil == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        np.save(path, np.load(path)[:9])
    edit(bundle, lambda raw: raw["files"].update({CONFIDENCE: sha256(path)}))
    with refused(CONFIDENCE, "build the bundle again"):
        LLM(bundle)
