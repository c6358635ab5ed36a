"""/openapi.json: the routes and what their bodies hold, made from the models that check them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from echo_trt import __version__
from echo_trt.engine.service import MODEL
from echo_trt.server import answer_types as api
from echo_trt.server.anthropic.blocks import BLOCKS
from echo_trt.server.anthropic.types import AnthropicMessage, CountedTokens, MessageEvent
from echo_trt.server.edge import OPEN
from echo_trt.server.errors import OllamaFailure, OpenAIFailure, failure_type
from echo_trt.server.fields import RequestBody
from echo_trt.server.ollama.request import OllamaRequest
from echo_trt.server.ollama.types import OllamaChatLine, OllamaModels, OllamaShown, OllamaTextLine, OllamaVersion
from echo_trt.server.responses.types import CountedInput, ResponseObject, StreamedEvent
from echo_trt.server.translated import CHAT_FIELDS, TranslatedRequest


class Operation(NamedTuple):
    """What an operation is called, and what it answers: whole, and an event or a line of a stream."""

    tag: str
    id: str
    summary: str
    answer: Any = None
    event: Any = None


TURNS = {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
#: Path -> a body that is answered.
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": TURNS | {"max_tokens": 22},
    "/v1/completions": {"prompt": "The sky is blue because", "max_tokens": 22},
    "/v1/responses": {"input": "Why is the sky blue?", "max_output_tokens": 22},
    "/v1/responses/input_tokens": {"input": "Why is the sky blue?"},
    "/v1/messages": TURNS | {"max_tokens": 22},
    "/v1/messages/count_tokens": TURNS,
    "/api/chat": TURNS | {"options": {"num_predict": 22}},
    "/api/generate": {"prompt": "Why is the sky blue?", "options": {"num_predict": 22}},
    "/api/show": {"model": MODEL},
    "/tokenize": {"prompt": "The sky is blue because"},
    "/detokenize": {"tokens": [5, 6]},
}
OPERATIONS = {
    "/v1/chat/completions": Operation(
        "OpenAI", "createChatCompletion", "Answer a chat", api.ChatCompletion, api.ChatCompletionChunk | OpenAIFailure
    ),
    "/v1/completions": Operation(
        "OpenAI", "createCompletion", "Continue texts", api.TextCompletion, api.TextCompletion | OpenAIFailure
    ),
    "/v1/responses": Operation("OpenAI", "createResponse", "Answer by items", ResponseObject, StreamedEvent),
    "/v1/responses/input_tokens": Operation("OpenAI", "countInputTokens", "Count an input's tokens", CountedInput),
    "/v1/models": Operation("OpenAI", "listModels", "Name the model", api.ServedModels),
    "/v1/models/{name}": Operation("OpenAI", "retrieveModel", "Describe the model", api.ServedModel),
    "/v1/messages": Operation("Anthropic", "createMessage", "Answer by blocks", AnthropicMessage, MessageEvent),
    "/v1/messages/count_tokens": Operation("Anthropic", "countTokens", "Count a prompt's tokens", CountedTokens),
    "/api/chat": Operation("Ollama", "ollamaChat", "Answer a chat", OllamaChatLine, OllamaChatLine | OllamaFailure),
    "/api/generate": Operation(
        "Ollama", "ollamaGenerate", "Answer a prompt", OllamaTextLine, OllamaTextLine | OllamaFailure
    ),
    "/api/tags": Operation("Ollama", "ollamaTags", "Name the model", OllamaModels),
    "/api/ps": Operation("Ollama", "ollamaPs", "Name the loaded model", OllamaModels),
    "/api/show": Operation("Ollama", "ollamaShow", "Describe the model", OllamaShown),
    "/api/version": Operation("Ollama", "ollamaVersion", "Name Ollama's version", OllamaVersion),
    "/tokenize": Operation("Tokens", "tokenize", "Turn a text or a chat into tokens", api.TokenizedText),
    "/detokenize": Operation("Tokens", "detokenize", "Turn tokens into text", api.DetokenizedText),
    "/health": Operation("Server", "health", "Tell whether the engine works", api.Health),
    "/ping": Operation("Server", "ping", "Tell whether the engine works", api.Health),
    "/version": Operation("Server", "version", "Name the package's version", api.Version),
    "/openapi.json": Operation("Server", "openapi", "Describe this API", dict[str, Any]),
    "/metrics": Operation("Server", "metrics", "Count, for Prometheus", str),
    "/live": Operation("Server", "live", "Show the engine at work", event=dict[str, Any]),
    "/live/about": Operation("Server", "liveAbout", "Describe model and server", api.About),
}
TEXT, MANY, NULL = {"type": "string"}, {"type": "array", "items": {}}, {"type": "null"}
TEXTS, WORDS = {"anyOf": [TEXT, {"type": "array", "items": TEXT}]}, {"anyOf": [TEXT, MANY]}
PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": TEXT}, "required": ["type", "text"]}
ROLE, TOP_P = {"enum": [*BLOCKS]}, {"type": "number", "minimum": 0, "maximum": 1, "default": 1.0}
TURN = {"type": "object", "properties": {"role": ROLE, "content": WORDS}, "required": ["role", "content"]}
#: Fields that are taken in other shapes than they are kept in.
WIDER: dict[tuple[str, str], dict[str, Any]] = {
    ("CompletionRequest", "prompt"): WORDS,
    ("ResponsesRequest", "input"): WORDS,
    ("Message", "content"): {"anyOf": [TEXT, {"type": "array", "items": PART}, NULL]},
    ("TokenizeRequest", "messages"): {"type": "array", "items": {"$ref": "#/components/schemas/Message"}},
    **{(body, "messages"): {"type": "array", "items": TURN} for body in ("CountTokensRequest", "MessagesRequest")},
    **{(body, "top_p"): TOP_P for body in ("ChatRequest", "CompletionRequest")},
    **{(body, "stop"): TEXTS for body in ("ChatRequest", "CompletionRequest")},
}


class _Untitled(GenerateJsonSchema):
    """Leaves out titles of fields, which say their names again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


