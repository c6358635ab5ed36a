"""A chat decided for the model that is served: what the engine is asked, and how its texts are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from echo_trt.gateway.errors import ApiError
from echo_trt.gateway.schemas import ChatRequest
from echo_trt.gateway.structured import Structured
from echo_trt.gateway.tool_formats import format_of
from echo_trt.gateway.tool_formats.base import Asked, Format, json_rule
from echo_trt.gateway.tool_formats.hermes import Hermes
from echo_trt.gateway.tools import NamedTool, Tool
from echo_trt.gateway.turns import Turn
from echo_trt.grammar.requested import LONGEST
from echo_trt.models.tools_as_text import tools_as_text
from echo_trt.serving.wire import ModelInfo, ThinkTokens

SWITCH = "enable_thinking"  # the variable of templates that can do without a thought
NO_THOUGHT = "this model does not think; leave it out"


@dataclass(frozen=True)
class Chat:
    """``inputs`` are the engine's, but for those of sampling; ``names`` are those for ``errors.from_engine``."""

    inputs: dict[str, Any]
    names: dict[str, str]
    thinking: ThinkTokens | None
    calls: Calls | None

    def turn(self) -> Turn:
        """A reader for one choice."""
        if self.calls is None:
            return Turn(self.thinking)
        asked, form = self.calls.asked, self.calls.form
        return Turn(self.thinking, form.parser(asked.tools.keys(), asked.several))


@dataclass(frozen=True)
class Calls:
    """Tools that may be called. ``places``: the client's field of the arguments' schema of each."""

    form: Format
    asked: Asked
    places: list[str]
    must_fit: bool

    def grammar(self) -> tuple[str, dict[str, str]]:
        """Lark, and the fields that its lines came from, as ``errors.from_engine`` has them."""
        text = self.form.grammar(self.asked)
        lines = {f"function_{index}": place for index, place in enumerate(self.places)}
        rules = {number: line.partition(":")[0] for number, line in enumerate(text.split("\n"), 1)}
        return text, {f"structured:{number}": lines[rule] for number, rule in rules.items() if rule in lines}


def chat_for(asked: ChatRequest, info: ModelInfo) -> Chat:
    """Decide. Raises ApiError for what this model cannot do."""
    messages, tools = [turn.for_engine() for turn in asked.messages], [tool.for_engine() for tool in asked.tools]
    if asked.tool_choice == "none":
        tools = []
    if tools and info.takes_tools and not format_of(info.template, info.tokens):  # calls that cannot be read
        messages, tools = tools_as_text(messages, tools), []
    inputs: dict[str, Any] = {"chat_messages": _json(messages)}
    calls, structured = _calls(asked, info), asked.structured
    names = {"prompt": "messages"}
    if tools:
        inputs["tools"] = _json(tools)
    if calls and calls.must_fit:
        grammar, places = calls.grammar()
        inputs["structured"] = _json({"grammar": grammar})
        names |= {"structured": "tools", **places}
    elif structured:
        inputs["structured"], names["structured"] = structured.for_engine(), structured.field
    if kwargs := _template_kwargs(asked, info):
        inputs["chat_template_kwargs"] = _json(kwargs)
    if asked.thinking_token_budget is not None and info.thinking is None:
        message = f"thinking_token_budget is {asked.thinking_token_budget}, but {NO_THOUGHT}."
        raise ApiError(400, message, param="thinking_token_budget")
    return Chat(inputs, names, info.thinking, calls)


def _calls(asked: ChatRequest, info: ModelInfo) -> Calls | None:
    if not asked.tools or asked.tool_choice == "none":
        return None
    form = (format_of(info.template, info.tokens) if info.takes_tools else None) or Hermes(info.tokens)
    choice = asked.tool_choice
    several = asked.parallel_tool_calls is not False and not isinstance(choice, NamedTool) and form.several
    chosen = {
        f"tools.{index}.function.parameters": tool
        for index, tool in enumerate(asked.tools)
        if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name
    }
    must = asked.must_call
    content = None if must else _content(asked.structured)
    strict = any(tool.function.strict for tool in asked.tools)
    must_fit = must or strict or content is not None or asked.parallel_tool_calls is False
    schemas = {tool.function.name: _schema(tool, must) for tool in chosen.values()}
    _check_size(schemas, "tools")
    return Calls(form, Asked(schemas, must, several, content), list(chosen), must_fit)


def _schema(tool: Tool, must: bool) -> dict[str, Any]:
    """Arguments that nobody asked to fit are any object."""
    return tool.schema_of_arguments() if must or tool.function.strict else {"type": "object"}


def _content(structured: Structured | None) -> str | None:
    """Lark of an answer that calls nothing."""
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


def _template_kwargs(asked: ChatRequest, info: ModelInfo) -> dict[str, Any]:
    kwargs, effort = dict(asked.chat_template_kwargs), asked.reasoning_effort
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
