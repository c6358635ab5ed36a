"""What Ollama's API reports of the model and the server: /api/tags, /api/ps, /api/show and /api/version."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, cast

from pydantic import AfterValidator
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from echo_trt import __version__
from echo_trt.engine.process.client import EngineError
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

    ALSO = ("name",)

    model: Annotated[str, AfterValidator(without_tag)] = ""
    verbose: bool = False

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = super().kept(given)
        older = given.pop("name", "")
        return given if given.get("model", "") != "" else given | {"model": older}


async def tags(request: Request) -> Response:
    """GET /api/tags: the model by each of its names."""
    modified = datetime.fromtimestamp(request.app.state.created, UTC).isoformat()
    return JSONResponse(OllamaModels(models=await _models(request, modified_at=modified)))


async def running(request: Request) -> Response:
    """GET /api/ps: the same, for the model is always loaded."""
    models = await _models(request, expires_at="9999-12-31T23:59:59Z", size_vram=0)
    return JSONResponse(OllamaModels(models=models))


async def alive(request: Request) -> Response:
    """GET /, which Ollama's command asks before anything else."""
    return PlainTextResponse("Ollama is running")


async def _models(request: Request, **more: Any) -> list[OllamaModel]:
    size = 0
    with suppress(EngineError):  # it is away
        size = (await request.app.state.client.model()).size
    about = {"size": size, "details": DETAILS, **more}
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in request.app.state.names}  # clients need one
    named = [{"name": name, "model": name, "digest": digest, **about} for name, digest in digests.items()]
    return cast(list[OllamaModel], named)


@reads(ShowRequest)
async def show(request: Request, requested: ShowRequest) -> Response:
    """POST /api/show: what the model is. Raises EngineError."""
    info = await request.app.state.client.model()
    shown: OllamaShown = {
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in info.sampling.items()),
        "template": info.template,
        "details": DETAILS,
        "model_info": {
            "general.architecture": KIND,
            "general.basename": requested.model,
            f"{KIND}.context_length": info.context,
        },
        "capabilities": ["completion", "tools", *(["thinking"] if info.thinking else [])],
    }
    return JSONResponse(shown)


async def version(request: Request) -> Response:
    """GET /api/version."""
    return JSONResponse(OllamaVersion(version=OLLAMA, echo_trt=__version__))
