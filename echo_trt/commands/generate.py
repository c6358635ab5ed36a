"""``echo-trt generate``: run prompts through a bundle, show the text, compare policies, write the results."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from echo_trt.bundle.calibration import own_files
from echo_trt.bundle.manifest import read_manifest
from echo_trt.commands.side import Side
from echo_trt.commands.sources import SourcedText, legend
from echo_trt.commands.watch import Watch
from echo_trt.decoding.policies import policy_named
from echo_trt.errors import UserError
from echo_trt.files.outputs import files_first, json_bytes, output_file
from echo_trt.files.prompts import Prompt
from echo_trt.runtime.llm import LLM, check_lengths
from echo_trt.runtime.params import Delta, SamplingParams


@dataclass(frozen=True)
class Job:
    """What the command was asked to do; None stands for the recipe's own."""

    bundle: Path
    prompts: list[Prompt]
    params: SamplingParams
    policy: str | None = None
    batch: int | None = None
    budget: int | None = None
    json_file: Path | None = None
    compare: bool = False
    prompts_file: Path | None = None  # where the prompts were read
    special_tokens_in_content: bool = False
    coloured: bool = False  # by who proposed a token
    watch: bool = False
    kv_cache_memory: int | None = None


def run(job: Job, out: Console, messages: Console) -> dict[str, Any]:
    """Run the command. Returns what ``--json`` writes."""
    decoding = read_manifest(job.bundle).recipe.decoding
    name = job.policy or decoding.policy
    _check(job, name, out)
    inputs = [job.prompts_file, *own_files(job.bundle)]
    with output_file("--json", job.json_file, inputs) as write, files_first(out) if job.json_file else nullcontext():
        batch = 1 if job.batch is None and job.compare else job.batch
        with messages.status("loading the bundle"):
            # Of two policies the second would find what the first has computed.
            prefix_cache = False if job.compare else None
            llm = LLM(
                job.bundle,
                job.policy,
                batch,
                job.budget,
                messages.print,
                prefix_cache,
                special_tokens_in_content=job.special_tokens_in_content,
                kv_cache_memory=job.kv_cache_memory,
            )
        policy = llm.loop.planner.name
        check_lengths(llm, job.prompts)
        first = llm.chat_ids(job.prompts[0].text)
        llm.generate([first], SamplingParams(max_tokens=8))  # the first calls are slow: not counted
        llm.loop.state.forget_cached()
        answer = _answer
        if job.compare:
            (comparison,) = entry_points(group="echo_trt.generate", name="compare")  # echo_trt_lab's
            answer = comparison.load()
        result = answer(job, llm, policy, out, messages)
        write(json_bytes(result))
    return result


def _check(job: Job, policy: str, out: Console) -> None:
    known = policy_named(policy, "--policy")
    if job.budget is not None and job.budget < 1:
        raise UserError(f"--budget is {job.budget}; give 1 or more.")
    if job.budget and not known.shares_budget:
        raise UserError(f"--budget is {job.budget}, but {policy} shares no budget; give --policy echo, dense or fixed.")
    if job.watch and job.compare:
        raise UserError("--watch draws one policy's trees, but --compare runs two; leave one of them out.")
    if job.watch and not out.is_terminal:
        raise UserError("--watch draws on a terminal, but standard output is none; leave it out, or run it in one.")


def _answer(job: Job, llm: LLM, policy: str, out: Console, messages: Console) -> dict[str, Any]:
    side, params = Side(policy), replace(job.params, token_sources=job.coloured or job.watch)
    texts = [SourcedText() for _ in job.prompts]
    single, watch = len(job.prompts) == 1 and not job.watch, None
    if job.watch:
        watch = Watch(out, llm.loop, lambda token: llm.tokenizer.decode([token]))
    progress = Progress(console=messages, transient=True, disable=not messages.is_terminal or single or job.watch)
    task = progress.add_task(policy, total=len(job.prompts))

    def show(delta: Delta) -> None:
        text = texts[delta.index].add(delta)
        if watch:
            watch.add(delta)
        if single:
            out.print(text, end="", highlight=False, soft_wrap=True)
        if delta.completion:
            progress.advance(task)
            if len(job.prompts) > 1 and not job.watch:
                _print_answer(job.prompts[delta.index].id, texts[delta.index], out)

    ids = [prompt.id for prompt in job.prompts]
    with watch or progress:
        side.begin(llm, ids, [llm.chat_ids(p.text) for p in job.prompts], params)
        side.run(math.inf, show)
    if single:
        out.print()
    for prompt, text in zip(job.prompts, texts, strict=True):
        if job.watch:  # the picture is gone
            _print_answer(prompt.id if len(texts) > 1 else "", text, out)
    if job.coloured:
        out.print(legend(side.counts), highlight=False, soft_wrap=True)
    facts = side.summary()
    messages.print(
        f"{policy}: {facts['tokens']} tokens in {facts['seconds']:.2f} s, {facts['tokens_per_s']:.1f} tokens/s, "
        f"accepted length {facts['accepted_length']:.2f}",
        highlight=False,
    )
    return {"results": results(job, side), "summary": facts}


def _print_answer(name: str, text: SourcedText, out: Console) -> None:
    if name:
        out.print(name, style="bold", highlight=False)
    out.print(text.styled(), highlight=False, soft_wrap=True)


def results(job: Job, side: Side) -> list[dict[str, Any]]:
    """Make a row of every prompt's answer."""
    rows = []
    for prompt in job.prompts:
        c = side.completions[prompt.id]
        rows.append(
            {
                "id": prompt.id,
                "text": c.text,
                "token_ids": c.token_ids,
                "finish_reason": c.finish_reason,
                "accepted_length": round(c.accepted_length, 4),
            }
        )
    return rows
