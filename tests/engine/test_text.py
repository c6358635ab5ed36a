"""Tokens to text as they come: whole characters, the tokenizer's own text in the end, stop strings anywhere."""

import itertools

import numpy as np
import pytest
from byte_tokenizer import VOCAB, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.engine.text.prompts import Infill, PromptReader
from echo_trt.engine.text.stream import AnswerText, TextStream
from echo_trt.errors import UserError

#: Bytes, merges that end inside a character, and special tokens, all in the same text.
ids_of_anything = st.lists(st.integers(0, VOCAB - 1) | st.integers(130, 258), max_size=24)
scripts = st.text(st.sampled_from("ab the. éß€日本😀😎🤖\u200d\n"), max_size=12)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
stops = st.lists(st.text("the a", min_size=1, max_size=4), min_size=1, max_size=3)
text_of_stops = st.lists(st.sampled_from(["t", "h", "e", " ", "a", "th", "the", "é"]), max_size=20).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def byte_ids(tokenizer, text: str) -> list[int]:
    """Return a token for each byte: characters arrive in parts."""
    mapped = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [tokenizer.token_to_id(byte) for part, _ in mapped for byte in part]


def stream(tokenizer, ids: list[int], sizes: list[int], stop=()) -> tuple[list[str], int]:
    """Return what is given out piece by piece, and how many tokens were used. ``sizes`` are those of accepted paths."""
    text, given_out, used, size = TextStream(tokenizer, stop), [], 0, itertools.cycle(sizes)
    while used < len(ids) and not text.stopped:
        new, count = text.push(ids[used : used + next(size)])
        given_out.append(new)
        used += count
    given_out.append(text.finish())
    assert "".join(given_out) == text.text
    return given_out, used


@given(ids=ids_of_anything, sizes=sizes)
def test_whatever_comes_the_text_is_the_tokenizers(tokenizer, ids, sizes):
    given_out, used = stream(tokenizer, ids, sizes)
    assert "".join(given_out) == tokenizer.decode(ids)
    assert used == len(ids)


@given(text=scripts, sizes=sizes, split=st.booleans())
def test_pieces_are_whole_characters(tokenizer, text, sizes, split):
    ids = byte_ids(tokenizer, text) if split else tokenizer.encode(text).ids
    given_out, _ = stream(tokenizer, ids, sizes)
    for so_far in itertools.accumulate(given_out):
        assert text.startswith(so_far)
    assert "".join(given_out) == text


@given(text=text_of_stops, stops=stops, sizes=sizes, split=st.booleans())
def test_stop_strings_end_the_text_wherever_they_lie(tokenizer, text, stops, sizes, split):
    ids = byte_ids(tokenizer, text) if split else tokenizer.encode(text).ids
    given_out, used = stream(tokenizer, ids, sizes, stops)
    for count in range(len(ids) + 1):
        whole = tokenizer.decode(ids[:count])
        if whole.endswith("\ufffd"):  # in the middle of a character
            continue
        found = [position for stop in stops if (position := whole.find(stop)) >= 0]
        if found:
            assert ("".join(given_out), used) == (whole[: min(found)], count)
            return
    assert ("".join(given_out), used) == (text, len(ids))


@given(text=text_of_stops, stops=stops)
def test_only_the_beginning_of_a_stop_string_is_held_back(tokenizer, text, stops):
    so_far = TextStream(tokenizer, stops)
    for count, token in enumerate(ids := byte_ids(tokenizer, text), 1):
        so_far.push([token])
        if so_far.stopped:
            return
        whole = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        begins = (size for size in range(len(whole), 0, -1) if any(s.startswith(whole[-size:]) for s in stops))
        assert so_far.text == whole[: len(whole) - next(begins, 0)]


@given(ids=ids_of_anything, sizes=sizes, stops=stops | st.just([]))
def test_tokens_settle_with_their_text(tokenizer, ids, sizes, stops):
    text, offsets, used, size = TextStream(tokenizer, stops), [], 0, itertools.cycle(sizes)

    def output() -> str:
        return tokenizer.decode(ids[: len(offsets)])

    while used < len(ids) and not text.stopped:
        used += text.push(ids[used : used + next(size)])[1]
        offsets += text.settle()
        assert output().startswith(text.text)
    text.finish()
    offsets += text.settle()
    assert output() == text.text or (text.stopped and output().startswith(text.text))
    assert offsets == sorted(offsets)
    assert all(offset < len(text.text) for offset in offsets)
    assert text.settle() == []


def test_tokens_of_a_stop_string_never_settle(tokenizer):
    text = TextStream(tokenizer, ["the"])
    text.push(byte_ids(tokenizer, "a the"))
    text.finish()
    assert (text.text, text.settle()) == ("a ", [0, 1])
    text = TextStream(tokenizer, ["the"])
    text.push([*byte_ids(tokenizer, "é")[:1], *tokenizer.encode("the").ids])
    text.finish()
    assert (text.text, text.settle()) == ("\ufffd", [0])


def test_stop_strings_before_min_tokens_are_text(tokenizer):
    ids = byte_ids(tokenizer, "the the the")
    for minimum, want in ((0, ""), (3, ""), (4, "the "), (7, "the "), (8, "the the ")):
        text = TextStream(tokenizer, ["the"], minimum)
        text.push(ids)
        assert (text.text, text.stopped) == (want, "the")


def test_a_stop_string_before_half_a_character_is_left_out(tokenizer):
    ids = [*byte_ids(tokenizer, "b"), tokenizer.token_to_id("aÃ")]
    assert "".join(stream(tokenizer, ids, [1], ["ba"])[0]) == ""
    assert "".join(stream(tokenizer, ids, [1], ["bc"])[0]) == "ba\ufffd"


@pytest.mark.parametrize(("stop", "reason"), [("\ufffd", "stop"), ("?", "length")])
def test_a_stop_string_that_only_the_end_completes_is_the_reason(stop, reason, tokenizer):
    """Half a character is U+FFFD once nothing more can come."""
    half = tokenizer.token_to_id("aÃ")
    request = Request(0, np.array([5]), SamplingParams(1, stop=(stop,)))
    request.finish_reason = "length"
    request.generated = [half]
    AnswerText(tokenizer, request.params).follow(request, [half], lambda request: None)
    assert request.finish_reason == reason


@pytest.mark.parametrize("spelling", ["<|fim_{}|>", "<fim_{}>"])
def test_a_gap_is_filled_between_its_ends(tmp_path, spelling):
    """Until a token that begins another file; a text that has no gap keeps its parameters."""
    tokenizer = byte_tokenizer()
    marks = [spelling.format(part) for part in ("prefix", "suffix", "middle", "pad")]
    tokenizer.add_special_tokens([*marks, "<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    reader, params = PromptReader(tmp_path, 1000), SamplingParams(stop_token_ids=(7,))
    gap = Infill("def f(", "return a")
    before, behind, middle, pad, end = map(tokenizer.token_to_id, [*marks, "<|endoftext|>"])
    texts = [tokenizer.encode(text).ids for text in ("def f(", "return a")]
    assert reader.ids(gap) == [before, *texts[0], behind, *texts[1], middle]
    assert set(reader.params(gap, params).stop_token_ids) == {7, pad, end}
    assert reader.params("def f(", params) == params


def test_a_model_without_tokens_for_a_gap_says_so(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokens by which a gap is filled"):
        PromptReader(tmp_path, 1000).ids(Infill("a", "b"))
