"""A model's name is enough to build: a shipped recipe or a derived one, from the hub's cache or a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from answering import answering
from models.checkpoints import qwen3
from models.fp8_checkpoints import configure, quantise
from models.gguf_files import GGUF_SIZES, write_gguf
from refusal import refused

from echo_trt.backends.kind import built_as, engine_kinds
from echo_trt.backends.self_check import BOUNDS
from echo_trt.bundle.manifest import read_manifest
from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.cli import recipes
from echo_trt.cli.app import _bundle_of
from echo_trt.cli.options import BuildOptions
from echo_trt.cli.recipes import RECIPES, for_this_machine, recipe_for, sized
from echo_trt.engine.kv_pool import kv_pool
from echo_trt.models.checkpoint import weights_sha256
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.sizing.limits import filling, limited
from echo_trt.sizing.needs import needs
from echo_trt.sizing.shapes import shapes

HEAD = "AngelSlim/Qwen3-8B_eagle3"


def publish(home: Path, name: str, checkpoint: Path) -> None:
    """Put a checkpoint where the hub's client keeps what it has fetched."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint, folder / "snapshots" / ("0" * 40))


def built(*words: object, **env: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echo_trt", "build", *map(str, words)]
    return subprocess.run(
        command, env=os.environ | {k: str(v) for k, v in env.items()}, capture_output=True, text=True, timeout=300
    )


def test_a_derived_recipe_knows_the_family(networks, tmp_path):
    """Of config.json alone: no weights are there yet."""
    raw = json.loads((networks / "mistral" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert recipe_for(str(tmp_path))[0].limits.context == 2048
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["Mistral4ForCausalLM"]}))
    with refused(tmp_path, "'Mistral4ForCausalLM'", "Qwen2ForCausalLM", "MistralForCausalLM is nearest"):
        recipe_for(str(tmp_path))


def test_a_name_builds_what_the_hub_has(networks, tmp_path):
    """Offline, from the hub's own cache: a recipe is derived from both configurations."""
    publish(tmp_path / "home", "tiny/Target-1", networks / "target")
    publish(tmp_path / "home", "tiny/head", networks / "head")
    words = ["tiny/Target-1", "--draft", "tiny/head", "-o", tmp_path / "bundle", "--precision", "fp32"]
    words += ["--max-model-len", 64, "--max-num-seqs", 3, "--kv-cache-memory", "1M"]
    done = built(*words, HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=1, COLUMNS=200)
    assert done.returncode == 0, done.stderr
    recipe = read_manifest(tmp_path / "bundle").recipe
    pool = kv_pool(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    assert pool.blocks == recipe.limits.kv_blocks == 2**20 // pool.block_bytes
    assert pool.sentence.removeprefix("KV pool: ") in done.stdout
    assert (recipe.name, recipe.target.hub, recipe.draft.kind) == ("target-1", "tiny/Target-1", "eagle3")
    assert (recipe.limits.context, recipe.limits.batch) == (64, 3)


def test_an_fp8_model_of_the_hub_is_sized_and_built_in_fp8(networks, tmp_path):
    folder = tmp_path / "fp8"
    shutil.copytree(networks / "target", folder)
    quantise(folder, "block", (128, 128))
    configure(folder, quant_method="fp8", weight_block_size=[128, 128])
    publish(tmp_path / "home", "tiny/Target-FP8", folder)
    words = ["tiny/Target-FP8", "-o", tmp_path / "bundle", "--engine", "torch", "--precision", "fp8"]
    words += ["--max-model-len", 64, "--max-num-seqs", 3, "--kv-cache-memory", "1M"]
    done = built(*words, HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=1, COLUMNS=200)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.precision, manifest.checks["target"].bound) == ("fp8", BOUNDS["fp8"])


def test_what_is_not_in_the_cache_says_where_it_was_looked_for(tmp_path):
    done = built("tiny/Target-1", HF_HOME=tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 2
    output = " ".join(done.stderr.split())
    assert f"model tiny/Target-1 is not in {tmp_path}/hub and cannot be fetched (HF_HUB_OFFLINE is set); conn" in output
    assert not Path("bundles/target-1").exists()


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "GatedRepo", "model a/b is gated; accept its licence at"),
        (500, "", "cannot be fetched ("),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(status, code, sentence, tmp_path):
    with answering(status=status, X_Error_Code=code) as port:
        done = built("a/b", HF_HOME=tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HUB_OFFLINE=0)
    assert done.returncode == 2
    output = " ".join(done.stderr.split())
    assert sentence in output
    assert "Traceback" not in output


