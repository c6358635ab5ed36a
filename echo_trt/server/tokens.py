"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_trt.engine.process.client import EngineError
from echo_trt.engine.text.prompts import PromptInput
from echo_trt.models.messages import MAX_TOOLS
from echo_trt.server.answer_types import DetokenizedText, TokenizedText
from echo_trt.server.bodies import reads
from echo_trt.server.chats import chat_for
from echo_trt.server.errors import ApiError, from_engine, from_validation
from echo_trt.server.fields import FIELDS, MESSAGES, RequestBody, at_most
from echo_trt.server.schemas import ChatRequest, in_range
from echo_trt.server.text_client import TextClient


class TokenizeRequest(RequestBody):
    """The body of /tokenize: a text, or a chat as it is put into the chat template."""

    model: str | None = None  # None: the one there is
    prompt: str | None = None
    messages: Annotated[list[Any], at_most(MESSAGES, "messages")] | None = None
    tools: Annotated[list[Any], at_most(MAX_TOOLS, "tools")] = Field([])
    chat_template_kwargs: Annotated[dict[str, Any], at_most(FIELDS, "variables")] = Field({})
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "Give either prompt or messages.", param="prompt")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            name = "tools" if self.tools else "chat_template_kwargs"
            raise ApiError(400, f"{name} is only allowed beside messages.", param=name)
        if self.messages is not None and self.add_special_tokens:
            message = "add_special_tokens is true, but a chat template writes its own; leave it out."
            raise ApiError(400, message, param="add_special_tokens")
        _ = self.chat
        return self

    @cached_property
    def chat(self) -> ChatRequest | None:
        """The chat that ``messages`` are. Raises ApiError."""
        if self.messages is None:
            return None
        body = {name: value for name, value in self if name in ("messages", "tools", "chat_template_kwargs")}
        try:
            return ChatRequest.model_validate({"model": "", **body})
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from None


class DetokenizeRequest(RequestBody):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], BeforeValidator(in_range)]


@reads(TokenizeRequest)
async def tokenize(request: Request, requested: TokenizeRequest) -> Response:
    state = request.app.state
    info = await state.client.model()
    prompt: PromptInput = requested.prompt or ""
    names: dict[str, str] = {}
    if requested.chat:
        chat = chat_for(requested.chat, info)
        prompt, names = chat.prompt, chat.names
    ids = await token_ids(state.client, prompt, names, requested.add_special_tokens is not False)
    return JSONResponse(TokenizedText(count=len(ids), max_model_len=info.context, tokens=ids))


async def token_ids(client: TextClient, prompt: PromptInput, names: dict[str, str], special: bool = True) -> list[int]:
    """Return the tokens of a prompt. Raises ApiError, in terms of ``names``.

    ``special``: the tokenizer's own around a text, too.
    """
    try:
        return await client.token_ids(prompt, special)
    except EngineError as error:
        raise from_engine(error.failure, names) from None


@reads(DetokenizeRequest)
async def detokenize(request: Request, requested: DetokenizeRequest) -> Response:
    if not requested.tokens:
        return JSONResponse(DetokenizedText(prompt=""))
    return JSONResponse(DetokenizedText(prompt=await request.app.state.client.text(requested.tokens)))
