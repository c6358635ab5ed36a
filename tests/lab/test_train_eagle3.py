"""Head training: a bundle's target answers prompts, what a head learns from is written down, and a head learns it."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import recipe_of
from refusal import refused
from safetensors.torch import load_file

from echo_trt.backends.cpu.build import compile_role
from echo_trt.backends.self_check import block_shape
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.cli.build import build
from echo_trt.engine.options import run_alone
from echo_trt.models.block_weights import load_block
from echo_trt.models.checkpoint import weights_sha256
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule, HeadModule
from echo_trt.models.weights import load_decoder, load_eagle3
from echo_trt.speculation.pack import pack_blocks
from echo_trt.speculation.super_tree import SuperTree
from echo_trt_lab.training.corpus import features_path
from echo_trt_lab.training.features import write_features

SCRIPT = Path(__file__).parents[2] / "scripts" / "training" / "train_eagle3.py"


def invoked(*words: object) -> tuple[int, str]:
    """Run the script's command in this process: importing PyTorch for each command takes most of the time.

    Returns its exit code and what it printed.
    """
    with pytest.MonkeyPatch.context() as patch, StringIO() as out, redirect_stdout(out), redirect_stderr(out):
        patch.syspath_prepend(SCRIPT.parent)
        patch.setattr(sys, "argv", ["train_eagle3", *map(str, words)])
        patch.setattr(logging.getLogger(), "handlers", [])  # another test of this process may have begun a log
        from train_eagle3 import app

        with pytest.raises(SystemExit) as ended:
            run_alone(app)
        return ended.value.code or 0, out.getvalue()


def run(*words: object) -> str:
    code, output = invoked(*words)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def shards(bundle_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "{i}", "prompt": "the theme {i}"}}\n' for i in range(60)))
    run("generate", bundle_of("eagle3"), "--prompts", prompts, "--data", folder / "data", "--max-tokens", 12)
    return folder / "data"


def test_a_target_without_a_head_begins_with_an_untrained_one(networks, tmp_path):
    run("init", "--target", networks / "target", "--out", tmp_path / "head")
    draft = {"kind": "eagle3", "source": {"path": str(tmp_path / "head")}}
    manifest = build(recipe_of("eagle3", networks, draft=draft), networks, tmp_path / "bundle")
    assert manifest.draft.feature_size == 3 * manifest.target.hidden_size
    assert manifest.checks["draft"].prompt_error < manifest.checks["draft"].bound


@pytest.fixture(scope="module")
def head(networks, shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("heads") / "first"
    words = ["train", "--target", networks / "target", "--data", shards, "--loss-rows", 40]
    assert "held out: top-1" in run(*words, "--draft-vocab", 150, "--minutes", 0.05, "--out", out)
    return out


def test_the_engine_cpu_records_what_its_own_features_are(networks, tmp_path):
    """In fp32 they are those that torch computes over the recorded texts."""
    bundle, data = tmp_path / "bundle", tmp_path / "data"
    build(recipe_of("eagle3", networks).model_copy(update={"engine": "cpu"}), networks, bundle)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{i}", "prompt": "the theme {i}"}}\n' for i in range(4)))
    run("generate", bundle, "--prompts", tmp_path / "prompts.jsonl", "--data", data, "--max-tokens", 12)
    [shard] = data.glob("shard-*.npz")
    with np.load(shard) as stored:
        answered = np.concatenate(
            [np.arange(n) >= prompt for n, prompt in zip(stored["lengths"], stored["prompt_lengths"], strict=True)]
        )
        answered[np.cumsum(stored["lengths"]) - 1] = False  # the last token was never read

    def known() -> torch.Tensor:
        return torch.from_numpy(np.load(features_path(shard))).view(torch.bfloat16).float()

    recorded = known()
    write_features(load_decoder(open_checkpoint(networks / "target"), 256), shard)
    torch.testing.assert_close(recorded[answered], known()[answered], atol=0.05, rtol=0.02)


def test_a_head_in_blocks_is_taken_as_it_is(networks, head, tmp_path):
    """Matrices read as they were, a little rounded, and the engine cpu has the file's blocks."""
    run("shrink", head, "--out", tmp_path / "small")
    small, target = open_checkpoint(tmp_path / "small"), load_decoder(open_checkpoint(networks / "target"), 64)
    assert small.stored("fc.weight")[0] == "q4_0"
    for name in ("fc.weight", "midlayer.self_attn.q_proj.weight"):
        exact = open_checkpoint(head).get(name).float()
        assert small.shape(name) == exact.shape
        assert (small.get(name) - exact).norm() < 0.2 * exact.norm()  # in 4 bits
    network = load_eagle3(small, 64, target)
    assert network.stored["attention.qkv.weight"](1)[0] == "q4_0"
    facts: dict[str, str] = {}
    compile_role(HeadModule(network, 4), tmp_path / "draft.cpu", "int4", facts)
    assert facts == {"matrices, draft": "5 q8_0, 5 q4_0"}  # heads of 16 are padded, and so rounded to 8 bits again
    config = tmp_path / "small" / "config.json"
    config.write_text(config.read_text().replace("q4_0", "q9"))
    with refused("block_types", "fc.weight", "'q9'"):
        open_checkpoint(tmp_path / "small")


