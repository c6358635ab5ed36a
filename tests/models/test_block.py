"""Block drafters: every family's spelling, and its pass against the published equations, written out in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from models.block_checkpoints import FAMILIES, MASK, OUTPUTS, ROWS, block_raw, block_tensors, write_block
from models.checkpoints import qwen3
from models.equations import Equations
from refusal import refused

from echo_trt.backends.self_check import block_shape
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.models.block_weights import check_block, confidence_by_token, load_block
from echo_trt.models.decoder import Decoder
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import pack, pack_blocks

LAYERS = 8


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("target")
    qwen3(num_hidden_layers=LAYERS).save_pretrained(folder)
    return load_decoder(open_checkpoint(folder), positions=64)


class Retold(Equations):
    """The equations of block drafters."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, torch.Tensor], target: Decoder):
        super().__init__({**raw.get("transformer_layer_config", {}), **raw}, tensors, target.embed.weight)
        self.raw = raw
        own = "embed_tokens.weight" in self.t
        self.head = self.t["lm_head.weight"] if own else target.lm_head.weight.double().numpy()

    def dflash(self, features: np.ndarray, root: int, causal: bool) -> np.ndarray:
        """Return the block's hidden states [ROWS, H], of a root behind ``features`` [C, L * H]."""
        count = len(features)
        context = self.norm(features @ self.t["fc.weight"].T, "hidden_norm")
        x = self.embed[[root] + [MASK] * (ROWS - 1)]
        at, behind = np.arange(count), count + np.arange(ROWS)
        own = np.tri(ROWS) if causal else np.ones((ROWS, ROWS))
        mask = np.concatenate((np.ones((ROWS, count)), own), axis=1) > 0
        for i in range(self.c["num_hidden_layers"]):
            layer = f"layers.{i}."
            y = self.norm(x, layer + "input_layernorm")
            seen = np.concatenate((context, y))
            x = x + self.attention(y, seen, layer, behind, np.concatenate((at, behind)), mask)
            x = x + self.mlp(x, layer)
        return self.norm(x, "norm")

    def p_eagle(self, features: np.ndarray, tokens: list[int]) -> np.ndarray:
        """Return the block's hidden states [ROWS, H]: entry j has features j and token j + 1, of ``tokens`` [C]."""
        first = "midlayer." if "midlayer.hidden_norm.weight" in self.t else "layers.0."
        mask_state = self.t["mask_hidden"].reshape(1, -1)
        state = features @ self.t["fc.weight"].T
        masked = mask_state @ self.t["fc.weight"].T if mask_state.shape[1] > self.c["hidden_size"] else mask_state
        state = np.concatenate((state, *[masked] * (ROWS - 1)))
        embedded = self.embed[tokens + [MASK] * (ROWS - 1)]
        at, mask = np.arange(len(state)), np.tri(len(state)) > 0
        normed = self.norm(state, first + "hidden_norm")
        y = np.concatenate((self.norm(embedded, first + "input_layernorm"), normed), axis=1)
        x = (normed if self.raw.get("norm_before_residual") else state) + self.attention(y, y, first, at, at, mask)
        x = x + self.mlp(x, first)
        for i in range(1, self.c["num_hidden_layers"]):
            layer = f"layers.{i}."
            y = self.norm(x, layer + "input_layernorm")
            x = x + self.attention(y, y, layer, at, at, mask)
            x = x + self.mlp(x, layer)
        return self.norm(x[-ROWS:], "norm")

    def confidence(self, hidden: np.ndarray, previous: list[int]) -> np.ndarray:
        """Return the logit of each row's confidence [ROWS], behind the tokens ``previous``."""
        seen = np.concatenate((hidden, self.t["markov_head.markov_w1.weight"][previous]), axis=1)
        return seen @ self.t["confidence_head.proj.weight"][0] + self.t["confidence_head.proj.bias"][0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def drafted(role: BlockModule, features: list[np.ndarray], tokens: list[list[int]]) -> dict[str, np.ndarray]:
    """Run a pass for requests whose contexts came in two calls, of which the second has the block."""
    engine, shape = TorchEngine(role, 16), block_shape(role.network.config)
    table = np.arange(16).reshape(2, 8)[:, ::-1].copy()
    past = np.array([len(f) - 2 - i for i, f in enumerate(features)])
    rows, owner = np.concatenate([np.arange(n) for n in past]), np.arange(past.sum())
    first = pack(
        np.concatenate([t[:n] for t, n in zip(tokens, past, strict=True)]),
        rows, np.zeros(2, np.int64), past, table, np.zeros(0),
    )  # fmt: skip
    engine.run(first, features=np.concatenate([f[:n] for f, n in zip(features, past, strict=True)]), state_rows=owner)
    counts = np.array([len(f) for f in features]) - past
    new = np.concatenate([t[n:] for t, n in zip(tokens, past, strict=True)])
    roots = np.array([t[-1] for t in tokens])
    call, states = pack_blocks(shape, new, past, counts, roots, table)
    return engine.run(
        call, features=np.concatenate([f[n:] for f, n in zip(features, past, strict=True)]), state_rows=states
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_follows_the_equations(family, target, tmp_path):
    raw = block_raw(family)
    tensors = block_tensors(raw)
    checkpoint = open_checkpoint(write_block(tmp_path / "drafter", raw, tensors))
    network = load_block(checkpoint, 64, target)
    config, vocab = network.config, raw.get("draft_vocab_size") or 97
    assert config.feature_layers == tuple(layer + 1 for layer in OUTPUTS)
    role, rng = BlockModule(network, vocab), np.random.default_rng(5)
    features = [rng.standard_normal((n, config.feature_size)).astype(np.float32) for n in (9, 37)]
    tokens = [rng.integers(0, 97, n).tolist() for n in (9, 37)]  # of entries; the last one is the root
    outputs = drafted(role, features, tokens)
    plain, ids = Retold(raw, tensors, target), network.target_ids.numpy()
    for i in range(2):
        root = tokens[i][-1]
        hidden = (
            plain.p_eagle(features[i], tokens[i]) if config.anchored else plain.dflash(features[i], root, config.causal)
        )
        logits = hidden @ plain.head.T
        assert 4 < np.abs(logits).max() < 100
        rows = slice(i * ROWS, (i + 1) * ROWS)
        by_id = np.full((ROWS, 97), np.nan)
        np.put_along_axis(by_id, outputs["candidates"][rows], outputs["scores"][rows], axis=1)
        np.testing.assert_allclose(by_id[:, ids], log_softmax(logits), atol=1e-4)
        if config.confidence:
            path = rng.integers(0, 97, ROWS)
            logit = outputs["confidence"][rows, 0] + confidence_by_token(network, checkpoint)[path]
            np.testing.assert_allclose(logit, plain.confidence(hidden, path), atol=1e-4)


@pytest.mark.parametrize("family", ["dspark", "speculators dspark"])
def test_a_markov_head_is_left_out_with_a_word(family, target, tmp_path, caplog):
    """Nothing of it is read but the embedding that the confidence head takes."""
    raw = block_raw(family)
    tensors = block_tensors(raw)
    checkpoint = open_checkpoint(write_block(tmp_path / "with", raw, tensors))
    read, get = [], checkpoint.get
    checkpoint.get = lambda name, *part: read.append(name) or get(name, *part)
    network = load_block(checkpoint, 64, target)
    assert [record.message for record in caplog.records] == [
        f"{checkpoint.path} has a Markov head, which is left out: its drafts are used without that correction."
    ]
    confidence_by_token(network, checkpoint)
    assert [name for name in read if "markov" in name] == ["markov_head.markov_w1.weight"]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_shares_the_targets_tables_where_it_has_none(prefix, target, tmp_path):
    raw = block_raw("dflash")
    tensors = {prefix + name: tensor for name, tensor in block_tensors(raw).items()}
    network = load_block(open_checkpoint(write_block(tmp_path / "drafter", raw, tensors)), 64, target)
    assert network.embed.weight is target.embed.weight
    assert network.lm_head.weight is target.lm_head.weight


# -- bad input: a sentence, before any weight is read ---------------------------------------------------------


def without(*names: str):
    return lambda raw, tensors: [tensors.pop(name) for name in names]


def stated(**changes: Any):
    def spoil(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        inner = raw.get("dflash_config", {})
        for key, value in changes.items():
            (inner if key in inner else raw)[key] = value

    return spoil


BAD = {
    "layers": ("dflash", stated(target_layer_ids=[1, 7]), ("target_layer_ids", "[1, 7]", "8 layers", "use")),
    "no layers": ("deepspec", stated(target_layer_ids="1,2"), ("target_layer_ids", "'1,2'", "list")),
    "aux layers": (
        "speculators dflash",
        stated(aux_hidden_state_layer_ids=[1, 8]),
        ("aux_hidden_state_layer_ids names [1, 8]", "8 layers", "use"),
    ),
    "eagle's layers": (
        "speculators peagle",
        stated(eagle_aux_hidden_state_layer_ids=[1, 5, 8]),
        ("eagle_aux_hidden_state_layer_ids names [1, 5, 8]", "8 layers"),
    ),
    "block": ("dflash", stated(block_size=0), ("block_size", "0", "positive")),
    "one row": ("dflash", stated(block_size=1), ("block_size", "1", "2 or more")),
    "mask": ("dflash", stated(mask_token_id=97), ("mask_token_id", "97", "vocabulary")),
    "no mask": ("dspark", lambda raw, tensors: raw.pop("mask_token_id"), ("mask_token_id", "missing")),
    "vocabulary": ("deepspec", stated(vocab_size=101), ("vocab_size", "101", "97", "this target")),
    "width": ("dflash", stated(target_hidden_size=24), ("target_hidden_size", "24", "20", "this target")),
    "other target": ("dflash", stated(num_target_layers=36), ("num_target_layers", "36", "8", "this target")),
    "confidence": ("dspark", without("confidence_head.proj.weight"), ("confidence_head", "enable_confidence_head")),
    "its token": (
        "dspark",
        without("markov_head.markov_w1.weight"),
        ("markov_w1.weight is missing", "confidence_head_with_markov True"),
    ),
    "causal rows": ("dflash", stated(causal_head=True), ("causal_head", "not supported", "use a drafter")),
    "family": ("dflash", stated(architectures=["MedusaModel"]), ("architectures", "MedusaModel", "DFlashDraftModel")),
    "speculators' family": (
        "speculators dflash",
        stated(speculators_model_type="mtp"),
        ("speculators_model_type", "mtp", "dspark"),
    ),
    "plain head": ("p-eagle", lambda raw, tensors: raw.pop("mask_token_id"), ("architectures", "mask_token_id")),
    "sliding": ("dflash", stated(layer_types=["full_attention", "sliding_attention"]), ("layer_types", "sliding")),
}


@pytest.mark.parametrize(("family", "spoil", "words"), BAD.values(), ids=BAD.keys())
def test_bad_drafter(family, spoil, words, target, tmp_path):
    raw = block_raw(family)
    tensors = block_tensors(raw)
    spoil(raw, tensors)
    checkpoint = open_checkpoint(write_block(tmp_path / "drafter", raw, tensors))
    checkpoint.get = None  # nothing may be read
    with refused(*words):
        check_block(checkpoint, target.config)


@pytest.mark.parametrize(
    ("family", "spoil", "words"),
    [
        ("dflash", lambda t: t.update({"layers.0.self_attn.sinks": torch.ones(3)}), ("sinks", "no part")),
        ("dflash", lambda t: t.update({"fc.weight": torch.zeros(20, 40)}), ("fc.weight", "[20, 40]", "[20, 60]")),
        ("speculators dspark", lambda t: t.pop("d2t"), ("d2t", "missing", "31", "97")),
        ("p-eagle", lambda t: t.pop("mask_hidden"), ("mask_hidden", "missing")),
        ("p-eagle", lambda t: t.update(mask_hidden=torch.zeros(1, 7)), ("mask_hidden", "7", "20", "60")),
    ],
)
def test_bad_weights(family, spoil, words, target, tmp_path):
    raw = block_raw(family)
    tensors = block_tensors(raw)
    spoil(tensors)
    with refused(*words):
        load_block(open_checkpoint(write_block(tmp_path / "drafter", raw, tensors)), 64, target)
