"""Several loops over one bundle's engines, and the distance of logits where two answers part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.kv_blocks import blocks_for
from echo_trt.engine.llm import LLM
from echo_trt.speculation.pack import pack


def side_by_side(llm: LLM, policies: Sequence[str], budget: int | None = None) -> list[EngineCore]:
    """Make a loop for each policy over the same engines, a part of the KV pool each; ``llm.loop`` must rest meanwhile.

    An engine that keeps states for each slot cannot be divided (``Engine.paged``).
    """
    batch, loops = llm.loop.batch, []
    blocks = batch.blocks.count // len(policies)
    for number, name in enumerate(policies):
        cached = batch.blocks.cache.enabled
        slots = InputBatch(batch.count, batch.context, batch.reserve, blocks, cached, number * blocks)
        part = llm.networks.over(slots)
        loops.append(part.loop(llm.tuning.planner(name, budget, part)))
    return loops


def gap(llm: LLM, prompt: Sequence[int], first: Sequence[int], second: Sequence[int]) -> float:
    """Return the distance of the target's logits of the two tokens where two answers part, after what they share.

    prompt, first, second  token ids
    Infinite where one merely ends earlier. Call it while nothing is running.
    """
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if shared is None:
        return math.inf
    ids = llm.checked([*prompt, *first[:shared]])
    llm.loop.batch.blocks.forget_cached()  # the pass below writes over the pool
    count = np.array([len(ids)])
    table = np.arange(blocks_for(len(ids)))[None]
    call = pack(ids, np.arange(len(ids)), np.zeros(1, np.int64), count, table, count - 1)
    logits = llm.loop.target.run(call)["logits"][0]
    return float(abs(logits[first[shared]] - logits[second[shared]]))
