"""The options of ``build`` and ``generate``, and what ``chat`` shares with them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from echo_trt.engine.options import EngineOptions, Flag, KVCacheMemory, SpecialTokens, bounds
from echo_trt.engine.params import PARAMETERS
from echo_trt.files.extras import ENGINES, registered

EngineOption = Literal[registered(ENGINES)]
Colour = Annotated[
    Literal["auto", "always", "never"],
    Parameter(help="Colour tokens by who proposed them; auto: on a terminal, without NO_COLOR."),
]
NumberType = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]


@dataclass(frozen=True)
class BuildOptions:
    """What ``build`` is asked to do; None stands for the recipe's value."""

    model: Annotated[
        str,
        Parameter(
            help="A recipe (YAML, or a shipped one's name), a model of the hub such as Qwen/Qwen3-8B, or a "
            "checkpoint: a folder or a GGUF file."
        ),
    ]
    _: KW_ONLY
    draft: Annotated[
        str | None, Parameter(help="Draft of the hub, a folder or a GGUF file. Default: the recipe's.")
    ] = None
    random_weights: Annotated[
        Flag, Parameter(help="Build the model's shape alone, without a download, to measure speed.")
    ] = False
    output: Annotated[Path | None, Parameter(alias="-o", help="Bundle folder. Default: bundles/NAME.")] = None
    engine: Annotated[EngineOption | None, Parameter(help="Compile for this runtime instead of the recipe's.")] = None
    precision: Annotated[NumberType | None, Parameter(help="Compute in this precision instead of the recipe's.")] = None
    max_model_len: Annotated[
        int | None, Parameter(help="limits.context: tokens per request.", validator=bounds(16))
    ] = None
    max_num_seqs: Annotated[int | None, Parameter(help="limits.batch: running requests.", validator=bounds(1))] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Parameter(help="Fill this share of the GPU's memory: limits.kv_blocks.", validator=bounds(0.01, 1)),
    ] = None
    kv_cache_memory: KVCacheMemory = None


def _sampling_option(name: str) -> tuple[str, Any, Any]:
    """Make the field of a sampling parameter. None stands for the model's own value."""
    known = PARAMETERS[name]
    text = f"{known.doc[0].upper()}{known.doc[1:].partition(' ([')[0]}"
    default, kind = known.default, tuple[str, ...] if known.kind is str else known.kind
    if known.recommended:
        default, kind, text = None, kind | None, f"{text}. Default: the model's own, else {known.default:g}"
    shown = None if known.single else False
    parameter = Parameter(help=f"{text}.", allow_leading_hyphen=known.kind is str, show_default=shown)
    return name, Annotated[kind, parameter], default


SAMPLED = [name for name, known in PARAMETERS.items() if known.option]
SamplingOptions: Any = make_dataclass("SamplingOptions", map(_sampling_option, SAMPLED), frozen=True, kw_only=True)


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions, EngineOptions):
    """What ``generate`` is asked to do; None stands for the recipe's value, of sampling parameters for the model's."""

    prompt: Annotated[str | None, Parameter(help="One user turn, put into the model's chat template.")] = None
    _: KW_ONLY
    prompts: Annotated[Path | None, Parameter(help="JSONL: id and prompt, or turns, per line.")] = None
    batch: Annotated[
        int | None, Parameter(help="Requests running at once. Default: the recipe's; 1 with --compare.")
    ] = None
    budget: Annotated[
        int | None,
        Parameter(
            help="K_max of echo and of your policies: tokens of a pass. Default: the recipe's, else measured.",
            validator=bounds(1),
        ),
    ] = None
    json_file: Annotated[Path | None, Parameter("--json", help="Write results and summary to this file.")] = None
    compare: Annotated[Flag, Parameter(help="Answer twice, plain and speculating side by side, and compare.")] = False
    color: Colour = "auto"
    watch: Annotated[Flag, Parameter(help="Draw the draft tree beside the text, on a terminal.")] = False
    special_tokens_in_content: SpecialTokens = False


@dataclass(frozen=True)
class ChatOptions(SamplingOptions, EngineOptions):
    """What ``chat`` is asked to do; None stands for the recipe's value, of sampling parameters for the model's."""

    _: KW_ONLY
    system: Annotated[str, Parameter(help="System prompt. Default: the chat template's.", show_default=False)] = ""
    color: Colour = "auto"
