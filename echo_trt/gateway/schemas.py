"""What the two endpoints accept. What the engine cannot do is refused by name, never ignored."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from echo_trt.gateway.errors import ApiError

CHOICES = 128  # of one request, prompts times n
INT32, INT64 = 2**31 - 1, 2**63 - 1
#: Fields that ask for something we don't have, unless they hold one of these values (null asks for nothing).
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),  # says nothing without tools
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
}
#: Fields that say something about the caller and nothing about the text.
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


def _encodable(text: str) -> str:
    """JSON may spell half a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair; send whole characters") from None
    return text


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= INT32 for key in bias):
        raise ValueError("its keys must be token ids")
    return {int(key): value for key, value in bias.items()}


Text = Annotated[str, AfterValidator(_encodable)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Alternatives = Annotated[int, Field(ge=0, le=20)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: there is none either way


class Params(Strict):
    """What both endpoints share. Not OpenAI's: ``top_k``, ``repetition_penalty``, ``min_tokens``, the last three."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=INT32)] = 0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: Annotated[dict[str, Bias], Field(max_length=300), AfterValidator(_by_token)] = {}
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] = 0
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=16)] = []
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    ignore_eos: bool = False
    priority: Annotated[int, Field(ge=0, le=INT32)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=INT32)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_we_have(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept = {}
        for name, value in raw.items():
            if value is None or name in IGNORED:
                continue
            if name not in REFUSED:
                kept[name] = value
            elif not any(value == free and type(value) is type(free) for free in REFUSED[name]):
                raise ApiError(400, f"{name} is not supported by this engine; leave it out.", param=name)
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _agree(self) -> Params:
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only allowed where stream is true."
            raise ApiError(400, message, param="stream_options")
        return self

    @model_validator(mode="after")
    def _least_below_most(self) -> Params:
        if self.min_tokens > self.limit:
            message = f"min_tokens is {self.min_tokens}; give a whole number from 0 to the limit, {self.limit}."
            raise ApiError(400, message, param="min_tokens")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def seeds(self) -> list[int]:
        """One a choice: the request's seed, plus one for each choice after the first; without one, a random start."""
        first = secrets.randbits(63) if self.seed is None else self.seed
        return [(first + choice) % 2**63 for choice in range(self.n)]


class Message(Strict):
    """One turn of a chat; its content is text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, raw: Any) -> Any:
        """A client that sends an earlier answer back sends tool_calls, refusal and others as null or empty."""
        if not isinstance(raw, dict):
            return raw
        return {name: value for name, value in raw.items() if value is not None and value != []}

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("give a string, or parts of type text; this model reads nothing else")
        return "".join(texts)

    @field_validator("name")
    @classmethod
    def _nameless(cls, name: str | None) -> None:
        if name is not None:
            raise ValueError("names of participants are not supported; leave it out")


class ChatRequest(Params):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    logprobs: bool = False
    top_logprobs: Alternatives = 0

    @model_validator(mode="after")
    def _top_of_something(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs is {self.top_logprobs}, which is only allowed where logprobs is true."
            raise ApiError(400, message, param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are both given; give the latter."
            raise ApiError(400, message, param="max_tokens")
        return self

    @property
    def limit(self) -> int:
        """Without a word from the client the context is the limit."""
        return self.max_completion_tokens or self.max_tokens or INT32

    @property
    def alternatives(self) -> int | None:
        """How many tokens' log-probabilities are wanted beside the emitted one's; None: none at all."""
        return self.top_logprobs if self.logprobs else None

    def inputs(self) -> list[dict[str, Any]]:
        """What stands for the prompt in the engine's inputs: one entry a prompt, and a chat is one."""
        turns = [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.content}
            for turn in self.messages
        ]
        return [{"chat_messages": json.dumps(turns, ensure_ascii=False)}]


class CompletionRequest(Params):
    """The body of /v1/completions."""

    prompt: list[str | list[int]]
    logprobs: Alternatives | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_of_prompts(cls, prompt: Any) -> Any:
        """A string, a list of strings, token ids, or a list of those."""
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_int, prompt))):
            prompt = [prompt]
        if not (isinstance(prompt, list) and prompt and all(isinstance(p, str | list) for p in prompt)):
            raise ValueError("give a string, token ids, or a list of either")
        for one in prompt:
            if isinstance(one, str):
                _encodable(one)
            elif not (one and all(_is_int(token) and 0 <= token <= INT32 for token in one)):
                raise ValueError(f"token ids must be a list of whole numbers from 0 to {INT32} that is not empty")
        return prompt

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * self.n > CHOICES:
            message = f"{len(self.prompt)} prompts times n = {self.n} are more than {CHOICES} choices; ask for fewer."
            raise ApiError(400, message, param="prompt")
        return self

    @property
    def limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's own default here

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def inputs(self) -> list[dict[str, Any]]:
        return [{"text_input" if isinstance(p, str) else "input_ids": p} for p in self.prompt]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
