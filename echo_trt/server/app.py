"""The HTTP application: endpoints of OpenAI, Anthropic and Ollama, health and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from echo_trt import __version__
from echo_trt.engine.params import MAX_PROMPT_LOGPROBS, check_answer_logprobs, check_prompt_logprobs
from echo_trt.engine.process.client import EngineError
from echo_trt.engine.process.wire import Submit, failure_for
from echo_trt.engine.service import MODEL
from echo_trt.engine.text.prompts import PromptInput
from echo_trt.errors import UserError
from echo_trt.server.answer_types import Health, Version
from echo_trt.server.answers import Answer, ChatAnswer, EventStream, TextAnswer
from echo_trt.server.anthropic.answer import MessagesAnswer
from echo_trt.server.anthropic.request import CountTokensRequest, MessagesRequest
from echo_trt.server.anthropic.types import CountedTokens
from echo_trt.server.bodies import Bodies, reads, with_ignored
from echo_trt.server.chats import chat_for
from echo_trt.server.choices import ClientGone, PieceStream, merged, prompts_alone
from echo_trt.server.edge import OPEN, AuthMiddleware, Cors
from echo_trt.server.errors import ApiError, from_engine, shown
from echo_trt.server.keys import Key, Keys, sender
from echo_trt.server.live import Live, show_about, show_live
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.ollama import models as ollama_models
from echo_trt.server.ollama.answer import OllamaAnswer, line
from echo_trt.server.ollama.request import GenerateRequest, OllamaChatRequest, OllamaRequest
from echo_trt.server.openapi import show_openapi
from echo_trt.server.options import ANY, checked_hosts, checked_names, checked_origins
from echo_trt.server.page_files import PageFiles
from echo_trt.server.request_log import HUNG_UP, RequestLines, RequestLog
from echo_trt.server.responses.answer import Response as ResponsesAnswer
from echo_trt.server.responses.request import ResponsesRequest
from echo_trt.server.responses.types import CountedInput
from echo_trt.server.schemas import ChatRequest, CompletionRequest
from echo_trt.server.served import models, one_model
from echo_trt.server.text_client import ModelFacts, Question, TextClient
from echo_trt.server.tokens import detokenize, token_ids, tokenize
from echo_trt.server.translated import TranslatedRequest
from echo_trt.server.turns import OutputParser
from echo_trt.server.unserved import refusal

LARGEST_BODY = 2**20  # bytes


def create_app(
    engine: Path,
    api_keys_file: Path | None = None,
    largest_body: int = LARGEST_BODY,
    names: Sequence[str] = (MODEL,),
    origins: Sequence[str] = (),
    page: bool = True,
    hosts: Sequence[str] | None = None,
    classes: Collection[str] | None = None,
    request_log: bool = True,
    strict_fields: bool = False,
    bundle: Path | None = None,
) -> Starlette:
    """Make the application of the engine at a socket. Raises UserError for unusable keys, an odd name or origin.

    engine         path of the socket, which need not be there yet
    api_keys_file  None: everyone may ask
    largest_body   bytes
    names          what clients may call the model; with * anything
    origins        web pages that may ask
    page           whether / is the live page
    hosts          names of this server beside this machine's own; None: any name, and any page that a browser lets ask
    classes        latency classes that keys may have; None: any
    request_log    whether the log has a line for each answered request; refused ones have theirs
    strict_fields  whether a field that is not known is refused, whatever it is
    """
    keys, metrics = Keys(api_keys_file, classes) if api_keys_file else None, ServerMetrics()
    lines = RequestLines(request_log)
    layers = [Middleware(RequestLog, lines=lines, keys=keys)]
    layers += [Middleware(Cors, origins=checked_origins(origins))] if origins else []
    shown = PageFiles() if page else None
    without_key = OPEN + tuple(shown.files if shown else ("/",))
    edge: dict[str, Any] = {"keys": keys, "largest_body": largest_body, "metrics": metrics, "without_key": without_key}
    layers.append(Middleware(AuthMiddleware, **edge, hosts=checked_hosts(hosts), origins=origins))

    handlers: dict[Any, Any] = {  # starlette's type asks of each that it handle any exception
        ApiError: _failed,
        EngineError: _failed,
        HTTPException: _frameworks,
        ClientDisconnect: _hung_up,  # while its body was read
        ClientGone: _hung_up,  # while it was answered
    }

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.client, app.state.bodies = TextClient(engine, bundle), Bodies(largest_body, strict_fields)
        app.state.live = Live(app.state.client)
        yield
        await app.state.live.close()
        await app.state.client.close()
        lines.close()

    app = Starlette(
        routes=[
            Route("/v1/models", models),  # where GET is answered, HEAD is too
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", chats(ChatRequest, ChatAnswer), methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/responses", chats(ResponsesRequest, ResponsesAnswer), methods=["POST"]),
            Route("/v1/responses/input_tokens", chats(ResponsesRequest, None), methods=["POST"]),
            Route("/v1/messages", chats(MessagesRequest, MessagesAnswer), methods=["POST"]),
            Route("/v1/messages/count_tokens", chats(CountTokensRequest, None), methods=["POST"]),
            Route("/api/chat", chats(OllamaChatRequest, OllamaAnswer), methods=["POST"]),
            Route("/api/generate", chats(GenerateRequest, OllamaAnswer), methods=["POST"]),
            Route("/api/tags", ollama_models.tags),
            Route("/api/ps", ollama_models.running),
            Route("/api/show", ollama_models.show, methods=["POST"]),
            Route("/api/version", ollama_models.version),
            Route("/health", health),
            Route("/ping", health, methods=["GET", "POST"]),  # SageMaker's name for it
            Route("/version", version),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/openapi.json", show_openapi),
            Route("/metrics", show_metrics),
            *(
                [Route("/live", show_live), Route("/live/about", show_about)]
                + [Route(path, shown.show, include_in_schema=False) for path in shown.files]
                if shown
                else [Route("/", ollama_models.alive, include_in_schema=False)]
            ),
        ],
        middleware=layers,
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would redirect to whatever the Host header says
    app.state.metrics, app.state.created, app.state.lines = metrics, int(time.time()), lines
    app.state.names = tuple(name for name in checked_names(names) if name != ANY) or (MODEL,)
    app.state.any_name = ANY in names
    app.state.page_build = shown.build if shown else ""
    return app


def chats(kind: type[ChatRequest | TranslatedRequest], answer_type: type[Answer[Any]] | None) -> Any:
    """Return the endpoint of an API that asks for a chat, or, without an answer, for its tokens."""

    async def endpoint(request: Request, requested: ChatRequest | TranslatedRequest) -> Response:
        state = request.app.state
        if isinstance(requested, OllamaRequest) and not requested.turns:  # the model is loaded already
            return JSONResponse(line(requested, "", {}, {"done": True, "done_reason": "load"}))
        try:
            info = await state.client.model()
            wanted = requested.chat_for_model(info)
            chat = chat_for(wanted, info)
            if answer_type is None:
                count = len(await token_ids(state.client, chat.prompt, chat.names))
                counted: Any = CountedTokens(input_tokens=count)
                if isinstance(requested, ResponsesRequest):
                    counted = CountedInput(object="response.input_tokens", input_tokens=count)
                return JSONResponse(counted)
            pieces = _pieces(request, wanted, info, [chat.prompt], chat.names, chat.structured)
            turns = [chat.turn() for _ in range(wanted.n)]
            response = await _sent(request, answer_type(requested, turns, state.metrics), pieces, requested.stream)
        except ApiError as error:
            raise requested.in_client_fields(error) from None
        if requested.left_out:
            response.headers["X-Tools-Left-Out"] = ", ".join(requested.left_out)
        return response

    return reads(kind)(endpoint)


@reads(CompletionRequest)
async def completions(request: Request, requested: CompletionRequest) -> Response:
    state, structured = request.app.state, requested.structured
    info = await state.client.model()
    await _check_echo(requested, state.client)
    names, fits = ({"structured": structured.field}, structured.for_engine()) if structured else ({}, None)
    pieces = _pieces(request, requested, info, requested.prompts, names, fits)
    pieces = prompts_alone(pieces) if requested.scores else pieces
    turns = [OutputParser() for _ in range(len(requested.prompt) * requested.n)]
    return await _sent(request, TextAnswer(requested, turns, state.metrics), pieces, requested.stream)


async def health(request: Request) -> Response:
    """GET /health: 200 where the engine answers, 503 where it does not."""
    await request.app.state.client.check()
    return JSONResponse(Health(status="ok"))


async def version(request: Request) -> Response:
    """GET /version: this package's."""
    return JSONResponse(Version(version=__version__))


