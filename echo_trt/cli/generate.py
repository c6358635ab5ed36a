"""``echo-trt generate``: run prompts through a bundle, show the text, compare policies, write the results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from echo_trt.bundle.calibration import own_files
from echo_trt.bundle.manifest import read_manifest
from echo_trt.cli.options import SAMPLED, ChatOptions, GenerateOptions
from echo_trt.cli.outputs import files_first, json_bytes, output_file
from echo_trt.cli.progress import loading
from echo_trt.cli.terminal import wants_colour
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, Delta, SamplingParams
from echo_trt.errors import UserError, encodable, shown
from echo_trt.files.extras import of_lab, registered
from echo_trt.files.prompts import Prompt, read_prompts
from echo_trt.speculation.policies import policy_named


@dataclass(frozen=True)
class GenerateRun:
    """Prompts that a policy answers, alone or against plain decoding. ``coloured``: by who proposed a token."""

    prompts: list[Prompt]
    params: SamplingParams
    budget: int | None = None
    coloured: bool = False
    watch: bool = False


class PlainText:
    """A text as it grows; with the lab it has colours."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, delta: Delta) -> Text:
        """Take what was said next; return its text."""
        self.text += delta.text
        return Text(delta.text)

    def styled(self) -> Text:
        return Text(self.text)


def run(options: GenerateOptions, out: Console, messages: Console) -> dict[str, Any]:
    """Run the command. Returns what ``--json`` writes."""
    coloured = wants_colour(out, options.color) and "text" in registered("generate")
    work = GenerateRun(_prompts(options), sampling_params(options), options.budget, coloured, options.watch)
    name = options.policy or read_manifest(options.bundle).recipe.decoding.policy
    _check(options, name, out)
    inputs = [options.prompts, *own_files(options.bundle)]
    files = files_first(out) if options.json_file else nullcontext()
    with output_file("--json", options.json_file, inputs) as write, files:
        with loading(messages):
            llm = LLM(
                options.bundle,
                options.policy,
                1 if options.batch is None and options.compare else options.batch,
                options.budget,
                messages.print,
                False if options.compare else None,  # of two policies the second would find what the first computed
                special_tokens_in_content=options.special_tokens_in_content,
                kv_cache_memory=options.kv_cache_memory,
                costs=options.costs,
            )
        policy = llm.loop.planner.name
        check_lengths(llm, work.prompts)
        first = llm.chat_ids(work.prompts[0].text)
        llm.generate([first], SamplingParams(max_tokens=8))  # the first calls are slow: not counted
        llm.loop.batch.blocks.forget_cached()
        answer = of_lab("generate", "compare") if options.compare else _answer
        result = answer(work, llm, policy, out, messages)
        write(json_bytes(result))
    return result


def _prompts(options: GenerateOptions) -> list[Prompt]:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("give either PROMPT or --prompts FILE.")
    if options.prompt == "":
        raise UserError("PROMPT is empty; give at least one character.")
    return read_prompts(options.prompts) if options.prompts else [Prompt("0", encodable(options.prompt, "PROMPT"))]


def check_lengths(llm: LLM, prompts: Iterable[Prompt]) -> None:
    """Refuse, before any is answered, a prompt that leaves no room for an answer in the bundle's context."""
    context = llm.loop.batch.context
    for prompt in prompts:
        count = len(llm.chat_ids(prompt.text))
        if count >= context:
            raise UserError(
                f"prompt {shown(prompt.id)} has {count} tokens, but the context is {context}; shorten it, or raise "
                "limits.context in the recipe and build again."
            )


def sampling_params(options: GenerateOptions | ChatOptions) -> SamplingParams:
    """Return the parameters that are on the command line, else the model's own."""
    requested = {name: value for name in SAMPLED if (value := getattr(options, name)) is not None}
    requested["stop"] = tuple(encodable(text, "--stop") for text in requested["stop"])
    return SamplingParams(**(read_manifest(options.bundle).sampling.given() | requested))


