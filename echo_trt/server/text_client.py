"""The engine as the APIs see it: prompts and texts here, token ids on the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from echo_trt.engine.process.client import Client, EngineError
from echo_trt.engine.process.wire import ModelInfo, Submit, failure_for
from echo_trt.engine.request import Event
from echo_trt.engine.text.entries import LogprobEntry, SourceEntry
from echo_trt.engine.text.prompts import ChatFacts, PromptInput, PromptReader
from echo_trt.engine.text.stream import OutgoingText
from echo_trt.errors import UserError
from echo_trt.models.tokenizer import load_tokenizer

Result = TypeVar("Result")


@dataclass(kw_only=True)
class TextPiece:
    """New text of an answer.

    logprobs, sources  where asked for, entries of tokens whose text is in ``text``
    in_thought         whether the prompt has opened a thought
    prediction         tokens of the prediction, of which the answer has ``predicted``
    stop_string        of the last piece: the stop string that ended the text, if one did
    others             as of ``Event``
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    sources: list[SourceEntry] = field(default_factory=list)
    in_thought: bool = False
    prompt_tokens: int = 0
    finish_reason: str | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    predicted: int = 0
    saved_ms: float | None = None
    saved_error_ms: float | None = None
    prediction: int = 0
    stop_string: str = ""
    queue_ms: float | None = None
    first_token_ms: float | None = None


@dataclass(frozen=True)
class ModelFacts(ChatFacts):
    """What the APIs know of the model: also its ``context`` in tokens, recommended ``sampling``, and size in bytes."""

    context: int
    sampling: dict[str, float]
    size: int


@dataclass(frozen=True)
class Question:
    """A prompt, and what is asked of it; ``echoes``: whether its text precedes the answer's."""

    prompt: PromptInput
    submit: Submit
    echoes: bool = False


class TextClient(Client):
    """A client of the engine at a socket. Prompts are read on a thread of their own: a long one delays nobody."""

    def __init__(self, path: Path, bundle: Path | None = None):
        """``bundle``: loaded at once, while the engine starts; None: once the engine has named it."""
        super().__init__(path)
        self._thread = ThreadPoolExecutor(1, "prompts")
        self._bundle = bundle.absolute() if bundle else None
        self._loading = self._thread.submit(load_tokenizer, bundle) if bundle else None
        self._known: tuple[ModelInfo, PromptReader, ModelFacts] | None = None
        self._loaded: tuple[ModelInfo, PromptReader, ModelFacts] | None = None  # the thread's own

    async def close(self) -> None:
        await super().close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def model(self) -> ModelFacts:
        """Return the facts of the engine's model. Raises EngineError."""
        return (await self._model())[1]

    async def token_ids(self, prompt: PromptInput, special_tokens: bool = True) -> list[int]:
        """Return the tokens of a prompt. ``special_tokens``: the tokenizer's own around a text. Raises EngineError."""
        reader, _ = await self._model()
        return await self._on_thread(lambda: reader.ids(prompt, special_tokens))

    async def text(self, tokens: list[int]) -> str:
        """Return the text of tokens. Raises EngineError."""
        reader, _ = await self._model()
        return await self._on_thread(lambda: reader.text(tokens))

    async def answer(self, question: Question) -> AsyncGenerator[TextPiece]:
        """Yield pieces as they come. Close it early and the engine drops the request. Raises EngineError."""
        reader, _ = await self._model()
        prompt, submit = question.prompt, question.submit
        submit.prompt, submit.calls, submit.params = await self._on_thread(
            lambda: (reader.ids(prompt), reader.calls(prompt), reader.params(prompt, submit.params))
        )
        out = OutgoingText(reader, prompt, submit.prompt, submit.params, question.echoes)
        async with aclosing(self.submit(submit)) as answers:
            async for event in answers:
                if out.add(event):
                    self.stop(submit, out.text.used)
                if event.reason or out.unsent:
                    yield _piece(out, event)

    async def _model(self) -> tuple[PromptReader, ModelFacts]:
        info = structs.replace(await self.model_info(), id=0)
        if self._known is None or self._known[0] != info:
            self._known = await self._on_thread(lambda: self._load(info))
        return self._known[1:]

    def _load(self, info: ModelInfo) -> tuple[ModelInfo, PromptReader, ModelFacts]:
        """Load what a model's prompts take, once for all who wait for the thread."""
        if self._loaded and self._loaded[0] == info:
            return self._loaded
        bundle = Path(info.bundle)
        tokenizer = self._loading.result() if self._loading and bundle == self._bundle else None
        reader = PromptReader(bundle, info.context, info.special_tokens_in_content, tokenizer)
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        facts = ModelFacts(**vars(reader.facts), context=info.context, sampling=info.sampling, size=size)
        self._loaded = info, reader, facts
        return self._loaded

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except UserError as mistake:
            raise EngineError(failure_for(mistake)) from None


def _piece(out: OutgoingText, event: Event) -> TextPiece:
    text, token_ids = out.take()
    piece = TextPiece(text=text, token_ids=token_ids, in_thought=bool(out.in_thought), prompt_tokens=len(out.ids))
    piece.logprobs = out.logprobs.clear() if out.logprobs else []
    piece.sources = out.sources.clear() if out.sources else []
    if event.reason:
        piece.finish_reason, piece.stop_string = event.reason, out.text.stopped
        piece.completion_tokens, piece.cached_tokens = event.completion_tokens, event.cached_tokens
        piece.drafted, piece.accepted = event.drafted, event.accepted
        piece.predicted, piece.prediction = event.predicted, out.prediction
        piece.saved_ms, piece.saved_error_ms = _ms(event.saved), _ms(event.saved_error)
        piece.queue_ms, piece.first_token_ms = _ms(event.queue_seconds), _ms(event.first_token_seconds)
    return piece


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
