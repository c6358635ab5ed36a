"""``echo-trt bench``: compares policies in one run, in turns of a second, at several batch sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from echo_trt.backends.kind import computes_in
from echo_trt.bundle.calibration import own_files
from echo_trt.cli.generate import check_lengths
from echo_trt.cli.outputs import files_first, json_bytes, output_file
from echo_trt.engine.core import EngineCore
from echo_trt.engine.kv_blocks import blocks_for
from echo_trt.engine.llm import LLM
from echo_trt.engine.measure import machine
from echo_trt.engine.params import MAX_AT_ONCE, SamplingParams
from echo_trt.errors import UserError
from echo_trt.files.prompts import Prompt, read_prompts
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.pacer import Latency
from echo_trt.speculation.policies import POLICIES, policy_named
from echo_trt.speculation.policy_names import PLAIN
from echo_trt_lab.benchmark.closed_loop import ClosedLoop, StepSample, run_side_by_side
from echo_trt_lab.benchmark.figures import attainment, figures, peer_figures
from echo_trt_lab.benchmark.options import BenchOptions
from echo_trt_lab.benchmark.peer import Peer, PeerRun
from echo_trt_lab.benchmark.peers import check_peers, open_peer
from echo_trt_lab.benchmark.report import html_report, latency_table, results_table
from echo_trt_lab.calibration.record import record
from echo_trt_lab.options import tree_named
from echo_trt_lab.side_by_side import side_by_side
from echo_trt_lab.synthetic_engine import SyntheticNetworks, rates_given
from echo_trt_lab.tables import print_table

WITH_TARGETS = " with targets"  # behind the name of a policy that is told of latency targets


def run(job: BenchOptions, out: Console, messages: Console) -> dict[str, Any]:
    sets = {file.stem: read_prompts(file) for file in job.prompts}
    if len(sets) < len(job.prompts):
        names = ", ".join(map(str, job.prompts))
        raise UserError(f"--prompts names {names}; give files of different names, by which the results are told apart.")
    _check(job, sets)
    with ExitStack() as stack:
        write_json, write_html, write_recording = (
            stack.enter_context(output_file(option, path, [*job.prompts, *own_files(job.bundle)]))
            for option, path in _outputs(job).items()
        )
        stack.enter_context(files_first(out))
        with messages.status("loading the bundle"):
            # No prefix cache: every policy and round has to compute the same prompts.
            with rates_given(job.synthetic_text):
                llm = LLM(job.bundle, None, max(job.batches), note=messages.print, prefix_cache=False)
            check_pool(llm, job)
            for rows in sets.values():
                check_lengths(llm, rows)
            peers = [open_peer(name, job.bundle, llm.manifest, job.recipes) for name in job.peers]
        policies, nets = list(dict.fromkeys((PLAIN, *job.policies))), llm.networks
        if job.targets:  # goodput with targets beside goodput that knows of none
            policies += [name + WITH_TARGETS for name in policies if name.startswith("goodput")]
        result: dict[str, Any] = {
            "machine": machine(llm.manifest),
            "bundle": llm.manifest.name,
            "precision": computes_in(llm.manifest),
            "max_tokens": job.max_tokens,
            "texts": f"temperature {job.temperature:g}, seed {job.seed}" if job.temperature else "greedy",
            "turn": job.turns,
            "static": tree_named(llm.manifest.recipe.decoding.static.model_dump()),
            **({"synthetic_text": nets.text.rates.sentence} if isinstance(nets, SyntheticNetworks) else {}),
            "prompts": {name: len(rows) for name, rows in sets.items()},
            "hinge": llm.tuning.costs.hinge.model_dump(),
            "results": [],
        }
        with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
            kinds = [("all", sets)] + [(name, {name: rows}) for name, rows in sets.items() if job.each_file]
            chosen = [
                (batch, name, drawn(rows, max(job.requests, 2 * batch)))
                for batch in job.batches
                for name, rows in kinds
            ]
            every = {prompt for *_, prompts in chosen for prompt in prompts}
            ids = conversation_ids(llm, every, job.turns, job.max_tokens)
            cells = [(batch, name, [ids[prompt] for prompt in prompts]) for batch, name, prompts in chosen]
            loops = _loops(llm, policies, job.budget)
            task = progress.add_task("bench", total=len(cells))
            for batch, name, prompts in cells:
                part = _cell(llm, loops, policies, peers, prompts, batch, job)
                result["results"] += [{"set": name, **row} for row in part]
                write_json(json_bytes(result))
                progress.advance(task)
                if not messages.is_terminal:
                    messages.print(f"batch {batch}, {name}: done", highlight=False)
        print_table(out, results_table(result))
        print_table(out, latency_table(result))
        _note_caches(result, messages)
        write_html(html_report(result))
        if job.record_file:
            with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
                task = progress.add_task("recording draft trees", total=1.0)
                trees = _recording(llm, sets, job, lambda share: progress.update(task, completed=share))
            write_recording(trees)
    return result


def _outputs(job: BenchOptions) -> dict[str, Path | None]:
    return {"--json": job.json_file, "--html": job.html_file, "--record": job.record_file}


def _loops(llm: LLM, policies: list[str], budget: int | None) -> dict[str, EngineCore]:
    """Make a loop for every policy, over the same engines; none where they have states."""
    if not llm.networks.target.paged:
        return {}
    names = [policy.removesuffix(WITH_TARGETS) for policy in policies]
    return dict(zip(policies, side_by_side(llm, names, budget), strict=True))


def _have_room(loops: dict[str, EngineCore], prompts: list[list[int]], batch: int, max_tokens: int) -> bool:
    """Return whether the KV blocks of every loop hold the ``batch`` longest requests."""
    longest = sorted(map(len, prompts))[-batch:]
    return all(
        sum(blocks_for(length + max_tokens + loop.batch.reserve) for length in longest) <= loop.batch.blocks.count
        for loop in loops.values()
    )


def _cell(
    llm: LLM,
    loops: dict[str, EngineCore],
    policies: list[str],
    peers: list[Peer],
    prompts: list[list[int]],
    batch: int,
    job: BenchOptions,
) -> list[dict[str, Any]]:
    """Measure all policies and peers at one batch, in rounds.

    Policies run side by side, or one after another where the KV pool is too small, with another first one in every
    round. Peers follow.
    """
    beside = bool(loops) and _have_room(loops, prompts, batch, job.max_tokens)
    samples: dict[str, list[StepSample]] = {policy: [] for policy in policies}
    budgets: dict[str, int] = {}
    peer_runs: dict[str, list[PeerRun]] = {peer.name: [] for peer in peers}
    for number in range(job.rounds):
        turn = number % len(policies)
        runs = []
        for policy in policies[turn:] + policies[:turn]:
            latency = job.latency if policy.endswith(WITH_TARGETS) else None
            if not beside:
                llm.set_policy(policy.removesuffix(WITH_TARGETS), job.budget)
            loop = loops[policy] if beside else llm.loop
            shares = policy_named(policy.removesuffix(WITH_TARGETS)).shares_budget
            budgets[policy] = loop.planner.budget * shares
            runs.append(ClosedLoop(loop, prompts, batch, job.params, latency))
            samples[policy].append(runs[-1].sample)
            if not beside:
                runs.pop().run()
        run_side_by_side(runs)
        for peer in peers:
            peer_runs[peer.name].append(peer.run(prompts, batch, job.max_tokens))
    rows = [figures(policy, batch, samples[policy], samples[PLAIN], budgets[policy]) for policy in policies]
    if job.targets:
        rows = [row | attainment(samples[row["policy"]], Latency.of(job.latency)) for row in rows]
    rows = [row | {"side_by_side": beside} for row in rows]

    def text_of(ids: list[int]) -> str:
        return llm.tokenizer.decode(ids, skip_special_tokens=True)

    return rows + [peer_figures(name, batch, runs, samples[PLAIN], text_of) for name, runs in peer_runs.items()]


def _note_caches(result: dict[str, Any], messages: Console) -> None:
    for name in dict.fromkeys(row["policy"] for row in result["results"] if row.get("cached_prompt_tokens")):
        messages.print(
            f"note: peer {name} took prompts from its prefix cache, and ours had none; start it without one to compare "
            "first tokens, prefill and whole requests.",
            highlight=False,
        )


def conversation_ids(llm: LLM, prompts: Iterable[Prompt], turns: int, max_tokens: int) -> dict[Prompt, list[int]]:
    """Return each prompt's token ids: its conversation up to that turn, as far as it goes."""
    conversations = {prompt: [{"role": "user", "content": prompt.text}] for prompt in prompts}
    for turn in range(turns - 1):
        going = [prompt for prompt in conversations if len(prompt.later) > turn]
        answers = llm.chat([conversations[prompt] for prompt in going], SamplingParams(max_tokens)) if going else []
        for prompt, answer in zip(going, answers, strict=True):
            conversations[prompt] += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": prompt.later[turn]},
            ]
    return {prompt: llm.chat_ids(messages) for prompt, messages in conversations.items()}


