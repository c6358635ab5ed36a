"""The bodies of /v1/messages and /v1/messages/count_tokens, and the chat that they stand for."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from echo_trt.models.messages import MAX_TOOLS
from echo_trt.server.anthropic.blocks import BlockTurns
from echo_trt.server.errors import ApiError, wrong
from echo_trt.server.fields import FIELDS, Strict, at_most
from echo_trt.server.schemas import Thinking
from echo_trt.server.translated import CHAT_FIELDS, TranslatedRequest, form_of, renamed

#: Beginnings of the types of tools that Anthropic's servers run.
HOSTED = ("web_search", "web_fetch", "code_execution", "tool_search_tool")
#: The chat's names of fields that are called otherwise here. A longer one stands before its beginning.
CLIENT_FIELDS = {
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
    "thinking_token_budget": "thinking.budget_tokens",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
FUNCTION = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
Fields = Annotated[dict[str, Any], at_most(FIELDS, "fields")]


class ToolChoice(Strict):
    PATH = "tool_choice."

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> Any:
        named = {"type": "function", "function": {"name": self.name}}
        return named if self.type == "tool" else "required" if self.type == "any" else self.type


class OutputConfig(Strict):
    PATH = "output_config."

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Fields | None = None
    task_budget: Fields | None = None  # of several answers: each is ended by max_tokens


class CountTokensRequest(TranslatedRequest):
    """The body of /v1/messages/count_tokens. ``seed`` and others that are shared are not Anthropic's."""

    ALSO = tuple(name for name in CHAT_FIELDS if name not in ("stop", "parallel_tool_calls"))

    messages: Any
    system: Any = None
    max_tokens: int | None = None
    stop_sequences: list[str] = Field([])
    tools: Annotated[list[Fields], at_most(MAX_TOOLS, "tools")] = Field([])
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking = Thinking(type="disabled")
    output_config: OutputConfig = OutputConfig()
    output_format: Fields | None = None

    @property
    def thoughts(self) -> tuple[bool, str | None]:
        return self.thinking.type != "disabled", self.output_config.effort

    @cached_property
    def turns(self) -> BlockTurns:
        return BlockTurns(self.system, self.messages)

    @cached_property
    def functions(self) -> list[int]:
        """Positions of the tools that the model may call."""
        return [index for index, tool in enumerate(self.tools) if not str(tool.get("type")).startswith(HOSTED)]

    @property
    def left_out(self) -> list[str]:
        return [name for name in HOSTED if any(str(tool.get("type")).startswith(name) for tool in self.tools)]

    def body(self) -> dict[str, Any]:
        choice, alone = self.tool_choice.for_chat(), self.tool_choice.disable_parallel_tool_use
        return {
            "model": self.model,
            "messages": self.turns.messages,
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "tools": [_function(f"tools.{index}", self.tools[index]) for index in self.functions],
            "tool_choice": choice if self.functions or choice not in ("auto", "none") else None,
            "parallel_tool_calls": None if alone is None else not alone,
            "thinking_token_budget": self.thinking.budget_tokens if self.thinking.type == "enabled" else None,
            "response_format": form_of(self.output_config.format or self.output_format, "output_config.format"),
        }

    def client_field(self, chat_field: str) -> str:
        if chat_field.startswith("messages."):
            return self.turns.field(chat_field)
        if chat_field.startswith("tools."):
            _, index, *rest = chat_field.split(".")
            return ".".join(["tools", str(self.functions[int(index)]), *rest[1:]]).replace("parameters", "input_schema")
        return renamed(chat_field, CLIENT_FIELDS)


class MessagesRequest(CountTokensRequest):
    """The body of /v1/messages."""

    max_tokens: int


def _function(field: str, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise wrong(f"{field}.type", tool["type"], "this model needs a schema; give a tool with an input_schema")
    if missing := next((name for name in ("name", "input_schema") if tool.get(name) is None), None):
        raise ApiError(400, f"{field}.{missing} is missing.", param=f"{field}.{missing}")
    return {"type": "function", "function": {new: tool.get(name) for name, new in FUNCTION.items()}}
