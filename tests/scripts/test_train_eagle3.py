"""Head training's first half: a bundle's target answers prompts, and what a head learns from is written down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from pairs import recipe_of

from echo_trt.compile.build import build

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_eagle3.py"


def run(*words: object) -> None:
    subprocess.run(list(map(str, (sys.executable, SCRIPT, *words))), check=True, capture_output=True, timeout=120)


def test_a_target_without_a_head_begins_with_an_untrained_one(networks, tmp_path):
    run("init", "--target", networks / "target", "--out", tmp_path / "head")
    draft = {"kind": "eagle3", "source": {"path": str(tmp_path / "head")}}
    manifest = build(recipe_of("eagle3", networks, draft=draft), networks, tmp_path / "bundle")
    assert manifest.draft.feature_size == 3 * manifest.target.hidden_size
    assert manifest.checks["draft"].prompt_error < manifest.checks["draft"].bound


def test_answers_are_written_with_the_features_of_their_tokens(bundle_of, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "{i}", "prompt": "the theme {i}"}}\n' for i in range(5)))
    words = ["generate", bundle_of("eagle3"), "--prompts", prompts, "--data", tmp_path / "data"]
    words += ["--batch", 2, "--max-tokens", 8, "--per-shard", 3]
    run(*words)
    shards = sorted((tmp_path / "data").glob("*.npz"))
    assert [path.name for path in shards] == ["shard-00000.npz", "shard-00001.npz"]
    for path, samples in zip(shards, (3, 2), strict=True):
        shard = np.load(path)
        features = np.load(path.with_name(path.stem + ".features.npy"), mmap_mode="r")
        assert len(shard["lengths"]) == samples
        assert (shard["lengths"] > shard["prompt_lengths"]).all()
        assert shard["lengths"].sum() == len(shard["tokens"]) == len(features)
        assert np.any(features, axis=1).mean() > 0.8  # all but each answer's last token
