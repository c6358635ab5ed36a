"""``echo-trt chat``: what was said before is in the prompt, until it is reset."""

from __future__ import annotations

import io
import sys

import pytest

from echo_trt import LLM, SamplingParams

GREEDY = ("--temperature", 0, "--max-tokens", 8)


@pytest.fixture
def chat(echo_trt, bundle_of, monkeypatch):
    def run(*lines: str, words: tuple[object, ...] = ()) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        outcome = echo_trt("chat", bundle_of("close"), *GREEDY, *words)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


def test_a_turn_knows_the_turns_before_it_until_a_reset(chat, bundle_of):
    llm, params = LLM(bundle_of("close")), SamplingParams(max_tokens=8)
    system = {"role": "system", "content": "be short"}
    first = {"role": "user", "content": "the theme"}
    then = {"role": "user", "content": "and then"}
    [one] = llm.chat([first], params)
    [two] = llm.chat([first, {"role": "assistant", "content": one.text}, then], params)
    [alone] = llm.chat([system, then], params)
    expected = "".join(f"{answer.text}\n" for answer in (one, two, one, alone))
    assert (
        chat("the theme", "and then", "/reset", "the theme", "/system be short", "and then", "/bye", "no") == expected
    )
    assert chat("and then", words=("--system", "be short")) == f"{alone.text}\n"


def test_a_conversation_that_is_too_long_is_told_and_goes_on(chat):
    assert chat("the theme " * 4000, "/reset", "the theme") == chat("the theme")
