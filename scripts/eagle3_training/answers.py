"""The target's own answers to prompts, written as shards: the text that a head is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eagle3_training.corpus import write_shard
from echo_trt.prompts import Prompt
from echo_trt.runtime.llm import LLM
from echo_trt.runtime.params import SamplingParams

GREEDY_OF_FIVE = 3  # three answers of five are greedy, as at serving; two are drawn, for variety


def write_answers(
    llm: LLM, prompts: list[Prompt], folder: Path, max_tokens: int, per_shard: int, report: Callable[[float, str], None]
) -> None:
    """Answer ``prompts`` in order, ``per_shard`` to a file; files that are there from an earlier run are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = 0
    for number, begin in enumerate(range(0, len(prompts), per_shard)):
        path = folder / f"shard-{number:05d}.npz"
        report(begin / len(prompts), f"{path.name}, {tokens:,} tokens so far")
        if path.exists():
            continue
        asked = [llm.chat_ids(p.text) for p in prompts[begin : begin + per_shard]]
        params = [_params(begin + i, max_tokens) for i in range(len(asked))]
        answers = llm.generate(asked, params)
        tokens += sum(len(a.token_ids) for a in answers)
        write_shard(path, [([*ids, *a.token_ids], len(ids)) for ids, a in zip(asked, answers, strict=True)])


def _params(number: int, max_tokens: int) -> SamplingParams:
    if number % 5 < GREEDY_OF_FIVE:
        return SamplingParams(max_tokens)
    return SamplingParams(max_tokens, temperature=0.8, top_p=0.95, seed=number)
