"""The offline interface: ``LLM(bundle).generate(prompts)`` continues texts, ``chat(conversations)`` answers them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echo_trt.engine.assemble import load_networks
from echo_trt.engine.core import EngineCore
from echo_trt.engine.host_memory import bytes_in
from echo_trt.engine.parameter import INT32, Parameter
from echo_trt.engine.params import (
    MAX_AT_ONCE,
    TOKEN_SOURCES,
    Completion,
    Counters,
    Delta,
    SamplingParams,
    TokenLogprobs,
    TokenSource,
)
from echo_trt.engine.request import Request
from echo_trt.engine.text.prompts import with_prediction_ids
from echo_trt.engine.text.stream import AnswerText
from echo_trt.engine.tuning import Tuning
from echo_trt.errors import UserError, encodable, shown
from echo_trt.files.extras import extra, registered
from echo_trt.grammar.compiler import GrammarCompiler
from echo_trt.grammar.state import ReasoningState, Vocabulary
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.messages import Messages, Tools, checked_messages, checked_tools
from echo_trt.models.tokenizer import REASONING, load_tokenizer, think_tokens
from echo_trt.speculation.planner import Planner

TextOrIds = str | Sequence[int]
Prompts = str | Sequence[TextOrIds]  # a string is a single prompt
RequestParams = SamplingParams | Sequence[SamplingParams] | None
BATCH, BUDGET = (Parameter(default=None, kind=int, doc="", low=1, high=high) for high in (MAX_AT_ONCE, INT32))


class LLM:
    """A bundle, ready to answer. Not for several threads at once."""

    def __init__(
        self,
        bundle: str | Path,
        policy: str | None = None,
        batch: int | None = None,
        budget: int | None = None,
        note: Callable[[str], None] = lambda sentence: None,
        prefix_cache: bool | None = None,
        special_tokens_in_content: bool = False,
        kv_cache_memory: int | str | None = None,
        costs: Path | None = None,
        learn_answers: bool = False,
    ):
        """``policy``, ``batch`` (running requests), ``budget`` (K_max) and ``prefix_cache`` override the recipe's.

        ``kv_cache_memory``: bytes of the KV pool, or a text as on the command line, such as "4G"; by default the
        recipe's blocks, or on a CPU what the memory has room for, up to a whole context for each running request.
        ``costs``: a file, or its folder, that keeps what passes cost on this machine; by default the bundle does.
        With ``learn_answers`` the policy goodput drafts from earlier answers, those to the same ``Sender.salt``.
        ``note`` is told, in a sentence, what a user should know of the start. With ``special_tokens_in_content`` a
        control token's name in a prompt, such as ``<|im_end|>``, becomes that token; else it is text.
        """
        BATCH.check("batch", batch)
        BUDGET.check("budget", budget)
        if kv_cache_memory is not None and not isinstance(kv_cache_memory, int):
            kv_cache_memory = bytes_in("kv_cache_memory", kv_cache_memory)
        folder = Path(bundle)
        self.networks = load_networks(folder, batch, prefix_cache, kv_cache_memory, learn_answers)
        for name in registered("networks"):  # wrappers of engines
            self.networks = extra("networks", name)(self.networks, folder, note)
        self.manifest = self.networks.manifest
        self.pool = self.networks.pool
        if self.pool.warning:
            note(self.pool.warning)
        self.tuning = Tuning(folder, self.networks, note, costs)
        self._planners: dict[tuple[str, int | None], Planner] = {}
        self.loop = self.networks.loop(self._planner(policy, budget))
        self.tokenizer = load_tokenizer(folder)
        self._chat = ChatEncoder(self.tokenizer, special_tokens_in_content)
        self._marks = think_tokens(self.tokenizer)
        tokens = Vocabulary(self.manifest.target.vocab_size, tuple(self.manifest.eos_token_ids))
        self.grammars = GrammarCompiler(self.tokenizer.backend_tokenizer.to_str(), tokens)

    @property
    def counters(self) -> Counters:
        return self.loop.counters

    def sampling(self, **given: Any) -> SamplingParams:
        """Parameters that are ``given``, and the model's own (generation_config.json) for what is left out.

        As the command line and the server do it; without any, those of a request that gives none.
        """
        return SamplingParams(**(self.manifest.sampling.given() | given))

    def set_policy(self, name: str | None, budget: int | None = None) -> None:
        """Plan by another policy from now on, None for the recipe's, or with another K_max; texts stay the same.

        A policy that was set before goes on with what it had learnt. The first that needs this machine's costs
        measures them, so nothing may be running then.
        """
        BUDGET.check("budget", budget)
        self.loop.planner = self._planner(name, budget)

    def _planner(self, name: str | None, budget: int | None) -> Planner:
        key = name or self.manifest.recipe.decoding.policy, budget
        if key not in self._planners:
            self._planners[key] = self.tuning.planner(*key)
        return self._planners[key]

    def chat_ids(
        self,
        conversation: str | Messages,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the bundle's chat template; a string is a single user turn.

        A bundle without a template takes the bare texts.
        """
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        return self._chat.ids(conversation, checked_tools(tools) if tools else None, chat_template_kwargs)

    def generate(self, prompts: Prompts, params: RequestParams = None) -> list[Completion]:
        """Continue texts as they are; completions come in the order of the prompts.

        A string is encoded with the tokenizer's special tokens, and no chat template; names of control tokens in it
        are control tokens. Token ids are taken as they are. ``params`` are for all prompts, or one for
        each; without, the model's own, ``sampling()``.
        """
        return _completions(self.stream(prompts, params))

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: RequestParams = None,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answer one conversation or several, each a list of ``{"role", "content"}``, in the bundle's chat template.

        ``tools`` are OpenAI's, for all conversations; turns may hold ``tool_calls``, and their results. The template
        writes them, and the answer is the model's text, calls included. ``chat_template_kwargs`` set variables of the
        template, such as {"enable_thinking": False}. Always returns a list, in the order of the conversations.
        """
        return _completions(self.stream_chat(conversations, params, tools, chat_template_kwargs))

    def stream(self, prompts: Prompts, params: RequestParams = None, loop: EngineCore | None = None) -> Iterator[Delta]:
        """Do as ``generate``, a Delta for each new piece of text; a request's last one holds its Completion.

        ``loop``: another one over the same engines (``Networks.over``), to run in instead of the LLM's own.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = [
            self.tokenizer.encode(encodable(prompt, f"prompts[{index}]")) if isinstance(prompt, str) else prompt
            for index, prompt in enumerate(prompts)
        ]
        return self._deltas("prompts", ids, params, loop)

    def stream_chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: RequestParams = None,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Delta]:
        """Do as ``chat``, a Delta for each new piece of text; a request's last one holds its Completion."""
        several = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        rule = 'give a list such as [{"role": "user", "content": "hello"}].'
        ids = [
            self.chat_ids(checked_messages(messages, f"conversations[{index}]", rule), tools, chat_template_kwargs)
            for index, messages in enumerate(several)
        ]
        return self._deltas("conversations", ids, params)

    def _deltas(
        self, name: str, prompts: Sequence[Sequence[int]], params: RequestParams, loop: EngineCore | None = None
    ) -> Iterator[Delta]:
        """Run prompts of token ids; a refusal names the argument that they came in."""
        loop = loop or self.loop
        for given in params if isinstance(params, Sequence) else [] if params is None else [params]:
            if not isinstance(given, SamplingParams):
                raise UserError(
                    f"params is {shown(given)}; give SamplingParams(max_tokens=3), or one for each of {name}."
                )
        all_params = params if isinstance(params, Sequence) else [params or self.sampling()] * len(prompts)
        if len(all_params) != len(prompts):
            one = name.removesuffix("s")
            raise UserError(
                f"params has {len(all_params)} entries for {len(prompts)} {name}; give one, or one per {one}."
            )
        if loop.scheduler.busy:
            raise UserError("another stream of this LLM is still open; finish or close it first.")
        open_requests: dict[Request, AnswerText] = {}
        try:
            for index, (ids, prompt_params) in enumerate(zip(prompts, all_params, strict=True)):
                try:
                    request = self.request(index, ids, prompt_params)
                    loop.scheduler.add(request)
                except UserError as error:
                    raise UserError(f"{name}[{index}]: {error}") from error
                open_requests[request] = self.text_of(request)
            while open_requests:
                for request, tokens in loop.step():
                    text = open_requests[request]
                    before = text.used
                    piece, _, offsets = text.follow(request, tokens, loop.scheduler.cancel)
                    reported = (
                        (request.sources[before : text.used], offsets) if request.params.token_sources else ((), ())
                    )
                    if request.finish_reason:
                        del open_requests[request]
                        yield Delta(request.id, piece, text.completion(request), *reported)
                    elif piece or reported[0]:
                        yield Delta(request.id, piece, None, *reported)
        finally:  # an abandoned stream leaves nothing behind
            for request in open_requests:
                loop.scheduler.cancel(request)

    def request(self, id: int, ids: Sequence[int], params: SamplingParams) -> Request:
        """Make a request for the loop. Raises UserError for what this model cannot answer."""
        self.prepare(request := Request(id, np.asarray(ids, np.int64), params))
        return request

    def text_of(self, request: Request) -> AnswerText:
        """Begin the text of a request's answer, behind what it has ``generated``."""
        return AnswerText(self.tokenizer.backend_tokenizer, request.params, request.generated)

    def prepare(self, request: Request, compiled: bool = True) -> None:
        """Check a request that the loop has not seen, which goes on behind what it has ``generated``.

        Log-probabilities and sources of generated tokens are not known here.
        ``compiled``: false leaves its grammar to ``set_grammar``. Raises UserError.
        """
        params = request.params = with_prediction_ids(request.params, self.tokenizer)
        self.checked(params.prediction_ids, "prediction")
        self.checked([*params.logit_bias], "logit_bias")
        self.checked(params.stop_token_ids, "stop_token_ids")
        budget = params.thinking_token_budget
        if self._marks is None and budget is not None:
            raise UserError(
                f"thinking_token_budget is {budget}, but this model does not think (its tokenizer has no token "
                f"{REASONING[1]}); leave it out.",
                "thinking_token_budget",
            )
        request.prompt = self.checked(request.prompt)
        generated = request.generated = self.checked(request.generated).tolist()
        reasoning = self._reasoning(request.prompt, params)
        if (
            reasoning
            and budget is not None
            and budget < params.min_tokens
            and reasoning.closes in params.stop_token_ids
        ):
            raise UserError(
                f"min_tokens is {params.min_tokens}, but thinking_token_budget ends the thought after {budget} tokens "
                f"by {REASONING[1]}, which is among stop_token_ids; give min_tokens up to {budget}.",
                "min_tokens",
            )
        if params.logprobs is not None:
            request.logprobs = [TokenLogprobs(token, math.nan) for token in generated]
        if params.token_sources:
            request.sources = [TokenSource(token, TOKEN_SOURCES[0]) for token in generated]
        if compiled:
            self.set_grammar(request)

    def set_grammar(self, request: Request) -> None:
        """Give a request the state that its text is in under its grammar. Any thread may. Raises UserError."""
        params, grammar = request.params, None
        if params.structured is not None or params.thinking_token_budget is not None:
            grammar = self.grammars.begin(params.structured, self._reasoning(request.prompt, params))
        for token in request.generated if grammar else ():
            grammar = grammar.after(token) if grammar else None
        request.grammar = grammar

    def _reasoning(self, prompt: np.ndarray, params: SamplingParams) -> ReasoningState | None:
        """Return the thought that a prompt [n] leaves open, or that may begin behind it."""
        if self._marks is None:
            return None
        return ReasoningState.following(prompt.tolist(), *self._marks, params.thinking_token_budget)

    def checked(self, ids: Sequence[int] | np.ndarray, name: str = "prompt") -> np.ndarray:
        """Return token ids as the engine core takes them [n] int64; ids that the target does not have are refused."""
        array = np.asarray(ids, np.int64).reshape(-1)
        size = self.manifest.target.vocab_size
        unknown = array[(array < 0) | (array >= size)]
        if len(unknown):
            raise UserError(f"{name} holds token id {unknown[0]}; give ids from 0 to {size - 1}.", name)
        return array


def _completions(deltas: Iterator[Delta]) -> list[Completion]:
    finished = {delta.index: delta.completion for delta in deltas if delta.completion}
    return [finished[index] for index in range(len(finished))]
