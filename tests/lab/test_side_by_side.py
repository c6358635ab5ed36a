"""Loops over parts of one pool, and the distance of the logits where two answers part."""

from __future__ import annotations

import pytest
import torch
from driving import prompt_ids
from refusal import refused
from transformers import AutoModelForCausalLM

from echo_trt.engine.params import SamplingParams
from echo_trt_lab.side_by_side import gap, side_by_side


def test_the_gap_of_two_answers_is_that_of_the_logits_where_they_part(networks, open_llm):
    prompt = prompt_ids(40, 0)
    model = AutoModelForCausalLM.from_pretrained(networks / "target")
    logits = model(torch.tensor([[*prompt, 7, 8]])).logits[0, -1].tolist()
    llm = open_llm("lookup", "echo", 3)
    assert gap(llm, prompt, [7, 8, 9, 5], [7, 8, 40]) == pytest.approx(abs(logits[9] - logits[40]), abs=1e-4)
    assert gap(llm, prompt, [7, 8], [7, 8, 9]) == float("inf")


def test_a_part_of_a_pool_too_small_for_a_request_refuses_it(open_llm):
    """It would wait for blocks that never come."""
    llm = open_llm("lookup")
    part = side_by_side(llm, ["autoregressive"] * llm.loop.batch.blocks.count)[0]
    with refused("the request may need", "there are 1", "lower its max_tokens"):
        part.scheduler.check(llm.request(0, [5, 6], SamplingParams(max_tokens=64)))
