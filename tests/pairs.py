"""Tiny targets with a real tokenizer, a draft of every kind for them, and the recipes that build the pairs.

| pair   | draft                                              | what it is good for                        |
|--------|----------------------------------------------------|--------------------------------------------|
| lookup | prompt lookup                                      | a draft without an engine                  |
| model  | a smaller random model                             | nearly every drafted token is refused      |
| self   | the target itself                                  | nearly every drafted token is accepted     |
| eagle3 | a random head, reduced vocabulary, shared embedding| nearly every drafted token is refused      |
| close  | a head that was made to agree with its target      | trees that are accepted in part, branches  |
| dflash | a random DFlash block drafter                      | nearly every drafted token is refused      |
| dspark | a block drafter that knows the target's tokens | blocks that are accepted in part, branches |

Beside these, each of FAMILY_PAIRS is a target of another family, which drafts for itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_tokenizer import CORPUS, END, VOCAB, byte_tokenizer
from models.block_checkpoints import block_raw, block_tensors, write_block
from models.checkpoints import (
    BUILDERS,
    HYBRID_LAYERS,
    add_tensors,
    head_config,
    head_tensors,
    mtp_tensors,
    qwen3,
    qwen3_5,
    write_head,
)
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.read_recipe import parse_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.models.block_weights import load_block
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule, DraftModule, HeadModule, MtpModule, Role, TargetModule
from echo_trt.models.weights import load_decoder, load_eagle3, load_mtp
from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.policies import reserve_for

PAIRS = ("lookup", "model", "self", "eagle3", "close", "dflash", "dspark")
#: Families whose layers are not those of the other pairs' targets.
FAMILY_PAIRS = ("gemma3", "mistral", "qwen2", "smollm3")
#: Beside SIZES, so that three layers have what a family's deeper networks have, and texts outgrow a window;
#: transformers gives Qwen2's tokenizer one token more.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"sliding_window": 56},
    "qwen2": {"vocab_size": VOCAB + 1},
    "smollm3": {"no_rope_layer_interval": 2},
}
CHAT = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
LIMITS = {"batch": 8, "context": 160, "prefill_chunk": 16}
#: Of block drafters: the target's width and vocabulary.
BLOCK = {"hidden_size": 64, "vocab_size": VOCAB, "max_position_embeddings": 2048}
DECODING = {
    "policy": "echo",
    "budget": 24,
    "per_request": 16,
    "max_depth": 4,
    "beams": 3,
    "width": 4,
    "gates": {1: 0.05, 3: 0.01},
    "static": {"depth": 3, "top_k": 3, "tokens": 8},
}
#: pair -> its target's folder, its draft's kind and its draft's folder
FOLDERS: dict[str, tuple[str, str, str | None]] = {
    "lookup": ("target", "lookup", None),
    "model": ("target", "model", "small"),
    "self": ("target", "model", "target"),
    "eagle3": ("target", "eagle3", "head"),
    "close": ("plain_target", "eagle3", "close_head"),
    "dflash": ("target", "block", "dflash"),
    "dspark": ("plain_target", "block", "dspark"),
    # A random block drafter of another family, for tests that name it.
    "peagle": ("target", "block", "peagle"),
    # A mixture of experts that drafts for itself, for tests that name it.
    "qwen3_moe": ("qwen3_moe", "model", "qwen3_moe"),
    # Delta-net layers, in tests/engine/test_hybrids.py: the head of the checkpoint agrees with its target.
    "mtp": ("hybrid", "mtp", None),
    "lfm2": ("lfm2", "lookup", None),
    **{family: (family, "model", family) for family in FAMILY_PAIRS},
}


def write_networks(folder: Path) -> None:
    """Every checkpoint that the pairs name."""
    write_tokenizer(folder / "target")
    qwen3(**SIZES, eos_token_id=0).save_pretrained(folder / "target")
    for family in (*FAMILY_PAIRS, "lfm2", "qwen3_moe"):
        write_tokenizer(folder / family)
        BUILDERS[family](**SIZES | CHANGES.get(family, {}), eos_token_id=0).save_pretrained(folder / family)
    write_tokenizer(folder / "small")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1}
    qwen3(**SIZES | small, tie_word_embeddings=True).save_pretrained(folder / "small")
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size")}
    config = head_config(**sizes, draft_vocab_size=VOCAB // 2)
    tensors = head_tensors(config)
    del tensors["embed_tokens.weight"]
    write_head(folder / "head", config, tensors)
    _write_close_pair(folder)
    write_block(folder / "dflash", block_raw("dflash", **BLOCK, **layers([0, 1])))
    parallel = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "mask_token_id": VOCAB - 1, "draft_vocab_size": 150}
    write_block(folder / "peagle", block_raw("speculators peagle", **BLOCK, **parallel))
    _write_close_block(folder)
    _write_hybrid(folder / "hybrid")


def layers(ids: list[int]) -> dict[str, Any]:
    """Return the key of a DFlash drafter that names the target's layers."""
    return {"dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": ids}}


