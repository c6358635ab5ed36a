"""Records draft trees: the target answers prompts, and at every token the draft grows the tree it would propose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError
from echo_trt.files.prompts import Prompt
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt_lab.calibration.trees import TreeRecorder, Trees


def record(
    llm: LLM,
    prompts: list[Prompt],
    groups: list[str],
    max_tokens: int,
    shape: EchoSettings,
    progress: Callable[[float], None] = lambda share: None,
) -> Trees:
    """Record trees of ``shape``'s max_depth, beams and width along greedy answers of up to ``max_tokens``."""
    loop = llm.loop
    if loop.drafter is None:
        raise UserError("the bundle has no draft, so there is nothing to record; build one with a draft.")
    previous, networks = loop.planner, llm.networks
    recorder = TreeRecorder(loop.batch, shape, networks.copier, head=networks.drafter is not networks.copier)
    loop.planner = recorder
    first, preemptions = loop.scheduler.admissions, loop.counters.preemptions
    try:
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for delta in llm.stream([llm.chat_ids(p.text) for p in prompts], SamplingParams(max_tokens)):
            if delta.completion:
                answers[delta.index] = delta.completion.token_ids
                done += 1
                progress(done / len(prompts))
    finally:
        loop.planner = previous
    if loop.counters.preemptions > preemptions:
        raise UserError("the KV pool was too small to record; give a smaller --batch.")
    if max(map(len, answers), default=0) < 2:
        raise UserError("no answer has more than one token, so nothing could be drafted; give a larger --max-tokens.")
    return recorder.trees(first + np.arange(len(prompts)), answers, groups)
