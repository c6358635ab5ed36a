"""Bundles: whole or not there at all, bound to what was built, and with what their checkpoints bring."""

import shutil
from pathlib import Path

import pytest
from models.checkpoints import head_config, head_tensors, qwen3, write_head
from pairs import FOLDERS, PAIRS, SIZES, VOCAB, recipe_of, write_tokenizer
from refusal import refused

from echo_trt.adapters.triton.request import Reader
from echo_trt.bundle.manifest import read_manifest, sha256, verify_files
from echo_trt.bundle.recipe import Sampling
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.text.prompts import PromptReader
from echo_trt.models.checkpoint import weights_sha256


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# -- what a build leaves behind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_a_bundle_is_complete_and_says_what_is_in_it(pair, bundle_of, networks):
    folder = bundle_of(pair)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    measured = {"costs.json"}  # another test may have run it by now
    assert files_below(folder) - measured == {*manifest.files, "manifest.json"}
    assert {"target.onnx", "target.onnx.data", "tokenizer.json"} <= set(manifest.files)
    assert ("draft.onnx" in manifest.files) == (manifest.draft is not None) == (pair != "lookup")
    assert manifest.recipe == recipe_of(pair, networks)
    assert manifest.target_sha256 == weights_sha256(networks / FOLDERS[pair][0])
    assert manifest.eos_token_ids == [0]
    assert (manifest.target.vocab_size, manifest.target.num_layers) == (VOCAB, SIZES["num_hidden_layers"])
    assert {"openvino", "torch", "onnx", "python", "echo-trt"} <= set(manifest.tools)


def test_a_bundle_needs_nothing_else(bundle_of, tmp_path, networks, monkeypatch):
    """It works from another place, under another name, and nothing in it but the recipe knows where it came from."""
    moved = shutil.copytree(bundle_of("model"), tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    turn = [{"role": "user", "content": "hello"}]
    assert LLM("elsewhere").chat(turn)[0].token_ids == LLM(bundle_of("model")).chat(turn)[0].token_ids
    for name in files_below(moved) - {"manifest.json"}:
        assert str(networks).encode() not in (moved / name).read_bytes()


# -- builds that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        ("reading the target", KeyboardInterrupt),
        ("compiling the target", RuntimeError),
        ("writing the bundle", KeyboardInterrupt),
    ],
)
def test_an_interrupted_build_leaves_nothing_behind(stage, stop, networks, tmp_path):
    def progress(now: str) -> None:
        if now == stage:
            raise stop

    with pytest.raises(stop):
        build(recipe_of("lookup", networks), networks, tmp_path / "bundle", progress)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_the_old_bundle(networks, bundle):
    before = {name: sha256(bundle / name) for name in files_below(bundle)}

    def progress(now: str) -> None:
        if now == "reading the draft":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe_of("model", networks), networks, bundle, progress)
    assert {name: sha256(bundle / name) for name in files_below(bundle)} == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_build_takes_the_place_of_an_old_bundle_and_of_nothing_else(networks, bundle, tmp_path):
    build(recipe_of("lookup", networks), networks, bundle)
    assert read_manifest(bundle).name == "lookup"
    assert "draft.onnx" not in files_below(bundle)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for index in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with refused(index, "not a bundle", "another folder"):
            build(recipe_of("lookup", networks), networks, index)
    assert files_below(tmp_path / "mine") == {"thesis.txt"}


def other_head(folder: Path, **changes) -> dict:
    sizes = {"vocab_size": VOCAB, "hidden_size": SIZES["hidden_size"]}
    config = head_config(**sizes | changes)
    write_head(folder, config, head_tensors(config))
    return {"kind": "eagle3", "source": {"path": str(folder)}}


def other_model(folder: Path, corpus: str = "", **changes) -> dict:
    write_tokenizer(folder, *([corpus] if corpus else []))
    qwen3(**SIZES | {"num_hidden_layers": 1} | changes).save_pretrained(folder)
    return {"kind": "model", "source": {"path": str(folder)}}


def test_a_recipe_brings_its_own_chat_template(networks, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(networks, folder)
    written = folder / "mine.jinja"
    recipe = recipe_of("lookup", folder)
    recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update={"chat_template": "mine.jinja"})})
    for source in (None, "{% for x in messages %}"):
        if source:
            written.write_text(source)
        with refused("mine.jinja", "Jinja template"):
            build(recipe, folder, tmp_path / "bundle")
    written.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    build(recipe, folder, tmp_path / "bundle")
    llm = LLM(tmp_path / "bundle")
    assert llm.tokenizer.decode(llm.chat_ids("ab")) == "<ab>"


