"""The body of /v1/responses, and the chat that it stands for."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from echo_trt.server.errors import ApiError, from_validation
from echo_trt.server.fields import FIELDS, Strict, at_most, bounded, check_supported
from echo_trt.server.responses.items import Turns
from echo_trt.server.responses.tools import (
    CallableFunction,
    Choice,
    FlatChoice,
    ToolList,
    functions_of,
    joined,
    left_out,
)
from echo_trt.server.schemas import IGNORED as CHAT_IGNORED
from echo_trt.server.schemas import SHARED as SAMPLED
from echo_trt.server.schemas import ChatRequest

#: Fields that ask for something we don't have, unless they hold one of these values (null asks for nothing).
REFUSED: dict[str, tuple[Any, ...]] = {
    "store": (False, True),  # nothing is stored either way, as answers say
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "context_management": (),
    "truncation": ("disabled", "auto"),  # nothing is cut off: a prompt that does not fit is refused
}
#: Fields that say something about the caller and nothing about the text.
IGNORED = (*(name for name in CHAT_IGNORED if name != "metadata"), "client_metadata")
#: Fields that are a chat's too, by the same name; the chat checks them.
SHARED = (
    *(name for name in SAMPLED if name != "token_sources"),
    "top_logprobs",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "latency",
    "priority",
    "deadline_ms",
    "structured_outputs",
    "chat_template_kwargs",
    "parallel_tool_calls",
)
LOGPROBS = "message.output_text.logprobs"
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]  # the latter: nothing here is
#: The chat's names of fields that are called otherwise here. A longer one stands before its beginning.
OURS = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
}


class Reasoning(Strict):
    effort: str | None = None
    summary: Literal["auto"] | None = None  # there is none: the thought itself is given
    generate_summary: Literal["auto"] | None = None


class Text(Strict):
    format: Annotated[dict[str, Any], at_most(FIELDS, "fields")] | None = None
    verbosity: Literal["medium"] | None = None

    def for_chat(self) -> dict[str, Any] | None:
        if self.format is None or self.format.get("type") != "json_schema":
            return self.format
        inner = {name: value for name, value in self.format.items() if name != "type"}
        return {"type": "json_schema", "json_schema": inner}


class EventOptions(Strict):
    include_obfuscation: bool = False  # padding against traffic analysis: there is none either way


class ResponsesRequest(Strict):
    """What is asked. ``top_k`` and others of SHARED are not OpenAI's (docs/openai-api.md)."""

    model: str
    input: Any
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    stream_options: EventOptions | None = None
    tools: ToolList = Field([])
    tool_choice: Choice | None = None
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    include: Annotated[list[Included], at_most(16, "entries")] = Field([])
    metadata: Annotated[dict[str, str], at_most(16, "entries")] = Field({})
    shared: Any = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _only_what_we_have(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        for name, value in bounded(raw).items():
            if value is None or name in IGNORED:
                continue
            if name in SHARED:
                shared[name] = value
            elif name == "shared":
                raise ApiError(400, "shared is not known here; leave it out.", param="shared")
            elif not check_supported(name, value, REFUSED):
                kept[name] = value
        return kept | {"shared": shared}

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

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat that it stands for. Raises ApiError."""
        choice: Any = self.tool_choice
        if isinstance(choice, FlatChoice):
            choice = {"type": "function", "function": {"name": joined(choice.namespace, choice.name)}}
        elif choice == "auto" and self.left_out and not self.functions:
            choice = None
        body = {
            "model": self.model,
            "messages": self.turns.messages,
            "max_completion_tokens": self.max_output_tokens,
            "stream": self.stream,
            "tools": [function.for_chat() for function in self.functions],
            "tool_choice": choice,
            "response_format": self.text.for_chat(),
            "reasoning_effort": self.reasoning.effort,
            "logprobs": LOGPROBS in self.include or "top_logprobs" in self.shared,
            **self.shared,
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise self.ours(from_validation(error.errors(include_url=False))) from None
        except ApiError as error:
            raise self.ours(error) from None

    @model_validator(mode="after")
    def _is_a_chat(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only allowed where stream is true."
            raise ApiError(400, message, param="stream_options")
        _ = self.left_out, self.chat
        return self

    def ours(self, error: ApiError) -> ApiError:
        """Rewrite a chat's refusal in the names of these fields."""
        reported: dict[str, Any] = error.body["error"]
        theirs, message = reported["param"], reported["message"]
        if not theirs:
            return error
        field = self._field(theirs)
        message = field + message.removeprefix(theirs) if message.startswith(theirs + " ") else message
        return ApiError(error.status_code, message, reported["type"], field, reported["code"], error.retry_after)

    def _field(self, theirs: str) -> str:
        if theirs == "messages":
            return "input"
        if theirs.startswith("messages."):
            return self.turns.field(theirs)
        if theirs.startswith("tools."):
            _, index, *rest = theirs.split(".")
            return ".".join([self.functions[int(index)].field, *rest[1:]])
        longest = next((name for name in OURS if theirs == name or theirs.startswith(name + ".")), None)
        return OURS[longest] + theirs.removeprefix(longest) if longest else theirs
