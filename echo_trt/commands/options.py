"""Options that several commands have, and lists that are one option's text."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from echo_trt.decoding.policy_names import NAMES
from echo_trt.errors import UserError, shown
from echo_trt.runtime.host_memory import OPTION, bytes_in

Policies = StrEnum("Policies", {name: name for name in NAMES})
Precisions = StrEnum("Precisions", {name: name for name in ("fp32", "bf16", "fp16", "int8", "int4")})
Colours = StrEnum("Colours", {name: name for name in ("auto", "always", "never")})
Engines = StrEnum("Engines", {name: name for name in ("openvino", "tensorrt", "tensorrt-rtx", "torch")})
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