def test_shipped_recipes_are_found_by_the_target_and_its_draft(tmp_path):
    assert recipe_for("Qwen/Qwen3-8B")[0].name == "qwen3-8b"
    assert recipe_for("Qwen/Qwen3-8B", HEAD)[0].draft.source.hub == HEAD
    assert recipe_for("Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16")[0].name == "qwen3-8b-dflash"
    (tmp_path / "Qwen3-8B").mkdir()
    recipe, _ = recipe_for(str(tmp_path / "Qwen3-8B"))
    assert (recipe.name, recipe.target.path) == ("qwen3-8b", str(tmp_path / "Qwen3-8B"))
    assert recipe.draft.source.hub == HEAD


@pytest.mark.parametrize(
    ("file", "name"),
    [("Qwen3-1.7B-Q4_K_M.gguf", "qwen3-1.7b"), ("Qwen3-8B.UD-IQ4_XS.gguf", "qwen3-8b"), ("qwen3-8b.gguf", "qwen3-8b")],
)
def test_a_gguf_file_s_name_finds_the_head_of_its_model(file, name, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_trt.backends.cuda.device.has_cuda", lambda: False)
    (tmp_path / file).touch()
    recipe, _ = recipe_for(str(tmp_path / file))
    assert (recipe.name, recipe.target.path, recipe.target.hub) == (name, str(tmp_path / file), None)
    recipe, _ = for_this_machine(file, recipe, Path(), None, None)
    assert (recipe.draft.kind, recipe.engine, recipe.limits.kv_blocks) == ("eagle3", "cpu", None)


def test_the_name_in_a_file_finds_the_head_of_its_model(tmp_path):
    model = qwen3(**GGUF_SIZES)
    for file, name in (("sha256-5ee4f0", "Qwen3 1.7B GGUF"), ("other", "Own 1.7B")):
        recipe, _ = recipe_for(str(write_gguf(tmp_path / file, model, name=name)))
        assert (recipe.name, recipe.draft.kind) == (("qwen3-1.7b", "eagle3") if name[0] == "Q" else ("other", "lookup"))


def test_a_shipped_head_goes_with_the_file_that_it_was_trained_for(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "shipped_folder", lambda: tmp_path)
    mine, other = tmp_path / "model-1b-q4_k_m.gguf", tmp_path / "Model-1B-Q8_0.gguf"
    mine.write_bytes(b"GGUF mine")
    other.write_bytes(b"GGUF other")
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text(json.dumps({"target_sha256": weights_sha256(mine)}))
    draft = {"kind": "eagle3", "source": {"path": "head"}, "ngrams": "head/ngrams.npz", "precision": "int8"}
    raw = {"name": "model-1b", "target": {"hub": "own/Model-1B"}, "draft": draft, "calibration": "head/c.json"}
    (tmp_path / "model-1b.yaml").write_text(json.dumps(raw))
    found, folder = recipe_for(str(mine))
    assert (found.draft.kind, found.draft.ngrams, found.calibration, folder) == (
        "eagle3", "head/ngrams.npz", "head/c.json", tmp_path,
    )  # fmt: skip
    for what in (str(other), "own/Model-1B"):
        left = recipe_for(what)[0]
        assert (left.name, left.draft.kind, left.draft.source, left.draft.ngrams) == ("model-1b", "lookup", None, None)
        assert left.calibration is None


def test_a_gguf_file_is_built_with_what_it_recommends(tmp_path):
    stated = {"temp": 0.95, "top_k": -1}
    file = write_gguf(tmp_path / "Own-2B-F32.gguf", qwen3(**GGUF_SIZES), recommended=stated)
    done = built(file, "-o", tmp_path / "bundle", "--max-model-len", 64, "--max-num-seqs", 2, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.name, manifest.engine, manifest.recipe.draft.kind) == ("own-2b-f32", "cpu", "lookup")
    assert manifest.sampling.given() == {"temperature": 0.95, "top_k": 0, "top_p": 0.95}  # the last is its family's
    with refused("models/x.gguf is neither a recipe", "GGUF file"):
        recipe_for("models/x.gguf")


def test_without_a_gpu_a_name_is_built_for_the_cpu_with_a_pool_that_follows_its_memory(monkeypatch):
    name = "Qwen/Qwen3-0.6B"
    recipe, folder = recipe_for(name)
    monkeypatch.setattr("echo_trt.backends.cuda.device.has_cuda", lambda: False)
    here, why = for_this_machine(name, recipe, folder, None, None)
    assert (here.engine, here.limits.kv_blocks, why) == ("cpu", None, "the fastest on this CPU")
    named, why = for_this_machine(name, recipe, folder, "tensorrt", None)
    assert (named.engine, named.limits.kv_blocks, why) == ("tensorrt", 4096, "")
    assert built_as(recipe, "openvino", "int8").limits.kv_blocks is None
    assert built_as(recipe, "tensorrt", None).limits.kv_blocks == 4096
    monkeypatch.setattr("echo_trt.backends.cuda.device.has_cuda", lambda: True)
    assert for_this_machine(name, recipe, folder, None, None)[0].engine == "torch"
    assert for_this_machine(name, recipe, folder, None, "int8")[0].engine == "cpu"  # which cards have not
    file = str(RECIPES / "qwen3-0.6b.yaml")  # its engine is kept
    assert for_this_machine(file, recipe_for(file)[0], RECIPES, None, "int8")[0].engine == "torch"


@pytest.mark.parametrize(
    ("name", "precision", "draft", "engine"),
    [
        ("Qwen/Qwen3-30B-A3B", "bf16", "lookup", "cpu"),
        ("Qwen/Qwen3-0.6B", "bf16", "block", "cpu"),
        ("Qwen/Qwen3-0.6B", "fp32", "lookup", "cpu"),
        ("Qwen/Qwen3-0.6B", "int4", "eagle3", "cpu"),
    ],
)
def test_the_usual_engine_is_the_first_that_refuses_nothing(name, precision, draft, engine, monkeypatch):
    monkeypatch.setattr("echo_trt.backends.cuda.device.has_cuda", lambda: False)
    raw = {"name": "own", "target": {"hub": name}, "draft": {"kind": draft}, "precision": precision}
    if draft != "lookup":
        raw["draft"]["source"] = {"hub": "own/head"}
    recipe = parse_recipe(raw, "own.yaml")
    assert for_this_machine("own.yaml", recipe, Path(), None, None)[0].engine == engine
    named = parse_recipe(raw | {"engine": "openvino"}, "own.yaml")
    assert for_this_machine("own.yaml", named, Path(), None, None) == (named, "")
    kinds = [replace(kind, runs_here=lambda kind=kind: kind.name != "cpu") for kind in engine_kinds()]
    monkeypatch.setattr(recipes, "engine_kinds", lambda: kinds)
    assert for_this_machine("own.yaml", recipe, Path(), None, None)[0].engine == "openvino"  # as on another CPU


def test_a_context_keeps_the_recipe_s_kv_blocks_if_one_request_fits():
    recipe = load_recipe(RECIPES / "smollm2-135m.yaml")
    limits = recipe.limits
    assert limited(recipe, 2 * limits.context, 8).limits == limits.model_copy(
        update={"context": 2 * limits.context, "batch": 8}
    )
    assert limited(recipe, 32 * limits.kv_blocks, None).limits.kv_blocks is None


def test_a_chosen_pool_becomes_kv_blocks(monkeypatch):
    monkeypatch.setattr("echo_trt.backends.cuda.device.has_cuda", lambda: True)
    recipe, folder = recipe_for("Qwen/Qwen3-8B")
    chosen = sized(recipe, folder, BuildOptions("", kv_cache_memory=40 * 2**30))
    target, draft = shapes(chosen, folder)
    need = needs(chosen, target.sizes, draft.sizes)
    assert need.blocks * need.block <= 40 * 2**30 < (need.blocks + 1) * need.block
    with refused("--kv-cache-memory is 1.1 GB", "limits.context 8,192", "raise it"):
        sized(recipe, folder, BuildOptions("", kv_cache_memory=2**30))
    with refused("--gpu-memory-utilization and --kv-cache-memory", "give one of them"):
        sized(recipe, folder, BuildOptions("", gpu_memory_utilization=0.9, kv_cache_memory=2**30))


def test_another_draft_keeps_the_recipe_and_tells_its_kind_by_its_configuration(tmp_path):
    for kind, raw in {
        "eagle3": {"architectures": ["LlamaForCausalLMEagle3"]},
        "block": {"architectures": ["DFlashDraftModel"]},
        "model": {"architectures": ["Qwen3ForCausalLM"]},
    }.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(raw))
        recipe, _ = recipe_for("Qwen/Qwen3-8B", str(tmp_path / kind))
        assert (recipe.draft.kind, recipe.draft.top_k, recipe.limits.batch) == (kind, 20, 128)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with refused("draft", "architectures is ['BertModel']", "give an EAGLE-3 head"):
        recipe_for("Qwen/Qwen3-8B", str(tmp_path / "odd"))


