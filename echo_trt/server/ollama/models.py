"""What Ollama's API reports of the model and the server: /api/tags, /api/show and /api/version."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_trt import __version__
from echo_trt.server.fields import Strict
from echo_trt.server.ollama.request import without_tag
from echo_trt.server.served import check_model

#: Version of Ollama whose API this is: clients refuse older ones.
OLLAMA = "0.13.0"
KIND = "echo-trt"
DETAILS = {"format": KIND, "family": KIND, "families": [KIND], "parameter_size": "", "quantization_level": ""}


class ShowRequest(Strict):
    """The body of /api/show. ``name`` is the older name of ``model``."""

    model: str = ""
    name: str = ""
    verbose: bool = False


async def tags(request: Request) -> Response:
    """GET /api/tags: the model by each of its names."""
    modified = datetime.fromtimestamp(request.app.state.created, UTC).isoformat()
    about = {"modified_at": modified, "size": 0, "details": DETAILS}
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in request.app.state.names}  # clients need one
    models = [{"name": name, "model": name, "digest": digest, **about} for name, digest in digests.items()]
    return JSONResponse({"models": models})


async def show(request: Request) -> Response:
    """POST /api/show: what the model is. Raises EngineError."""
    state = request.app.state
    requested = await state.bodies.read(request, ShowRequest)
    check_model(request, without_tag(requested.model or requested.name))
    info = await state.client.model_info()
    shown: dict[str, Any] = {
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in info.sampling.items()),
        "template": info.template,
        "details": DETAILS,
        "model_info": {"general.architecture": KIND, f"{KIND}.context_length": info.context},
        "capabilities": ["completion", "tools", *(["thinking"] if info.thinking else [])],
    }
    return JSONResponse(shown)


async def version(request: Request) -> Response:
    """GET /api/version."""
    return JSONResponse({"version": OLLAMA, "echo_trt": __version__})
