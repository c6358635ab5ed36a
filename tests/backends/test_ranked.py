"""A target divided among processes: built, opened, lossless; and what a user is told where it cannot go on."""

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from driving import prompt_ids
from models.checkpoints import qwen3
from pairs import SIZES, recipe_of, write_tokenizer
from refusal import refused

from echo_trt.backends.parallel.rank_group import RankGroup, check_gpus
from echo_trt.backends.parallel.ranked import OpenRank, RankedEngine, of_rank
from echo_trt.backends.torch.engine import TorchEngine, open_torch
from echo_trt.bundle.manifest import read_manifest, verify_files
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError
from echo_trt.speculation.pack import pack

BLOCKS = 8


@pytest.fixture(scope="module")
def divided(networks, tmp_path_factory):
    """Return the pair "close" with its target in two parts."""
    folder = tmp_path_factory.mktemp("divided") / "bundle"
    stages = []
    build(recipe_of("close", networks, engine="torch", tensor_parallel=2), networks, folder, stages.append)
    return folder, stages


def prompt_call():
    return pack(np.arange(9), np.arange(9), np.zeros(1, int), np.array([9]), np.array([[2, 0]]), np.arange(9))


def files_of(folder):
    return tuple(folder / name for name in read_manifest(folder).target.rank_files)


def torch_rank(files):
    return partial(of_rank, files, partial(open_torch, num_blocks=BLOCKS))


def test_a_bundle_has_a_file_for_each_rank(divided, networks, bundle_of):
    folder, stages = divided
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert manifest.target.rank_files == ["target.rank0.safetensors", "target.rank1.safetensors"]
    assert {*manifest.target.rank_files, "draft.safetensors"} <= set(manifest.files)
    assert manifest.target.parameters == read_manifest(bundle_of("close")).target.parameters
    assert manifest.checks["target"].tree_error < 1e-6
    assert stages[2:-1] == [
        "compiling the target, rank 0 of 2",
        "reading the target, rank 1 of 2",
        "compiling the target, rank 1 of 2",
        "compiling the draft",
    ]


def test_echo_on_two_ranks_writes_what_plain_decoding_of_one_does(divided, bundle_of):
    """Greedy and sampled, with trees that are accepted in part; the undivided engine is OpenVINO's."""
    prompts = [prompt_ids(n, i) for i, n in enumerate((5, 37, 1, 16))]
    params = [SamplingParams(24, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(4)]
    expected = LLM(bundle_of("close"), "autoregressive", 4).generate(prompts, params)
    llm = LLM(divided[0], "echo", 3)
    for policy in ("echo", "autoregressive"):
        llm.set_policy(policy)
        answers = llm.generate(prompts, params)
        assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
        assert (max(a.accepted_length for a in answers) > 1.2) == (policy == "echo")


# -- ranks that load at their own pace ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LateRank:
    """Opens the last rank two seconds after the others; ``begun`` is there from then on."""

    rank: OpenRank
    begun: Path

    def __call__(self, group: RankGroup) -> TorchEngine:
        last = group.rank == group.ranks - 1
        if last:
            time.sleep(2)
            self.begun.touch()
        engine = self.rank(group)
        if not (last or self.begun.exists()):
            raise UserError("the other ranks were not waited for")
        return engine


def test_no_engine_goes_on_before_all_ranks_have_their_weights(divided, tmp_path):
    """Its first collective would wait for the slowest rank's weights, against its timeout."""
    engine = RankedEngine(LateRank(torch_rank(files_of(divided[0])), tmp_path / "begun"), 2)
    assert np.isfinite(engine.run(prompt_call())["logits"]).all()


# -- ranks that are lost -------------------------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_call_with_a_sentence(divided):
    engine = RankedEngine(torch_rank(files_of(divided[0])), 2)
    engine.run(prompt_call())
    (other,) = engine._others._processes
    os.kill(other.child.pid, signal.SIGKILL)
    began = time.monotonic()
    for _ in range(2):
        with refused("rank 1 of 2 has ended (signal SIGKILL)"):
            engine.run(prompt_call())
    assert time.monotonic() - began < 60


def test_a_rank_that_hangs_is_not_waited_for(divided):
    engine = RankedEngine(torch_rank(files_of(divided[0])), 2)
    engine.run(prompt_call())
    engine._others._patience = 2.0  # from here on: what is not stopped may take longer
    (other,) = engine._others._processes
    os.kill(other.child.pid, signal.SIGSTOP)
    began = time.monotonic()
    with refused("2"):
        engine.run(prompt_call())
    assert time.monotonic() - began < 60
    assert other.child.wait(60) == -signal.SIGKILL


def test_a_rank_that_cannot_start_says_why(divided, tmp_path):
    (tmp_path / "broken").write_text("not a network")
    began = time.monotonic()
    with refused("broken holds no network of echo-trt", "build the bundle again"):
        RankedEngine(torch_rank((files_of(divided[0])[0], tmp_path / "broken")), 2)
    assert time.monotonic() - began < 60


def test_the_processes_end_with_the_engine(divided):
    engine = RankedEngine(torch_rank(files_of(divided[0])), 2)
    (other,) = engine._others._processes
    assert other.child.poll() is None
    del engine
    assert other.child.wait(60) is not None


# -- what is refused -----------------------------------------------------------------------------------------------


def test_fewer_gpus_than_ranks_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with refused("tensor_parallel is 4, but PyTorch sees 3 GPUs", "set tensor_parallel to 2"):
        check_gpus(4)
    check_gpus(2)


@pytest.mark.parametrize(
    ("sizes", "ranks", "words"),
    [
        ({}, 8, ["does not divide", "4 attention heads"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, ["3 KV heads"]),
        ({"intermediate_size": 98}, 4, ["98 intermediate_size"]),
    ],
)
def test_a_network_that_cannot_be_divided_is_refused(sizes, ranks, words, tmp_path):
    qwen3(**SIZES | sizes).save_pretrained(tmp_path / "target")
    write_tokenizer(tmp_path / "target")
    changes = {"target": {"path": "target"}, "engine": "torch", "tensor_parallel": ranks}
    with refused(f"tensor_parallel is {ranks}", *words):
        build(recipe_of("lookup", tmp_path, **changes), tmp_path, tmp_path / "bundle")


def test_a_full_disk_is_named_beforehand(networks, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with refused("the build writes about", "where 0.0 MB are free", "-o"):
        build(recipe_of("lookup", networks, engine="torch", tensor_parallel=2), networks, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_missing_ranks_are_named(divided, tmp_path):
    folder = shutil.copytree(divided[0], tmp_path / "bundle")
    (folder / "target.rank1.safetensors").unlink()
    with refused("lacks its file target.rank1.safetensors"):
        LLM(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["target"]["rank_files"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refused("holds 1 of the target's 2 ranks", "build it again"):
        LLM(folder)
