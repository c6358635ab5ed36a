"""The names of the model that is served, and /v1/models."""

from __future__ import annotations

import difflib

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_trt.engine.process.client import EngineError
from echo_trt.server.answer_types import ServedModel, ServedModels
from echo_trt.server.errors import ApiError
from echo_trt.server.options import LONGEST
from echo_trt.server.text_client import TextClient


async def models(request: Request) -> Response:
    """GET /v1/models: the model, by each of its names."""
    context, names = await _context(request), request.app.state.names
    return JSONResponse(ServedModels(object="list", data=[_model(request, name, context) for name in names]))


async def one_model(request: Request) -> Response:
    """GET /v1/models/NAME; 404 for another name."""
    name = request.path_params["name"]
    model_of(request, name)
    return JSONResponse(_model(request, name, await _context(request)))


def model_of(request: Request, name: str | None) -> str:
    """Return the name that an answer has, the first one's where a request has none. Raises ApiError for another."""
    names = request.app.state.names
    if name and name not in names and not (request.app.state.any_name and len(name) <= LONGEST):
        known = " or ".join(f"'{each}'" for each in names[:4])
        near = difflib.get_close_matches(name[:80], names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        message = f"The model {name[:80]!a} does not exist here{hint}; ask for {known}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return name or names[0]


async def _context(request: Request) -> int | None:
    """Return the model's context in tokens; None while the engine is away."""
    client: TextClient = request.app.state.client
    try:
        return (await client.model()).context
    except EngineError:
        return None


def _model(request: Request, name: str, context: int | None) -> ServedModel:
    state = request.app.state
    model: ServedModel = {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "echo-trt",
        "root": state.names[0],
    }
    return {**model, "max_model_len": context, "meta": {"n_ctx": context}} if context else model
