"""The names of the model that is served, and /v1/models."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_trt.engine.process.client import EngineError
from echo_trt.server.answer_types import ServedModel, ServedModels
from echo_trt.server.bodies import model_of
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
