"""A chat for the served model: the engine's prompt, and the parser of its output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from echo_trt.engine.text.prompts import ChatPrompt, ThinkTokens
from echo_trt.grammar.requested import LONGEST
from echo_trt.models.tools_as_text import tools_as_text
from echo_trt.server.errors import ApiError
from echo_trt.server.schemas import SWITCH, ChatRequest
from echo_trt.server.structured import Structured
from echo_trt.server.text_client import ModelFacts
from echo_trt.server.tool_formats import format_of
from echo_trt.server.tool_formats.bare import BareParser
from echo_trt.server.tool_formats.base import Format, FormatReader, ToolRequest, json_rule
from echo_trt.server.tool_formats.marked import HERMES, Marked
from echo_trt.server.tools import NamedTool, Tool, names_in
from echo_trt.server.turns import OutputParser

NO_THOUGHT = "this model does not think; leave it out"


@dataclass(frozen=True)
class Chat:
    """``structured``: what the answer must fit; ``names`` are those for ``errors.from_engine``."""

    prompt: ChatPrompt
    structured: dict[str, Any] | None
    names: dict[str, str]
    thinking: ThinkTokens | None
    calls: Calls | None

    def turn(self) -> OutputParser:
        if self.calls is None:
            return OutputParser(self.thinking)
        requested = self.calls.requested
        parser: FormatReader = self.calls.form.parser(self.calls.schemas, requested.several, requested.call_required)
        if self.calls.bare:
            parser = BareParser(parser, self.calls.bare, requested.several)
        return OutputParser(self.thinking, parser)


@dataclass(frozen=True)
class Calls:
    """Tools that may be called.

    schemas  of the arguments by name
    bare     those of tools whose calls may come without the format's marks
    fields   the client's field of each schema
    """

    form: Format
    requested: ToolRequest
    schemas: dict[str, dict[str, Any]]
    bare: dict[str, dict[str, Any]]
    fields: list[str]
    must_fit: bool

    def grammar(self) -> tuple[str, dict[str, str]]:
        """Lark, and the fields that its lines came from, as ``errors.from_engine`` has them."""
        text = self.form.grammar(self.requested)
        lines = {f"function_{index}": field for index, field in enumerate(self.fields)}
        rules = {number: line.partition(":")[0] for number, line in enumerate(text.split("\n"), 1)}
        return text, {f"structured:{number}": lines[rule] for number, rule in rules.items() if rule in lines}


def chat_for(requested: ChatRequest, info: ModelFacts) -> Chat:
    """Translate a chat into the engine's prompt. Raises ApiError for what this model cannot do."""
    messages = [turn.for_engine() for turn in requested.messages]
    tools = [] if requested.tool_choice == "none" else [tool.for_engine() for tool in requested.tools]
    if tools and info.takes_tools and not format_of(info.template, info.tokens):  # calls that cannot be read
        messages, tools = tools_as_text(messages, tools), []
    calls, structured = _calls(requested, info), requested.structured
    free = calls and not calls.must_fit  # else the grammar says it, and more
    known = tuple(calls.form.parts(name, schema) for name, schema in calls.schemas.items()) if calls and free else ()
    prompt = ChatPrompt(messages, tools, _template_kwargs(requested, info), tuple(filter(None, known)))
    names, fits = {"prompt": "messages"}, None
    if calls and calls.must_fit:
        grammar, fields = calls.grammar()
        fits = {"grammar": grammar}
        names |= {"structured": "tools", **fields}
    elif structured:
        fits, names["structured"] = structured.for_engine(), structured.field
    if requested.thinking_token_budget is not None and info.thinking is None:
        message = f"thinking_token_budget is {requested.thinking_token_budget}, but {NO_THOUGHT}."
        raise ApiError(400, message, param="thinking_token_budget")
    return Chat(prompt, fits, names, info.thinking, calls)


def _calls(requested: ChatRequest, info: ModelFacts) -> Calls | None:
    if not requested.tools or requested.tool_choice == "none":
        return None
    form = (format_of(info.template, info.tokens) if info.takes_tools else None) or Marked(HERMES, info.tokens)
    choice = requested.tool_choice
    names, must, parallel = names_in(choice), requested.must_call, requested.parallel_tool_calls
    several = form.several and not isinstance(choice, NamedTool) and (not must if parallel is None else parallel)
    chosen = {
        f"tools.{index}.function.parameters": tool
        for index, tool in enumerate(requested.tools)
        if names is None or tool.function.name in names
    }
    content = None if must else _content(requested.structured)
    strict = any(tool.function.strict for tool in requested.tools)
    must_fit = must or strict or content is not None or requested.parallel_tool_calls is False or names is not None
    enforced = {tool.function.name: _schema(tool, must) for tool in chosen.values()}
    _check_size(enforced, "tools")
    schemas = {tool.function.name: tool.schema_of_arguments() for tool in chosen.values()}
    is_free = not must and content is None
    bare = {t.function.name: schemas[t.function.name] for t in chosen.values() if is_free and not t.function.strict}
    return Calls(form, ToolRequest(enforced, must, several, content), schemas, bare, list(chosen), must_fit)


def _schema(tool: Tool, must: bool) -> dict[str, Any]:
    """Return the schema of a call's arguments: any object, unless the request demands the tool's own."""
    return tool.schema_of_arguments() if must or tool.function.strict else {"type": "object"}


def _content(structured: Structured | None) -> str | None:
    """Return the Lark grammar of an answer without calls."""
    if structured is None:
        return None
    kind, value = structured.kind, structured.value
    if kind == "json_object":
        return json_rule({"type": "object"})
    if kind == "json" and isinstance(value, dict):
        _check_size(value, structured.field)
        return json_rule(value)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return " | ".join(map(_json, value))
    message = f"{structured.field} cannot stand beside tools; give a JSON schema, or tool_choice none."
    raise ApiError(400, message, param=structured.field)


def _check_size(schemas: Any, field: str) -> None:
    """Refuse what the engine would refuse, before time is spent on it."""
    if (size := len(_json(schemas))) > LONGEST:
        raise ApiError(400, f"{field} has schemas of {size} characters; give at most {LONGEST}.", param=field)


def _template_kwargs(requested: ChatRequest, info: ModelFacts) -> dict[str, Any]:
    kwargs, effort = dict(requested.chat_template_kwargs), requested.reasoning_effort
    for name in kwargs:
        if name not in info.variables:
            known = ", ".join(info.variables[:20])
            remedy = f"give {known}" if known else "leave it out"
            reason = f"chat_template_kwargs has {name[:50]!a}, which this model's chat template does not use"
            raise ApiError(400, f"{reason}; {remedy}.", param="chat_template_kwargs")
    if "reasoning_effort" in info.variables and effort is not None:
        return {"reasoning_effort": effort} | kwargs
    if effort is None or info.thinking is None:  # a model that does not think has nothing to do with it
        return kwargs
    if SWITCH not in info.variables:
        message = f"reasoning_effort is {effort!r}, but this model always decides itself how it thinks; leave it out."
    elif effort != "none":
        message = f"reasoning_effort is {effort!r}, but this model knows none alone; give thinking_token_budget."
    else:
        return {SWITCH: False} | kwargs
    raise ApiError(400, message, param="reasoning_effort")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
