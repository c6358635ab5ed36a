"""What Dynamo's frontend sends, read: parameters, what moves with an answer, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from refusal import refused

from echo_trt.adapters.dynamo.answers import DynamoAnswer
from echo_trt.adapters.dynamo.migration import Boundary, boundary_of, migrated
from echo_trt.adapters.dynamo.request import read
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import FIRST, Request

EOS = [2]


def ask(
    metadata: dict[str, str] | None = None, recommended: dict[str, float] | None = None, **request: Any
) -> DynamoAnswer:
    return read({"token_ids": [5, 6, 7], **request}, metadata or {}, recommended or {}, EOS)


def request_of(*given: Any, **request: Any) -> Request:
    return ask(*given, **request).job.request


def test_every_parameter_arrives():
    sampling = {"temperature": 0.699999988079071, "top_p": 0.9, "top_k": -1, "min_p": 0.05, "seed": -3, "n": 1}
    sampling |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
    sampling |= {"guided_decoding": {"json": '{"type": "object"}', "backend": "xgrammar", "regex": None}}
    stops = {"max_tokens": 9, "stop": ["x"], "stop_token_ids": [5], "stop_token_ids_hidden": [2, 5, 8]}
    stops |= {"ignore_eos": True, "max_thinking_tokens": 4}
    requested = ask(
        sampling_options=sampling,
        stop_conditions=stops,
        output_options={"logprobs": 2, "prompt_logprobs": 1},
        routing={"priority": 5},
        metadata={"deadline-ms": "1500", "latency": '{"tpot_ms": 20}'},
    )
    asked = requested.job.request
    assert asked.params == SamplingParams(
        max_tokens=9,
        temperature=0.7,
        top_p=0.9,
        top_k=-1,
        min_p=0.05,
        seed=2**63 - 3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        stop=("x",),
        stop_token_ids=(5, 8),
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=1,
        structured={"json": {"type": "object"}},
        thinking_token_budget=4,
        latency={"tpot_ms": 20},
    )
    assert (asked.prompt.tolist(), asked.generated, asked.priority, requested.job.seconds) == (
        [5, 6, 7],
        [],
        -5,
        1.5,
    )


def test_a_request_that_says_nothing_has_openai_s_defaults_or_the_model_s():
    plain = request_of(sampling_options={"temperature": None}, stop_conditions={}, output_options={}, routing=None)
    assert plain.params == SamplingParams(2**31 - 1, temperature=1.0, seed=plain.params.seed)
    assert plain.params.seed != request_of().params.seed
    assert plain.priority == 0
    assert ask().job.seconds is None
    assert request_of(recommended={"temperature": 0.6, "top_k": 20}).params.top_k == 20
    assert request_of(sampling_options={"top_k": 3}, recommended={"top_k": 20}).params.top_k == 3


def test_a_probe_comes_before_all_others():
    assert request_of(_HEALTH_CHECK=True, stop_conditions={"max_tokens": 1}).priority == FIRST
    assert request_of(routing={"priority": 2**40}).priority > FIRST


def test_an_answer_that_moved_counts_from_its_own_beginning():
    first = ask(sampling_options={"presence_penalty": 1.0}, stop_conditions={"max_tokens": 40, "min_tokens": 30})
    link = first.boundary.link()["worker_trace_link"]
    moved = {"token_ids": [5, 6, 7, 11, 12], "migration_link": link, "sampling_options": {"presence_penalty": 1.0}}
    second = read(moved | {"stop_conditions": {"max_tokens": 38, "min_tokens": 28}}, {}, {}, EOS)
    params, asked = first.job.request.params, second.job.request
    assert (asked.prompt.tolist(), asked.generated) == ([5, 6, 7], [11, 12])
    assert asked.params == params  # the seed that was drawn, too
    assert second.boundary == first.boundary == Boundary(3, params.seed)
    nothing_left = read(moved | {"stop_conditions": {"max_tokens": 0}}, {}, {}, EOS).job.request
    assert nothing_left.params.max_tokens == len(nothing_left.generated)


def test_a_trace_that_took_the_boundary_s_place_is_known_by_its_link():
    moved = {"migration_link": {"trace_id": "1af8b8a2c1828c9676a23dc923af9790", "span_id": "371c64033cd84d8d"}}
    assert migrated(moved)
    assert not migrated({})
    assert boundary_of(moved) is boundary_of({}) is None
    assert request_of(**moved).generated == []
    for penalty in ("presence_penalty", "frequency_penalty"):
        with refused(penalty, "traces requests"):
            ask(**moved, sampling_options={penalty: 0.1})
    for budget in (0, 9):
        with refused("thinking_token_budget", "traces requests"):
            ask(**moved, stop_conditions={"max_thinking_tokens": budget})
    assert request_of(**moved, sampling_options={"repetition_penalty": 1.1}).params.repetition_penalty == 1.1  # of all


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"multi_modal_data": {"image": ["x"]}}, ("multi_modal_data", "images")),
        ({"prompt_embeds": "x"}, ("prompt_embeds", "embeddings")),
        ({"prefill_result": {"x": 1}}, ("prefill_result", "prefill on another worker")),
        ({"routing": {"lora_name": "mine"}}, ("lora_name",)),
        ({"routing": {"cache_salt": "mine"}}, ("cache_salt",)),
        ({"sampling_options": {"n": 2}}, ("n is 2",)),
        ({"sampling_options": {"best_of": 3}}, ("best_of is 3",)),
        ({"sampling_options": {"use_beam_search": True}}, ("use_beam_search",)),
        ({"sampling_options": {"guided_decoding": {"structural_tag": "x"}}}, ("structural_tag", "json")),
        ({"sampling_options": {"guided_decoding": {"regex": "a", "choice": ["a"]}}}, ("regex and choice",)),
        ({"sampling_options": {"guided_decoding": {"json": "{"}}}, ("guided_json is not JSON",)),
        ({"sampling_options": {"temperature": 101.0}}, ("temperature is 101.0",)),
        ({"stop_conditions": {"max_tokens": 3, "min_tokens": 5}}, ("min_tokens is 5",)),
        ({"stop_conditions": {"max_tokens": 0}}, ("max_tokens is 0",)),
    ],
)
def test_mistakes_and_what_only_the_frontend_knows_are_refused_by_name(request_, words):
    with refused(*words):
        ask(**request_)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "1.5", "1" * 20, "\u0661"])
def test_a_deadline_is_whole_milliseconds(text):
    with refused("x-dynamo-meta-deadline-ms", "whole milliseconds"):
        ask({"deadline-ms": text})
