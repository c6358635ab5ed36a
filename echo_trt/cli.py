"""The command line: build | calibrate | generate | serve | worker | bench | simulate | inspect."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from echo_trt import __version__
from echo_trt.commands.options import (
    Colours,
    Engines,
    KVCacheMemory,
    PolicyFile,
    PolicyName,
    Precisions,
    SpecialTokens,
)
from echo_trt.commands.terminal import Screen, messages, run_app, screen_of
from echo_trt.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Elastic speculative decoding (ECHO, arXiv 2604.09603), compiled.\n\n"
    "`echo-trt build RECIPE` makes a bundle, `echo-trt generate BUNDLE` answers with it, "
    "and `--compare` shows what speculation is worth.",
)


def main() -> None:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    run_app(app)


def _version(asked: bool) -> None:
    if asked:
        print(f"echo-trt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


@app.command()
def build(
    model: Annotated[
        str, typer.Argument(help="A recipe (YAML), a model of the hub such as Qwen/Qwen3-8B, or a checkpoint's folder.")
    ],
    draft: Annotated[
        str | None, typer.Option(help="Draft of the hub, or a checkpoint's folder. Default: the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Bundle folder. Default: bundles/NAME.")] = None,
    engine: Annotated[Engines | None, typer.Option(help="Compile for this runtime instead of the recipe's.")] = None,
    precision: Annotated[
        Precisions | None, typer.Option(help="Compute in this precision instead of the recipe's.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="Cards that TensorRT-RTX compiles for, such as 8.9; may be given again. Default: all."),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=16, help="limits.context: tokens of a request.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="limits.batch: running requests.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Fill this share of the GPU's memory: limits.kv_blocks.")
    ] = None,
    kv_cache_memory: KVCacheMemory = None,
) -> None:
    """Compile a target and its draft into a bundle.

    A recipe says what to compile and how. A model's name finds the shipped recipe for it, or one is derived from the
    checkpoints' configurations; weights are fetched once into the hub's cache (HF_HOME).

    The bundle is checked against the reference before it is put in its place: it appears whole or not at all. One that
    is there is replaced, with the calibration and the costs that were written into it.

    Examples: `echo-trt build build/smollm2-135m.yaml -o bundles/smollm2-135m`,
    `echo-trt build Qwen/Qwen3-8B --draft AngelSlim/Qwen3-8B_eagle3 --engine torch --gpu-memory-utilization 0.9`
    """
    from echo_trt.commands.progress import BuildProgress
    from echo_trt.commands.recipes import recipe_for, sized

    chosen = [option and option.value for option in (engine, precision)]
    found, place = recipe_for(model, draft, chosen[0])
    settings = found.built_as(*chosen, compute_capability or [])
    settings = sized(settings, place, max_model_len, max_num_seqs, gpu_memory_utilization, kv_cache_memory)
    folder = out or Path("bundles") / settings.name
    with BuildProgress(messages) as progress:
        from echo_trt.commands.build import build as run

        manifest = run(settings, place, folder, progress.stage, progress.detail)
    from echo_trt.commands.tables import manifest_table

    Screen().print(manifest_table(manifest, folder))


@app.command()
def generate(
    bundle: Annotated[Path, typer.Argument(help="A folder that echo-trt build made.")],
    prompt: Annotated[str | None, typer.Argument(help="One user turn, put into the model's chat template.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL: id and prompt, or turns, a line.")] = None,
    policy: PolicyName = None,
    policy_file: PolicyFile = None,
    batch: Annotated[
        int | None, typer.Option(help="Requests running at once. Default: the recipe's; 1 with --compare.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="K_max of echo, dense, fixed: tokens verified an iteration. Default: the recipe's, else measured."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens a request, at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own, else 0.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many best tokens; 0 or -1 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the smallest set with this share; 1 is off.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens with this share of the best one's; 0 is off.")
    ] = None,
    presence_penalty: Annotated[float, typer.Option(help="Off the logits of tokens said before, -2 to 2.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that they were said.")] = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divides logits of tokens said before or in the prompt; 1 is off.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Repeats a text; in bf16 for sure only by the policy goodput-exact.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text at this string; may be given again.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results and summary to this file.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer twice, plain and speculating side by side, and compare.")
    ] = False,
    color: Annotated[
        Colours, typer.Option(help="Colour tokens by who proposed them; auto: on a terminal, without NO_COLOR.")
    ] = Colours.auto,
    watch: Annotated[bool, typer.Option("--watch", help="Draw the draft tree beside the text, on a terminal.")] = False,
    special_tokens_in_content: SpecialTokens = False,
    kv_cache_memory: KVCacheMemory = None,
) -> None:
    """Answer prompts with a bundle; text streams as it comes.

    On a terminal a token's colour tells who proposed it, and the last line what the colours mean.

    Examples: `echo-trt generate bundles/smollm2-135m "Why is the sky blue?"`,
    `echo-trt generate bundles/smollm2-135m --prompts prompts.jsonl --batch 8 --json answers.json`
    """
    from echo_trt.bundle.manifest import read_manifest
    from echo_trt.commands.generate import Job, run
    from echo_trt.commands.sources import wants_colour
    from echo_trt.files.prompts import Prompt, encodable, read_prompts
    from echo_trt.runtime.params import SamplingParams

    if (prompt is None) == (prompts is None):
        raise UserError("give either PROMPT or --prompts FILE.")
    if prompt == "":
        raise UserError("PROMPT is empty; give at least one character.")
    asked = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    params = SamplingParams(
        max_tokens,
        seed=seed,
        stop=tuple(encodable(text, "--stop") for text in stop or ()),
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        **read_manifest(bundle).sampling.given() | {name: value for name, value in asked.items() if value is not None},
    )
    rows = read_prompts(prompts) if prompts else [Prompt("0", encodable(prompt, "PROMPT"))]
    out = screen_of(color)
    more = special_tokens_in_content, wants_colour(out, color), watch, kv_cache_memory
    job = Job(bundle, rows, params, policy, batch, budget, json_file, compare, prompts, *more)
    run(job, out, messages)


@app.command()
def serve(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A folder that echo-trt build made.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Triton's HTTP endpoint, with --triton.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Triton's gRPC endpoint, with --triton.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Triton's metrics, with --triton.")] = 8002,
    openai_port: Annotated[int, typer.Option(min=0, max=65535, help="The OpenAI-compatible API; 0 is off.")] = 9000,
    api_keys_file: Annotated[
        Path | None, typer.Option("--api-keys-file", "--api-keys", help="Keys that the OpenAI API takes, one a line.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What OpenAI clients call the model; may be given again.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may ask the OpenAI API, * for all; again for more."),
    ] = None,
    policy: PolicyName = None,
    policy_file: PolicyFile = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Requests running at once. Default: the recipe's.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 256,
    start_timeout: Annotated[int, typer.Option(min=1, help="Seconds until the first answer, at most.")] = 300,
    drain_timeout: Annotated[int, typer.Option(min=1, help="Seconds that SIGTERM waits for open answers.")] = 60,
    special_tokens_in_content: SpecialTokens = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Whether / of the OpenAI API's port shows the live page.")
    ] = True,
    triton: Annotated[
        bool,
        typer.Option("--triton", help="Let Triton Inference Server host the engine, with Triton's own HTTP and gRPC."),
    ] = False,
    replicas: Annotated[
        int,
        typer.Option(min=0, help="Workers behind NVIDIA Dynamo's frontend at --openai-port; 0: one engine, no Dynamo."),
    ] = 0,
    kv_cache_memory: KVCacheMemory = None,
) -> None:
    """Serve a bundle by OpenAI's API; with Triton Inference Server beside it, or with several workers of Dynamo.

    Prints where it listens once a real answer has come back. What dies is started again. SIGTERM and Ctrl-C let open
    answers finish.

    Example: `echo-trt serve bundles/smollm2-135m`
    """
    if replicas:
        from echo_trt.dynamo import replicas as dynamo

        for option, given in (
            ("--api-keys-file", api_keys_file),
            ("--allowed-origins", allowed_origins),
            ("--special-tokens-in-content", special_tokens_in_content),
            ("a second --served-model-name", (served_model_name or [])[1:]),
            ("--openai-port 0", openai_port == 0),
            ("--no-page", not page),
            ("--triton", triton),
            *((f"--{port}-port", _is_given(context, f"{port}_port")) for port in ("http", "grpc", "metrics")),
        ):
            if given:
                raise UserError(f"{option} has no meaning with --replicas; leave it out.")
        model, numbers = (served_model_name or ["echo"])[0], (batch, queue, start_timeout, drain_timeout)
        more = kv_cache_memory, policy_file
        raise typer.Exit(dynamo.run(dynamo.Job(bundle, replicas, host, openai_port, model, policy, *numbers, *more)))
    from echo_trt.launch.launcher import Job, run

    given = [f"--{port}-port" for port in ("http", "grpc", "metrics") if _is_given(context, f"{port}_port")]
    if given and not triton:
        raise UserError(f"{given[0]} is a port of Triton's, which is not started; add --triton, or leave the port out.")
    ports = (http_port, grpc_port, metrics_port, openai_port)
    numbers = batch, queue, start_timeout, drain_timeout
    names, origins = tuple(served_model_name or ()), tuple(allowed_origins or ())
    more = special_tokens_in_content, names, origins, page, kv_cache_memory, policy_file, triton
    raise typer.Exit(run(Job(bundle, host, *ports, api_keys_file, policy, *numbers, *more)))


def _is_given(context: typer.Context, name: str) -> bool:
    """Return whether a parameter is on the command line, be it with its default value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def worker(
    bundle: Annotated[Path, typer.Argument(help="A folder that echo-trt build made.")],
    name: Annotated[str, typer.Option(help="What clients call the model. Default: the bundle's name.")] = "",
    policy: PolicyName = None,
    policy_file: PolicyFile = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Requests running at once. Default: the recipe's.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more go to other workers.")] = 256,
    drain_timeout: Annotated[int, typer.Option(min=1, help="Seconds that SIGTERM waits for open answers.")] = 60,
    system_port: Annotated[
        int, typer.Option(min=0, max=32767, help="Metrics and health; 0: DYN_SYSTEM_PORT, else none.")
    ] = 0,
    tool_call_parser: Annotated[str | None, typer.Option(help="Dynamo's parser of tool calls, such as hermes.")] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="Dynamo's parser of thoughts, such as qwen3.")] = None,
    kv_cache_memory: KVCacheMemory = None,
) -> None:
    """Serve a bundle as a worker of NVIDIA Dynamo, whose frontend finds it.

    Dynamo's own settings are environment variables: DYN_DISCOVERY_BACKEND (here file by default), DYN_FILE_KV,
    DYN_NAMESPACE and others. SIGTERM lets open answers finish; what is left goes on at other workers.

    Example: `echo-trt worker bundles/smollm2-135m --system-port 9191`
    """
    from echo_trt.dynamo.command import run
    from echo_trt.dynamo.job import Job

    parsers = tool_call_parser, reasoning_parser
    more = *parsers, kv_cache_memory
    raise typer.Exit(run(Job(bundle, name, policy, batch, queue, drain_timeout, system_port, *more)))


