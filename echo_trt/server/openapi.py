"""/openapi.json: the routes and what their bodies hold, made from the models that check them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from echo_trt import __version__
from echo_trt.server.edge import OPEN
from echo_trt.server.ollama.request import OllamaRequest
from echo_trt.server.translated import CHAT_FIELDS, TranslatedRequest

STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/live")
LINES = ("/api/chat", "/api/generate")
TEXT, MANY = {"type": "string"}, {"type": "array", "items": {}}
#: Fields that are taken in more shapes than they are kept in.
WIDER: dict[tuple[str, str], dict[str, Any]] = {
    ("CompletionRequest", "prompt"): {"anyOf": [TEXT, MANY]},
    ("ResponsesRequest", "input"): {"anyOf": [TEXT, MANY]},
    ("Message", "content"): {"anyOf": [TEXT, MANY, {"type": "null"}]},
    ("ChatRequest", "stop"): {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
    ("CompletionRequest", "stop"): {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        }
    },
}


async def show_openapi(request: Request) -> Response:
    state = request.app.state
    if not hasattr(state, "openapi"):  # made once: it takes some 10 ms of the event loop
        state.openapi = document(request.app.routes)
    return JSONResponse(state.openapi)


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Describe an application's routes in OpenAPI 3.1."""
    shown = [route for route in routes if isinstance(route, Route) and route.include_in_schema]
    bodies: dict[str, Any] = {each.path: each.endpoint.body for each in shown if hasattr(each.endpoint, "body")}
    reference = "#/components/schemas/{model}"
    _, known = models_json_schema([(body, "validation") for body in bodies.values()], ref_template=reference)
    schemas = known["$defs"]
    for (model, field), schema in WIDER.items():
        schemas[model]["properties"][field] = schema
    for body in bodies.values():
        if issubclass(body, TranslatedRequest):
            properties = schemas[body.__name__]["properties"]
            properties.pop("shared", None)  # two paths may read the same body
            if not issubclass(body, OllamaRequest):  # whose clients know options alone
                properties |= {name: schemas["ChatRequest"]["properties"][name] for name in CHAT_FIELDS} | properties
    paths: dict[str, Any] = {}
    for route in shown:
        path, methods = route.path.replace(":path", ""), (route.methods or set()) - {"HEAD"}
        paths[path] = {method.lower(): _operation(path) for method in sorted(methods)}
    for path, body in bodies.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        paths[path]["post"]["requestBody"] = {"required": True, "content": content}
    paths["/v1/models/{name}"]["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "echo-trt", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str) -> dict[str, Any]:
    """Describe what an endpoint answers, and whether it asks for a key."""
    kinds = ["text/plain"] if path == "/metrics" else ["application/json"]
    kinds += ["text/event-stream"] if path in STREAMS else ["application/x-ndjson"] if path in LINES else []
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "security": [{}] if path in OPEN else [{}, {"key": []}],
        "responses": {
            "200": {"description": "The answer.", "content": {kind: {} for kind in kinds}},
            "default": {"description": "A refusal or a failure.", "content": refused},
        },
    }
