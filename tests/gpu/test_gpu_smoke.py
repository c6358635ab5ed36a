"""Whether the path runs on a card, in seconds: a tile of each size, a captured graph, an iteration of ``echo``."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from gpu.engines import Card, apart
from gpu.random_networks import SMALL, TINY, random_decoder, random_head
from gpu.serving import SHALLOW, Served, gap, recipe_of, torch_engines
from plugins.attention_calls import Batch

from echo_trt.backends.cuda.calls import Graphs

pytestmark = pytest.mark.gpu
DECODING = SHALLOW | {"gates": {1: 1e-6, 2: 1e-6}}  # a random head is never sure
BOUND = 0.05  # of the largest value: bfloat16 beside float32


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_a_tile_of_each_size_is_the_reference(card, rows):
    requests, heads = card.pick(([(700, 9, True), (64, 1, False)], (8, 4, 128)), ([(40, 5, True)], (1, 4, 64)))
    Batch(requests, *heads, torch.bfloat16).check(rows=rows)


def test_a_graph_computes_from_what_is_sent(card):
    if not card.cuda:
        pytest.skip("a CPU has no graphs")
    graphs = Graphs(lambda inputs: (2 * inputs["x"],), card.device)
    assert [graphs.run({"x": np.full(8, n)})[0].tolist() for n in (3, 5)] == [[6] * 8, [10] * 8]


def test_an_iteration_of_echo_is_the_references(card, figures):
    """Drafted scores of levels in graphs, and the tokens, beside the reference in float32 on a CPU."""
    config, cpu = dataclasses.replace(card.pick(SMALL, TINY), num_layers=2, num_heads=8), Card(torch.device("cpu"))
    config = dataclasses.replace(config, head_dim=card.pick(128, 16))
    model, drafts, texts = random_decoder(config, 512, torch.bfloat16, cpu.device), [], []
    head = random_head(model, torch.bfloat16)
    head.lm_head.weight.mul_(6)  # so that scores differ from token to token
    for where, dtype in ((card, torch.bfloat16), (cpu, torch.float32)):
        networks = [copy.deepcopy(network).to(dtype) for network in (model, head)]
        recipe = recipe_of(cpu, "torch", dtype, 2, 40, DECODING)
        served = Served(recipe, config, torch_engines(where, recipe, config, dtype, networks))
        loop = served.begun("echo", 2)
        served.head.drafted = []
        loop.step()
        batch = loop.batch
        prompts = [batch.tokens[slot, : batch.prompt_length[slot]].copy() for slot in (0, 1)]
        drafts.append(np.concatenate([scores.ravel() for scores in served.head.drafted]))
        texts.append([batch.tokens[slot, len(prompts[slot]) : batch.length[slot]].tolist() for slot in (0, 1)])
    off = apart(*drafts)
    figures(drafted=len(drafts[0]), off=off, texts=texts)
    assert off <= BOUND
    for prompt, got, wanted in zip(prompts, *texts, strict=True):
        shared = min(len(got), len(wanted))  # of two ties, one may accept more
        assert got[:shared] == wanted[:shared] or gap(served.target, prompt, wanted[:shared], got[:shared]) <= BOUND
