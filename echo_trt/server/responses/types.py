"""Types of what is answered by the Responses API; /openapi.json is made from them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from echo_trt.server.answer_types import CachedTokens, ChatToken, CompletionDetails

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


OutputPart = OutputText | ReasoningText


class _OutputItem(TypedDict):
    id: str
    status: ResponseStatus


class OutputMessage(_OutputItem):
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(_OutputItem):
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(_OutputItem):
    type: Literal["function_call"]
    call_id: str
    namespace: NotRequired[str]
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseError(TypedDict):
    code: str
    message: str


class Incomplete(TypedDict):
    reason: Literal["max_output_tokens"]


class Effort(TypedDict):
    effort: str | None
    summary: None


class TextSettings(TypedDict):
    format: dict[str, Any]
    verbosity: Literal["medium"]


class InputTokens(CachedTokens):
    cache_write_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    presence_penalty: float
    frequency_penalty: float
    previous_response_id: None
    reasoning: Effort
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: TextSettings
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class _Numbered(TypedDict):
    sequence_number: NotRequired[int]  # as it is sent


class ResponseEvent(_Numbered):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseObject


class ItemEvent(_Numbered):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _Inner(_Numbered):
    item_id: str
    output_index: int


class PartEvent(_Inner):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputPart


class TextDelta(_Inner):
    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    content_index: int
    delta: str
    logprobs: NotRequired[list[ChatToken]]


class TextDone(_Inner):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    content_index: int
    text: str
    logprobs: NotRequired[list[ChatToken]]


class ArgumentsDelta(_Inner):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(_Inner):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class FailureEvent(_Numbered):
    type: Literal["error"]
    code: str
    message: str
    param: str | None


InnerEvent = PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone
StreamedEvent = ResponseEvent | ItemEvent | InnerEvent | FailureEvent


class CountedInput(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int
