"""Options that several of the lab's commands have."""

from __future__ import annotations

from collections.abc import Sequence
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


def _by_commas(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


#: Lists that are one text, separated by commas.
WORDS = Parameter(converter=_words, metavar="NAMES", show_default=_by_commas)
NUMBERS = Parameter(converter=_numbers, metavar="NUMBERS", show_default=_by_commas)
PromptFiles = Annotated[
    list[Path], Parameter("--prompts", help="JSONL: id and prompt, or turns, per line; may be given again.")
]
JsonFile = Annotated[Path | None, Parameter("--json", help="Write all figures to this file.")]
HtmlFile = Annotated[Path | None, Parameter("--html", help="Write a report with plots to this file.")]
