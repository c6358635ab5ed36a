"""What the two endpoints accept. What would change the text is refused by name, never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from echo_trt.engine.latency import RULE
from echo_trt.engine.parameter import INT32
from echo_trt.engine.params import MAX_ANSWER_LOGPROBS, MAX_STOP_TOKENS, PARAMETERS, SINGLE, SamplingParams
from echo_trt.engine.text.prompts import Infill, PromptInput
from echo_trt.models.messages import MAX_TOOLS
from echo_trt.server.errors import ApiError, shown
from echo_trt.server.fields import FIELDS, MESSAGES, RequestBody, Strict, at_most, ignore, within
from echo_trt.server.messages import Message, few_calls, joined
from echo_trt.server.structured import STRUCTURED, Structured, structured_of
from echo_trt.server.text_client import ModelFacts
from echo_trt.server.tools import Allowed, Choice, Tool, check

SWITCH = "enable_thinking"  # the variable of templates that can do without a thought
CHOICES = 128  # of one request, prompts times n
STOP_STRINGS = 16
SHOWN_KEYS = 5  # of those of a logit_bias that are none
LONGEST_SALT = 1000  # characters
TOKEN_IDS = 2**18  # of all prompts of a request; no model that we know has a longer context
#: Other servers' names of fields.
ALIASES = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
#: Stands for a top_p of 0, which leaves the best token alone. Larger: a text of nearly equal tokens has several.
SMALLEST_TOP_P = 1e-9


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    if wrong := [k for k in bias if not (k.isascii() and k.isdigit() and len(k) <= 10 and int(k) <= INT32)]:
        raise ValueError(f"its keys must be token ids, not {', '.join(map(shown, wrong[:SHOWN_KEYS]))}")
    return {int(key): value for key, value in bias.items()}


def in_range(ids: Any) -> Any:
    """Refuse what are no token ids, in C: there may be many."""
    numbers = ids if isinstance(ids, list) and {int}.issuperset(map(type, ids)) else [-1]
    if len(numbers) > TOKEN_IDS or min(numbers, default=0) < 0 or max(numbers, default=0) > INT32:
        raise ValueError(f"give at most {TOKEN_IDS} token ids, whole numbers from 0 to {INT32}")
    return ids


Limit = Annotated[int, within("max_tokens")]
Bias = Annotated[float, within("logit_bias")]
Alternatives = Annotated[int, within("logprobs")]
StopString = Annotated[str, within("stop")]


def _targets(latency: Any) -> Any:
    """Refuse what is neither a class's name nor numbers by name; the engine knows which there are."""
    numbers = isinstance(latency, dict) and all(type(value) in (int, float) for value in latency.values())
    if not (numbers or isinstance(latency, str | None)):
        raise ValueError(f"give {RULE}, or a class's name")
    return latency


_TARGETS = {"type": "object", "additionalProperties": {"type": "number"}}
LatencyField = Annotated[
    Any, AfterValidator(_targets), WithJsonSchema({"anyOf": [{"type": "string"}, _TARGETS, {"type": "null"}]})
]


class StreamOptions(Strict):
    PATH = "stream_options."

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with include_usage, every chunk tells its choice's tokens so far
    include_obfuscation: bool = False  # padding against traffic analysis: there is none either way


def _field(name: str) -> tuple[Any, Any]:
    """Return the type and the default of a sampling parameter's field."""
    known, other = SINGLE[name], dict(SINGLE[name].openai or {})
    default = other.pop("default", known.default)
    kind: Any = known.kind if known.kind is bool else Annotated[known.kind, within(name, **other)]
    return (kind if default is not None else kind | None), default


class Prediction(Strict):
    """What the answer is likely to repeat."""

    PATH = "prediction."

    type: Literal["content"]
    content: Annotated[str, BeforeValidator(joined)]


class Thinking(Strict):
    """Whether the model is to think, in Anthropic's and DeepSeek's words."""

    PATH = "thinking."

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, within("thinking_token_budget")] | None = None
    display: str | None = None  # thoughts are given as they are


class Reasoning(Strict):
    """How hard the model is to think, in OpenRouter's words and those of the Responses API."""

    PATH = "reasoning."

    effort: str | None = None
    enabled: bool | None = None
    summary: str | None = None  # there is none: the thought itself is given
    generate_summary: str | None = None


#: Sampling parameters of one value that both endpoints have by their own names (docs/openai-api.md).
SHARED = tuple(name for name, known in SINGLE.items() if known.openai is not None)
if TYPE_CHECKING:

    class Sampled(RequestBody):
        def __getattr__(self, name: str) -> Any: ...