def without_tokenizer(folder: Path) -> dict:
    draft = other_model(folder)
    (folder / "tokenizer.json").unlink()
    return draft


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: {"kind": "model", "source": {"path": str(f)}}, ("draft", "does not exist", "download")),
        (lambda f: other_head(f, vocab_size=VOCAB + 1), (f"vocab_size is {VOCAB + 1}", f"target's is {VOCAB}")),
        (lambda f: other_head(f, target_hidden_size=32), ("target_hidden_size is 32", "target's is 64", "this target")),
        (lambda f: other_head(f, target_sha256="0" * 64), ("target_sha256", "other weights", "use the target")),
        (
            lambda f: other_model(
                f, "quite another text, whose words pair other letters: jumping zebras vex my plucky folk; "
            ),
            ("tokenizer differs", "use a draft with"),
        ),
        (
            lambda f: other_model(f, vocab_size=VOCAB + 20),
            (f"vocab_size is {VOCAB + 20}", f"target's is {VOCAB}", "use"),
        ),
        (without_tokenizer, ("tokenizer.json", "missing", "name its folder")),
    ],
    ids=["missing", "vocabulary", "shape", "weights", "tokens", "more tokens", "no tokenizer"],
)
def test_drafts_of_another_target(make, words, networks, tmp_path):
    draft = make(tmp_path / "draft") | {"top_k": 8}
    (tmp_path / "out").mkdir()
    with refused(tmp_path / "draft", *words):
        build(recipe_of("lookup", networks, draft=draft), networks, tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_head_for_these_very_weights(networks, tmp_path):
    digest = weights_sha256(networks / "target")
    draft = other_head(tmp_path / "draft", target_sha256=digest) | {"top_k": 8}
    stages = []

    def progress(stage: str) -> None:
        stages.append(stage)
        if stage == "compiling the target":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe_of("lookup", networks, draft=draft), networks, tmp_path / "bundle", progress)
    assert stages == ["reading the target", "reading the draft", "compiling the target"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": {"path": "nowhere"}}, ("nowhere", "does not exist", "download")),
        ({"precision": "fp16"}, ("precision", "'fp16'", "fp32, bf16")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_recipes_that_cannot_be_built(changes, words, networks, tmp_path):
    with refused(*words):
        build(recipe_of("lookup", networks, **changes), networks, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["b" * 300, "file/bundle", "b" * 250])
def test_a_place_that_cannot_be_is_refused_before_the_build(name, networks, tmp_path):
    (tmp_path / "file").touch()
    with refused(f"output {tmp_path / name}", "cannot be made", "another folder with -o"):
        build(recipe_of("lookup", networks), networks, tmp_path / name, pytest.fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_calibration_that_is_not_there_is_named_before_it_compiles(networks, tmp_path):
    stages = []
    with refused("the recipe's calibration", networks / "nofile.json", "cannot be read"):
        build(recipe_of("lookup", networks, calibration="nofile.json"), networks, tmp_path / "bundle", stages.append)
    assert stages == ["reading the target"]
    assert list(tmp_path.iterdir()) == []


# -- what of a checkpoint a bundle takes over --------------------------------------------------------------------


def test_a_context_beyond_the_targets_is_refused_before_it_compiles(networks, tmp_path):
    recipe = recipe_of("lookup", networks)
    limits = recipe.limits.model_copy(update={"context": 2049, "kv_blocks": None})
    with refused("limits.context", 2049, 2048, "lower"):
        build(recipe.model_copy(update={"limits": limits}), networks, tmp_path / "bundle")


def test_what_the_checkpoint_recommends_is_the_default_of_requests(networks, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(networks, folder)
    config = folder / "target" / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}')
    build(recipe_of("lookup", folder), folder, tmp_path / "bundle")
    llm = LLM(tmp_path / "bundle")
    own = {"top_k": 20, "top_p": 0.95, "min_p": 0.1}
    assert llm.sampling() == SamplingParams(temperature=0.6, **own)
    assert llm.sampling(temperature=0, max_tokens=3) == SamplingParams(3, temperature=0, **own)
    reader = Reader(PromptReader(tmp_path / "bundle", 100), llm.manifest.sampling.given())
    ids, greedy = {"input_ids": [5]}, {"temperature": 0.0}
    assert reader.read(ids).job.request.params == llm.sampling()
    params = reader.read(ids | greedy).job.request.params
    assert params == SamplingParams(temperature=0.0, top_k=20, top_p=0.95, min_p=0.1)
    preferred = {"sampling": Sampling(temperature=0.2, repetition_penalty=1.1)}
    recipe = recipe_of("lookup", folder).model_copy(update=preferred)
    recommended = build(recipe, folder, tmp_path / "bundle").sampling
    assert recommended == Sampling(temperature=0.2, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)
    config.unlink()
    assert build(recipe, folder, tmp_path / "bundle").sampling == preferred["sampling"]
    config.write_text('{"do_sample": true, "temperature": -1}')
    with refused("temperature", "do_sample"):
        build(recipe_of("lookup", folder), folder, tmp_path / "bundle")


def test_more_end_tokens_than_a_request_stops_at_are_refused(networks, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(networks, folder)
    (folder / "target" / "generation_config.json").write_text('{"eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8]}')
    with refused("9 end tokens", "8 at most", "generation_config.json"):
        build(recipe_of("lookup", folder), folder, tmp_path / "bundle")


def test_the_bundle_takes_the_place_of_what_a_link_points_to(networks, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    build(recipe_of("lookup", networks), networks, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "manifest.json").exists()
