"""The EAGLE-3 head: every published spelling, and the forward pass against its formulas written out plainly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import head_config, head_tensors, qwen3, write_head
from equations import Equations
from paged import PagedCache, Tree
from refusal import refused
from torch import Tensor

from echo_trt.models.config import Eagle3Config
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.weights import load_decoder, load_eagle3

LAYERS = 8


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("target")
    qwen3(num_hidden_layers=LAYERS).save_pretrained(folder)
    return load_decoder(open_checkpoint(folder), positions=64)


def load(folder: Path, target: Decoder) -> Eagle3Head:
    return load_eagle3(open_checkpoint(folder), positions=64, target=target)


# How publishers write the same head: a change of config.json and of the tensors' names.


def eagle(config, tensors):
    return config, tensors


def vllm(config, tensors):
    def rename(name: str) -> str:
        top = {"d2t": "draft_id_to_target_id", "lm_head.weight": "lm_head.weight"}
        return top.get(name) or "model." + name.replace("midlayer.", "layers.0.")

    return config, {rename(name): tensor for name, tensor in tensors.items() if name != "t2d"}


def speculators(config, tensors):
    layer = {key: value for key, value in config.items() if key not in ("architectures", "draft_vocab_size")}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": config.get("norm_before_residual", False),
        "target_hidden_size": None,
        "transformer_layer_config": {"model_type": "llama", **layer},
    }
    return config, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


SPELLINGS = [eagle, vllm, speculators]


class PlainHead(Equations):
    """The paper's formulas over one request's entries."""

    def combine(self, features: np.ndarray) -> np.ndarray:
        if self.c.get("fc_norm"):
            parts = np.split(features, 3, axis=-1)
            features = np.concatenate([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], axis=-1)
        return features @ self.t["fc.weight"].T

    def __call__(self, token_ids: Tensor, state: np.ndarray, positions: Tensor, mask: Tensor) -> list[Tensor]:
        """Return what entries hand to their children, and logits; ``state``: combined features or outputs."""
        layer, at = "midlayer.", positions.numpy()
        normed = self.norm(state, layer + "hidden_norm")
        inputs = np.concatenate((self.norm(self.embed[token_ids.numpy()], layer + "input_layernorm"), normed), axis=-1)
        residual = normed if self.c.get("norm_before_residual") else state
        x = residual + self.attention(inputs, inputs, layer, at, at, mask.numpy())
        x = x + self.mlp(x, layer)
        normed = self.norm(x, "norm")
        handed = normed if self.c.get("norm_output") else x
        return [torch.from_numpy(each).float() for each in (handed, normed @ self.t["lm_head.weight"].T)]


class Entries:
    """Random entries of one request: ``past`` ones with features, then new ones, the first ``known`` with features too.

    The other new ones carry an output of the head. ``tree`` spans all new entries; None stands for a prompt chunk.
    """

    def __init__(self, config: Eagle3Config, past: int, known: int, tree: Tree | None):
        self.past, self.count = past, known if tree is None else len(tree.parents)
        total = past + self.count
        generator = torch.Generator().manual_seed(total)
        self.token_ids = torch.randint(config.vocab_size, (total,), generator=generator)
        self.features = 3 * torch.randn(past + known, 3 * config.target_hidden_size, generator=generator)
        self.hidden = 3 * torch.randn(self.count - known, config.hidden_size, generator=generator)
        self.tree_mask = None if tree is None else tree.mask
        self.mask = torch.ones(total, total, dtype=torch.bool).tril()
        self.positions = torch.arange(total)
        if tree is not None:
            self.mask[past:, past:] = tree.mask
            self.positions[past:] = past + tree.depths


def assert_follows_formulas(head: Eagle3Head, plain: PlainHead) -> None:
    requests = [
        Entries(head.config, past=6, known=2, tree=None),
        Entries(head.config, past=3, known=2, tree=Tree([-1, 0, 1, 1, 2, 3])),
        Entries(head.config, past=5, known=0, tree=Tree([-1, 0, 0, 2])),
    ]
    pasts, counts = [r.past for r in requests], [r.count for r in requests]
    cache = PagedCache(head.config, 1, len(requests), capacity=12)
    with torch.no_grad():
        first = head(
            torch.cat([r.token_ids[: r.past] for r in requests]),
            torch.cat([r.features[: r.past] for r in requests]),
            torch.zeros(0, head.config.hidden_size),
            torch.cat([r.positions[: r.past] for r in requests]),
            cache.attend(pasts),
        )
        cache.commit(pasts)
        second = head(
            torch.cat([r.token_ids[r.past :] for r in requests]),
            torch.cat([r.features[r.past :] for r in requests]),
            torch.cat([r.hidden for r in requests]),
            torch.cat([r.positions[r.past :] for r in requests]),
            cache.attend(counts, [r.tree_mask for r in requests]),
        )
        for request, *ours in zip(requests, first.split(pasts), second.split(counts), strict=True):
            state = np.concatenate((plain.combine(request.features.numpy()), request.hidden.numpy()))
            expected, logits = plain(request.token_ids, state, request.positions, request.mask)
            assert 5 < logits.abs().max() < 100
            torch.testing.assert_close(torch.cat(ours), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(head.logits(torch.cat(ours)), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "switches",
    [{}, {"norm_before_residual": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}],
    ids=lambda switches: " ".join(switches) or "plain",
)
def test_forward_follows_the_formulas(switches, spelling, target, tmp_path):
    config = head_config(**switches)
    tensors = head_tensors(config)
    head = load(write_head(tmp_path, *spelling(config, tensors)), target)
    assert_follows_formulas(head, PlainHead(config, tensors, target.embed.weight))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_head_without_embeddings_shares_the_targets(spelling, target, tmp_path):
    config = head_config()
    tensors = head_tensors(config)
    del tensors["embed_tokens.weight"]
    head = load(write_head(tmp_path, *spelling(config, tensors)), target)
    assert head.embed.weight is target.embed.weight
    assert_follows_formulas(head, PlainHead(config, tensors, target.embed.weight))


def test_head_of_another_width_than_its_target(target, tmp_path):
    config = head_config(hidden_size=14, target_hidden_size=target.config.hidden_size)
    tensors = head_tensors(config)
    head = load(write_head(tmp_path, config, tensors), target)
    assert_follows_formulas(head, PlainHead(config, tensors, target.embed.weight))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_draft_ids_map_to_target_ids(spelling, target, tmp_path):
    config = head_config()
    tensors = head_tensors(config)
    head = load(write_head(tmp_path, *spelling(config, tensors)), target)
    assert torch.equal(head.target_ids, tensors["t2d"].nonzero().flatten())


@pytest.mark.parametrize(
    ("stated", "layers"),
    [
        ({}, ()),
        ({"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": []}}, ()),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, LAYERS // 2 - 1, LAYERS - 4]}}, (2, 4, 5)),
        ({"eagle_aux_hidden_state_layer_ids": [2, LAYERS // 2, LAYERS - 3]}, (2, 4, 5)),
    ],
    ids=["not stated", "empty", "outputs, as SpecForge counts", "inputs, as vLLM counts"],
)
def test_feature_layers_are_inputs(stated, layers, target, tmp_path):
    config = head_config(**stated)
    head = load(write_head(tmp_path, config, head_tensors(config)), target)
    assert head.config.feature_layers == layers
    assert (head.config.feature_layers or target.config.feature_layers) == target.config.feature_layers


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"norm_before_fc": True}, ("norm_before_fc", "true")),
        ({"eagle_config": {"eh_proj_before_attn": True}}, ("eh_proj_before_attn", "true")),
        ({"eagle_config": {"use_aux_hidden_state": False}}, ("use_aux_hidden_state", "false")),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4]}, ("eagle_aux_hidden_state_layer_ids", "2 layers")),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, LAYERS]}, ("eagle_aux_hidden_state_layer_ids", "[2, 4, 8]")),
        ({"attention_bias": True}, ("attention_bias", "True")),
        ({"num_hidden_layers": 2}, ("num_hidden_layers", "2")),
        ({"architectures": ["Qwen3ForCausalLM"]}, ("architectures", "Qwen3ForCausalLM", "LlamaForCausalLMEagle3")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_unsupported_heads_are_refused(stated, words, target, tmp_path):
    config = head_config(**stated)
    folder = write_head(tmp_path, config, head_tensors(config))
    with refused(*words):
        load(folder, target)
