"""Options that several commands have, and lists that are one option's text."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from echo_trt.errors import UserError, shown
from echo_trt.runtime.host_memory import OPTION, bytes_in

Precisions = StrEnum("Precisions", {name: name for name in ("fp32", "bf16", "fp16", "int8", "int4")})
Colours = StrEnum("Colours", {name: name for name in ("auto", "always", "never")})
Engines = StrEnum("Engines", {name: name for name in ("openvino", "tensorrt", "tensorrt-rtx", "torch")})


def _load_policies(file: Path | None) -> Path | None:
    """Register the policies of a file before any command looks for one. Raises UserError."""
    if file:
        from echo_trt.decoding.policies import load_policies

        load_policies(file)
    return file


PolicyName = Annotated[str | None, typer.Option("--policy", help="How to speculate. Default: the recipe's.")]
PolicyFile = Annotated[
    Path | None, typer.Option(help="A Python file with policies of your own.", callback=_load_policies)
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens-in-content",
        help="Take <|im_end|> and the like in a message for the control token. Default: for text.",
    ),
]
KVCacheMemory = Annotated[
    int | None,
    typer.Option(
        OPTION,
        parser=partial(bytes_in, OPTION),
        metavar="GIB",
        help="Memory of the KV pool in GiB, or such as 512M. Default: the recipe's, else enough for the batch, on a "
        "CPU up to half of the free memory.",
    ),
]


def words_in(text: str) -> list[str]:
    """Return the words of a text that are separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers_in(option: str, text: str) -> list[int]:
    """Return the numbers of an option's text. Raises UserError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {shown(text)}; give whole numbers, separated by commas.") from None
