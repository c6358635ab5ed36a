"""Bundles that are not what was built: refused with one sentence, before an engine opens them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from pairs import VOCAB
from refusal import refused

from echo_trt.bundle.manifest import sha256
from echo_trt.engine.llm import LLM
from echo_trt.errors import UserError


def edit_manifest(bundle: Path, **changes) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.parametrize("found", [0, 1, "1", None])
def test_another_format(found, bundle):
    edit_manifest(bundle, format=found)
    with refused("manifest.json", f"format is {found!r}", "reads 2", "build the bundle again"):
        LLM(bundle)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": {"file": "target.onnx"}}, ("key target.vocab_size is missing",)),
        ({"surprise": 1}, ("surprise is not valid",)),
        ({"engine": "foo"}, ("engine is not valid", "'openvino'", "not 'foo'")),
        ({"draft": None}, ("draft is missing for recipe.draft.kind model",)),
        ({"engine": "tensorrt"}, ("engine_facts: key version is missing",)),
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
    ("index", "value", "words"),
    [
        ("target.parameters", 10**400, ["target.parameters is not valid", "less than"]),
        ("target.parameters", -1, ["target.parameters is not valid", "not -1"]),
        ("target.vocab_size", VOCAB + 1, ["target.vocab_size is 301", "is 300"]),
        ("draft.hidden_size", 65, ["draft.hidden_size is 65", "is 64"]),
        ("draft.feature_size", 191, ["draft.feature_size is 191", "have 192 numbers"]),
        ("draft.file", "target.onnx", ["draft.file is target.onnx", "target.file"]),
        ("eos_token_ids", [VOCAB], ["eos_token_ids has 300", "299"]),
        ("eos_token_ids", [*range(9)], ["eos_token_ids has 9 ids", "8 at most"]),
    ],
)
def test_numbers_that_cannot_be(index, value, words, bundle_of, tmp_path):
    bundle = Path(shutil.copytree(bundle_of("close"), tmp_path / "bundle"))
    *above, last = index.split(".")
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_manifest_that_is_none(content, bundle):
    (bundle / "manifest.json").write_bytes(content)
    with refused("manifest.json", "build the bundle again"):
        LLM(bundle)


@pytest.mark.parametrize("name", ["/etc/passwd", "../target.onnx", "a/../../b", "..", ""])
def test_a_network_that_is_not_in_the_bundle(name, bundle):
    target = json.loads((bundle / "manifest.json").read_text())["target"]
    edit_manifest(bundle, target=target | {"file": name})
    with pytest.raises(UserError, match=re.escape(f"within the bundle, not {name!r}); build the bundle again.")):
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
        LLM(bundle)


def test_a_folder_that_is_no_bundle(tmp_path):
    for index, what in (
        (tmp_path, "not a bundle"),
        (Path(__file__), "not a bundle"),
        (tmp_path / "none", "there is no bundle"),
    ):
        with refused(index, what, "echo-trt build"):
            LLM(index)


def test_a_hybrid_for_an_engine_that_runs_it_no_more(bundle_of, tmp_path):
    bundle = shutil.copytree(bundle_of("mtp"), tmp_path / "old")
    edit_manifest(bundle, engine="openvino")
    with refused(bundle, "recurrent layers", "engine openvino", "build it again"):
        LLM(bundle)
