"""The turns of a chat: texts, calls of tools, and what the tools gave."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import from_json

from echo_trt.models.messages import MAX_TOOLS
from echo_trt.server.errors import shown
from echo_trt.server.fields import MESSAGES, Strict, at_most
from echo_trt.server.tool_formats.base import NAME

Name = Annotated[str, Field(pattern=f"^{NAME}$")]


def _legacy(value: Any) -> Any:
    raise ValueError("functions are not supported by this engine; give tools and tool_calls")


def few_calls(messages: Any) -> Any:
    """Bound the calls of all turns together, as ``at_most`` does."""
    if isinstance(messages, list):
        calls = [turn.get("tool_calls") for turn in messages if isinstance(turn, dict)]
        if sum(len(each) for each in calls if isinstance(each, list)) > MESSAGES:
            raise ValueError(f"give at most {MESSAGES} calls in all")
    return messages


def joined(content: Any) -> str:
    """Return the text of a content, which is a string or parts. Raises ValueError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError("give a string, or parts of type text")
    if len(content) > MESSAGES:
        raise ValueError(f"give at most {MESSAGES} parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            found = f"part {index} is {f'of type {shown(kind)}' if isinstance(kind, str) else shown(part)}"
            raise ValueError(f"{found}; give a string, or parts of type text: this model reads nothing else")
        texts.append(text)
    return "".join(texts)


class CalledFunction(Strict):
    PATH = "messages.tool_calls.function."

    name: Name
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _object(cls, arguments: str) -> str:
        try:
            parsed = from_json(arguments or "{}", allow_inf_nan=False, allow_partial=True)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError("give a JSON object, written as a string")
        try:
            from_json(arguments or "{}", allow_inf_nan=False)
        except ValueError:  # a call that the limit cut, sent back: what was complete
            return json.dumps(parsed, ensure_ascii=False)
        return arguments


class ToolCall(Strict):
    """A call in a turn of the assistant's."""

    PATH = "messages.tool_calls."

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of a chat; its content is text, null where there are calls. A user's ``name`` is seldom used."""

    PATH = "messages."

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], FailFast(), at_most(MAX_TOOLS, "calls")] = Field([])
    function_call: Annotated[Any, BeforeValidator(_legacy)] = None
    tool_call_id: str | None = None
    content: str | None  # behind tool_calls, beside which it may be null
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, raw: Any) -> Any:
        """Drop empty fields: an answer that a client sends back has tool_calls, refusal and others null or empty."""
        if not isinstance(raw, dict):
            return raw
        kept = {name: value for name, value in raw.items() if name == "content" or value not in (None, [])}
        reasoning = kept.pop("reasoning", None)  # vLLM's newer name
        if reasoning is not None:
            kept.setdefault("reasoning_content", reasoning)
        if kept.get("tool_calls"):
            kept.setdefault("content", None)
        return kept

    @field_validator("role", mode="before")
    @classmethod
    def _no_function(cls, role: Any) -> Any:
        return _legacy(role) if role == "function" else role

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any, info: ValidationInfo) -> Any:
        if content in (None, []) and info.data.get("tool_calls"):
            return None
        if content is None and info.data.get("role") == "assistant":  # an answer of a thought alone, sent back
            return ""
        return joined(content)

    @model_validator(mode="after")
    def _calls_by_assistants(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the role assistant has tool_calls")
        return self

    def for_engine(self) -> dict[str, Any]:
        """Return the message as the engine's input ``chat_messages`` has it."""
        role = "system" if self.role == "developer" else self.role
        turn = self.model_dump(exclude_none=True, exclude={"role", "content"})
        if not self.tool_calls:
            turn.pop("tool_calls", None)
        if self.role != "tool":
            turn.pop("name", None)  # few templates know participants' names
        return {"role": role, "content": self.content} | turn
