"""How models write calls of tools: a file per format, found by the model's chat template."""

from __future__ import annotations

from collections.abc import Collection

from echo_trt.server.tool_formats.base import Format
from echo_trt.server.tool_formats.hermes import Hermes
from echo_trt.server.tool_formats.llama3 import Llama3
from echo_trt.server.tool_formats.mistral import Mistral


def format_of(template: str, tokens: Collection[str] = ()) -> Format | None:
    """Return the format that a chat template teaches; None where it is no known one. ``tokens``: see ``Format``."""
    kinds: tuple[type[Format], ...] = (Hermes, Llama3, Mistral)
    return next((found for kind in kinds if (found := kind.of(template, tokens))), None)
