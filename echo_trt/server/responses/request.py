"""The body of /v1/responses, and the chat that it stands for."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from echo_trt.server.fields import FIELDS, Strict, at_most, ignore
from echo_trt.server.responses.items import Turns
from echo_trt.server.responses.tools import (
    CallableFunction,
    FlatAllowed,
    FlatChoice,
    FlatToolChoice,
    ToolList,
    functions_of,
    left_out,
)
from echo_trt.server.schemas import Reasoning
from echo_trt.server.translated import TranslatedRequest, form_of, renamed

LOGPROBS = "message.output_text.logprobs"
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]  # the latter: nothing here is
#: The chat's names of fields that are called otherwise here. A longer one stands before its beginning.
CLIENT_FIELDS = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
}


class Text(Strict):
    PATH = "text."

    format: Annotated[dict[str, Any], at_most(FIELDS, "fields")] | None = None
    verbosity: Literal["medium"] | None = None


class EventOptions(Strict):
    PATH = "stream_options."

    include_obfuscation: bool = False  # padding against traffic analysis: there is none either way


class ResponsesRequest(TranslatedRequest):
    """What is asked. ``top_k`` and others of CHAT_FIELDS are not OpenAI's (docs/openai-api.md)."""

    NEUTRAL: ClassVar = {"max_output_tokens": (-1,)}

    input: Any
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream_options: EventOptions | None = None
    tools: ToolList = Field([])
    tool_choice: FlatToolChoice | None = None
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    include: Annotated[list[Included], at_most(16, "entries")] = Field([])
    metadata: Annotated[dict[str, str], at_most(16, "entries")] = Field({})

    @cached_property
    def turns(self) -> Turns:
        return Turns(self.instructions, self.input)

    @cached_property
    def functions(self) -> list[CallableFunction]:
        """What the chat's tools are, in their order."""
        return functions_of(self.tools)

    @cached_property
    def left_out(self) -> list[str]:
        """Types of tools that are not used. Raises ApiError."""
        return left_out(self.tools, self.tool_choice)

    def body(self) -> dict[str, Any]:
        choice: Any = self.tool_choice
        if isinstance(choice, FlatChoice | FlatAllowed):
            choice = choice.for_chat()
        elif choice == "auto" and self.left_out and not self.functions:
            choice = None
        return {
            "model": self.model,
            "messages": self.turns.messages,
            "max_completion_tokens": self.max_output_tokens,
            "stream": self.stream,
            "tools": [function.for_chat() for function in self.functions],
            "tool_choice": choice,
            "response_format": form_of(self.text.format, "text.format"),
            "reasoning_effort": self.reasoning.effort,
            "logprobs": LOGPROBS in self.include or "top_logprobs" in self.shared,
        }

    @model_validator(mode="after")
    def _agrees(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            ignore("stream_options")
        return self

    def client_field(self, chat_field: str) -> str:
        if chat_field.startswith("messages."):
            return self.turns.field(chat_field)
        if chat_field.startswith("tools."):
            _, index, *rest = chat_field.split(".")
            return ".".join([self.functions[int(index)].field, *rest[1:]])
        return renamed(chat_field, CLIENT_FIELDS)
