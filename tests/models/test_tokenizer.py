"""A bundle's tokenizer reads its files as transformers does: token ids, texts and what chat templates write."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tool_models
from checkpoints import qwen3
from gguf_files import GGUF_SIZES, write_gguf
from jinja2 import TemplateError
from refusal import refused
from test_chat import DEFAULT, QWEN, byte_level, of_tests, sentence_piece
from transformers import PreTrainedTokenizerFast

from echo_trt.models.chat_template import render
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.tokenizer import BundleTokenizer, added_tokens, load_tokenizer

TEXTS = ("", " the theme", "naïve café\n\n 50 €  ", "😀🤖 日本語\t1234567", unicodedata.normalize("NFD", "é"), "a <b")
TOOL = {"type": "function", "function": {"name": "add", "description": "é <b>", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"é": [1, None]}}}
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"},
]
CHATS = [TALK[:1], [{"role": "system", "content": " Be brief.\n"}, *TALK[:1]], TALK]
#: What templates of the hub use of Jinja: blocks for trainers, loop controls, filters, what they are given.
JINJA = (
    "{%- set ns = namespace(first=true) %}\n"
    "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
    "{{ bos_token }}{{ m.role }}{% generation %}{% set ns.first = false %}{{ m.content | trim }}{% endgeneration %}\n"
    "{{ m | tojson(indent=2) }}{{ m.thinking }}{{ documents is none }}{{ ns.first }}{{ tools | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}"
)


def of_gguf(folder: Path, words: str) -> PreTrainedTokenizerFast:
    path = write_gguf(folder / f"{words}.gguf", qwen3(**GGUF_SIZES), pre_tokenizer=words)
    return open_checkpoint(path).tokenizer()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[PreTrainedTokenizerFast, BundleTokenizer]]:
    """Tokenizers of all families: transformers', and ours of the files that it writes into a bundle."""
    folder = tmp_path_factory.mktemp("tokenizers")
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = {
        "tests": of_tests(folder / "tests"),
        "qwen": byte_level(QWEN, chatml, ["<think>", "</think>"], bos_token="<|im_start|>", split_special_tokens=True),
        "jinja": byte_level(JINJA, chatml, [], bos_token="<|im_start|>"),
        "bare": byte_level(None, chatml, []),
        "llama 2": sentence_piece(),
        "tools": tool_models.qwen3_tokenizer(),
        "llama 3": tool_models.llama3_tokenizer(),
        "mistral": tool_models.mistral_tokenizer(),
        **{words: of_gguf(folder, words) for words in ("smollm", "qwen2", "llama-bpe")},
    }
    if DEFAULT.exists():
        made["default"] = PreTrainedTokenizerFast.from_pretrained(DEFAULT)
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(folder / name)
    names = {name: folder / name for name in made}
    return {name: (PreTrainedTokenizerFast.from_pretrained(at), load_tokenizer(at)) for name, at in names.items()}


def test_ids_and_texts_are_transformers(pairs):
    for name, (theirs, ours) in pairs.items():
        marks = "".join(theirs.get_added_vocab())
        for text in (*TEXTS, f"a{marks} b"):
            for special in (True, False):
                ids = theirs(text, add_special_tokens=special)["input_ids"]
                assert ours.encode(text, add_special_tokens=special) == ids, (name, text)
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert (ours.get_vocab(), len(ours)) == (theirs.get_vocab(), len(theirs))
        assert (ours.special_tokens_map, added_tokens(ours)) == (theirs.special_tokens_map, theirs.get_added_vocab())


def test_templates_write_what_transformers_writes(pairs):
    for name, (theirs, ours) in pairs.items():
        assert ours.chat_template == (theirs.chat_template or "")
        for chat in CHATS if ours.chat_template else ():
            for tools in (None, [TOOL]):
                for answer in (True, False):
                    given = {"tools": tools, "add_generation_prompt": answer, "tokenize": False}
                    try:
                        expected = theirs.apply_chat_template(chat, **given)
                    except TemplateError as error:
                        with pytest.raises(TemplateError, match=str(error)):
                            render(ours.chat_template, chat, tools, answer, ours.special_tokens_map)
                        continue
                    assert render(ours.chat_template, chat, tools, answer, ours.special_tokens_map) == expected, name


def test_calls_are_shown_and_other_special_tokens_are_not(pairs):
    tokenizer = pairs["mistral"][1]
    ids = tokenizer.encode("<s>[TOOL_CALLS] a</s>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "[TOOL_CALLS] a"


def test_files_of_earlier_versions_are_read(tmp_path):
    """Which wrote special tokens with their flags, and the template into tokenizer_config.json."""
    byte_level("{{ bos_token }}", ["<a>"], []).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    token = {"__type": "AddedToken", "content": "<a>", "lstrip": False, "special": True}
    config = {"bos_token": token, "eos_token": None, "chat_template": "{{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special_tokens_map, tokenizer.chat_template) == ({"bos_token": "<a>"}, "{{ bos_token }}")


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named_in_one_sentence(damaged, tmp_path):
    byte_level(None, [], []).save_pretrained(tmp_path)
    (tmp_path / damaged).write_text("{")
    with refused(f"tokenizer in {tmp_path} cannot be read"):
        load_tokenizer(tmp_path)
