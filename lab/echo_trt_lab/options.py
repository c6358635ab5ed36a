"""Options that several of the lab's commands have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from echo_trt.errors import UserError, shown


def _words(_: object, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(part.strip() for part in tokens[-1].value.split(",") if part.strip())


def _numbers(_: object, tokens: Sequence[Token]) -> tuple[int, ...]:
    option, text = tokens[-1].keyword, tokens[-1].value
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {shown(text)}; give whole numbers, separated by commas.") from None


def _fractions(_: object, tokens: Sequence[Token]) -> tuple[float, ...]:
    option, text = tokens[-1].keyword, tokens[-1].value
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {shown(text)}; give numbers, separated by commas.") from None


def gates_of(text: str) -> dict[int, float]:
    """Read thresholds by depth from a text such as ``1:0.2,4:0.3``. Raises UserError."""
    try:
        gates = {int(depth): float(threshold) for depth, threshold in (part.split(":") for part in text.split(","))}
    except ValueError:
        gates = {}
    if not gates or min(gates) < 1 or not all(0 <= threshold <= 1 for threshold in gates.values()):
        raise UserError(
            f"--gates is {shown(text)}; give depths of 1 or more and thresholds from 0 to 1, such as 1:0.2,4:0.3."
        )
    return gates


def _targets(_: object, tokens: Sequence[Token]) -> tuple[float, ...]:
    text = tokens[-1].value
    try:
        ttft, tpot = map(float, text.split(","))
    except ValueError:
        ttft = tpot = 0.0
    if not min(ttft, tpot) > 0:
        raise UserError(f"--targets is {shown(text)}; give milliseconds to the first token and per token, as 500,25.")
    return ttft, tpot


def _by_commas(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


#: Lists that are one text, separated by commas.
WORDS = Parameter(converter=_words, metavar="NAMES", show_default=_by_commas)
FRACTIONS = Parameter(converter=_fractions, metavar="NUMBERS", show_default=_by_commas)
NUMBERS = Parameter(converter=_numbers, metavar="NUMBERS", show_default=_by_commas)
PromptFiles = Annotated[
    list[Path], Parameter("--prompts", help="JSONL: id and prompt, or turns, per line; may be given again.")
]
JsonFile = Annotated[Path | None, Parameter("--json", help="Write all figures to this file.")]
HtmlFile = Annotated[Path | None, Parameter("--html", help="Write a report with plots to this file.")]
LatencyTargets = Annotated[
    tuple[float, ...],
    Parameter(
        converter=_targets,
        metavar="TTFT,TPOT",
        show_default=False,
        help="Give a quarter of the requests these latency targets, in ms, such as 500,25, and show who keeps them.",
    ),
]


def tree_named(tree: Mapping[str, int]) -> str:
    """Name the policy static's tree by its depth, top_k and tokens."""
    return f"static {tree['depth']}/{tree['top_k']}/{tree['tokens']}"


def latency_of(targets: Sequence[float]) -> dict[str, float]:
    """Return targets as a request's ``latency``."""
    return dict(zip(("ttft_ms", "tpot_ms"), targets, strict=True))
