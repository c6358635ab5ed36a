"""N-grams from a file: they come back as they were, others are refused, and texts with them are plain decoding's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from driving import assert_all_free, goodput_planner, prompt_ids
from pairs import recipe_of
from refusal import refused

from echo_trt.bundle.manifest import NGRAMS, read_manifest
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError
from echo_trt.models.checkpoint import weights_sha256
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.model.ngrams import SUREST, NGrams
from echo_trt_lab.ngram_tables import context_keys, write_ngrams

LONGEST, TARGET = 4, "7" * 64


def ngrams_of(texts: list[list[int]], chance: float = 0.8, wrong: int = 0) -> NGrams:
    """Return what follows every context in ``texts``, plus ``wrong``."""
    found = {}
    for text in texts:
        keys = context_keys(np.array(text), LONGEST)
        for end in range(1, len(text)):
            found |= {int(key): (text[end] + wrong) % 300 for key in keys[end] if key}
    keys = np.array(sorted(found), np.uint32)
    return NGrams(keys, np.array([found[k] for k in sorted(found)]), np.full(len(keys), chance), LONGEST)


def test_they_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 2**32, 500, np.uint32))
    ngrams = NGrams(keys, rng.integers(0, 300, len(keys)), rng.uniform(0, 1, len(keys)), LONGEST)
    write_ngrams(ngrams, tmp_path / NGRAMS, TARGET)
    again = read_ngrams(tmp_path / NGRAMS, TARGET, 300)
    assert (again.keys == ngrams.keys).all()
    assert (again.tokens == ngrams.tokens).all()
    assert again.chances == pytest.approx(np.minimum(ngrams.chances, SUREST), abs=1 / 255)
    assert again.longest == LONGEST
    assert [path.name for path in tmp_path.iterdir()] == [NGRAMS]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_sha256": "8" * 64}, ["another target's text", "888888888888", "777777777777"]),
        ({"keys": np.array([5, 3], np.uint32)}, ["keys do not ascend"]),
        ({"tokens": np.array([1, 300], np.uint32)}, ["beyond 300"]),
        ({"tokens": np.array([1], np.uint32)}, ["do not fit together"]),
        ({"chances": np.array([0.1, 0.2])}, ["do not fit together"]),
        ({"longest": 0}, ["do not fit together"]),
        ({"longest": 1.5}, ["do not fit together"]),
        ({"keys": None}, ["holds no n-grams", "keys"]),
        ({"keys": np.array([{}, {}])}, ["holds no n-grams"]),
    ],
)
def test_another_file_is_refused(changes, words, tmp_path):
    columns = {
        "keys": np.array([3, 5], np.uint32),
        "tokens": np.array([1, 2], np.uint32),
        "chances": np.array([9, 200], np.uint8),
        "longest": 4,
        "target_sha256": TARGET,
    }
    columns = {name: value for name, value in (columns | changes).items() if value is not None}
    np.savez(tmp_path / NGRAMS, **columns)
    with refused(tmp_path / NGRAMS, *words, "train_eagle3.py ngrams"):
        read_ngrams(tmp_path / NGRAMS, TARGET, 300)


def test_any_changed_byte_is_a_sentence_or_does_no_harm(tmp_path):
    write_ngrams(ngrams_of([list(range(40))]), tmp_path / "whole.npz", TARGET)
    whole = (tmp_path / "whole.npz").read_bytes()
    reported = []
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / NGRAMS).write_bytes(damaged)
        try:
            read_ngrams(tmp_path / NGRAMS, TARGET, 300)
        except UserError as error:
            reported.append(str(error))
    assert len(reported) > len(whole) / 3 / 2
    assert all("train_eagle3.py ngrams" in sentence for sentence in reported)


@pytest.fixture(scope="module")
def with_ngrams(networks, bundle_of, tmp_path_factory) -> Path:
    """Return the bundle of a pair without an engine of its own for drafts, and n-grams of what its target writes."""
    folder = tmp_path_factory.mktemp("ngrams")
    texts = [c.token_ids for c in LLM(bundle_of("lookup"), "autoregressive", 4).generate(*requests())]
    digest = weights_sha256(networks / "target")
    write_ngrams(ngrams_of(texts), folder / "mine.npz", digest)
    recipe = recipe_of("lookup", networks, draft={"kind": "lookup", "ngrams": str(folder / "mine.npz")})
    build(recipe, networks, folder / "bundle")
    return folder / "bundle"


def requests() -> tuple[list[list[int]], SamplingParams]:
    return [prompt_ids(n, n) for n in (5, 9, 20)], SamplingParams(max_tokens=30, ignore_eos=True)


def test_a_bundle_brings_them(with_ngrams, bundle_of):
    llm = LLM(with_ngrams, "goodput", 3)
    planner = llm.loop.planner  # whose costs are not this machine's, nor learnt from what else runs here
    planner.learner.costs = Costs(Curve([1, 256], [1e-3] * 2), Curve([1], [1e-9]))
    plain = [c.token_ids for c in LLM(bundle_of("lookup"), "autoregressive", 3).generate(*requests())]
    completions = llm.generate(*requests())
    assert [c.token_ids for c in completions] == plain
    assert planner.totals()["accepted"]["ngram"] > 0
    assert_all_free(llm.loop)


def test_a_bundle_must_hold_those_that_its_recipe_names(with_ngrams, tmp_path):
    raw = json.loads((with_ngrams / "manifest.json").read_text())
    del raw["files"][NGRAMS]
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with refused("files has no hash of", NGRAMS):
        read_manifest(tmp_path)


def test_those_of_another_target_are_refused_before_it_compiles(networks, tmp_path):
    write_ngrams(ngrams_of([[1, 2, 3]]), tmp_path / "its.npz", TARGET)
    stages: list[str] = []
    recipe = recipe_of("lookup", networks, draft={"kind": "lookup", "ngrams": str(tmp_path / "its.npz")})
    with refused("another target's text", "its.npz"):
        build(recipe, networks, tmp_path / "bundle", stages.append)
    assert "compiling the target" not in stages


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("pair", ["lookup", "self", "close"])
def test_texts_are_plain_decodings_whether_they_are_right_or_wrong(pair, wrong, open_llm):
    plain = [c.token_ids for c in open_llm(pair, "autoregressive", 3).generate(*requests())]
    llm = open_llm(pair, "autoregressive", 3)
    free = Costs(Curve([1, 256], [1e-3, 1e-3]), Curve([1, 256], [1.0, 1.0]))  # a draft would cost more than it brings
    ngrams = ngrams_of(plain, wrong=wrong)
    for policy in ("goodput", "goodput-exact"):
        planner = goodput_planner(llm, free, policy, ngrams)
        llm.loop.planner = planner
        assert [c.token_ids for c in llm.generate(*requests())] == plain
        assert_all_free(llm.loop)
        totals = planner.totals()
        assert totals["expected"]["ngram"] > 0
        assert (totals["accepted"]["ngram"] > 0.5 * totals["expected"]["ngram"]) == (wrong == 0)
