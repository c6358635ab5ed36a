"""Two batches that mix requests of every kind, and what makes two sets of answers the same."""

from __future__ import annotations

import pytest
from driving import prompt_ids

from echo_trt.engine.params import Completion, SamplingParams

#: Lengths of the prompts (a chunk is 16 tokens) and of the answers, in a batch that mixes greedy and sampled requests.
PROMPTS = (5, 37, 1, 16, 50, 17, 2, 33, 9, 70)
ANSWERS = (24, 9, 20, 31, 1, 26, 15, 22, 40, 3)
PENALISED_PROMPTS = (37, 5, 16, 1, 50, 17, 9, 20)
#: A batch of every kind: greedy and sampled, with penalties and without, with log-probabilities and without.
WAYS = (
    {"frequency_penalty": 0.6, "logprobs": 3},
    {"temperature": 0.9, "seed": 7, "presence_penalty": 1.5, "frequency_penalty": 0.3, "logprobs": 0},
    {},
    {"repetition_penalty": 1.4},
    {"temperature": 0.7, "top_p": 0.9, "min_p": 0.02, "seed": 1, "logprobs": 20},
    {"temperature": 1.0, "seed": 9, "logit_bias": {7: 3.5, 20: -100.0, 21: 1.0}},
    {"frequency_penalty": 0.2, "logit_bias": {31: 100.0}, "stop_token_ids": (31, 40), "min_tokens": 13, "logprobs": 1},
    {"temperature": 1.0, "top_k": 40, "seed": 3, "repetition_penalty": 0.8, "presence_penalty": -2.0, "logprobs": 5},
)


def mixed(count: int = len(PROMPTS)) -> tuple[list[list[int]], list[SamplingParams]]:
    """Make prompts and parameters of greedy and sampled requests."""
    sampled = {"temperature": 0.8, "top_p": 0.95}
    params = [
        SamplingParams(max_tokens=n, seed=100 + i, ignore_eos=i % 4 < 2, **(sampled if i % 2 else {}))
        for i, n in enumerate(ANSWERS)
    ]
    return [prompt_ids(n, i) for i, n in enumerate(PROMPTS)][:count], params[:count]


def penalised() -> tuple[list[list[int]], list[SamplingParams]]:
    """Make prompts and parameters of requests with penalties, biases and log-probabilities."""
    params = [SamplingParams(28 + i, ignore_eos=True, **way) for i, way in enumerate(WAYS)]
    return [prompt_ids(n, n) for n in PENALISED_PROMPTS], params


#: What answers must fit, greedy and sampled, with what else comes between logits and choice.
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["alpha", "beta"]},
        "tags": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
GRAMMARS = (
    {"structured": {"json": RECORD}},
    {"structured": {"json": RECORD}, "temperature": 0.9, "seed": 4},
    {"structured": {"regex": "[A-Z][a-z]{2,9}( [a-z]{1,4}){2,6}"}, "frequency_penalty": 0.5, "logprobs": 2},
    {},
    {"structured": {"choice": ["yes, it is", "yes, it was", "no"]}, "temperature": 1.0, "seed": 8, "ignore_eos": True},
    {"structured": {"grammar": 'root ::= ("ab" | "ba")+ "."'}, "temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"structured": {"json_object": True}, "temperature": 0.7, "top_k": 20, "seed": 5},
    {"structured": {"json": RECORD}, "logit_bias": {9: -100.0, 40: 5.0}, "repetition_penalty": 1.2},
)


def structured() -> tuple[list[list[int]], list[SamplingParams]]:
    """Make prompts and parameters of requests under grammars, beside one without."""
    params = [SamplingParams(40 + i, **way) for i, way in enumerate(GRAMMARS)]
    return [prompt_ids(n, n) for n in PENALISED_PROMPTS], params


def repeated() -> tuple[list[list[int]], list[SamplingParams]]:
    """Make greedy and sampled requests, every second of which repeats itself, and four under grammars."""
    prompts, params = mixed(8)
    prompts = [(prompt_ids(7, i) * 9)[: len(prompt)] if i % 2 else prompt for i, prompt in enumerate(prompts)]
    under_grammars = structured()
    return prompts + under_grammars[0][:4], params + under_grammars[1][:4]


REQUESTS = {"mixed": mixed, "penalised": penalised, "structured": structured, "repeated": repeated}


def assert_same(got: list[Completion], want: list[Completion]) -> None:
    """Compare tokens, and log-probabilities but for what the arithmetic of another batch rounds differently."""
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    for own, other in zip(got, want, strict=True):
        assert (own.logprobs is None) == (other.logprobs is None)
        for a, b in zip(own.logprobs or [], other.logprobs or [], strict=True):
            assert (a.token, [token for token, _ in a.top]) == (b.token, [token for token, _ in b.top])
            numbers = [[each.logprob, *(logprob for _, logprob in each.top)] for each in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
