"""The tools of a chat, and which of them must be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from echo_trt.models.messages import MAX_TOOLS
from echo_trt.server.errors import ApiError
from echo_trt.server.fields import Strict, at_most, ignore
from echo_trt.server.messages import Name


class Function(Strict):
    PATH = "tools.function."

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    PATH = "tools."

    type: Literal["function"]
    function: Function

    def for_engine(self) -> dict[str, Any]:
        """As chat templates show it to the model."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": {**function, "parameters": self.schema_of_arguments()}}

    def schema_of_arguments(self) -> dict[str, Any]:
        return self.function.parameters or {"type": "object", "properties": {}}


class NamedFunction(Strict):
    PATH = "tool_choice.function."

    name: str


class NamedTool(Strict):
    PATH = "tool_choice."

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    PATH = "tool_choice.allowed_tools."

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1), at_most(MAX_TOOLS, "tools")]


class Allowed(Strict):
    """Some of the tools: the model sees all of them, and calls these alone."""

    PATH = "tool_choice."

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_of(named: type[Strict], allowed: type[Strict], example: str) -> BeforeValidator:
    """Read a tool_choice: a word, an object that names a function, as ``example`` does, or one that names several."""

    def read(value: Any) -> Any:
        if value in ("auto", "none", "required"):
            return value
        try:
            several = isinstance(value, dict) and value.get("type") == "allowed_tools"
            return (allowed if several else named).model_validate(value)
        except ValidationError:
            raise ValueError(f"give auto, none, required, {example} or allowed_tools of such") from None

    return BeforeValidator(read)


NAMED = '{"type": "function", "function": {"name": ...}}'
Choice = Annotated[Literal["auto", "none", "required"] | NamedTool | Allowed, choice_of(NamedTool, Allowed, NAMED)]


def names_in(choice: Choice | None) -> list[str] | None:
    """Return the functions that alone may be called; None: all may be."""
    if isinstance(choice, Allowed):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, NamedTool) else None


def check(tools: Sequence[Tool], choice: Choice | None) -> None:
    """Refuse names that are given twice, and a choice of what is not there. Raises ApiError."""
    known: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in known:
            message = f"tools.{index}.function.name is {tool.function.name!r} again; give each function its own name."
            raise ApiError(400, message, param=f"tools.{index}.function.name")
        known.add(tool.function.name)
    if choice in (None, "none"):
        return
    if not tools and choice == "auto":
        return ignore("tool_choice")
    if not tools:
        raise ApiError(400, "tool_choice is only allowed where tools are given; leave it out.", param="tool_choice")
    for name in names_in(choice) or ():
        if name not in known:
            message = f"tool_choice names {name[:100]!a}, which is none of the tools; name one of them."
            raise ApiError(400, message, param="tool_choice")