async def show_metrics(request: Request) -> PlainTextResponse:
    """GET /metrics, for Prometheus: the API server's and the engine's."""
    text = await request.app.state.metrics.scrape(request.app.state.client.metrics)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


async def _sent(request: Request, answer: Answer[Any], pieces: PieceStream, stream: bool) -> Response:
    """Answer a chat or a completion. The HTTP status follows the first piece: what fails before it is no 200."""
    request.scope["record"].answer = answer
    if not stream:
        return JSONResponse(await answer.whole(pieces))
    return EventStream(answer, await anext(pieces), pieces)


async def _check_echo(requested: CompletionRequest, client: TextClient) -> None:
    """Refuse a request for too many log-probabilities of prompts. Raises ApiError.

    A token has a byte at least, so most requests are known to be small enough before texts become tokens.
    """
    if not requested.echo or requested.alternatives is None:
        return
    tokens = sum(len(prompt.encode() if isinstance(prompt, str) else prompt) for prompt in requested.prompt)
    if tokens * requested.n * (requested.alternatives + 1) > MAX_PROMPT_LOGPROBS:
        tokens = sum([len(await client.token_ids(prompt)) for prompt in requested.prompt])
    try:
        check_prompt_logprobs("logprobs", tokens, requested.n, requested.alternatives)
    except UserError as error:
        raise ApiError(400, str(error), param="logprobs") from None