def _check(job: GenerateOptions, policy: str, out: Console) -> None:
    known = policy_named(policy, "--policy")
    if job.budget and not known.shares_budget:
        raise UserError(f"--budget is {job.budget}, but {policy} shares no budget; give --policy echo.")
    if job.watch and job.compare:
        raise UserError("--watch draws one policy's trees, but --compare runs two; leave one of them out.")
    if job.watch and not out.is_terminal:
        raise UserError("--watch draws on a terminal, but standard output is none; leave it out, or run it in one.")


def _answer(job: GenerateRun, llm: LLM, policy: str, out: Console, messages: Console) -> dict[str, Any]:
    params = replace(job.params, token_sources=job.coloured or job.watch)
    new_text = of_lab("generate", "text") if "text" in registered("generate") else PlainText
    texts, completions = [new_text() for _ in job.prompts], dict[str, Completion]()
    single, watch = len(job.prompts) == 1 and not job.watch, None
    if job.watch:
        watch = of_lab("generate", "watch")(out, llm.loop, lambda token: llm.tokenizer.decode([token]))
    progress = Progress(console=messages, transient=True, disable=not messages.is_terminal or single or job.watch)
    task = progress.add_task(policy, total=len(job.prompts))

    def show(delta: Delta) -> None:
        text = texts[delta.index].add(delta)
        if watch:
            watch.add(delta)
        if single:
            out.print(text, end="", highlight=False, soft_wrap=True)
        if delta.completion:
            completions[job.prompts[delta.index].id] = delta.completion
            progress.advance(task)
            if len(job.prompts) > 1 and not job.watch:
                _print_answer(job.prompts[delta.index].id, texts[delta.index], out)

    before = llm.counters.copy()
    with watch or progress:
        seconds = _timed(llm.stream([llm.chat_ids(p.text) for p in job.prompts], params), show)
    if single:
        out.print()
    for prompt, text in zip(job.prompts, texts, strict=True):
        if job.watch:  # the picture is gone
            _print_answer(prompt.id if len(texts) > 1 else "", text, out)
    if job.coloured:
        counts = sum((text.counts for text in texts), Counter[str]())
        out.print(of_lab("generate", "legend")(counts), highlight=False, soft_wrap=True)
    verifications = llm.counters.verifications - before.verifications
    emitted = llm.counters.emitted_tokens - before.emitted_tokens
    facts = summary(policy, completions.values(), seconds, verifications, emitted)
    messages.print(
        f"{policy}: {facts['tokens']} tokens in {facts['seconds']:.2f} s, {facts['tokens_per_s']:.1f} tokens/s, "
        f"accepted length {facts['accepted_length']:.2f}",
        highlight=False,
    )
    return {"results": results(job, completions), "summary": facts}


def _timed(deltas: Iterator[Delta], show: Callable[[Delta], None]) -> float:
    """Show what comes; return the seconds that it took to come, without those of ``show``."""
    seconds = 0.0
    while True:
        begin = time.perf_counter()
        delta = next(deltas, None)
        seconds += time.perf_counter() - begin
        if delta is None:
            return seconds
        show(delta)


def summary(
    policy: str, completions: Iterable[Completion], seconds: float, verifications: int, emitted: int
) -> dict[str, Any]:
    """Return the figures of a policy's answers; it ``emitted`` so many tokens in so many ``verifications``."""
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "policy": policy,
        "requests": len(lengths),
        "tokens": sum(lengths),
        "seconds": round(seconds, 4),
        "tokens_per_s": round(sum(lengths) / seconds, 2) if seconds else 0.0,
        "accepted_length": round(emitted / verifications, 4) if verifications else 0.0,
    }


def _print_answer(name: str, text: Any, out: Console) -> None:
    if name:
        out.print(name, style="bold", highlight=False)
    out.print(text.styled(), highlight=False, soft_wrap=True)


def results(job: GenerateRun, completions: Mapping[str, Completion]) -> list[dict[str, Any]]:
    rows = []
    for prompt in job.prompts:
        c = completions[prompt.id]
        row = {"id": prompt.id, "text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
        rows.append(row | {"accepted_length": round(c.accepted_length, 4)})
    return rows