def test_a_name_that_is_nothing_says_what_there_is():
    with refused("smolm2-135m is neither a recipe", "Qwen/Qwen3-8B", "did you mean smollm2-135m?"):
        recipe_for("smolm2-135m")
    with refused("nothing is neither a recipe", "or a shipped recipe: gemma3-270m, ", "smollm2-135m."):
        recipe_for("nothing")


@pytest.mark.parametrize("words", [("build", "smolm2-135m"), ("serve", "nope")])
def test_a_mistyped_name_imports_no_engine(words):
    """It costs a tenth of what imports of torch and transformers do."""
    code = (
        "import sys; from echo_trt.cli.app import main\ntry: main()\n"
        "except SystemExit as done: print(done.code, *{'torch', 'openvino', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2\n", done.stderr


def test_a_server_s_wheel_has_recipes_and_the_lab_s_the_heads(tmp_path, monkeypatch):
    whole = recipes.RECIPES
    shutil.copytree(whole, tmp_path / "recipes", ignore=shutil.ignore_patterns("heads"))
    monkeypatch.setattr(recipes, "RECIPES", tmp_path / "none")
    monkeypatch.setattr(recipes, "PACKAGED", tmp_path / "recipes")
    monkeypatch.setattr(recipes, "registered", lambda group: ())
    with refused("recipe smollm2-135m has a head that comes with echo-trt-lab", "pip install ./lab"):
        recipe_for("smollm2-135m")
    assert recipe_for("qwen3-8b")[0].name == "qwen3-8b"
    monkeypatch.setattr(recipes, "registered", lambda group: ("folder",))
    monkeypatch.setattr(recipes, "extra", lambda group, name: whole)
    assert recipe_for("smollm2-135m")[1] == whole


@pytest.mark.parametrize("name", ["Qwen2.5-Coder-1.5B-Instruct", "Own-2B"])
def test_a_gguf_file_is_inspected_as_it_is_served(name, tmp_path, monkeypatch, echo_trt):
    """The first has a shipped recipe, which states another batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran: list[list[str]] = []

    def built(words: list[str], check: bool) -> SimpleNamespace:
        """Stand in for the build, whose bundle has a manifest."""
        ran.append(words[3:])
        folder = Path(words[words.index("-o") + 1])
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", built)
    file = write_gguf(tmp_path / f"{name}-F32.gguf", qwen3(**GGUF_SIZES))
    _bundle_of(file)
    served = echo_trt("inspect", file, *[word for word in ran[0][4:] if word.startswith("--")]).out
    assert "batch 8, context" in served
    assert ", int4" in served
    assert limits_of(echo_trt("inspect", file).out) == limits_of(served)
    assert limits_of(echo_trt("inspect", file, "--max-num-seqs", 9).out) != limits_of(served)


def limits_of(table: str) -> list[str]:
    return [line for line in table.splitlines() if any(row in line for row in ("limits", "engine", "KV pool  "))]


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path):
    file = write_gguf(tmp_path / "sha256-deadbeef", qwen3(**GGUF_SIZES))
    recipe, _ = recipe_for(str(file))
    assert (recipe.name, recipe.target.path) == ("sha256-deadbeef", str(file))
    assert open_checkpoint(file).config["architectures"] == ["Qwen3ForCausalLM"]


def test_memory_is_filled_as_far_as_was_said():
    """The blocks that are left fit, one more would not, and too little is a sentence with a context that fits."""
    recipe, folder = recipe_for("Qwen/Qwen3-8B")
    recipe = limited(recipe, 4096, 16)
    full = filling(recipe, folder, 80 * 10**9, 0.9, "H100", "9.0")
    target, draft = shapes(full, folder)
    need = needs(full, target.sizes, draft.sizes)
    taken = need.fixed + need.pool + need.features
    assert taken <= 72 * 10**9 < taken + need.block
    assert need.features > 2 * 10**9  # of the head's projection of the target's hidden states
    one = need.request_blocks * need.block
    with refused("(H100)", "lower --max-model-len to"):
        filling(recipe, folder, 80 * 10**9, (need.fixed + one // 2) / (80 * 10**9), "H100", "9.0")
    with refused("--gpu-memory-utilization is 0.1", "; raise it."):
        filling(recipe, folder, 80 * 10**9, 0.1, "H100", "9.0")
