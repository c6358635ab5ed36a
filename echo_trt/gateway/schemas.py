"""What the two endpoints accept. What the engine cannot do is refused by name, never ignored."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    field_validator,
    model_validator,
)

from echo_trt.gateway.errors import ApiError
from echo_trt.runtime.parameter import MOST as INT32
from echo_trt.runtime.params import PARAMETERS

CHOICES = 128  # of one request, prompts times n
#: Most messages of a chat, and most content parts of a message: as at OpenAI.
MESSAGES = 2048
#: Most fields of an object. More would only take longer to refuse; there are about 40 that mean something.
FIELDS = 100
STOP_STRINGS = 16
TOKEN_IDS = 2**18  # of all prompts of a request; no model that we know has a longer context
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


def at_most(most: int, things: str) -> BeforeValidator:
    """Refuse a longer list or object before pydantic looks at its entries, which takes it microseconds for each."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"give at most {most} {things}")
        return value

    return BeforeValidator(check)


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= INT32 for key in bias):
        raise ValueError("its keys must be token ids")
    return {int(key): value for key, value in bias.items()}


def within(name: str, low: int | None = None, high: int | None = None) -> Any:
    """The bounds of a sampling parameter, or of its entries; ``low`` and ``high`` are given where OpenAI's differ."""
    known = PARAMETERS[name]
    low, high = known.low if low is None else low, known.high if high is None else high
    if known.kind is str:
        return Field(min_length=low, max_length=high)
    return Field(gt=low, le=high) if known.above else Field(ge=low, le=high)


def off(name: str) -> Any:
    """The default of a sampling parameter, which changes nothing."""
    return PARAMETERS[name].default


Limit = Annotated[int, within("max_tokens")]
Bias = Annotated[float, within("logit_bias")]
Alternatives = Annotated[int, within("logprobs")]
Stop = Annotated[str, within("stop")]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with include_usage, every chunk tells its choice's tokens so far
    include_obfuscation: bool = False  # padding against traffic analysis: there is none either way


class Params(Strict):
    """What both endpoints share. Not OpenAI's: ``top_k``, ``repetition_penalty``, ``min_tokens``, the last three."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    temperature: Annotated[float, within("temperature", high=2)] = 1.0
    top_p: Annotated[float, within("top_p")] = off("top_p")
    top_k: Annotated[int, within("top_k")] = off("top_k")
    presence_penalty: Annotated[float, within("presence_penalty")] = off("presence_penalty")
    frequency_penalty: Annotated[float, within("frequency_penalty")] = off("frequency_penalty")
    repetition_penalty: Annotated[float, within("repetition_penalty")] = off("repetition_penalty")
    logit_bias: Annotated[
        dict[str, Bias],
        AfterValidator(_by_token),
        at_most(PARAMETERS["logit_bias"].entries, "tokens"),
    ] = {}
    min_tokens: Annotated[int, within("min_tokens")] = off("min_tokens")
    seed: Annotated[int, within("seed", low=-(2**63))] | None = None
    stop: Annotated[list[Stop], at_most(STOP_STRINGS, "strings")] = []
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    ignore_eos: bool = off("ignore_eos")
    priority: Annotated[int, Field(ge=0, le=INT32)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=INT32)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_we_have(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if len(raw) > FIELDS:
            raise ApiError(400, f"The body has {len(raw)} fields; give at most {FIELDS}.")
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
    def limit(self) -> int:
        """The most tokens of one choice; each endpoint has its own default."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def seeds(self) -> list[int]:
        """One a choice: the request's seed, plus one for each choice after the first; without one, a random start."""
        first = secrets.randbits(63) if self.seed is None else self.seed
        return [(first + choice) % 2**63 for choice in range(self.n)]


def _no_tools(value: Any) -> Any:
    raise ValueError("tools are not supported by this engine; leave their calls and results out")


NoTools = Annotated[Any, BeforeValidator(_no_tools)]


class Message(Strict):
    """One turn of a chat; its content is text. ``name`` is accepted and not used: few templates know it."""

    role: Literal["system", "developer", "user", "assistant"]
    tool_calls: NoTools = None  # before content, which is null beside it
    function_call: NoTools = None
    tool_call_id: NoTools = None
    content: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, raw: Any) -> Any:
        """A client that sends an earlier answer back sends tool_calls, refusal and others as null or empty."""
        if not isinstance(raw, dict):
            return raw
        if len(raw) > FIELDS:
            raise ValueError(f"give at most {FIELDS} fields")
        return {name: value for name, value in raw.items() if name == "content" or value not in (None, [])}

    @field_validator("role", mode="before")
    @classmethod
    def _no_tool(cls, role: Any) -> Any:
        return _no_tools(role) if role in ("tool", "function") else role

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not content:
            raise ValueError("give a string, or parts of type text")
        if len(content) > MESSAGES:
            raise ValueError(f"give at most {MESSAGES} parts")
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                raise ValueError("give a string, or parts of type text; this model reads nothing else")
            texts.append(text)
        return "".join(texts)


class ChatRequest(Params):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1), FailFast(), at_most(MESSAGES, "messages")]
    max_completion_tokens: Limit | None = None
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
        if isinstance(prompt, str) or (isinstance(prompt, list) and set(map(type, prompt)) == {int}):
            prompt = [prompt]
        if not (isinstance(prompt, list) and prompt and set(map(type, prompt)) <= {str, list}):
            raise ValueError("give a string, token ids, or a list of either")
        if len(prompt) > CHOICES:
            raise ValueError(f"give at most {CHOICES} prompts")
        lists = [one for one in prompt if isinstance(one, list)]
        if sum(map(len, lists)) > TOKEN_IDS:
            raise ValueError(f"give at most {TOKEN_IDS} token ids")
        for ids in lists:
            if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > INT32:  # in C: there may be many
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
