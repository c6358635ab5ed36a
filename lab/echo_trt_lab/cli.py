"""The commands bench, simulate and calibrate, which ``echo-trt`` finds by their entry points."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echo_trt.commands.options import PolicyFile, numbers_in, words_in
from echo_trt.commands.terminal import Screen, messages


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="A folder that echo-trt build made; the results go into it.")],
    prompts: Annotated[list[Path], typer.Option(help="JSONL: id and prompt, or turns, a line; may be given again.")],
    limit: Annotated[int, typer.Option(min=1, help="Prompts to answer, spread over the files.")] = 160,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens a prompt, at most.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 16,
) -> None:
    """Learn how far this bundle's draft can be trusted, and what passes cost on this machine.

    Writes calibration.json (acceptance and gates, bound to target and draft), costs.json (bound to the machine) and
    calibration.html, a report of both. Use prompts like those that will be served, but none that a benchmark is run on.

    Example: `echo-trt calibrate bundles/smollm2-135m --prompts prompts.jsonl`
    """
    from echo_trt_lab.calibration.command import Job, run
    from echo_trt_lab.simulation.foresee import foresee

    run(Job(bundle, prompts, limit, max_tokens, batch, foresee), Screen(), messages)


def bench(
    bundle: Annotated[Path, typer.Argument(help="A folder that echo-trt build made.")],
    prompts: Annotated[list[Path], typer.Option(help="JSONL: id and prompt, or turns, a line; may be given again.")],
    policies: Annotated[str, typer.Option(help="Compared with plain decoding, by commas.")] = "goodput,echo,static",
    policy_file: PolicyFile = None,
    batch: Annotated[str, typer.Option(help="Requests at once, by commas.")] = "1,2,4,8,16,32,64",
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens a request, at most.")] = 128,
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, help="Runs of each policy at each batch; medians are told.")
    ] = 3,
    requests: Annotated[int, typer.Option(min=2, max=1_000_000, help="Requests of a run, at least; two a slot.")] = 32,
    each_file: Annotated[bool, typer.Option("--each-file", help="Also run each prompts file by itself.")] = False,
    budget: Annotated[
        int | None, typer.Option(help="K_max of echo, dense, fixed. Default: the recipe's, else measured.")
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="Other engines, by commas: openvino-genai, openvino-genai-eagle3, transformers, where installed; "
            "NAME=URL or NAME=URL#MODEL for a server that runs, as vllm=http://127.0.0.1:8000."
        ),
    ] = "",
    recipes: Annotated[Path, typer.Option(help="The folder of the bundle's recipe, for peers.")] = Path("build"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with plots to this file.")] = None,
    record_file: Annotated[
        Path | None, typer.Option("--record", help="Write the draft trees of the prompts here, for simulate.")
    ] = None,
) -> None:
    """Measure policies against plain decoding: closed loop, greedy, all side by side in turns of a second.

    Example: `echo-trt bench bundles/smollm2-135m --prompts prompts.jsonl --batch 1,4,16 --html report.html`
    """
    from echo_trt_lab.benchmark.command import Job, run

    words, others, sizes = words_in(policies), words_in(peers), numbers_in("--batch", batch)
    files = (json_file, html_file, record_file)
    job = Job(bundle, prompts, words, sizes, max_tokens, rounds, requests, each_file, others, *files, recipes, budget)
    run(job, Screen(), messages)


def simulate(
    recording: Annotated[Path, typer.Argument(help="Draft trees, as echo-trt bench --record wrote them.")],
    calibration: Annotated[Path, typer.Option(help="calibration.json of the bundle that was recorded.")],
    machine: Annotated[str, typer.Option(help="this, h100-qwen3-8b or 8xh100-qwen3-235b.")] = "this",
    costs: Annotated[Path | None, typer.Option(help="costs.json, for the machine this.")] = None,
    batch: Annotated[str, typer.Option(help="Requests at once, by commas.")] = "1,4,16,64,256,1024",
    policies: Annotated[str, typer.Option(help="By commas; oracle knows what will be accepted.")] = (
        "goodput,echo,dense,fixed,static,oracle"
    ),
    policy_file: PolicyFile = None,
    prompt: Annotated[int, typer.Option(min=1, help="Cached tokens before each answer.")] = 256,
    budget: Annotated[int | None, typer.Option(min=1, help="K_max. Default: the machine's knee.")] = None,
    static: Annotated[str | None, typer.Option(help="Depth, top_k, tokens of static's trees. Default: 6,4,8.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Measured a policy and batch. Default: by batch.")] = None,
    ngrams: Annotated[Path | None, typer.Option(help="ngrams.npz of the bundle, for goodput and the oracle.")] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Charge the trees as one pass of N rows.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with plots to this file.")] = None,
) -> None:
    """Replay recorded draft trees under the same policies and another machine's costs.

    Example: `echo-trt simulate trees.npz --calibration bundles/smollm2-135m/calibration.json --machine h100-qwen3-8b`
    """
    from echo_trt_lab.simulation.command import SimulationJob, run

    words, sizes = tuple(words_in(policies)), tuple(numbers_in("--batch", batch))
    shape = tuple(numbers_in("--static", static)) if static else None
    numbers = sizes, words, budget, shape, prompt, tokens
    job = SimulationJob(recording, calibration, machine, costs, *numbers, ngrams, json_file, html_file, block)
    run(job, Screen(), messages)