else:
    constraints = dict.fromkeys(STRUCTURED, (Any, None))
    Sampled = create_model("Sampled", __base__=RequestBody, **{name: _field(name) for name in SHARED}, **constraints)


class Params(Sampled):
    """What both endpoints share. ``top_k`` and others are not OpenAI's (docs/openai-api.md)."""

    ALSO = (*ALIASES, "best_of")
    NEUTRAL: ClassVar = {"max_tokens": (-1,), "max_completion_tokens": (-1,), "n_predict": (-1,), "stop": ("",)}

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    logit_bias: Annotated[
        dict[str, Bias], AfterValidator(_by_token), at_most(PARAMETERS["logit_bias"].entries, "tokens")
    ] = Field({})
    stop: Annotated[list[StopString], at_most(STOP_STRINGS, "strings")] = Field([])
    stop_token_ids: Annotated[list[Annotated[int, within("stop_token_ids")]], at_most(MAX_STOP_TOKENS, "token ids")] = (
        Field([])
    )
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    latency: LatencyField = None
    prediction: Prediction | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LONGEST_SALT)] | None = None
    priority: Annotated[int, Field(ge=0, le=INT32)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=INT32)] | None = None

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = super().kept(given)
        best_of, n = given.pop("best_of", None), given.get("n", 1)
        if best_of is not None and (type(best_of) is not int or best_of != n):
            why = "and texts are not ranked here; give the value of n, or leave it out."
            raise ApiError(400, f"best_of is {shown(best_of)}, {why}", param="best_of")
        for name, ours in ALIASES.items():
            if name in given and given[name] != given.get(ours, given[name]):
                raise ApiError(400, f"{name} and {ours} are both given; give the latter.", param=name)
        if given.get("top_p") == 0 and type(given["top_p"]) is int:
            given["top_p"] = SMALLEST_TOP_P
        return {ALIASES.get(name, name): value for name, value in given.items()}

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _agree(self) -> Params:
        if self.stream_options is not None and not self.stream:
            ignore("stream_options")
        if self.min_tokens > self.limit:
            message = f"min_tokens is {self.min_tokens}; give a whole number from 0 to the limit, {self.limit}."
            raise ApiError(400, message, param="min_tokens")
        _ = self.structured
        return self

    @cached_property
    def structured(self) -> Structured | None:
        """What the answer must fit. Raises ApiError."""
        given = {name: value for name in STRUCTURED if (value := getattr(self, name)) is not None}
        return structured_of(given) if given else None

    @property
    def limit(self) -> int:
        """The maximum number of tokens of one choice; endpoints differ in the default."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """How many tokens' log-probabilities are wanted beside the emitted one's; None: none at all."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """How many log-probabilities and sources a token is told with."""
        return (0 if self.alternatives is None else self.alternatives + 1) + bool(self.token_sources)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def sampling(self, recommended: Mapping[str, float], **more: Any) -> SamplingParams:
        """Return the sampling parameters but for the seed. Raises UserError.

        recommended  the model's values for what the request leaves out
        more         parameters that this request does not know itself
        """
        given: dict[str, Any] = dict(recommended)
        for name in SHARED:
            value = getattr(self, name)
            if name in self.model_fields_set or (value != SINGLE[name].default and name not in recommended):
                given[name] = value
        lists = {"stop": tuple(self.stop), "stop_token_ids": tuple(self.stop_token_ids), "logit_bias": self.logit_bias}
        if self.prediction:
            lists["prediction"] = self.prediction.content
        own = {"max_tokens": self.limit, "logprobs": self.alternatives, "seed": 0}
        return SamplingParams(**given | lists | own | more)

    def seeds(self) -> list[int]:
        """Return one seed per choice: the request's, or a random one, plus the number of the choice."""
        first = secrets.randbits(63) if self.seed is None else self.seed
        return [(first + choice) % 2**63 for choice in range(self.n)]