def _check_entries(requested: ChatRequest | CompletionRequest, prompts: int, context: int) -> None:
    """Refuse a request for too many log-probabilities of its answers. Raises ApiError."""
    field = "max_completion_tokens" if getattr(requested, "max_completion_tokens", None) else "max_tokens"
    limit, choices = requested.limit, prompts * requested.n
    try:
        check_answer_logprobs(field, limit, min(limit, context), choices, requested.entries)
    except UserError as error:
        raise ApiError(400, str(error), param=field) from None


def _targets(request: Request, requested: ChatRequest | CompletionRequest) -> tuple[dict[str, float] | None, str]:
    """Return a request's latency targets, and the name of a class of them: its own, or its key's."""
    key: Key | None = request.scope.get("key")
    latency = requested.latency or (key and key.latency) or ""
    return (None, latency) if isinstance(latency, str) else (latency, "")


def _pieces(
    request: Request,
    requested: ChatRequest | CompletionRequest,
    info: ModelFacts,
    prompts: Sequence[PromptInput],
    names: dict[str, str],
    structured: dict[str, Any] | None,
) -> PieceStream:
    _check_entries(requested, len(prompts), info.context)
    latency, latency_class = _targets(request, requested)
    try:
        params = requested.sampling(info.sampling, structured=structured, latency=latency)
    except UserError as error:
        raise from_engine(failure_for(error), names) from None
    echoes = isinstance(requested, CompletionRequest) and requested.echo

    def question(prompt: PromptInput, seed: int) -> Question:
        submit = Submit(
            prompt=[],
            params=replace(params, seed=seed),
            latency_class=latency_class,
            priority=requested.priority or 0,
            deadline_ms=requested.deadline_ms or 0,
            streamed=requested.stream,
            sender=sender(request.scope.get("key"), requested.cache_salt),
        )
        return Question(prompt, submit, echoes)

    return merged(request, [question(prompt, seed) for prompt in prompts for seed in requested.seeds()], names)


async def _failed(request: Request, error: ApiError | EngineError) -> Response:
    refused = from_engine(error.failure) if isinstance(error, EngineError) else error
    return with_ignored(refused.response(request.scope), request)


async def _frameworks(request: Request, error: HTTPException) -> Response:
    message, path = str(error.detail), shown(request.scope["path"])
    if error.status_code == 404:
        routes = [route for route in request.app.routes if isinstance(route, Route) and route.include_in_schema]
        paths = [route.path for route in routes if "{" not in route.path]
        known, bare = ", ".join(paths), request.scope["path"].rstrip("/")
        why = f"there is no slash at its end; use {bare}" if bare in paths else refusal(request.scope["path"])
        message = f"{path}: {why}." if why else f"{path} is no path of this server; use one of {known}."
    elif error.status_code == 405 and error.headers:
        message = f"{path} does not take this method; use {error.headers['Allow']}."
    refused = ApiError(error.status_code, message, headers=error.headers)  # 405 has Allow
    return refused.response(request.scope)


async def _hung_up(request: Request, error: Exception) -> Response:
    request.app.state.metrics.disconnects.inc()
    return Response(status_code=HUNG_UP)