async def show_openapi(request: Request) -> Response:
    state = request.app.state
    if not hasattr(state, "openapi"):  # made once, in a thread: it takes some 100 ms
        state.openapi = await asyncio.to_thread(document, request.app.routes)
    return JSONResponse(state.openapi)


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Describe an application's routes in OpenAPI 3.1."""
    shown = [route for route in routes if isinstance(route, Route) and route.include_in_schema]
    bodies: dict[str, Any] = {each.path: each.endpoint.body for each in shown if hasattr(each.endpoint, "body")}
    answers = {path: [each for each in (*known[3:], failure_type(path)) if each] for path, known in OPERATIONS.items()}
    kinds = dict.fromkeys([*bodies.values(), *chain(*answers.values())])
    typed: Any = [(kind, "validation", TypeAdapter(kind)) for kind in kinds]
    shapes, known = TypeAdapter.json_schemas(
        typed, ref_template="#/components/schemas/{model}", schema_generator=_Untitled
    )
    schemas = known["$defs"]
    for (model, field), schema in WIDER.items():
        schemas[model]["properties"][field] = schema
    for schema in schemas.values():
        if schema.get("additionalProperties") is False:  # others are dropped and named, or refused for what they say
            del schema["additionalProperties"]
    for body in bodies.values():
        if issubclass(body, TranslatedRequest):
            properties = schemas[body.__name__]["properties"]
            properties.pop("shared", None)  # two paths may read the same body
            if not issubclass(body, OllamaRequest):  # whose clients know options alone
                names = [name for name in CHAT_FIELDS if name in body.ALSO]
                properties |= {name: schemas["ChatRequest"]["properties"][name] for name in names} | properties
        if issubclass(body, RequestBody):  # where null asks for nothing
            shape = schemas[body.__name__]
            for name in shape["properties"].keys() - set(shape.get("required", ())):
                shape["properties"][name] = _or_null(shape["properties"][name])
    paths: dict[str, Any] = {}
    for route in shown:
        path, methods = route.path.replace(":path", ""), sorted((route.methods or set()) - {"HEAD"})
        written = {kind: shapes[kind, "validation"] for kind in answers[path]}
        paths[path] = {
            method.lower(): _operation(path, method if len(methods) > 1 else "", written) for method in methods
        }
    for path, body in bodies.items():
        content = {"application/json": {"schema": shapes[body, "validation"], "example": EXAMPLES[path]}}
        paths[path]["post"]["requestBody"] = {"required": True, "content": content}
    paths["/v1/models/{name}"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": TEXT, "example": MODEL}
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "echo-trt", "version": __version__},
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in OPERATIONS.values())],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    kind = {name: value for name, value in schema.items() if name != "default"}
    default = {"default": schema["default"]} if isinstance(schema.get("default"), bool | int | float | str) else {}
    return {"anyOf": [*(each for each in kind.get("anyOf", [kind]) if each != NULL), NULL], **default} if kind else {}


def _operation(path: str, method: str, written: dict[Any, Any]) -> dict[str, Any]:
    """Describe an operation; ``written`` has the schemas of what it answers. ``method``: where a path has several."""
    known = OPERATIONS[path]
    content = {}
    if known.answer:
        content["text/plain" if known.answer is str else "application/json"] = {"schema": written[known.answer]}
    if known.event:
        lines = "application/x-ndjson" if known.tag == "Ollama" else "text/event-stream"
        content[lines] = {"schema": written[known.event]}
    refused = {"application/json": {"schema": written[failure_type(path)]}}
    return {
        "operationId": known.id + method.capitalize(),
        "summary": f"{known.summary}.",
        "tags": [known.tag],
        "security": [{}] if path in OPEN else [{}, {"key": []}],
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "A refusal or a failure.", "content": refused},
        },
    }
