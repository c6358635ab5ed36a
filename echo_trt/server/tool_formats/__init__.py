"""How models write calls of tools: formats, found by the model's chat template."""

from __future__ import annotations

from collections.abc import Collection

from echo_trt.server.tool_formats.base import Format
from echo_trt.server.tool_formats.coder import Coder
from echo_trt.server.tool_formats.llama3 import Llama3, MistralList
from echo_trt.server.tool_formats.marked import CODER, SPELLINGS, Marked


def format_of(template: str, tokens: Collection[str] = ()) -> Format | None:
    """Return the format that a chat template teaches; None where it is no known one. ``tokens``: see ``Format``."""
    for spelling in SPELLINGS:
        if all(mark in template for mark in spelling.taught):
            return (Coder if spelling is CODER else Marked)(spelling, tokens)
    return MistralList.of(template, tokens) or Llama3.of(template, tokens)