@app.command()
def inspect(
    place: Annotated[Path, typer.Argument(metavar="BUNDLE|RECIPE", help="A bundle folder, or a recipe.")],
    cards: Annotated[
        str | None,
        typer.Option("--fit", metavar="CARDS", help='Does a recipe fit these, "H100-80GB x8"? Exit code 1: no.'),
    ] = None,
) -> None:
    """Show what a bundle holds, or what a recipe would build and need of each GPU.

    A bundle's files are checked against their hashes. A recipe's checkpoints need not be there.

    Example: `echo-trt inspect build/qwen3-32b.yaml --fit "H100-80GB x2"`
    """
    from echo_trt.commands.tables import manifest_table, print_recipe

    if not os.path.exists(place):
        raise UserError(f"{place} does not exist; name a bundle's folder, or a recipe's YAML file.")
    if not place.is_dir():
        from echo_trt.bundle.recipe import load_recipe

        raise typer.Exit(0 if print_recipe(load_recipe(place), place.parent, cards, Screen()) else 1)
    from echo_trt.bundle.manifest import read_manifest, verify_files

    if cards is not None:
        raise UserError(f"--fit is about a recipe, but {place} is a folder; name the recipe's YAML file.")
    manifest = read_manifest(place)
    verify_files(place, manifest)
    Screen().print(manifest_table(manifest, place))


for _command in entry_points(group="echo_trt.commands"):  # echo_trt_lab's, whose imports wait for a run
    app.command(_command.name)(_command.load())


if __name__ == "__main__":
    main()
