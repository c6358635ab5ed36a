"""Qwen3.5 against transformers' network, and its MTP head against the published one, retold; keys that are hard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import add_tensors, mtp_tensors, qwen3_5
from gguf import GGMLQuantizationType
from gguf_files import GGUF_SIZES, write_gguf
from paged import PagedCache
from safetensors.torch import save_file
from transformers.models.qwen3_5 import modeling_qwen3_5 as published

from echo_trt.backends.base import Engine
from echo_trt.backends.cpu.build import compile_role
from echo_trt.backends.cpu.engine import CPUEngine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.errors import UserError
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.read_config import decoder_config
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder, load_mtp
from echo_trt.speculation.pack import BLOCK, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask

VOCAB, SLOT = 97, 2
TABLE = np.array([[5, 1, 3]], np.int32)


def engine(folder: Path, kind: str) -> Engine:
    decoder = load_decoder(open_checkpoint(folder), 3 * BLOCK)
    role = TargetModule(decoder, (decoder.config.num_layers,))
    if kind == "torch":
        return TorchEngine(role, 6)
    file = folder.with_suffix(".cpu")
    compile_role(role, file, "fp32")
    return CPUEngine(file, "fp32", 6, threads=2)


def pool_rows(positions: np.ndarray) -> np.ndarray:
    return TABLE[0, positions // BLOCK] * BLOCK + positions % BLOCK


def read(opened: Engine, tokens: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """Return the logits of ``tokens``, which come in calls of ``counts``."""
    logits, past = [], 0
    for count in counts:
        here, one = np.arange(past, past + count), np.array([count])
        call = pack(tokens[here], here, np.array([past]), one, TABLE, np.arange(count))
        logits.append(opened.run(call._replace(slots=np.array([SLOT])))["logits"].copy())
        opened.commit(np.arange(count), one)
        past += count
    return np.concatenate(logits)


@pytest.mark.parametrize("kind", ["torch", "cpu"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"linear_num_value_heads": 2}], ids=str)
def test_logits_equal_transformers(changes, kind, tmp_path):
    theirs = qwen3_5(**changes)
    theirs.save_pretrained(tmp_path)
    add_tensors(tmp_path, mtp_tensors(theirs))  # which a target does not read
    tokens = np.random.default_rng(3).integers(0, VOCAB, 50)
    expected, past = [], None
    with torch.no_grad():  # token by token, which is their exact form: chunks of theirs are 1e-4 off it
        for token in tokens:
            output = theirs(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            expected.append(output.logits[0, 0].numpy())
    assert 5 < np.abs(expected).max() < 100
    opened = engine(tmp_path, kind)
    for counts in ((17, 1, 1, 20, 11), (50,), (1,) * 50):
        np.testing.assert_allclose(read(opened, tokens, counts), expected, atol=1e-4)


def test_a_checkpoint_with_images_is_read_for_its_text(tmp_path):
    theirs = qwen3_5()
    theirs.save_pretrained(tmp_path / "text")
    (tmp_path / "images").mkdir()
    raw = json.loads((tmp_path / "text/config.json").read_text())
    nested = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": raw, "vision_config": {}}
    (tmp_path / "images/config.json").write_text(json.dumps(nested))
    text = open_checkpoint(tmp_path / "text")
    tensors = {name.replace("model.", "model.language_model.", 1): text.get(name) for name in text.names()}
    save_file(tensors | {"model.visual.pos_embed.weight": torch.zeros(3)}, tmp_path / "images/model.safetensors")
    tokens = np.random.default_rng(4).integers(0, VOCAB, 20)
    found = [read(engine(tmp_path / kind, "torch"), tokens, (20,)) for kind in ("text", "images")]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", ["torch", "cpu"])
@pytest.mark.parametrize("storage", ["F16", "Q8_0"])
def test_a_gguf_file_is_the_same_network_with_its_head(storage, kind, tmp_path):
    """Its heads of values take turns with those of keys, whole blocks of columns among them."""
    theirs = qwen3_5(**GGUF_SIZES | {"head_dim": 16})
    tensors = mtp_tensors(theirs)
    file = write_gguf(tmp_path / "model.gguf", theirs, GGMLQuantizationType[storage], mtp=tensors)
    theirs.save_pretrained(tmp_path / "folder")
    add_tensors(tmp_path / "folder", tensors)
    tokens = np.random.default_rng(7).integers(0, GGUF_SIZES["vocab_size"], 40)
    found, wanted = (read(engine(path, kind), tokens, (17, 1, 22)) for path in (file, tmp_path / "folder"))
    assert 1 < np.abs(wanted).max() < 100
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    heads = [
        load_mtp(checkpoint, 64, load_decoder(checkpoint, 64)).state_dict()
        for checkpoint in map(open_checkpoint, (file, tmp_path / "folder"))
    ]
    torch.testing.assert_close(*heads)


@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_every_path_of_a_tree_has_the_logits_and_the_states_of_its_text(kind, tmp_path):
    """On the CPU engine to the bit."""
    qwen3_5().save_pretrained(tmp_path)
    off = {"atol": 1e-4} if kind == "torch" else {"rtol": 0, "atol": 0}
    opened, rng = engine(tmp_path, kind), np.random.default_rng(5)
    prompt = rng.integers(0, VOCAB, 21)
    tree = SuperTree.from_roots(rng.integers(0, VOCAB, 1))
    for parent in (0, 0, 1, 1, 2, 3, 6, 7, 8, 9, 9, 10):
        tree.add(np.array([parent]), rng.integers(0, VOCAB, 1), np.zeros(1))
    rows, size = np.arange(len(tree)), np.array([len(tree)])
    for leaf in (4, 5, 11, 12):
        path = np.flatnonzero(ancestor_mask(tree)[0].reshape(len(tree), -1)[leaf])
        text = np.concatenate((prompt, tree.token[path], rng.integers(0, VOCAB, 3)))
        expected = read(opened, text, (21, *(1,) * (len(path) + 3)))[len(prompt) :]
        read(opened, prompt, (21,))
        depth = len(prompt) + tree.depth
        call = pack(tree.token, depth, np.array([21]), size, TABLE, rows, ancestor_mask(tree))
        verified = opened.run(call._replace(slots=np.array([SLOT])))["logits"]
        np.testing.assert_allclose(verified[path], expected[: len(path)], **off)
        opened.commit(path, np.array([len(path)]))
        opened.compact_kv(pool_rows(21 + path), pool_rows(21 + np.arange(len(path))))
        past = 21 + len(path)
        after = pack(text[past:], np.arange(past, past + 3), np.array([past]), np.array([3]), TABLE, np.arange(3))
        found = opened.run(after._replace(slots=np.array([SLOT])))["logits"]
        np.testing.assert_allclose(found, expected[len(path) :], **off)


def test_the_mtp_head_is_the_published_one(tmp_path):
    """Its layer is transformers' own; what is around it is retold: norms, fc over [embedding, hidden], a last norm."""
    theirs = qwen3_5()
    tensors = mtp_tensors(theirs)
    theirs.save_pretrained(tmp_path)
    add_tensors(tmp_path, tensors)
    checkpoint, rng = open_checkpoint(tmp_path), np.random.default_rng(6)
    target = load_decoder(checkpoint, 64)
    head = load_mtp(checkpoint, 64, target)
    count, split = 12, 7
    tokens, hidden = torch.tensor(rng.integers(0, VOCAB, count)), torch.randn(count, theirs.config.hidden_size)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scaled = x * (x.square().mean(-1, keepdim=True) + theirs.config.rms_norm_eps).rsqrt()
        return scaled * (1 + tensors[f"mtp.{name}.weight"])

    theirs.config._attn_implementation = "eager"
    layer = published.Qwen3_5DecoderLayer(theirs.config, theirs.config.layer_types.index("full_attention"))
    prefix = "mtp.layers.0."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    with torch.no_grad():
        embedded = norm("pre_fc_norm_embedding", theirs.model.embed_tokens(tokens))
        x = torch.cat((embedded, norm("pre_fc_norm_hidden", hidden)), dim=-1) @ tensors["mtp.fc.weight"].T
        angles = theirs.model.rotary_emb(x[None], torch.arange(count)[None, None].expand(3, 1, -1))
        causal = torch.full((count, count), -torch.inf).triu(1)[None, None]
        out = norm("norm", layer(x[None], angles, attention_mask=causal)[0])
        expected = theirs.lm_head(out)
        cache = PagedCache(head.config, 1, 1, count)
        state = head(tokens, hidden[:split], hidden[split:], torch.arange(count), cache.attend([count]))
        torch.testing.assert_close(state, out, atol=1e-5, rtol=0)
        torch.testing.assert_close(head.logits(state), expected, atol=1e-4, rtol=0)


