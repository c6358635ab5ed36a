"""The options of ``echo-trt calibrate``."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.options import Bundle, bounds
from echo_trt_lab.options import PromptFiles


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``calibrate`` is asked to do: ``limit`` prompts of the files are answered in ``max_tokens`` each."""

    bundle: Annotated[Bundle, Parameter(help="A folder that echo-trt build made; the results go into it.")]
    _: KW_ONLY
    prompts: PromptFiles
    limit: Annotated[int, Parameter(help="Prompts to answer, spread over the files.", validator=bounds(1))] = 160
    max_tokens: Annotated[int, Parameter(help="New tokens per prompt, at most.", validator=bounds(1))] = 96
    batch: Annotated[int, Parameter(help="Requests running at once.", validator=bounds(1))] = 16