class ChatRequest(Params):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1), FailFast(), BeforeValidator(few_calls), at_most(MESSAGES, "messages")
    ]
    max_completion_tokens: Limit | None = None
    logprobs: bool = False
    top_logprobs: Alternatives = 0
    tools: Annotated[list[Tool], FailFast(), at_most(MAX_TOOLS, "tools")] = Field([])
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], at_most(FIELDS, "variables")] = Field({})
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None  # Qwen's
    thinking: Thinking | None = None
    reasoning: Reasoning | None = None

    @model_validator(mode="after")
    def _chat_agrees(self) -> ChatRequest:
        if self.tools or self.tool_choice is not None:
            check(self.tools, self.tool_choice)
        if self.must_call and self.structured and not self.structured.field.startswith("response_format"):
            field = self.structured.field
            message = f"{field} cannot stand beside a tool_choice that asks for a call; leave one of them out."
            raise ApiError(400, message, param=field)
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs is {self.top_logprobs}, which is only allowed where logprobs is true."
            raise ApiError(400, message, param="top_logprobs")
        if self.max_tokens not in (None, self.max_completion_tokens) and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are both given; give the latter."
            raise ApiError(400, message, param="max_tokens")
        return self

    @property
    def thoughts(self) -> tuple[bool | None, str | None]:
        """Whether the model is to think and how hard, where it can choose; None: as it likes."""
        effort, enabled = (self.reasoning.effort, self.reasoning.enabled) if self.reasoning else (None, None)
        switched = self.thinking.type != "disabled" if self.thinking else None
        wanted = self.enable_thinking, switched, enabled
        return next((each for each in wanted if each is not None), False if effort == "none" else None), effort

    def chat_for_model(self, info: ModelFacts) -> ChatRequest:
        budget = self.thinking.budget_tokens if self.thinking and self.thinking.type == "enabled" else None
        return self.thinking_as(info, *self.thoughts, budget)

    def thinking_as(
        self, info: ModelFacts, thinks: bool | None, effort: str | None, budget: int | None = None
    ) -> ChatRequest:
        """Return the chat, with what is asked of thoughts as far as the model takes it."""
        changes: dict[str, Any] = {} if budget is None else {"thinking_token_budget": budget}
        if thinks is False and info.thinking and SWITCH in info.variables:
            changes["chat_template_kwargs"] = {SWITCH: False} | self.chat_template_kwargs
        if effort and "reasoning_effort" in info.variables:
            changes["reasoning_effort"] = effort
        if thinks is not None and info.thinking is None:
            changes["thinking_token_budget"] = None
        return self.model_copy(update=changes)

    @property
    def must_call(self) -> bool:
        if isinstance(self.tool_choice, Allowed):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice not in (None, "auto", "none")

    @property
    def limit(self) -> int:
        """The client's limit; without one the context limits the answer, or what may be told of its tokens."""
        maximum = MAX_ANSWER_LOGPROBS // (self.n * self.entries) if self.entries else INT32
        return self.max_completion_tokens or self.max_tokens or maximum

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Params):
    """The body of /v1/completions."""

    prompt: list[str | list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=INT32, json_schema_extra={"minimum": 1})] | None = None  # 0: see scores
    logprobs: Alternatives | None = None
    suffix: str | None = None  # what follows the answer, of a model that can fill a gap in a text
    echo: bool = False  # the prompt precedes the answer, with its log-probabilities where those are asked for

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_of_prompts(cls, prompt: Any) -> Any:
        """Read a string, a list of strings, token ids, or a list of token ids."""
        if isinstance(prompt, str) or (isinstance(prompt, list) and set(map(type, prompt)) == {int}):
            prompt = [prompt]
        if not (isinstance(prompt, list) and prompt and set(map(type, prompt)) <= {str, list}):
            raise ValueError("give a string, token ids, or a list of either")
        if len(prompt) > CHOICES:
            raise ValueError(f"give at most {CHOICES} prompts")
        lists = [one for one in prompt if isinstance(one, list)]
        if not all(lists):
            raise ValueError("give at least one token id in each list")
        in_range([*chain(*lists)])
        return prompt

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.suffix and (self.echo or not all(isinstance(prompt, str) for prompt in self.prompt)):
            raise ApiError(400, "suffix goes with a prompt of text, and without echo; leave it out.", param="suffix")
        if len(self.prompt) * self.n > CHOICES:
            message = f"{len(self.prompt)} prompts times n = {self.n} are more than {CHOICES} choices; ask for fewer."
            raise ApiError(400, message, param="prompt")
        if self.scores and not (self.echo and self.logprobs is not None):
            message = "max_tokens is 0, which asks for the prompt's log-probabilities; give echo and logprobs, or 1."
            raise ApiError(400, message, param="max_tokens")
        return self

    @property
    def prompts(self) -> list[PromptInput]:
        return [Infill(str(prompt), self.suffix) if self.suffix else prompt for prompt in self.prompt]

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of prompts are all that is wanted."""
        return self.max_tokens == 0

    @property
    def limit(self) -> int:
        return 1 if self.scores else self.max_tokens or 16  # OpenAI's own default here

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def sampling(self, recommended: Mapping[str, float], **more: Any) -> SamplingParams:
        echoed = self.alternatives if self.echo else None
        return super().sampling(recommended, prompt_logprobs=echoed, **more)
