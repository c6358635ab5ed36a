"""Chat templates: Jinja in a sandbox, with what templates of Hugging Face's hub expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from echo_trt.models.messages import Messages, Tools
from echo_trt.models.tokenizer import ROLES

#: What templates are given by ``render``, and no request may set.
GIVEN = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", *ROLES)
)


class _Generation(Extension):
    """Writes what ``{% generation %}`` marks, an answer that a trainer looks for, like any other text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """Compile a template. Raises TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json  # Jinja's own writes HTML
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(
    source: str, messages: Messages, tools: Tools | None, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """Return the text of a chat. A template may raise what it likes, about roles and their order.

    ``variables``: of the template, the names of special tokens among them.
    """
    return compiled(source).render(
        {
            **variables,
            "messages": [_message(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is None, which templates would write, and name a thought as gpt-oss' templates read it, too."""
    given = {key: value for key, value in message.items() if value is not None}
    return {"thinking": given["reasoning_content"], **given} if "reasoning_content" in given else given
