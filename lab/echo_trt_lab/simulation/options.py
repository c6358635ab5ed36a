"""The options of ``echo-trt simulate``."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.options import PolicyFile, bounds
from echo_trt_lab.options import FRACTIONS, NUMBERS, WORDS, HtmlFile, JsonFile, LatencyTargets


@dataclass(frozen=True)
class SimulateOptions:
    """What ``simulate`` is asked to do.

    costs   file of measured costs, for the machine "this" alone
    budget  K_max; None: the knee of the machine's curve
    gates   depths and thresholds, instead of the calibration's
    seeds   orders of the answers that are walked, all pooled
    static  depth, top_k and tokens of that policy; empty: the default pair's, as far as recorded
    prompt  cached tokens before every answer
    tokens  measured for a policy and batch; None: by the batch
    ngrams  file of the target's n-grams, with which goodput and the oracle go on where drafts end
    targets of a quarter of the requests, the class interactive, in milliseconds; empty: no requests come or go
    block   rows of a block drafter: one pass computes all levels of the recorded trees; None: a pass per level
    """

    recording: Annotated[Path, Parameter(help="Draft trees, as echo-trt bench --record wrote them.")]
    _: KW_ONLY
    calibration: Annotated[Path, Parameter(help="calibration.json of the bundle that was recorded.")]
    machine: Annotated[str, Parameter(help="this, h100-qwen3-8b, 8xh100-qwen3-235b or a YAML file.")] = "this"
    costs: Annotated[Path | None, Parameter(help="costs.json, for the machine this.")] = None
    batches: Annotated[tuple[int, ...], NUMBERS, Parameter("--batch", help="Requests at once, by commas.")] = (
        *(4**power for power in range(6)),
    )
    policies: Annotated[tuple[str, ...], WORDS, Parameter(help="By commas; oracle knows what will be accepted.")] = (
        "goodput",
        "echo",
        "static",
        "oracle",
    )
    policy_file: PolicyFile = None
    prompt: Annotated[int, Parameter(help="Cached tokens before each answer.", validator=bounds(1))] = 256
    budget: Annotated[int | None, Parameter(help="K_max. Default: the machine's knee.", validator=bounds(1))] = None
    gates: Annotated[str | None, Parameter(help="Of echo, as 1:0.2,4:0.3. Default: calibrated.")] = None
    seeds: Annotated[int, Parameter(help="Orders of the answers, pooled.", validator=bounds(1, 1000))] = 1
    static: Annotated[
        tuple[int, ...],
        NUMBERS,
        Parameter(help="Depth, top_k, tokens of static's trees. Default: 6,4,8.", show_default=False),
    ] = ()
    tokens: Annotated[
        int | None, Parameter(help="Measured per policy and batch. Default: by batch.", validator=bounds(1))
    ] = None
    ngrams: Annotated[Path | None, Parameter(help="ngrams.npz of the bundle, for goodput and the oracle.")] = None
    block: Annotated[int | None, Parameter(help="Charge the trees as one pass of N rows.", validator=bounds(1))] = None
    targets: LatencyTargets = ()
    arrivals: Annotated[
        str, Parameter(help="With --targets: poisson, bursts, or a trace, JSONL of time, prompt_tokens and class.")
    ] = "poisson"
    loads: Annotated[
        tuple[float, ...], FRACTIONS, Parameter(help="With --targets: arrivals over what goodput can answer.")
    ] = (0.5, 0.75, 1.0, 1.25, 1.5)
    slots: Annotated[int, Parameter(help="With --targets: requests at once, at most.", validator=bounds(1))] = 64
    seconds: Annotated[
        float, Parameter(help="With --targets: seconds in which requests come.", validator=bounds(1))
    ] = 30.0
    json_file: JsonFile = None
    html_file: HtmlFile = None
