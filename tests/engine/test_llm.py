"""The public face: what ``generate`` and ``chat`` take, what they return, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from byte_tokenizer import ASSISTANT, END, USER
from driving import assert_all_free, prompt_ids
from refusal import refused
from transformers import PreTrainedTokenizerFast

import echo_trt
from echo_trt import errors
from echo_trt.engine import params

FEW = params.SamplingParams(12, ignore_eos=True)
TURN = [{"role": "user", "content": "the theme of"}]
TALK = [*TURN, {"role": "assistant", "content": "a thing"}, {"role": "user", "content": "naïve"}]
#: What answers and command lines import last, and takes the longest.
HEAVY = ("numba", "numpy", "openvino", "torch", "transformers")


@pytest.fixture(scope="module")
def llm(open_llm):
    return open_llm("close", "echo", 3)


@pytest.fixture(scope="module")
def ids(bundle_of):
    """Return transformers' token ids of a conversation."""
    theirs = PreTrainedTokenizerFast.from_pretrained(bundle_of("close"))
    return lambda chat: theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_a_budget_is_a_number_whenever_it_is_set(llm):
    with refused("budget is '8'; give a whole number from 1 to 2^31 - 1, or None."):
        llm.set_policy("echo", "8")


@pytest.mark.parametrize(
    "program", ["import echo_trt", "from echo_trt import SamplingParams", "import echo_trt.cli.app"]
)
def test_what_needs_no_network_imports_nothing_heavy(program):
    reported = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"], capture_output=True, text=True
    )
    assert reported.returncode == 0, reported.stderr
    assert not set(reported.stdout.split()) & set(HEAVY)


def test_generate_continues_a_text_as_it_is(llm):
    text = f"the theme{END}{ASSISTANT}café{USER}"  # names of control tokens are control tokens, as in /v1/completions
    raw = llm.tokenizer.encode(text)
    from_text, from_ids = llm.generate([text, raw], FEW)
    assert from_text == from_ids
    assert from_text.prompt_tokens == len(raw)
    assert from_text.token_ids != llm.chat([{"role": "user", "content": text}], FEW)[0].token_ids


def test_chat_takes_one_conversation_or_several_and_returns_a_list(llm, ids):
    alone = [llm.chat(each, FEW) for each in (TURN, TALK)]
    assert [len(each) for each in alone] == [1, 1]
    together = llm.chat([TURN, TALK], [FEW, FEW])
    expected = llm.generate([ids(TURN), ids(TALK)], FEW)
    for answers in (together, [each[0] for each in alone]):
        assert [(c.text, c.token_ids, c.prompt_tokens) for c in answers] == [
            (c.text, c.token_ids, c.prompt_tokens) for c in expected
        ]
    assert llm.chat_ids("the theme of") == llm.chat_ids(TURN) == ids(TURN)
    assert llm.chat([]) == llm.generate([]) == []


def test_a_stream_s_pieces_are_the_whole_answers(llm):
    for stream, whole in (
        (llm.stream_chat([TURN, TALK], FEW), llm.chat([TURN, TALK], FEW)),
        (llm.stream(["the theme", "naïve"], FEW), llm.generate(["the theme", "naïve"], FEW)),
    ):
        texts, last = ["", ""], {}
        for delta in stream:
            texts[delta.index] += delta.text
            if delta.completion:
                last[delta.index] = delta.completion.token_ids
        assert texts == [c.text for c in whole]
        assert last == dict(enumerate(c.token_ids for c in whole))


def test_mistakes_name_the_argument(llm):
    assert echo_trt.UserError is errors.UserError
    with refused("params is {'max_tokens': 3}; give SamplingParams(max_tokens=3)"):
        llm.generate("the theme", {"max_tokens": 3})
    with refused("params is {}; give SamplingParams"):
        llm.chat(TURN, {})
    with refused("prompts[1]", "half a surrogate pair"):
        llm.generate(["a", "\ud800"])
    with refused("prompts[0]", "token id -1"):
        llm.generate([[-1]])
    for wrong in ([["hi"]], [[{"role": "user"}]], [[{"role": "user", "content": 5}]], [{"role": "user"}]):
        with refused("conversations[0][0] has no role and content", '"role": "user"'):
            llm.chat(wrong)
    for wrong in ("hi", [TURN, []], [TURN, "hi"]):
        with refused("is no list of messages", '"role": "user"'):
            llm.chat(wrong)
    with refused("2 entries", "1 conversations", "one per conversation"):
        llm.chat(TURN, [FEW, FEW])
    assert not llm.loop.scheduler.busy


def test_a_stop_string_inside_an_accepted_path_drops_what_follows(open_llm):
    llm = open_llm("self", "autoregressive", 8)
    prompts = [prompt_ids(8, seed) for seed in range(8)]
    whole = llm.generate(prompts, params.SamplingParams(60, ignore_eos=True))
    chosen = [re.search("[^\ufffd]{2,3}", c.text[20:])[0] for c in whole]
    stopping = [params.SamplingParams(60, ignore_eos=True, stop=(stop, "never said")) for stop in chosen]
    plain = llm.generate(prompts, stopping)
    for full, cut, stop in zip(whole, plain, chosen, strict=True):
        assert (cut.text, cut.finish_reason) == (full.text[: full.text.find(stop)], "stop")
        assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
        assert stop in llm.tokenizer.decode(cut.token_ids)
    for policy in ("static", "echo"):
        llm.set_policy(policy)
        completions = llm.generate(prompts, stopping)
        assert [(c.text, c.token_ids) for c in completions] == [(c.text, c.token_ids) for c in plain]
        assert_all_free(llm.loop)
