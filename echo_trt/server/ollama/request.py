"""The bodies of /api/chat and /api/generate, and the chat that they stand for."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from echo_trt.server.errors import ApiError, wrong
from echo_trt.server.fields import FIELDS, MESSAGES, at_most, read_at
from echo_trt.server.translated import CHAT_FIELDS, TranslatedRequest, renamed

#: The chat's fields -> their names here.
CLIENT_FIELDS = {
    "response_format.json_schema.schema": "format",
    "response_format": "format",
    "max_completion_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
}
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
CLIENT_FIELDS |= {name: f"options.{name}" for name in SAMPLED}
OPTIONS = {field.removeprefix("options."): name for name, field in CLIENT_FIELDS.items() if "options." in field}


def without_tag(model: str) -> str:
    """Return a model's name as it is served: Ollama's clients add a tag."""
    return model.removesuffix(":latest")


class OllamaRequest(TranslatedRequest):
    """What both paths share."""

    ALSO = tuple(name for name in CHAT_FIELDS if name != "top_logprobs")  # these answers have none

    model: Annotated[str, AfterValidator(without_tag)] = ""
    stream: bool = True
    format: Any = None
    options: Annotated[dict[str, Any], at_most(FIELDS, "options")] = Field({})
    think: bool | Literal["low", "medium", "high", "max"] | None = None

    @property
    def thoughts(self) -> tuple[bool | None, str | None]:
        thinks = None if self.think is None else self.think is not False
        return thinks, self.think if isinstance(self.think, str) else None

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The chat's messages. None: the request only asks that the model be loaded."""
        raise NotImplementedError

    def body(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": self.turns or [{"role": "user", "content": ""}],
            "stream": True,  # its times are reported, whether the answer is sent as it comes or not
            "response_format": self._format(),
            **self._options(),
        }

    def client_field(self, chat_field: str) -> str:
        return renamed(chat_field, CLIENT_FIELDS)

    def _format(self) -> dict[str, Any] | None:
        if self.format in (None, ""):
            return None
        if self.format != "json" and not isinstance(self.format, dict):
            raise wrong("format", self.format, "give json or a JSON schema")
        schema = {"type": "json_schema", "json_schema": {"schema": self.format}}
        return schema if isinstance(self.format, dict) else {"type": "json_object"}

    def _options(self) -> dict[str, Any]:
        read = read_at("options", self.options, OPTIONS, "options.")
        without_limit = read.get("num_predict") in (-1, -2)  # as Ollama says it
        return {OPTIONS[name]: read[name] for name in read if not (without_limit and name == "num_predict")}


class OllamaChatRequest(OllamaRequest):
    """The body of /api/chat."""

    messages: Annotated[list[dict[str, Any]], at_most(MESSAGES, "messages")] = Field([])
    tools: list[Any] = Field([])

    @cached_property
    def turns(self) -> list[dict[str, Any]]:
        return [_turn(f"messages.{index}", message) for index, message in enumerate(self.messages)]

    def body(self) -> dict[str, Any]:
        return super().body() | {"tools": self.tools}


class GenerateRequest(OllamaRequest):
    """The body of /api/generate: a text, put into the chat template as a user's turn."""

    prompt: str = ""
    system: str = ""

    @cached_property
    def turns(self) -> list[dict[str, Any]]:
        turns = [("system", self.system), ("user", self.prompt)]
        return [{"role": role, "content": text} for role, text in turns if text] if self.prompt else []


def _turn(field: str, message: dict[str, Any]) -> dict[str, Any]:
    names = {"thinking": "reasoning_content", "tool_name": "name"}
    turn = {"content": ""} | {names.get(name, name): value for name, value in message.items()}
    if turn.pop("images", None):
        raise ApiError(400, f"{field}.images: this model reads text alone; leave it out.", param=f"{field}.images")
    if isinstance(calls := turn.get("tool_calls"), list):
        turn["tool_calls"] = [_call(call) for call in calls[: MESSAGES + 1]]
    return turn


def _call(call: Any) -> Any:
    """Return a call as a chat has it: its arguments are text there."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
