"""Recipes: those that ship are valid, and each mistake is named with its file, its key and the remedy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusal import refused

from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.drafters.kind import NONE, draft_kind

SHIPPED = sorted((Path(__file__).parents[2] / "build").glob("*.yaml"))
VALID: dict[str, Any] = {
    "name": "mine",
    "target": {"path": "target"},
    "draft": {"kind": "model", "source": {"path": "small"}},
    "limits": {"batch": 4},
    "decoding": {"gates": {1: 0.2}},
}


def with_value(dotted: str, value: Any) -> dict[str, Any]:
    """Return VALID with one key set, a new one if need be."""
    raw = copy.deepcopy(VALID)
    *parents, last = dotted.split(".")
    section = raw
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return raw


@pytest.fixture
def written(tmp_path):
    """Write a recipe, given as a mapping or as the file's content."""

    def write(content: Any) -> Path:
        file = tmp_path / "mine.yaml"
        file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        return file

    return write


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file):
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert draft_kind(recipe.draft.kind) is not NONE


def test_a_recipe_survives_its_way_through_a_manifest(written):
    for raw in (VALID, with_value("decoding.gates", {1: 0.25, 5: 1})):
        recipe = load_recipe(written(raw))
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("targets", "target"),
        ("limits.bach", "batch"),
        ("target.pth", "path"),
        ("draft.source.tokeniser", "tokenizer"),
        ("decoding.static.topk", "top_k"),
    ],
)
def test_unknown_keys_name_the_nearest_valid_one(key, near, written):
    file = written(with_value(key, 3))
    with refused(f"{file}: unknown key {key};", f"did you mean {near}?"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("limits.batch", "8", ("'8'", "integer")),
        ("limits.batch", True, ("True", "integer")),
        ("limits.batch", 0, ("0", "greater than or equal to 1")),
        ("limits.context", 2**20 + 1, ("1048577", "less than or equal to 1048576")),
        ("limits.kv_blocks", 10**12, ("less than or equal to 16777216",)),
        ("limits.batch", "x" * 500, ("'xxx", "…; input should be a valid integer")),
        ("target", {"wheel": "--help", "file": "x"}, ("wheel is '--help'", "match pattern")),
        ("limits.prefix_cache", "yes", ("'yes'", "boolean")),
        ("limits", [1], ("[1]",)),
        ("precision", "fp64", ("'fp64'", "'fp32'", "'bf16'", "'int8'")),
        ("draft.top_k", 65, ("65", "less than or equal to 64")),
        ("draft.acceptance", [0.2, 1.5], ("1.5", "less than 1")),
        ("decoding.policy", "ecco", ("'ecco'", "'echo'")),
        ("decoding.gates", {0: 0.2}, ("0", "greater than or equal to 1")),
        ("decoding.gates", {1: 1.2}, ("1.2", "less than or equal to 1")),
        ("decoding.static.tokens", 1, ("1", "greater than or equal to 2")),
    ],
)
def test_values_of_the_wrong_kind_or_size(key, value, words, written):
    file = written(with_value(key, value))
    with refused(f"{file}: {key}", *words):
        load_recipe(file)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("target", {}, ("target", "path", "wheel and file")),
        ("target", {"path": "x", "wheel": "y"}, ("target", "either path, hub, or wheel and file")),
        (
            "target",
            {"wheel": "a==1", "file": "b", "hub": "c/d"},
            ("target", "give either path, hub, or wheel and file"),
        ),
        ("target", {"hub": "c"}, ("target", "hub is 'c', give OWNER/NAME")),
        ("tensor_parallel", 3, ("tensor_parallel is 3", "1, 2, 4 or 8")),
        ("target", {"wheel": "y==1"}, ("target", "wheel and file belong together")),
        ("target", {"path": "a\0b"}, ("target", "path has a null character")),
        ("draft", {"kind": "eagle3"}, ("draft", "source", "missing", "eagle3")),
        ("draft", {"kind": "lookup", "source": {"path": "x"}}, ("draft", "source", "not used, leave it out", "lookup")),
        ("draft", {"kind": "lookup", "min_match": 5}, ("draft", "min_match")),
        ("draft", {"kind": "none", "ngrams": "n.npz"}, ("draft", "ngrams", "lookup")),
        ("draft.top_k", 4, ("draft.top_k is 4", "decoding.width 8", "raise it")),
        ("decoding.per_request", 6, ("decoding", "per_request is 6", "max_depth 6")),
    ],
)
def test_values_that_do_not_go_together(key, value, words, written):
    file = written(with_value(key, value))
    with refused(str(file), *words):
        load_recipe(file)


@pytest.mark.parametrize("key", ["name", "target"])
def test_missing_keys(key, written):
    raw = {k: v for k, v in VALID.items() if k != key}
    with refused(f"key {key} is missing", "add it"):
        load_recipe(written(raw))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("mapping of keys",)),
        (b"- a\n- b\n", ("mapping of keys",)),
        (b"just words", ("mapping of keys",)),
        (b"name: [mine", ("not valid YAML", "line 1")),
        (b"name: mine\n\tlimits: 3", ("not valid YAML", "line 2")),
        (b"name: \xff\xfe", ("not valid YAML",)),
        (b"name: !!python/object:os.system x", ("not valid YAML",)),
        (b"name: a\n---\nname: b", ("not valid YAML",)),
        (b"[" * 10_000, ("nested too deeply", "build/")),
        (b"1: one\nname: a\ntarget: {path: x}", ("a key is 1", "in quotes")),
        (b"name: a\ntarget: {path: x}\nname: b", ("not valid YAML", "key name stands twice", "line 1")),
        (b"null: one\nname: a\ntarget: {path: x}", ("a key is None", "leave it out")),
        (b"name: a\ntarget: {path: 2021-99-99}", ("not valid YAML", "month must be in 1 to 12")),
        (b"name: a\ntarget: {path: x}\nlimits: {batch: " + b"9" * 6000 + b"}", ("not valid YAML", "4300 digits")),
        (b"name: a\ntarget: {path: x}\nlimits: {batch: 0x" + b"f" * 6000 + b"}", ("too long to print",)),
    ],
)
def test_files_that_hold_no_recipe(content, words, written):
    file = written(content)
    with refused(str(file), *words):
        load_recipe(file)


def test_paths_without_a_recipe(tmp_path, written):
    with refused(tmp_path / "none.yaml", "does not exist", "build/"):
        load_recipe(tmp_path / "none.yaml")
    with refused(tmp_path, "directory", "name a YAML file"):
        load_recipe(tmp_path)
    file = written(VALID)
    with refused(file / "below.yaml", "name a YAML file"):
        load_recipe(file / "below.yaml")


def test_a_pool_that_is_too_small_for_one_request(written):
    """100 tokens and a tree of up to 20 take four blocks of 32."""
    raw = with_value("limits", {"context": 100, "kv_blocks": 3}) | {"decoding": {"per_request": 20, "beams": 2}}
    with refused("limits.kv_blocks is 3", "context 100 needs 4", "raise kv_blocks or lower context"):
        load_recipe(written(raw))
    raw["limits"]["kv_blocks"] = 4
    assert load_recipe(written(raw)).limits.kv_blocks == 4
