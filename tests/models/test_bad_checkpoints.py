"""Every bad checkpoint is a UserError of one sentence, which names what is wrong, its value and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    granite,
    granitemoehybrid,
    head_config,
    head_tensors,
    llama,
    phi3,
    qwen3,
    qwen3_moe,
    smollm3,
    write_head,
)
from gguf_files import vocabulary, write_gguf
from refusal import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo_trt.models.decoder import Decoder
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.weights import load_decoder, load_eagle3

WEIGHTS = "model.safetensors"
NORM, QUERY = "model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.q_proj.weight"


# Ways to break a checkpoint's folder.


def config(remove: str = "", **changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        raw.pop(remove, None)
        (folder / "config.json").write_text(json.dumps(raw))

    return apply


def rope(**parameters: object) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_theta": 10000.0, **parameters})


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return apply


FOLDERS = {
    "no folder": (shutil.rmtree, ("does not exist", "give a Hugging Face folder")),
    "no config.json": (delete("config.json"), ("config.json", "missing", "complete checkpoint")),
    "malformed JSON": (write("config.json", b'{"vocab_size": 9'), ("config.json", "JSON", "download")),
    "unknown architecture": (
        config(architectures=["GPT2LMHeadModel"]),
        ("architectures", "GPT2LMHeadModel", "use one"),
    ),
    "nearly known": (
        config(architectures=["Qwen3NextForCausalLM"]),
        ("Qwen3NextForCausalLM", "SmolLM3ForCausalLM", "of which Qwen3ForCausalLM is nearest"),
    ),
    "no architecture": (config("architectures"), ("architectures", "none", "Qwen3ForCausalLM")),
    "no size": (config("hidden_size"), ("hidden_size", "missing", "config.json")),
    "unequal groups": (config(num_key_value_heads=4), ("num_attention_heads 6", "num_key_value_heads 4", "take")),
    "activation": (config(hidden_act="gelu"), ("hidden_act", "gelu", "silu", "use")),
    "biases": (config(attention_bias=True), ("attention_bias", "True", "use")),
    "sliding window": (config(use_sliding_window=True), ("use_sliding_window", "True", "use")),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), ("quantization_config", "fp8", "use")),
    "rope type": (rope(rope_type="dynamic", factor=2.0), ("rope_type", "dynamic", "use", "yarn")),
    "rope without a factor": (rope(rope_type="yarn"), ("factor", "yarn", "missing", "take")),
    "rope with a surprise": (rope(rope_type="yarn", factor=2.0, mscale=0.7), ("mscale", "0.7", "remove")),
    "no weights": (delete(WEIGHTS), ("safetensors", "download")),
    "truncated weights": (truncate(WEIGHTS, 0.9), (WEIGHTS, "download")),
    "absent shard": (
        write(WEIGHTS + ".index.json", b'{"weight_map": {"a": "model-1-of-2.safetensors"}}'),
        ("model-1-of-2.safetensors", "download"),
    ),
    "missing tensor": (tensors(lambda held: held.pop(NORM)), (NORM, "missing", "use a complete")),
    "transposed tensor": (
        tensors(lambda held: held.update({QUERY: held[QUERY].T.contiguous()})),
        (QUERY, "[20, 60]", "[60, 20]", "take"),
    ),
    "another vocabulary": (config(vocab_size=98), ("model.embed_tokens.weight", "[97, 20]", "[98, 20]", "take")),
    "unread tensor": (
        tensors(lambda held: held.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(60)})),
        ("model.layers.0.self_attn.q_proj.bias", "no part", "use"),
    ),
}


@pytest.fixture(scope="module")
def good_target(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    qwen3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(good_target) -> Decoder:
    return load_decoder(open_checkpoint(good_target), positions=64)


@pytest.mark.parametrize(("spoil", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_bad_folder(spoil, words, good_target, tmp_path):
    folder = shutil.copytree(good_target, tmp_path / "checkpoint")
    spoil(folder)
    with refused(*words):
        load_decoder(open_checkpoint(folder), positions=64)


def test_weights_file_is_not_a_checkpoint(good_target):
    with refused(WEIGHTS, "single file and no GGUF file", "give a Hugging Face folder"):
        open_checkpoint(good_target / WEIGHTS)


@pytest.mark.parametrize("layers", [[1, 1, 0], "1110"])
def test_rotary_layers_that_are_no_list_of_all(layers, tmp_path):
    smollm3().save_pretrained(tmp_path)
    config(no_rope_layers=layers)(tmp_path)
    with refused("no_rope_layers", layers, "5 layers", "config.json"):
        load_decoder(open_checkpoint(tmp_path), positions=64)


@pytest.mark.parametrize(
    ("build", "changes", "words"),
    [
        (granite, {"residual_multiplier": 0}, ("residual_multiplier", 0, "positive number")),
        (granite, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ("rope_type", "'yarn'", "'default'")),
        (granitemoehybrid, {"num_local_experts": 4}, ("experts", "granite-4.0-micro")),
        (granitemoehybrid, {"position_embedding_type": None}, ("no rotary positions", "granite-4.0-micro")),
        (phi3, {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, ("short_factor", "list of 8")),
        (phi3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ("rope_type", "'linear'", "longrope")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_switches_of_granite_and_phi_that_are_not_theirs(build, changes, words, tmp_path):
    build().save_pretrained(tmp_path)
    config(**changes)(tmp_path)
    with refused(*words):
        load_decoder(open_checkpoint(tmp_path), positions=64)


@pytest.mark.parametrize("fused", [False, True], ids=["a tensor per expert", "all experts in one tensor"])
def test_missing_expert(fused, tmp_path):
    qwen3_moe().save_pretrained(tmp_path, save_original_format=not fused)
    name = "model.layers.3.mlp.experts." + ("down_proj" if fused else "4.up_proj.weight")
    tensors(lambda held: held.pop(name))(tmp_path)
    with refused(name, "missing", "use a complete"):
        load_decoder(open_checkpoint(tmp_path), positions=64)


@pytest.mark.parametrize(
    "change",
    [{"num_local_experts": None}, {"decoder_sparse_step": 0}, {"num_experts_per_tok": "3"}],
    ids=lambda change: next(iter(change)),
)
def test_bad_expert_sizes(change, tmp_path):
    qwen3_moe().save_pretrained(tmp_path)
    config(**change)(tmp_path)
    with refused(*change, "config.json"):
        load_decoder(open_checkpoint(tmp_path), positions=64)


HEADS = {
    "another vocabulary": (config(vocab_size=98), ("vocab_size", "98", "97", "trained for this target")),
    "map past the vocabulary": (tensors(lambda held: held["d2t"].fill_(67)), ("d2t", "97", "trained for this target")),
    "map before the vocabulary": (
        tensors(lambda held: held["d2t"].fill_(-1)),
        ("d2t", "-1", "97", "trained for this target"),
    ),
    "map of another length": (config(draft_vocab_size=30), ("lm_head.weight", "[31, 20]", "[30, 20]", "take")),
    "short map": (tensors(lambda held: held.update(d2t=held["d2t"][:9].clone())), ("d2t", "[9]", "[31]", "take")),
    "no map": (tensors(lambda held: held.pop("d2t")), ("d2t", "missing", "31", "97", "download")),
    "missing tensor": (tensors(lambda held: held.pop("fc.weight")), ("fc.weight", "missing", "use a complete")),
    "too few features": (
        tensors(lambda held: held.update({"fc.weight": torch.zeros(20, 40)})),
        ("fc.weight", "[20, 40]", "[20, 60]", "take"),
    ),
    "query norm": (
        tensors(lambda held: held.update({"midlayer.self_attn.q_norm.weight": torch.ones(8)})),
        ("midlayer.self_attn.q_norm.weight", "no part", "use"),
    ),
    "no embeddings of its width": (
        lambda folder: write_head(
            folder,
            raw := head_config(hidden_size=14, target_hidden_size=20),
            {name: tensor for name, tensor in head_tensors(raw).items() if name != "embed_tokens.weight"},
        ),
        ("embed_tokens.weight", "14", "20", "use a head with its own"),
    ),
}


@pytest.mark.parametrize(("spoil", "words"), HEADS.values(), ids=HEADS.keys())
def test_bad_head(spoil, words, target, tmp_path):
    raw = head_config()
    folder = write_head(tmp_path / "head", raw, head_tensors(raw))
    spoil(folder)
    with refused(*words):
        load_eagle3(open_checkpoint(folder), positions=64, target=target)


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory) -> bytes:
    network = llama(vocab_size=len(vocabulary().tokens))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", network).read_bytes()


@pytest.mark.parametrize("keep", [0, 25, 2000, 0.999])
def test_truncated_gguf(keep, good_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(good_gguf[: keep if isinstance(keep, int) else int(keep * len(good_gguf))])
    with refused("model.gguf", "GGUF", "download"):
        load_decoder(open_checkpoint(path), positions=64)


def test_another_file_named_gguf(good_target, tmp_path):
    path = shutil.copy(good_target / WEIGHTS, tmp_path / "model.gguf")
    with refused("model.gguf", "GGUF", "download"):
        open_checkpoint(path)


def test_gguf_of_another_architecture(good_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(good_gguf.replace(b"llama", b"gwen3"))
    with refused("general.architecture", "gwen3", "use a GGUF file of gemma3, granite, lfm2", "qwen3 is nearest"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "missing",
    [
        "general.architecture",
        "llama.block_count",
        "llama.attention.head_count",
        "tokenizer.ggml.tokens",
        "blk.2.ffn_up.weight",
    ],
)
def test_incomplete_gguf(missing, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", llama(vocab_size=len(vocabulary().tokens)), without=missing)
    named = {"blk.2.ffn_up.weight": "model.layers.2.mlp.up_proj.weight"}.get(missing, missing)
    with refused(named, "use a"):
        load_decoder(open_checkpoint(path), positions=64)


@pytest.mark.parametrize("missing", ["tokenizer.ggml.merges", "tokenizer.ggml.token_type"])
def test_gguf_with_an_incomplete_tokenizer(missing, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", llama(vocab_size=len(vocabulary().tokens)), without=missing)
    with refused(missing, "missing", "use a complete"):
        open_checkpoint(path).tokenizer()


@pytest.mark.parametrize("missing", ["tokenizer.ggml.model", "tokenizer.ggml.pre"])
def test_gguf_with_an_unknown_tokenizer(missing, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", llama(vocab_size=len(vocabulary().tokens)), without=missing)
    with refused(missing, "tokenizer.json"):
        open_checkpoint(path).tokenizer()
