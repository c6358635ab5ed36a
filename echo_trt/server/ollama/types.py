"""Types of what is answered by Ollama's API; /openapi.json is made from them."""

from __future__ import annotations

from typing import Any, Literal, Required

from typing_extensions import TypedDict


class OllamaFunction(TypedDict):
    name: str
    arguments: dict[str, Any]


class OllamaCall(TypedDict):
    function: OllamaFunction


class OllamaMore(TypedDict, total=False):
    thinking: str
    tool_calls: list[OllamaCall]


class OllamaEnd(TypedDict, total=False):
    """A last line has all of these; durations are in nanoseconds."""

    done: Required[bool]
    done_reason: Literal["stop", "length", "load"]
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int


class OllamaHead(OllamaEnd):
    model: str
    created_at: str


class OllamaMessage(OllamaMore):
    role: Literal["assistant"]
    content: str


class OllamaChatLine(OllamaHead):
    """A whole answer, or a line of one."""

    message: OllamaMessage


class OllamaTextLine(OllamaHead, OllamaMore):
    """A whole answer, or a line of one."""

    response: str


class OllamaDetails(TypedDict):
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(TypedDict, total=False):
    """A model that is there, with ``modified_at``, or one that is loaded, with the other two."""

    name: Required[str]
    model: Required[str]
    digest: Required[str]
    size: Required[int]
    details: Required[OllamaDetails]
    modified_at: str
    expires_at: str
    size_vram: int


class OllamaModels(TypedDict):
    models: list[OllamaModel]


class OllamaShown(TypedDict):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaVersion(TypedDict):
    version: str
    echo_trt: str