def drawn(sets: dict[str, list[Prompt]], count: int) -> list[Prompt]:
    """Draw ``count`` prompts, the same number from every file, the files in turn.

    They are spread evenly over a file, since files are often in an order, for example of topics. Files with fewer
    prompts begin again.
    """
    share = -(-count // len(sets))
    return [
        rows[i * len(rows) // share if share < len(rows) else i % len(rows)]
        for i in range(share)
        for rows in sets.values()
    ][:count]


def _recording(llm: LLM, sets: dict[str, list[Prompt]], job: BenchOptions, progress: Callable[[float], None]) -> bytes:
    decoding = llm.manifest.recipe.decoding
    groups = {
        f"{name}/{prompt.id}": (name, prompt)
        for name, rows in sets.items()
        for prompt in drawn({name: rows}, min(job.requests, len(rows)))
    }
    prompts = [Prompt(key, p.text) for key, (_, p) in groups.items()]
    sizes = decoding.model_dump(include={"max_depth", "beams", "width", "per_request"})
    shape = EchoSettings(**sizes)
    return record(llm, prompts, [name for name, _ in groups.values()], job.max_tokens, shape, progress).to_bytes()


def _check(job: BenchOptions, sets: dict[str, list[Prompt]]) -> None:
    if not job.policies:
        raise UserError(f"--policies is empty; name one or more of {', '.join(POLICIES)}, separated by commas.")
    for policy in job.policies:
        policy_named(policy, "--policies")
    if job.budget is not None and job.budget < 1:
        raise UserError(f"--budget is {job.budget}; give 1 or more.")
    if job.budget and not any(POLICIES[policy].shares_budget for policy in job.policies):
        raise UserError(
            f"--budget is {job.budget}, but none of {', '.join(job.policies)} shares one; add echo to --policies, "
            "or leave it out."
        )
    if not job.batches or min(job.batches) < 1 or max(job.batches) > MAX_AT_ONCE:
        raise UserError(f"--batch is {','.join(map(str, job.batches))}; give whole numbers from 1 to {MAX_AT_ONCE}.")
    check_peers(job.peers)
    if job.synthetic_text and (job.peers or job.record_file):
        option = "--peers" if job.peers else "--record"
        raise UserError(f"{option} needs a model's text, and --synthetic-text is given; leave one of them out.")
    named: dict[str, str] = {}
    for option, path in _outputs(job).items():
        if path is not None and (other := named.setdefault(os.path.realpath(path), option)) != option:
            raise UserError(f"{other} and {option} both name {path}; give each a file of its own.")
    count = sum(map(len, sets.values()))
    if count < 2:
        raise UserError(f"--prompts holds {count} prompt; a benchmark needs 2 or more.")


def check_pool(llm: LLM, job: BenchOptions) -> None:
    """Refuse a batch that the KV pool cannot hold: the benchmark would measure preemptions."""
    batch, blocks = llm.loop.batch, llm.loop.target.num_blocks
    needed = max(job.batches) * blocks_for(job.max_tokens + batch.reserve + 1)
    if needed > blocks:
        raise UserError(
            f"--batch {max(job.batches)} with --max-tokens {job.max_tokens} needs {needed} KV blocks or more, but the "
            f"bundle has {blocks}; lower one, or raise limits.kv_blocks in the recipe and build again."
        )
