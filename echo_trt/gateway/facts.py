"""What the engine says of its model, so that the gateway can read answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from echo_trt.gateway.tool_formats import format_of
from echo_trt.gateway.tool_formats.base import Format
from echo_trt.gateway.tool_formats.hermes import Hermes


@dataclass(frozen=True)
class Marks:
    """Around a thought, as text, and the token that closes it."""

    opens: str
    closes: str
    closing_token: int


@dataclass(frozen=True)
class Facts:
    """
    template     the chat template's text
    tokens       names of added tokens that the template writes
    variables    of the template, which a request may set
    takes_tools  whether the template shows tools to the model
    thought      None for a model that does not think
    context      tokens of a prompt and its answer, at most
    sampling     parameters of requests that leave them out, where the model recommends any
    """

    template: str
    tokens: frozenset[str]
    variables: frozenset[str]
    takes_tools: bool
    thought: Marks | None
    context: int
    sampling: dict[str, float]

    @cached_property
    def template_format(self) -> Format | None:
        """How the template teaches calls; None where it does not, or in a way that is not known here."""
        return format_of(self.template, self.tokens) if self.takes_tools else None

    @property
    def tool_format(self) -> Format:
        """How the model writes calls: where the template says nothing of it, in the form of tools as text."""
        return self.template_format or Hermes(self.tokens)

    @classmethod
    def read(cls, text: str) -> Facts:
        """From Triton's output ``description``."""
        raw: dict[str, Any] = json.loads(text)
        thought = raw["thought"]
        marks = Marks(thought["opens"], thought["closes"], thought["ids"][1]) if thought else None
        tokens, variables = frozenset(raw["tokens"]), frozenset(raw["variables"])
        return cls(raw["chat_template"], tokens, variables, raw["takes_tools"], marks, raw["context"], raw["sampling"])