@torch.no_grad()
def _write_close_block(folder: Path) -> None:
    """Write a drafter that has read the plain target's texts: its first row knows what follows a token, the others
    what comes often.
    """
    target = Qwen3ForCausalLM.from_pretrained(folder / "plain_target")
    text = target.generate(torch.arange(VOCAB)[:, None], do_sample=False, max_new_tokens=30, eos_token_id=None)
    pairs = text.unfold(1, 2, 1).reshape(-1, 2)
    counts = (pairs[:, 0] * VOCAB + pairs[:, 1]).bincount(minlength=VOCAB**2).view(VOCAB, VOCAB) + 0.01
    counts[VOCAB - 1] = often = text.flatten().bincount(minlength=VOCAB) + 0.01  # behind the mask
    chosen = often.topk(64).indices.sort().values
    raw = block_raw("speculators dspark", **BLOCK, draft_vocab_size=len(chosen))
    raw |= {"aux_hidden_state_layer_ids": [1, 2], "mask_token_id": VOCAB - 1}
    tensors = block_tensors(raw, 2)
    tensors["d2t"] = chosen - torch.arange(len(chosen))
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, chosen, True)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight", "confidence_head.proj.weight")):
            tensors[name] *= 0.1
    rows = tensors["lm_head.weight"] * tensors["norm.weight"]
    tensors["embed_tokens.weight"] = torch.linalg.lstsq(rows, counts[:, chosen].log().T).solution.T.contiguous()
    write_block(folder / "dspark", raw, tensors)


def write_tokenizer(folder: Path, corpus: str = CORPUS) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(corpus), eos_token=END, chat_template=CHAT)
    fast.save_pretrained(folder)


@torch.no_grad()
def _write_close_pair(folder: Path) -> None:
    """Write a target that looks mostly at its last token, and a head that knows that token's embedding and little
    else.
    """
    write_tokenizer(folder / "plain_target")
    target = qwen3(**SIZES)
    for name, parameter in target.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter *= 0.02
    target.save_pretrained(folder / "plain_target")

    hidden = SIZES["hidden_size"]
    shape = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": hidden}
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size")}
    config = head_config(**sizes, **shape, draft_vocab_size=VOCAB, norm_before_residual=True)
    tensors = {name: 0.2 * tensor for name, tensor in head_tensors(config).items() if name not in ("d2t", "t2d")}
    # Tokens attend to tokens like themselves and hand on that token's embedding.
    embedding = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
    for name, scale in (("q_proj", 2.0), ("k_proj", 2.0), ("v_proj", 1.0)):
        tensors[f"midlayer.self_attn.{name}.weight"] = scale * embedding
    tensors["midlayer.self_attn.o_proj.weight"] = torch.eye(hidden)
    tensors["midlayer.input_layernorm.weight"] = torch.ones(hidden)
    tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.clone()
    tensors["norm.weight"] = target.model.norm.weight.clone()
    tensors["lm_head.weight"] = target.lm_head.weight.clone()
    write_head(folder / "close_head", config, tensors)


