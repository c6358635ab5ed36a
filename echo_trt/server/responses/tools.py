"""The tools of a response: functions, functions in namespaces, and hosted tools, which OpenAI's own servers run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, FailFast, ValidationError

from echo_trt.models.messages import MAX_TOOLS
from echo_trt.server.errors import ApiError, from_validation, shown
from echo_trt.server.fields import Strict, at_most
from echo_trt.server.messages import Name
from echo_trt.server.tools import Function, choice_of

#: Hosted tools that clients send unasked -> the setting by which a client stops sending the tool.
HOSTED = {
    "web_search": 'in Codex with web_search = "disabled"',
    "web_search_preview": "in the client's settings",
    "image_generation": "in Codex with features.image_generation = false",
}


class FlatTool(Function):
    """A function, in one object where a chat has two."""

    PATH = "tools."

    type: Literal["function"]


class Namespace(Strict):
    """Functions with a name in common."""

    PATH = "tools."

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[FlatTool], FailFast(), at_most(MAX_TOOLS, "tools")]


class Hosted(BaseModel):
    """A hosted tool, whatever its settings."""

    type: Literal["web_search", "web_search_preview", "image_generation"]


Given = FlatTool | Namespace | Hosted
KINDS: dict[Any, type[Given]] = {"function": FlatTool, "namespace": Namespace, **dict.fromkeys(HOSTED, Hosted)}


def _read(given: Any) -> Any:
    """Tools by their types. Raises ApiError, which names the place."""
    return [_tool(f"tools.{index}", tool) for index, tool in enumerate(given)] if isinstance(given, list) else given


def _tool(field: str, tool: Any) -> Given:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        param, value = (f"{field}.type", kind) if isinstance(tool, dict) else (field, tool)
        raise ApiError(400, f"{param} is {shown(value)}: give a function or a namespace of functions.", param=param)
    try:
        return KINDS[kind].model_validate(tool)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise from_validation([{**first, "loc": (field, *first["loc"])}]) from None


ToolList = Annotated[list[Given], BeforeValidator(_read), at_most(MAX_TOOLS, "tools")]


class FlatChoice(Strict):
    PATH = "tool_choice."

    type: Literal["function"]
    name: str
    namespace: str | None = None

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": joined(self.namespace, self.name)}}


class FlatAllowed(Strict):
    """Some of the tools. Hosted ones, which do not run here, are no functions to call."""

    PATH = "tool_choice."

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatChoice | Hosted], at_most(MAX_TOOLS, "tools")]

    def for_chat(self) -> dict[str, Any]:
        tools = [tool.for_chat() for tool in self.tools if isinstance(tool, FlatChoice)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": tools}}


CHOICE = choice_of(FlatChoice, FlatAllowed, '{"type": "function", "name": ...}')
FlatToolChoice = Annotated[Literal["auto", "none", "required"] | FlatChoice | FlatAllowed, CHOICE]


def joined(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}.{name}"


@dataclass(frozen=True)
class CallableFunction:
    """A function that the model may call, and the client's field that it stands in."""

    field: str
    namespace: str | None
    tool: FlatTool

    @property
    def name(self) -> str:
        return joined(self.namespace, self.tool.name)

    def for_chat(self) -> dict[str, Any]:
        function = self.tool.model_dump(exclude={"type"}) | {"name": self.name}
        return {"type": "function", "function": function}


def functions_of(tools: Sequence[Given]) -> list[CallableFunction]:
    found = []
    for index, tool in enumerate(tools):
        if isinstance(tool, FlatTool):
            found.append(CallableFunction(f"tools.{index}", None, tool))
        elif isinstance(tool, Namespace):
            numbered = enumerate(tool.tools)
            found += [CallableFunction(f"tools.{index}.tools.{number}", tool.name, each) for number, each in numbered]
    return found


def left_out(tools: Sequence[Given], choice: object) -> list[str]:
    """Return the types of hosted tools, which do not run here. Raises ApiError where ``choice`` requires a call."""
    found = [(index, tool.type) for index, tool in enumerate(tools) if isinstance(tool, Hosted)]
    if found and choice == "required":
        index, kind = found[0]
        reason = f"tools.{index}.type is {kind!r}, which does not run here, and tool_choice is required"
        raise ApiError(400, f"{reason}; leave it out, {HOSTED[kind]}.", param=f"tools.{index}.type")
    return [kind for _, kind in found]
