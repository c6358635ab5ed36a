"""The names of the model that is served, and /v1/models."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_trt.server.errors import ApiError


async def models(request: Request) -> Response:
    """GET /v1/models: the model, by each of its names."""
    names = request.app.state.names
    return JSONResponse({"object": "list", "data": [_model(request, name) for name in names]})


async def one_model(request: Request) -> Response:
    """GET /v1/models/NAME; 404 for another name."""
    name = request.path_params["name"]
    check_model(request, name)
    return JSONResponse(_model(request, name))


def check_model(request: Request, name: str | None) -> None:
    """Raise ApiError for a name that is not served; None: there is one model alone."""
    names = request.app.state.names
    if name is not None and name not in names:
        known = " or ".join(f"'{each}'" for each in names[:4])
        message = f"The model {name[:80]!a} does not exist here; ask for {known}."
        raise ApiError(404, message, param="model", code="model_not_found")


def _model(request: Request, name: str) -> dict[str, Any]:
    state = request.app.state
    root = state.names[0]
    return {"id": name, "object": "model", "created": state.created, "owned_by": "echo-trt", "root": root}
