"""Bundles: whole or not there at all, bound to what was built, and refused with one sentence where they are not."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from models.checkpoints import head_config, head_tensors, qwen3, write_head
from pairs import FOLDERS, LIMITS, PAIRS, SIZES, VOCAB, recipe_of, write_tokenizer
from refusal import refused

from echo_trt.bundle.manifest import read_manifest, sha256, verify_files
from echo_trt.commands.build import build
from echo_trt.errors import UserError
from echo_trt.models.checkpoint import weights_sha256
from echo_trt.runtime.llm import LLM
from echo_trt.runtime.params import SamplingParams
from echo_trt.serving.triton.request import Reader


@pytest.fixture
def bundle(bundle_of, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(bundle_of("model"), tmp_path / "bundle"))


def edit_manifest(bundle: Path, **changes) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["reading the target", "compiling the target", "writing the bundle"])
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
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with refused(place, "not a bundle", "another folder"):
            build(recipe_of("lookup", networks), networks, place)
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
        ({"precision": "fp16"}, ("precision", "'fp16'", "fp32, bf16, int8")),
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


# -- bundles that are not what was built ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["target.onnx", "target.onnx.data", "draft.onnx.data", "tokenizer.json"])
def test_a_changed_file(name, bundle):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with refused(bundle / name, "changed after the build", "hash", "build it again"):
        LLM(bundle)


@pytest.mark.parametrize("name", ["target.onnx", "draft.onnx.data", "tokenizer.json"])
def test_a_missing_file(name, bundle):
    (bundle / name).unlink()
    with refused(bundle, f"lacks its file {name}", "build it again"):
        LLM(bundle)


def test_a_long_value_is_shortened(bundle):
    edit_manifest(bundle, format="1" * 5000)
    with refused("manifest.json", f"format is '{'1' * 199}…, but"):
        LLM(bundle)
    edit_manifest(bundle, format=2, engine="o" * 5000)
    with refused("manifest.json", f"not '{'o' * 199}…)"):
        LLM(bundle)


@pytest.mark.parametrize("found", [0, 1, "1", None])
def test_another_format(found, bundle):
    edit_manifest(bundle, format=found)
    with refused("manifest.json", f"format is {found!r}", "reads 2", "build the bundle again"):
        LLM(bundle)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": None}, ("files is not valid",)),
        ({"target": {"file": "target.onnx"}}, ("key target.vocab_size is missing",)),
        ({"surprise": 1}, ("surprise is not valid",)),
        ({"recipe": {"name": "x"}}, ("key recipe.target is missing",)),
        ({"engine": "foo"}, ("engine is not valid", "'openvino'", "not 'foo'")),
        ({"precision": "foo"}, ("precision is not valid", "not 'foo'")),
        ({"draft": None}, ("draft is missing for recipe.draft.kind model",)),
        ({"engine": "tensorrt"}, ("tensorrt is missing for engine tensorrt",)),
        ({"files": {"/etc/passwd": "0"}}, ("files./etc/passwd is not valid", "within the bundle")),
        ({"files": {}}, ("files has no hash of target.onnx",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_manifest_that_says_nonsense(changes, words, bundle):
    edit_manifest(bundle, **changes)
    with refused("manifest.json", *words, "build the bundle again"):
        LLM(bundle)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("target.parameters", 10**400, ["target.parameters is not valid", "less than"]),
        ("target.parameters", -1, ["target.parameters is not valid", "not -1"]),
        ("target.vocab_size", 0, ["target.vocab_size is not valid", "not 0"]),
        ("target.vocab_size", VOCAB + 1, ["target.vocab_size is 301", "is 300"]),
        ("target.num_layers", 2**70, ["target.num_layers is not valid"]),
        ("draft.head_dim", 0, ["draft.head_dim is not valid"]),
        ("draft.hidden_size", 65, ["draft.hidden_size is 65", "is 64"]),
        ("draft.feature_size", 191, ["draft.feature_size is 191", "is 192"]),
        ("draft.feature_size", 10**30, ["draft.feature_size is not valid"]),
        ("draft.file", "target.onnx", ["draft.file is target.onnx", "target.file"]),
        ("eos_token_ids", [VOCAB], ["eos_token_ids has 300", "299"]),
        ("eos_token_ids", [-1], ["eos_token_ids.0 is not valid", "not -1"]),
        ("eos_token_ids", [*range(9)], ["eos_token_ids has 9 ids", "8 at most"]),
    ],
)
def test_numbers_that_cannot_be(place, value, words, bundle_of, tmp_path):
    bundle = Path(shutil.copytree(bundle_of("close"), tmp_path / "bundle"))
    *above, last = place.split(".")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (manifest[above[0]] if above else manifest)[last] = value
    edit_manifest(bundle, **manifest)
    with refused("manifest.json", *words, "build the bundle again"):
        LLM(bundle)


@pytest.mark.parametrize("pair", ["close", "model"])
def test_networks_in_each_others_place(pair, bundle_of, tmp_path):
    bundle = Path(shutil.copytree(bundle_of(pair), tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    target, draft = manifest["target"], manifest["draft"]
    edit_manifest(bundle, target=target | {"file": "draft.onnx"}, draft=draft | {"file": "target.onnx"})
    with refused("target.file is 'draft.onnx'", "another network", "build the bundle again"):
        LLM(bundle)


def test_a_head_in_the_place_of_a_model(bundle, bundle_of):
    for name in ("draft.onnx", "draft.onnx.data"):
        shutil.copy(bundle_of("eagle3") / name, bundle / name)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {name: sha256(bundle / name) for name in ("draft.onnx", "draft.onnx.data")})
    with refused("draft.file is 'draft.onnx'", "another network", "build the bundle again"):
        LLM(bundle)


def test_end_tokens_that_are_no_tokens_are_left_out(networks, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(networks, folder)
    (folder / "target" / "generation_config.json").write_text(f'{{"eos_token_id": [-1, 7, {VOCAB}]}}')
    assert build(recipe_of("lookup", folder), folder, tmp_path / "bundle").eos_token_ids == [0, 7]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_manifest_that_is_none(content, bundle):
    (bundle / "manifest.json").write_bytes(content)
    with refused("manifest.json", "build the bundle again"):
        LLM(bundle)


def test_a_manifest_without_an_end(tmp_path):
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with refused("manifest.json", "File too large", "build the bundle again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../target.onnx", "a/../../b", "..", ""])
def test_a_network_that_is_not_in_the_bundle(name, bundle):
    target = json.loads((bundle / "manifest.json").read_text())["target"]
    edit_manifest(bundle, target=target | {"file": name})
    with pytest.raises(UserError, match=re.escape(f"within the bundle, not {name!r}); build the bundle again.")):
        LLM(bundle)


def test_a_folder_in_place_of_a_file(bundle):
    (bundle / "draft.onnx").unlink()
    (bundle / "draft.onnx").mkdir()
    with refused(bundle / "draft.onnx", "cannot be read (Is a directory)", "build it again"):
        LLM(bundle)


def test_links(bundle, tmp_path):
    """As mounts and caches make them: within the bundle and to graphs they are followed, and never to weights."""
    (bundle / "..data").mkdir()
    for name in ("target.onnx", "target.onnx.data", "tokenizer.json"):
        (bundle / name).rename(bundle / "..data" / name)
        (bundle / name).symlink_to(Path("..data") / name)
    (bundle / "draft.onnx").rename(tmp_path / "graph")
    (bundle / "draft.onnx").symlink_to(tmp_path / "graph")
    (tmp_path / "link").symlink_to(bundle)
    LLM(tmp_path / "link")
    (bundle / "draft.onnx.data").rename(tmp_path / "weights")
    (bundle / "draft.onnx.data").symlink_to(tmp_path / "weights")
    with refused(bundle / "draft.onnx.data", "is a link to", tmp_path / "weights", "cp -rL"):
        verify_files(bundle, read_manifest(bundle))


def test_a_file_that_was_not_a_network_when_it_was_hashed(bundle):
    (bundle / "target.onnx").write_text("nothing of the kind")
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {"target.onnx": sha256(bundle / "target.onnx")})
    with refused(bundle / "target.onnx", "not a network that OpenVINO reads", "echo-trt inspect", "build it again"):
        LLM(bundle)


def test_a_folder_that_is_no_bundle(tmp_path):
    for place, what in ((tmp_path, "not a bundle"), (Path(__file__), "not a bundle"), (tmp_path / "none", "not exist")):
        with refused(place, what, "echo-trt build"):
            LLM(place)


def test_a_prompt_longer_than_the_context(bundle):
    context = LIMITS["context"]
    with refused(f"{context} tokens", f"context length is {context}", "shorten it", "limits.context"):
        LLM(bundle).generate([[5] * context])


def test_a_context_beyond_the_targets_is_refused_before_it_compiles(networks, tmp_path):
    recipe = recipe_of("lookup", networks)
    limits = recipe.limits.model_copy(update={"context": 2049, "kv_blocks": None})
    with refused("limits.context", 2049, 2048, "lower"):
        build(recipe.model_copy(update={"limits": limits}), networks, tmp_path / "bundle")


def test_end_tokens_of_the_generation_config_stop_too(networks, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(networks, folder)
    (folder / "target" / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert build(recipe_of("lookup", folder), folder, tmp_path / "bundle").eos_token_ids == [0, 7]


def test_what_the_checkpoint_recommends_is_the_default_of_requests(networks, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(networks, folder)
    config = folder / "target" / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}')
    build(recipe_of("lookup", folder), folder, tmp_path / "bundle")
    llm = LLM(tmp_path / "bundle")
    assert llm.default_params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1)
    read = Reader(tmp_path / "bundle", 100, sampling=llm.manifest.sampling.given()).read
    ids, greedy = {"input_ids": np.array([[5]])}, {"temperature": np.array([[0.0]], np.float32)}
    assert read(ids).params == llm.default_params
    assert read(ids | greedy).params == SamplingParams(temperature=0.0, top_k=20, top_p=0.95, min_p=0.1)
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


def test_the_bundle_takes_the_place_of_the_folder_one_stands_in(networks, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build(recipe_of("lookup", networks), networks, Path())
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here" / "manifest.json").exists()
