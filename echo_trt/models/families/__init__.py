"""The registry of decoders. A family is one file here, and its row in ``FAMILIES``."""

from __future__ import annotations

import difflib

from echo_trt.errors import UserError
from echo_trt.models.families import (
    gemma3,
    granite,
    lfm2,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    smollm3,
)
from echo_trt.models.families.family import Family

_ROWS = (
    *(
        gemma3.FAMILY,
        granite.FAMILY,
        granite.DENSE,
        lfm2.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        phi3.FAMILY,
        qwen2.FAMILY,
    ),
    *(qwen3.FAMILY, qwen3_5.FAMILY, qwen3_moe.FAMILY, smollm3.FAMILY),
)
FAMILIES = {row.name: row for row in _ROWS}


def family_of(architecture: str, where: str) -> Family:
    """Return the family of an architecture in config.json; ``where`` names the file. Raises UserError."""
    known = {family.architecture: family for family in FAMILIES.values()}
    if architecture not in known:
        raise UserError(
            f"{where}: architectures is {architecture!r}, which echo-trt cannot build; {_remedy(architecture, known)}."
        )
    return known[architecture]


def gguf_family(kind: object, where: str) -> Family:
    """Return the family of a GGUF file's general.architecture; ``where`` names the file. Raises UserError."""
    known: dict[str, Family] = {}
    for family in FAMILIES.values():
        if family.gguf:
            known.setdefault(family.gguf, family)
    if kind not in known:
        raise UserError(
            f"{where}: general.architecture is {kind!r}, which echo-trt cannot build; "
            f"{_remedy(kind, known, 'a GGUF file of')}."
        )
    return known[kind]


def _remedy(name: object, known: dict[str, Family], what: str = "one of") -> str:
    [nearest] = difflib.get_close_matches(str(name), known, 1, 0.0)
    return f"use {what} {', '.join(known)}, of which {nearest} is nearest"
