"""Types of what is answered by OpenAI's API, vLLM's and our own; /openapi.json is made from them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]


class WrittenFunction(TypedDict):
    name: str
    arguments: str


class WrittenCall(TypedDict):
    id: str
    type: Literal["function"]
    function: WrittenFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[WrittenCall]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class PartialCall(TypedDict):
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class CallDelta(PartialCall):
    index: int


class MessageDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    reasoning: str
    tool_calls: list[CallDelta]


class BestToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(BestToken):
    top_logprobs: list[BestToken]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class SourcedToken(TypedDict):
    """Who proposed a token, and with which probability."""

    token: str
    bytes: list[int]
    source: str
    probability: float | None


class SourcedChoice(TypedDict, total=False):
    token_sources: list[SourcedToken]


class ChatDetails(SourcedChoice):
    logprobs: ChatLogprobs | None


class ChatChoice(ChatDetails):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason


class ChunkChoice(ChatDetails):
    index: int
    delta: MessageDelta
    finish_reason: FinishReason | None


class TextChoice(SourcedChoice):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class CachedTokens(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict, total=False):
    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]
    completion_tokens_details: NotRequired[CompletionDetails]


class DraftAcceptance(TypedDict):
    """vLLM's figures of one answer's drafts, and by how much it came sooner than by plain decoding."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    per_step_accepted: list[int]
    per_step_drafted: list[int]
    saved_ms: NotRequired[float]
    saved_error_ms: NotRequired[float]


class AnswerMetrics(TypedDict):
    speculative_decoding: DraftAcceptance


class AnswerHead(TypedDict):
    id: str
    created: int
    model: str
    metrics: NotRequired[AnswerMetrics]


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class RunningUsage(TypedDict, total=False):
    usage: Usage | None


class ChatCompletionChunk(AnswerHead, RunningUsage):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]


class TextCompletion(AnswerHead, RunningUsage):
    """A whole completion, which has its usage, or a part of one."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelMeta(TypedDict):
    n_ctx: int


class ServedModel(TypedDict):
    """``max_model_len`` is vLLM's name of the context in tokens, ``meta.n_ctx`` llama.cpp's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: NotRequired[int]
    meta: NotRequired[ModelMeta]


class ServedModels(TypedDict):
    object: Literal["list"]
    data: list[ServedModel]


class TokenizedText(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizedText(TypedDict):
    prompt: str


class Health(TypedDict):
    status: Literal["ok"]


class Version(TypedDict):
    version: str


class About(TypedDict):
    """What the live page shows of the server."""

    format: int
    build: str
    version: str
    models: list[str]
    context: int
    thinks: bool
    sampling: dict[str, Any]
