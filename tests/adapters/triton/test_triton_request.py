"""What tensors of Triton's API mean, and which are refused; a real Triton: tests/engine/service/test_triton.py."""

from __future__ import annotations

import json

import pytest

from echo_trt.adapters.triton.request import Reader
from echo_trt.engine.text.prompts import PromptReader
from echo_trt.errors import TooLong, UserError


@pytest.fixture(scope="module")
def reader(bundle_of) -> Reader:
    return Reader(PromptReader(bundle_of("close"), 160))


def request(**more: object) -> dict[str, object]:
    return {"text_input": "the theme", "max_tokens": 8, "ignore_eos": True, **more}


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({}, "no prompt"),
        (request(input_ids=[5]), "input_ids and text_input given"),
        (request(temperature=-1.0), "temperature is -1.0"),
        (request(max_tokens=0), "max_tokens is 0"),
        (request(max_tokens=-1, min_length=2), "max_tokens is -1"),
        (request(min_length=300), "min_length is 300"),
        (request(deadline_ms=-4), "deadline_ms is -4"),
        (request(logit_bias_ids=[5, 6], logit_bias=[1.5]), "logit_bias_ids has 2 values"),
        (request(top_logprobs=5), "return_log_probs is not true"),
        (request(return_log_probs=True, top_logprobs=21), "top_logprobs is 21"),
        (request(stop_words=["x"] * 65), "stop_words has 65"),
        (request(structured="{"), "structured is not JSON"),
        (request(latency="odd"), "latency is 'odd'"),
        (request(max_tokens=8, sampling_param_max_tokens=8), "mean the same"),
        (request(tools="[]"), "tools given without a chat"),
        (request(chat_template_kwargs="{}"), "chat_template_kwargs given without a chat"),
        ({"chat_messages": "{"}, "not JSON"),
        ({"chat_messages": "[]"}, "no list of messages"),
        ({"chat_messages": '[{"role": "user"}]'}, "chat_messages[0]"),
        (request(chat=True, tools='{"a": 1}'), "tools is no list of tools"),
        (request(chat=True, chat_template_kwargs="[1]"), "chat_template_kwargs is no JSON object"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(reader, inputs, word):
    with pytest.raises(UserError) as refused:
        reader.read(inputs)
    assert word in str(refused.value)


@pytest.mark.parametrize("inputs", [request(text_input="word " * 2000), request(text_input="word " * 2000, chat=True)])
def test_a_prompt_that_cannot_fit_is_no_mistake_of_form(reader, inputs):
    with pytest.raises(TooLong, match="shorten it"):
        reader.read(inputs)


def test_tensors_are_parameters(reader):
    words = {"stop_words": ["a", ""], "logit_bias_ids": [5], "logit_bias": [1.5], "top_p": 0.0, "deadline_ms": 1500}
    more = {"structured": json.dumps({"regex": "a+"}), "return_log_probs": True, "top_logprobs": 3, "priority": 2}
    answer = reader.read(request(stream=True, **words, **more))
    job, params = answer.job, answer.job.request.params
    assert (params.stop, params.logit_bias, params.top_p, params.logprobs) == (("a",), {5: 1.5}, 1.0, 3)
    assert (params.structured, params.max_tokens, params.ignore_eos) == ({"regex": "a+"}, 8, True)
    assert (answer.streamed, job.request.priority, job.seconds, answer.out.unsent) == (True, 2, 1.5, "")


@pytest.mark.parametrize("prompt", [{"text_input": "the theme"}, {"input_ids": [70, 71]}])
def test_a_prompt_comes_back_where_it_is_wanted(reader, prompt):
    answer = reader.read({**prompt, "exclude_input_in_output": False})
    assert answer.out.unsent == prompt.get("text_input", "bc") or answer.out.unsent


def test_a_prediction_is_a_text_whose_tokens_the_engine_gets(reader):
    reply = reader.read(request(prediction="the theme of a thing"))
    ids = reader.read(request(text_input="the theme of a thing", add_special_tokens=False)).out.ids
    assert list(reply.job.request.params.prediction) == ids
    assert not reader.read(request()).job.request.params.prediction
    with pytest.raises(UserError, match="prediction has 500000 characters"):
        reader.read(request(prediction="word " * 100_000))
