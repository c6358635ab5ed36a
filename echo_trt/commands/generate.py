"""``echo-trt generate``: run prompts through a bundle, show the text, compare policies, write the results."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from echo_trt.backends.openvino.cpu import computes_in
from echo_trt.bundle.calibration import own_files
from echo_trt.bundle.manifest import read_manifest
from echo_trt.commands.tables import comparison_table, rounding_note
from echo_trt.decoding.policy_names import BUDGETED, PLAIN
from echo_trt.errors import UserError
from echo_trt.files.outputs import files_first, json_bytes, output_file
from echo_trt.files.prompts import Prompt
from echo_trt.runtime.llm import LLM, check_lengths
from echo_trt.runtime.params import Completion, SamplingParams


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


@dataclass
class Run:
    """What one policy has done with the prompts so far."""

    policy: str
    seconds: float = 0.0
    completions: dict[str, Completion] = field(default_factory=dict)
    verifications: int = 0
    emitted: int = 0

    def summary(self) -> dict[str, Any]:
        tokens = sum(len(c.token_ids) for c in self.completions.values())
        return {
            "policy": self.policy,
            "requests": len(self.completions),
            "tokens": tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_s": round(tokens / self.seconds, 2) if self.seconds else 0.0,
            "accepted_length": round(self.emitted / self.verifications, 4) if self.verifications else 0.0,
        }


def run(job: Job, out: Console, messages: Console) -> None:
    decoding = read_manifest(job.bundle).recipe.decoding
    name = job.policy or decoding.policy
    if job.budget is not None and job.budget < 1:
        raise UserError(f"--budget is {job.budget}; give 1 or more.")
    if job.budget and name not in BUDGETED:
        raise UserError(f"--budget is {job.budget}, but {name} shares no budget; give --policy echo, dense or fixed.")
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
            )
        policy = llm.loop.planner.name
        check_lengths(llm, job.prompts)
        first = llm.chat_ids(job.prompts[0].text)
        llm.generate([first], SamplingParams(max_tokens=8))  # the first calls are slow: not counted
        llm.loop.state.forget_cached()
        write(json_bytes((_compare if job.compare else _answer)(job, llm, policy, out, messages)))


def _answer(job: Job, llm: LLM, policy: str, out: Console, messages: Console) -> dict[str, Any]:
    done = Run(policy)
    _run_round(llm, job, job.prompts, done, out, messages, header=len(job.prompts) > 1)
    facts = done.summary()
    messages.print(
        f"{policy}: {facts['tokens']} tokens in {facts['seconds']:.2f} s, {facts['tokens_per_s']:.1f} tokens/s, "
        f"accepted length {facts['accepted_length']:.2f}",
        highlight=False,
    )
    return {"results": _results(job, done), "summary": facts}


def _compare(job: Job, llm: LLM, policy: str, out: Console, messages: Console) -> dict[str, Any]:
    """Rounds of as many prompts as run at once, each policy in turn, so that both see the machine in the same state."""
    runs = [Run(PLAIN), Run(policy if policy != PLAIN else "goodput")]
    size = llm.loop.state.count
    for begin in range(0, len(job.prompts), size):
        part = job.prompts[begin : begin + size]
        for each in runs:
            llm.set_policy(each.policy, job.budget)
            if len(part) == 1:
                out.print(f"\n{each.policy} answers {part[0].id}", style="bold", highlight=False)
            _run_round(llm, job, part, each, out, messages, header=len(part) > 1)
    plain = runs[0]
    rows = []
    for each in runs:
        pairs = [(p, plain.completions[p.id].token_ids, each.completions[p.id].token_ids) for p in job.prompts]
        apart = [(p, first, second) for p, first, second in pairs if first != second]
        gaps = {p.id: round(llm.gap(llm.chat_ids(p.text), first, second), 4) for p, first, second in apart}
        rows.append({**each.summary(), "identical": len(pairs) - len(gaps), "logit_gaps": gaps})
    out.print()
    out.print(comparison_table(rows, rows[0]))
    if rows[1]["logit_gaps"]:
        out.print(rounding_note(rows[1]["logit_gaps"], computes_in(llm.manifest)), highlight=False)
    ratio = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    return {"results": _results(job, runs[1]), "summary": {**rows[1], "ratio": round(ratio, 4)}, "plain": rows[0]}


def _run_round(
    llm: LLM, job: Job, prompts: list[Prompt], done: Run, out: Console, messages: Console, header: bool
) -> None:
    """Answer ``prompts`` once. A single text streams; of several, each is printed when it is whole."""
    before = llm.counters.verifications, llm.counters.emitted_tokens
    start = time.perf_counter()
    with Progress(console=messages, transient=True, disable=not messages.is_terminal or len(prompts) == 1) as progress:
        task = progress.add_task(done.policy, total=len(prompts))
        for delta in llm.stream([llm.chat_ids(p.text) for p in prompts], job.params):
            if len(prompts) == 1:
                out.print(delta.text, end="", highlight=False, soft_wrap=True)
            if delta.completion:
                prompt = prompts[delta.index]
                done.completions[prompt.id] = delta.completion
                progress.advance(task)
                if header and not job.compare:
                    out.print(prompt.id, style="bold", highlight=False)
                    out.print(delta.completion.text, highlight=False, soft_wrap=True)
    done.seconds += time.perf_counter() - start
    done.verifications += llm.counters.verifications - before[0]
    done.emitted += llm.counters.emitted_tokens - before[1]
    if len(prompts) == 1:
        out.print()


def _results(job: Job, done: Run) -> list[dict[str, Any]]:
    rows = []
    for prompt in job.prompts:
        c = done.completions[prompt.id]
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
