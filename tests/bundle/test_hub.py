"""Checkpoints from a hub, in the formats that they are published in, by the hub's own client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import Hub, hub
from refusal import refused
from safetensors.torch import load_file

from echo_trt.bundle.manifest import read_manifest
from echo_trt.models.checkpoint import weights_sha256
from echo_trt.models.open_checkpoint import open_checkpoint

TARGET, HEAD = "Somebody/Target", "Somebody/Target_eagle3"


def pickled(folder: Path) -> None:
    """Write a folder's weights as PyTorch's own file, as heads are published, next to what their trainers left."""
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    torch.save({"lr": 1e-3}, folder / "training_args.bin")
    weights.unlink()


@pytest.fixture
def repositories(networks, tmp_path) -> Path:
    shutil.copytree(networks / "target", tmp_path / "hub" / TARGET)
    pickled(shutil.copytree(networks / "head", tmp_path / "hub" / HEAD))
    return tmp_path / "hub"


@pytest.fixture
def served(repositories) -> Iterator[Hub]:
    with hub(repositories) as running:
        yield running


def build(served: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echo_trt", "build", TARGET, "--draft", HEAD, "--engine", "torch"]
    command += ["--precision", "fp32", "--max-model-len", "64", "--max-num-seqs", "2", "-o", str(folder / "bundle")]
    env = os.environ | {"HF_ENDPOINT": served.url, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_head_in_pytorchs_own_format_is_fetched_and_built(served, repositories, tmp_path):
    done = build(served, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.recipe.draft.kind == "eagle3"
    assert manifest.draft_sha256 == weights_sha256(repositories / HEAD)
    assert f"{HEAD}/pytorch_model.bin" in served.fetched
    assert not [name for name in served.fetched if "training_args" in name]
    heads = [number for number, name in enumerate(served.fetched) if name == f"{HEAD}/pytorch_model.bin"]
    assert heads[0] < served.fetched.index(f"{TARGET}/model.safetensors")


def test_what_is_no_head_is_refused_before_the_targets_weights_are_fetched(served, repositories, tmp_path):
    config = repositories / HEAD / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    done = build(served, tmp_path)
    assert done.returncode == 2
    assert "hidden_act" in done.stderr
    assert f"{TARGET}/model.safetensors" not in served.fetched


@pytest.mark.parametrize("parts", [1, 2])
def test_both_formats_hold_the_same(networks, tmp_path, parts):
    whole = open_checkpoint(networks / "target")
    folder = shutil.copytree(networks / "target", tmp_path / "target")
    pickled(folder)
    held = torch.load(folder / "pytorch_model.bin")
    if parts == 2:
        (folder / "pytorch_model.bin").unlink()
        names = sorted(held)
        files = {f"pytorch_model-{part}-of-2.bin": names[part::2] for part in range(2)}
        for file, own in files.items():
            torch.save({name: held[name] for name in own}, folder / file)
        weight_map = {name: file for file, own in files.items() for name in own}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = open_checkpoint(folder)
    assert sorted(found.names()) == sorted(whole.names())
    for name in whole.names():
        assert found.shape(name) == whole.shape(name)
        assert found.dtype(name) == whole.dtype(name)
        assert torch.equal(found.get(name), whole.get(name))
        assert torch.equal(found.get(name, (slice(1, 2),)), whole.get(name, (slice(1, 2),)))


class Run:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("run",)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"x" * 100, "a list", "code"], ids=["empty", "zip", "noise", "list", "code"]
)
def test_a_file_that_holds_no_tensors_is_refused(networks, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(networks / "head", tmp_path / "head")
    pickled(folder)
    file = folder / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save([1] if content == "a list" else {"weight": Run()}, file)
    with refused("pytorch_model.bin", "cannot be read", "download it again"):
        open_checkpoint(folder)
    assert not Path("run").exists()
