"""Single tokens as bytes: joined they are the text that the tokenizer decodes, in both families of vocabularies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import END, write_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from echo_trt.models.token_texts import TokenTexts


def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words begin with a mark for the space, unknown characters fall back to bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "é"]
    tokenizer = Tokenizer(
        BPE({piece: i for i, piece in enumerate(pieces)}, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return [PreTrainedTokenizerFast.from_pretrained(folder), sentence_piece()]


@given(text=st.text(st.sampled_from("ab the. éß€日本😀🤖\u200d\n\t"), max_size=12))
def test_bytes_joined_are_the_text(tokenizers, text):
    for tokenizer in tokenizers:
        texts, ids = TokenTexts(tokenizer), tokenizer(text)["input_ids"]
        assert b"".join(map(texts.raw, ids)).decode() == text
        assert not any(map(texts.is_special, ids))


def test_every_byte_has_a_token(tokenizers):
    for tokenizer in tokenizers:
        texts = TokenTexts(tokenizer)
        assert {texts.raw(token) for token in range(len(tokenizer))} >= {bytes([byte]) for byte in range(256)}


def test_special_tokens_have_names_and_unknown_ids_nothing(tokenizers):
    texts = TokenTexts(tokenizers[0])
    end = tokenizers[0].convert_tokens_to_ids(END)
    assert (texts.raw(end), texts.is_special(end)) == (END.encode(), True)
    assert (texts.raw(100_000), texts.is_special(100_000)) == (b"", False)
