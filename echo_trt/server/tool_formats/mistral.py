"""Mistral's format: an answer that is a list of JSON objects, behind a special token that no text shows."""

from __future__ import annotations

from collections.abc import Collection

from echo_trt.server.tool_formats.base import Format, ToolRequest
from echo_trt.server.tool_formats.llama3 import Llama3Parser

MARK = "[TOOL_CALLS]"  # in a template; in a text only if it is spelt


class MistralParser(Llama3Parser):
    marks = (MARK, "[")
    separates, closes = ",]", "]"


class Mistral(Format):
    """[{"name": ..., "arguments": ...}, ...], as of Mistral 7B v0.3 and Nemo; an ``id`` may follow."""

    key, parser = "arguments", MistralParser

    @classmethod
    def of(cls, template: str, tokens: Collection[str]) -> Mistral | None:
        """Later models' calls have their name before a mark [ARGS], which no text shows either."""
        return cls(tokens) if MARK in template and "[ARGS]" not in template else None

    def rules(self, requested: ToolRequest) -> list[str]:
        calls = 'calls: "[" function (", " function)* "]"' if requested.several else 'calls: "[" function "]"'
        if requested.must:
            return ["start: calls", calls]
        if requested.content is not None:
            return ["start: calls | content", f"content: {requested.content}", calls]
        return ["start: calls | text", "text: TEXT", r"TEXT: /([ \t\r\n]*[^\[ \t\r\n](.|\n)*)?/", calls]
