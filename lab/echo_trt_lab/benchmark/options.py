"""The options of ``echo-trt bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from echo_trt.engine.options import Bundle, Flag, PolicyFile, bounds
from echo_trt.engine.params import SamplingParams
from echo_trt_lab.options import NUMBERS, WORDS, HtmlFile, JsonFile, LatencyTargets, PromptFiles, latency_of
from echo_trt_lab.synthetic_text import Rates


def _rates(_: object, tokens: Sequence[Token]) -> str:
    return Rates.parse(tokens[-1].value, "--synthetic-text").text


@dataclass(frozen=True)
class BenchOptions:
    """What ``bench`` is asked to do.

    requests   for every policy, batch and round, two per slot at least
    each_file  whether every prompts file gets rows in the results
    recipes    folder of the bundle's recipe, from which peers find its checkpoints
    budget     K_max of policies that share one; None: the recipe's, or the measured knee
    """

    bundle: Bundle
    _: KW_ONLY
    prompts: PromptFiles
    policies: Annotated[tuple[str, ...], WORDS, Parameter(help="Compared with plain decoding, by commas.")] = (
        "goodput",
        "echo",
        "static",
    )
    policy_file: PolicyFile = None
    batches: Annotated[tuple[int, ...], NUMBERS, Parameter("--batch", help="Requests at once, by commas.")] = (
        *(2**power for power in range(7)),
    )
    max_tokens: Annotated[int, Parameter(help="New tokens per request, at most.", validator=bounds(2))] = 128
    rounds: Annotated[
        int, Parameter(help="Runs of each policy at each batch, all pooled.", validator=bounds(1, 1000))
    ] = 3
    requests: Annotated[
        int, Parameter(help="Requests of a run, at least; two per slot.", validator=bounds(2, 1_000_000))
    ] = 32
    turns: Annotated[
        int, Parameter(help="Ask this turn of each prompt, behind the target's own answers.", validator=bounds(1))
    ] = 1
    each_file: Annotated[Flag, Parameter(help="Also run each prompts file by itself.")] = False
    temperature: Annotated[float, Parameter(help="0 is greedy.", validator=bounds(0, 2))] = 0.0
    seed: Annotated[int, Parameter(help="Of sampled texts.", validator=bounds(0))] = 0
    budget: Annotated[
        int | None, Parameter(help="K_max of echo and of your own policies. Default: the recipe's, else measured.")
    ] = None
    peers: Annotated[
        tuple[str, ...],
        WORDS,
        Parameter(
            help="Other engines, by commas: openvino-genai, openvino-genai-eagle3, transformers, or a server that "
            "runs, NAME=URL or NAME=URL#MODEL.",
            show_default=False,
        ),
    ] = ()
    recipes: Annotated[Path, Parameter(help="The folder of the bundle's recipe, for peers.")] = Path("build")
    targets: LatencyTargets = ()
    synthetic_text: Annotated[
        str | None,
        Parameter(
            metavar="RATES",
            converter=_rates,
            help="Measure speed with a made-up text, whose drafts are accepted at this rate (0.75), at rates by depth "
            "(0.8,0.7,0.6), or by depth and rank, in a JSON file.",
        ),
    ] = None
    json_file: JsonFile = None
    html_file: HtmlFile = None
    record_file: Annotated[
        Path | None, Parameter("--record", help="Write the draft trees of the prompts here, for simulate.")
    ] = None

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(self.max_tokens, self.temperature, seed=self.seed)

    @property
    def latency(self) -> dict[str, float]:
        return latency_of(self.targets)
