"""What Ollama's API reports of the model and the server: /api/tags, /api/show and /api/version."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_trt import __version__
from echo_trt.server.bodies import reads
from echo_trt.server.fields import RequestBody
from echo_trt.server.ollama.request import without_tag
from echo_trt.server.ollama.types import OllamaDetails, OllamaModel, OllamaModels, OllamaShown, OllamaVersion

#: Version of Ollama whose API this is: clients refuse older ones.
OLLAMA = "0.13.0"
KIND = "echo-trt"
DETAILS: OllamaDetails = {
    "format": KIND,
    "family": KIND,
    "families": [KIND],
    "parameter_size": "",
    "quantization_level": "",
}


class ShowRequest(RequestBody):
    """The body of /api/show."""

    model: Annotated[str, AfterValidator(without_tag)] = ""
    verbose: bool = False

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        older = given.pop("name", "")
        return given | {"model": given.get("model") or older}


async def tags(request: Request) -> Response:
    """GET /api/tags: the model by each of its names."""
    modified = datetime.fromtimestamp(request.app.state.created, UTC).isoformat()
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in request.app.state.names}  # clients need one
    models: list[OllamaModel] = [
        {"name": name, "model": name, "digest": digest, "modified_at": modified, "size": 0, "details": DETAILS}
        for name, digest in digests.items()
    ]
    return JSONResponse(OllamaModels(models=models))


@reads(ShowRequest)
async def show(request: Request, requested: ShowRequest) -> Response:
    """POST /api/show: what the model is. Raises EngineError."""
    info = await request.app.state.client.model_info()
    shown: OllamaShown = {
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
    return JSONResponse(OllamaVersion(version=OLLAMA, echo_trt=__version__))