@torch.no_grad()
def _write_hybrid(folder: Path) -> None:
    """Write a target of delta-net layers that looks mostly at its last token, and an MTP head that does the same."""
    write_tokenizer(folder)
    target = qwen3_5(**SIZES | HYBRID_LAYERS)
    head = mtp_tensors(target)
    for name, parameter in [*target.named_parameters(), *head.items()]:
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            parameter *= 0.01
    hidden = SIZES["hidden_size"]
    head["mtp.fc.weight"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
    head["mtp.pre_fc_norm_embedding.weight"] = torch.zeros(hidden)
    head["mtp.norm.weight"] = target.model.norm.weight.clone()
    target.save_pretrained(folder)
    add_tensors(folder, head)


def raw_recipe(pair: str, networks: Path, **changes: Any) -> dict[str, Any]:
    """Return the recipe as its YAML would hold it. ``changes`` replace whole keys."""
    target, kind, draft = FOLDERS[pair]
    raw: dict[str, Any] = {
        "name": pair,
        "target": {"path": str(networks / target)},
        "draft": {"kind": kind},
        "engine": "cpu" if pair in ("mtp", "lfm2") else "openvino",
        "precision": "fp32",
        "limits": LIMITS,
        "decoding": DECODING,
    }
    if draft is not None:
        raw["draft"] |= {"source": {"path": str(networks / draft)}, "top_k": 5}
    return raw | changes


def recipe_of(pair: str, networks: Path, **changes: Any) -> Recipe:
    return parse_recipe(raw_recipe(pair, networks, **changes), "recipe.yaml")


def roles_of(pair: str, networks: Path) -> dict[str, Role]:
    """Return the pair's networks in PyTorch, as a build has them before it exports them."""
    recipe = recipe_of(pair, networks)
    positions = recipe.limits.context + reserve_for(recipe.decoding.model_dump())
    target_folder, kind, draft_folder = FOLDERS[pair]
    checkpoint = open_checkpoint(networks / target_folder)
    target = load_decoder(checkpoint, positions)
    if kind == "lookup":
        return {"target": TargetModule(target)}
    if kind == "mtp":
        head = MtpModule(load_mtp(checkpoint, positions, target), recipe.draft.top_k)
        return {"target": TargetModule(target, (target.config.num_layers,)), "draft": head}
    draft = open_checkpoint(networks / draft_folder)
    if kind == "model":
        return {
            "target": TargetModule(target),
            "draft": DraftModule(load_decoder(draft, positions), recipe.draft.top_k),
        }
    if kind == "block":
        drafter = load_block(draft, positions, target)
        role = BlockModule(drafter, recipe.draft.top_k)
        return {"target": TargetModule(target, drafter.config.feature_layers), "draft": role}
    head = HeadModule(load_eagle3(draft, positions, target), recipe.draft.top_k)
    return {"target": TargetModule(target, target.config.feature_layers), "draft": head}


def reference_engines(
    pair: str, networks: Path, blocks: int, batch: int = 8, resident: bool = False
) -> dict[str, TorchEngine]:
    bounds = CallBounds(batch, blocks, 64)
    roles = roles_of(pair, networks)
    return {name: TorchEngine(role, blocks, bounds=bounds, resident=resident) for name, role in roles.items()}


def block_inputs(call: ForwardBatch, feature_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make a block drafter's inputs for any call: its logit rows are the block's, all other rows have features."""
    count, requested = len(call.token_ids), len(call.logit_rows)
    states, others = np.empty(count, np.int64), np.setdiff1d(np.arange(count), call.logit_rows)
    states[call.logit_rows], states[others] = np.arange(requested), requested + np.arange(len(others))
    return {"features": rng.standard_normal((len(others), feature_size), np.float32), "state_rows": states}