def test_an_mtp_head_that_is_missing_is_named(tmp_path):
    qwen3_5().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"has no MTP head .* use another kind"):
        load_mtp(checkpoint, 64, load_decoder(checkpoint, 64))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"linear_key_head_dim": 24}, "linear_key_head_dim is 24, but only multiples of 32"),
        ({"linear_value_head_dim": 8}, "linear_value_head_dim is 8, but only multiples of 32"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads is 3, no multiple of linear_num_key_heads 2"),
        ({"linear_num_value_heads": 1}, "linear_num_value_heads is 1, no multiple of linear_num_key_heads 2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes, named):
    raw = {**qwen3_5().config.to_dict(), "architectures": ["Qwen3_5ForCausalLM"], **changes}
    with pytest.raises(UserError, match=named):
        decoder_config(raw, "config.json")


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_states_ahead_are_those_behind_a_commit(path, tmp_path):
    qwen3_5().save_pretrained(tmp_path)
    compiled, rows, one = engine(tmp_path, "cpu"), np.arange(8), np.ones(1, np.int64)
    call = pack(rows + 5, rows, 0 * one, 8 * one, np.arange(1)[None], rows)
    compiled.run(call)
    before = [part[:, :1].copy() for part in (compiled.states.conv, compiled.states.delta)]
    ahead = compiled.states.ahead(0, np.array(path))
    for kept, part in zip(before, (compiled.states.conv, compiled.states.delta), strict=True):
        np.testing.assert_array_equal(part[:, :1], kept)
    compiled.commit(np.array(path), np.array([len(path)]))
    for state, part in zip(ahead, (compiled.states.conv, compiled.states.delta), strict=True):
        np.testing.assert_array_equal(state, part[:, :1])