def test_a_head_goes_on_as_a_larger_one_that_says_the_same(networks, shards, head, tmp_path):
    words = ["train", "--target", networks / "target", "--data", shards, "--loss-rows", 40]
    start = ["--start", head, "--intermediate-size", 160]
    run(*words, *start, "--minutes", 1e-9, "--out", tmp_path / "larger")  # one step, at a rate of 0
    first, larger = (load_file(folder / "model.safetensors") for folder in (head, tmp_path / "larger"))
    assert len(first["midlayer.mlp.up_proj.weight"]) == 96
    for name, weights in first.items():
        grown = larger[name][:, :96] if "down_proj" in name else larger[name][: len(weights)]
        torch.testing.assert_close(grown, weights)
    assert len(larger["midlayer.mlp.up_proj.weight"]) == 160
    assert not larger["midlayer.mlp.down_proj.weight"][:, 96:].any()
    run(*words, *start, "--minutes", 0.05, "--out", tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert trained["midlayer.mlp.down_proj.weight"][:, 96:].any()
    draft = {"kind": "eagle3", "source": {"path": str(tmp_path / "trained")}}
    build(recipe_of("eagle3", networks, draft=draft), networks, tmp_path / "bundle")


def test_a_block_drafter_is_trained_on_what_its_pass_computes(networks, shards, head, tmp_path, monkeypatch):
    """It begins with a head's layer, is built, and unrolled training steps are the rows of a runtime pass."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from echo_trt_lab.training.corpus import Corpus
    from echo_trt_lab.training.unroll import unroll

    out, rows = tmp_path / "drafter", 4
    words = ["train", "--target", networks / "target", "--data", shards, "--loss-rows", 40, "--block", rows]
    assert "held out: top-1" in run(*words, "--start", head, "--minutes", 0.05, "--out", out)
    assert "held out: top-1" in run(*words, "--resume", "--minutes", 0.08, "--out", out)
    draft = {"kind": "block", "source": {"path": str(out)}}
    build(recipe_of("peagle", networks, draft=draft), networks, tmp_path / "bundle")

    network = load_block(open_checkpoint(out), 64, load_decoder(open_checkpoint(networks / "target"), 64))
    (batch,) = Corpus(shards, 64).pack(Corpus(shards, 64).training[:1], 1)
    features = batch.features.float()
    with torch.no_grad():
        steps = torch.stack([logits.log_softmax(dim=-1) for logits in unroll(network, batch, features, rows)])
    table, none = np.arange(8)[None], np.zeros(1, np.int64)
    for chain, entry in enumerate(batch.rows.tolist()[: 1 - rows]):
        engine = TorchEngine(BlockModule(network, network.config.draft_vocab_size), 8)
        tokens, count = batch.token_ids[: entry + 1].numpy(), np.array([entry + 1])
        call, states = pack_blocks(block_shape(network.config), tokens, none, count, tokens[-1:], table)
        outputs = engine.run(call, features=features[: entry + 1].numpy(), state_rows=states)
        by_id = np.zeros((rows, network.config.vocab_size), np.float32)
        np.put_along_axis(by_id, outputs["candidates"], outputs["scores"], axis=1)
        np.testing.assert_allclose(by_id[:, network.target_ids], steps[:, chain].numpy(), atol=1e-4)


def test_a_chains_loss_has_the_gradient_of_cross_entropy(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from echo_trt_lab.training.unroll import ROWS, Surprise

    torch.manual_seed(0)
    logits = (3 * torch.randn(2 * ROWS + 5, 50)).requires_grad_()
    target, weight = torch.randn(len(logits), 50).softmax(dim=-1), torch.rand(len(logits))
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (right,) = torch.autograd.grad((weight * expected).sum(), logits)
    surprise = Surprise.apply(logits, target)
    torch.testing.assert_close(surprise, expected)
    (gradient,) = torch.autograd.grad((weight * surprise).sum(), logits)
    torch.testing.assert_close(gradient, right)
    short = logits.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad((weight * Surprise.apply(short, target)).sum(), short)
    torch.testing.assert_close(gradient.float(), right, atol=0.01, rtol=0.05)


def write_answers(folder: Path, answers: list[list[int]], prompt: tuple[int, ...] = (0,)) -> None:
    folder.mkdir()
    texts = [[*prompt, *answer] for answer in answers]
    lengths, prompts = np.array([len(t) for t in texts], np.int32), np.full(len(texts), len(prompt), np.int32)
    np.savez(folder / "shard-00000.npz", tokens=np.concatenate(texts), lengths=lengths, prompt_lengths=prompts)


def chains_of(ngrams, text: list[int]) -> list[tuple[int, float]]:
    """Return what the n-grams put behind ``text``, a token per level."""
    recent = np.full((1, ngrams.longest), -1)
    index = min(len(text) - 1, ngrams.longest)
    recent[0, ngrams.longest - index :] = text[len(text) - 1 - index : -1]
    chains = ngrams.chains(SuperTree.from_roots(np.array(text[-1:])), np.ones(1), recent, np.array([4]), 0.0, 0.01)
    exists = chains.exists[0]
    return list(zip(chains.tokens[0, exists].tolist(), np.exp(chains.log_p[0, exists]).tolist(), strict=True))


def test_ngrams_say_what_most_answers_say(networks, tmp_path):
    agreed, alone = [[1, 2, 3, 4]] * 300 + [[9, 2, 5, 6]] * 300, [[7] * 50]  # what one says often is said once
    write_answers(tmp_path / "some", agreed)
    write_answers(tmp_path / "others", alone)
    reported = run(
        *("ngrams", "--target", networks / "target", "--data", tmp_path / "some", "--data", tmp_path / "others"),
        *("--out", tmp_path / "ngrams.npz"),
    )
    assert "2,450 tokens" in reported
    assert "held-out" in reported
    ngrams = read_ngrams(tmp_path / "ngrams.npz", weights_sha256(networks / "target"), 300)
    assert [token for token, _ in chains_of(ngrams, [1, 2])] == [3, 4]
    assert [token for token, _ in chains_of(ngrams, [9, 2])] == [5, 6]
    assert chains_of(ngrams, [1, 2])[0][1] > 0.95
    assert not chains_of(ngrams, [7, 7])


def test_ngrams_of_new_answers_go_over_earlier_ones(networks, tmp_path):
    write_answers(tmp_path / "early", [[1, 2, 3, 4]] * 100 + [[5, 6, 7, 8]] * 100)
    write_answers(tmp_path / "late", [[1, 2, 9, 10]] * 100)
    command = ("ngrams", "--target", networks / "target")
    run(*command, "--data", tmp_path / "early", "--out", tmp_path / "early.npz")
    start = ("--start", tmp_path / "early.npz")
    run(*command, "--data", tmp_path / "late", *start, "--out", tmp_path / "both.npz")
    ngrams = read_ngrams(tmp_path / "both.npz", weights_sha256(networks / "target"), 300)
    assert [token for token, _ in chains_of(ngrams, [1, 2])] == [9, 10]
    assert [token for token, _ in chains_of(ngrams, [5, 6])] == [7, 8]

    (tmp_path / "early.npz").write_bytes(b"not a table")
    code, _ = invoked(*command, "--data", tmp_path / "late", *start, "--out", tmp_path / "no.npz")
    assert code != 0
    assert not (tmp_path / "no.npz").exists()
