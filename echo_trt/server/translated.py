"""What the APIs share that ask for a chat in other words (Responses, Anthropic's, Ollama's)."""

from __future__ import annotations

import re
from abc import abstractmethod
from functools import cache, cached_property
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from echo_trt.server.errors import ApiError, from_validation
from echo_trt.server.fields import RequestBody
from echo_trt.server.schemas import SHARED, ChatRequest
from echo_trt.server.text_client import ModelFacts

#: Fields that these APIs have by the chat's names; the chat checks them.
CHAT_FIELDS = (
    *(name for name in SHARED if name != "token_sources"),
    *("top_logprobs", "logit_bias", "stop", "stop_token_ids", "priority", "deadline_ms", "latency", "prediction"),
    *("cache_salt", "structured_outputs", "chat_template_kwargs", "parallel_tool_calls"),
)
_TURN = re.compile(r"^messages\.(\d+)(?:\.tool_calls\.(\d+))?(?:\.function)?")


class TurnList:
    """``messages`` of a chat's body, and the client's field of each message and call.

    Calls that follow each other, and the text before them, are one turn.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._fields: list[str] = []  # of each message
        self._calls: list[list[str]] = []  # of each message's calls

    def add(self, field: str, role: str, content: str | None, **more: Any) -> None:
        self.messages.append({"role": role, "content": content, **more})
        self._fields.append(field)
        self._calls.append([])

    def call(self, field: str, id: Any, name: Any, arguments: Any) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add(field, "assistant", None)
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self._calls[-1].append(field)

    def field(self, param: str) -> str:
        """Return the client's name of the chat field ``param``."""
        if not (found := _TURN.match(param)) or int(found[1]) >= len(self._fields):
            return param
        message, rest = int(found[1]), param[found.end() :]
        if found[2] is not None:
            return self._calls[message][int(found[2])] + rest
        return self._fields[message] + (rest if "." in self._fields[message] else "")


class TranslatedRequest(RequestBody):
    """A body that stands for a chat. Subclasses have their API's fields."""

    ALSO = CHAT_FIELDS

    model: str = ""
    stream: bool = False
    shared: Any = Field(None, exclude=True)

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = super().kept(given)
        shared = {name: given.pop(name) for name in CHAT_FIELDS if name in given}
        return given | {"shared": shared}

    @classmethod
    @cache
    def known(cls) -> frozenset[str]:
        return super().known() - {"shared"}

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """Return the chat's fields but CHAT_FIELDS. Raises ApiError, in the client's names of fields."""

    @abstractmethod
    def client_field(self, chat_field: str) -> str:
        """Return the client's name of a chat's field."""

    @property
    def thoughts(self) -> tuple[bool | None, str | None]:
        """Whether the model is to think and how hard, where it can choose; None: as it likes."""
        return None, None

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat that it stands for. Raises ApiError."""
        body = self.body() | self.shared
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise self.in_client_fields(from_validation(error.errors(include_url=False))) from None
        except ApiError as error:
            raise self.in_client_fields(error) from None

    def chat_for_model(self, info: ModelFacts) -> ChatRequest:
        """Return the chat, with what is asked of thoughts as far as the model takes it."""
        return self.chat.thinking_as(info, *self.thoughts)

    @model_validator(mode="after")
    def _is_a_chat(self) -> TranslatedRequest:
        _ = self.left_out, self.chat
        return self

    def in_client_fields(self, error: ApiError) -> ApiError:
        """Rewrite a chat's refusal in the client's names of fields."""
        reported = error.body["error"]
        chat_field, message = reported["param"], reported["message"]
        if not chat_field:
            return error
        field = self.client_field(chat_field)
        message = field + message.removeprefix(chat_field) if message.startswith(chat_field + " ") else message
        return ApiError(error.status_code, message, reported["type"], field, reported["code"], error.retry_after)


def form_of(given: dict[str, Any] | None, field: str) -> dict[str, Any] | None:
    """Return the chat's response_format of one that has its schema next to its type. Raises ApiError."""
    if given is None or given.get("type") != "json_schema":
        return given
    if given.get("schema") is None:
        raise ApiError(400, f'{field} has no "schema"; give {{"type": "json_schema", "schema": ...}}.', param=field)
    return {"type": "json_schema", "json_schema": {name: given[name] for name in given if name != "type"}}


def renamed(chat_field: str, names: dict[str, str]) -> str:
    """Return the client's name of a chat's field. ``names``: chat field -> client field, a field's parts before it."""
    longest = next((name for name in names if chat_field == name or chat_field.startswith(name + ".")), None)
    return names[longest] + chat_field.removeprefix(longest) if longest else chat_field


def arguments_of(text: str) -> dict[str, Any]:
    """Return a call's arguments, as far as they were written."""
    try:
        found = from_json(text or "{}", allow_inf_nan=False, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
