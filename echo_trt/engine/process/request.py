"""What a request says: its inputs become a prompt, sampling parameters and what is wanted back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.params import MAX_LOGPROBS, SINGLE, SamplingParams
from echo_trt.engine.process import wire
from echo_trt.engine.process.inputs import ALIASES, DEFAULTS, MAX_STOP_WORDS
from echo_trt.engine.process.pending import Pending
from echo_trt.errors import TooLong, UserError
from echo_trt.grammar.state import AT_END
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.messages import checked_messages, checked_tools
from echo_trt.models.token_texts import TokenTexts
from echo_trt.models.tokenizer import REASONING, load_tokenizer, think_tokens

PROMPTS = ("input_ids", "chat_messages", "text_input")
IN_CHATS = ("tools", "chat_template_kwargs")  # inputs that mean nothing without a chat template


class Reader:
    """Reads requests for a bundle. It has a tokenizer of its own: the engine's thread uses another."""

    def __init__(
        self,
        bundle: Path,
        context: int,
        special_tokens_in_content: bool = False,
        sampling: Mapping[str, float] | None = None,
        classes: LatencyClasses | None = None,
    ):
        """Prepare to read requests.

        sampling  parameters of requests that leave them out (``Manifest``)
        classes   of latency targets
        """
        self._sampling, self._classes = dict(sampling or {}), classes or LatencyClasses()
        self._tokenizer = load_tokenizer(bundle)
        self._chat = ChatEncoder(self._tokenizer, special_tokens_in_content)
        self._texts = TokenTexts(self._tokenizer)
        self._marks = think_tokens(self._tokenizer)
        self._context = context
        self._size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        longest = max(map(len, self._tokenizer.get_vocab()))
        self._max_characters = context * longest  # a longer text cannot have as few tokens as fit

    def read(self, inputs: Mapping[str, Any], answer: Pending) -> None:
        """Put what ``inputs`` ask for into ``answer``. Raises UserError.

        inputs  plain values by their names in ``INPUTS``; what is absent has its default
        """
        inputs = self._sampling | _renamed(inputs)
        prompt, echoed = self._prompt(inputs)
        deadline = _value(inputs, "deadline_ms")
        if deadline < 0:
            raise UserError(f"deadline_ms is {deadline}; give milliseconds, or 0 for none.")
        max_tokens, min_tokens = _value(inputs, "max_tokens"), _value(inputs, "min_length")
        if min_tokens > max_tokens >= 1:  # what is wrong with max_tokens itself is said below
            raise UserError(
                f"min_length is {min_tokens}; give a whole number from 0 (off) to max_tokens, {max_tokens}."
            )
        answer.params = SamplingParams(
            **{name: _value(inputs, known.tensor or name) for name, known in SINGLE.items()}
            | {
                "top_p": _value(inputs, "top_p") or 1.0,  # clients of TensorRT-LLM send 0 for "off"
                "stop": _stop_words(inputs),
                "stop_token_ids": tuple(inputs.get("stop_token_ids", ())),
                "logprobs": _logprobs(inputs),
                "logit_bias": _logit_bias(inputs),
                "structured": _json(inputs, "structured"),
                "latency": self.latency(inputs.get("latency", "")),
            }
        )
        answer.prompt = np.asarray(prompt, np.int64)
        answer.streamed, answer.statistics = _value(inputs, "stream"), _value(inputs, "return_perf_metrics")
        answer.priority, answer.seconds = _value(inputs, "priority"), deadline / 1000 if deadline else None
        if self._marks:
            last = next((token for token in reversed(prompt[-AT_END:]) if token in self._marks), None)
            answer.in_thought = last == self._marks[0]
        answer.begin("" if _value(inputs, "exclude_input_in_output") else echoed, self._texts)

    def latency(self, text: str) -> dict[str, Any] | None:
        """Return the targets of a class's name or of JSON. Raises UserError."""
        return self._classes.read(text)

    def tokenized(self, inputs: Mapping[str, Any]) -> tuple[list[int], str | None]:
        """Token ids of a prompt; for ``input_ids`` their text, too. Raises UserError."""
        ids, _ = self._prompt(inputs)
        if "input_ids" not in inputs:
            return ids, None
        if len(ids) > self._context:
            raise TooLong(
                f"input_ids has {len(ids)} tokens, but this model's maximum context length is {self._context} tokens; "
                "send them in parts.",
                "input_ids",
            )
        largest = len(self._tokenizer) - 1
        unknown = next((token for token in ids if not 0 <= token <= largest), None)
        if unknown is not None:
            raise UserError(f"input_ids holds token id {unknown}; give ids from 0 to {largest}.", "input_ids")
        return ids, str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def model_info(self, id: int) -> wire.ModelInfo:
        """Answer the question ``id`` for what the model is."""
        thinking = wire.ThinkTokens(*REASONING, self._marks[1]) if self._marks else None
        chat = self._chat
        known = chat.source, chat.tokens, sorted(chat.variables), chat.takes_tools
        return wire.ModelInfo(id, *known, thinking, self._context, self._sampling, self._size)

    def _prompt(self, inputs: Mapping[str, Any]) -> tuple[list[int], str]:
        """Token ids, and the text that the caller may want to see before the answer."""
        given = [name for name in PROMPTS if name in inputs]
        if len(given) != 1:
            raise UserError(f"{' and '.join(given) or 'no prompt'} given; give one of {', '.join(PROMPTS)}.")
        chat = given[0] == "chat_messages" or (given[0] == "text_input" and _value(inputs, "chat"))
        for name in IN_CHATS:
            if name in inputs and not chat:
                raise UserError(f"{name} given without a chat; give chat_messages, or leave it out.")
        if given[0] == "input_ids":
            ids = list(inputs["input_ids"])
            echoed = not _value(inputs, "exclude_input_in_output") and all(0 <= i < len(self._tokenizer) for i in ids)
            return ids, str(self._tokenizer.decode(ids, skip_special_tokens=True)) if echoed else ""
        text = inputs[given[0]]
        if len(text) > self._max_characters:
            raise TooLong(
                f"the prompt has {len(text)} characters, but this model's maximum context length is "
                f"{self._context} tokens; shorten it.",
                "prompt",
            )
        if chat:
            turns = _messages(text) if given[0] == "chat_messages" else [{"role": "user", "content": text}]
            return self._chat.ids(turns, _tools(inputs), _kwargs(inputs)), ""
        special = bool(_value(inputs, "add_special_tokens"))
        return self._tokenizer(text, add_special_tokens=special)["input_ids"], text


def _renamed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs under our own names. Raises UserError where one comes under two."""
    twice = next((alias for alias, name in ALIASES.items() if alias in inputs and name in inputs), None)
    if twice:
        raise UserError(f"{twice} and {ALIASES[twice]} are both given, and mean the same; give one of them.")
    return {ALIASES.get(name, name): tensor for name, tensor in inputs.items()}


def _tools(inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = _json(inputs, "tools")
    return checked_tools(tools) if tools is not None and tools != [] else None


def _kwargs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = _json(inputs, "chat_template_kwargs")
    if not isinstance(kwargs, dict | None):
        raise UserError('chat_template_kwargs is no JSON object; give one, such as {"enable_thinking": false}.')
    if not all(isinstance(text, str) and text.isprintable() for text in kwargs or ()):
        raise UserError("chat_template_kwargs has a name that cannot be printed; give names of variables.")
    return kwargs or {}


def _messages(text: str) -> list[dict[str, Any]]:
    rule = 'give a JSON list of objects such as {"role": "user", "content": "..."}.'
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"chat_messages is not JSON; {rule}") from None
    return checked_messages(messages, "chat_messages", rule)


def _json(inputs: Mapping[str, Any], name: str) -> Any:
    """Return a value written as JSON, None where the input is absent or empty."""
    text = inputs.get(name, "")
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        raise UserError(f"{name} is not JSON, or too deep; send it written as JSON.") from None


def _logprobs(inputs: Mapping[str, Any]) -> int | None:
    """How many of the best tokens' are wanted beside the emitted one's, None for none at all."""
    wanted, top = _value(inputs, "return_log_probs"), _value(inputs, "top_logprobs")
    if top and not wanted:
        raise UserError(f"top_logprobs is {top} and return_log_probs is not true; set both.")
    if not 0 <= top <= MAX_LOGPROBS:
        raise UserError(f"top_logprobs is {top}; give a whole number from 0 to {MAX_LOGPROBS}.")
    return top if wanted else None


def _logit_bias(inputs: Mapping[str, Any]) -> dict[int, float]:
    tokens, bias = (inputs.get(name, []) for name in ("logit_bias_ids", "logit_bias"))
    if len(tokens) != len(bias):
        raise UserError(f"logit_bias_ids has {len(tokens)} values and logit_bias {len(bias)}; give as many of both.")
    return dict(zip(tokens, bias, strict=True))


def _stop_words(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    words = inputs.get("stop_words", [])
    if len(words) > MAX_STOP_WORDS:
        raise UserError(f"stop_words has {len(words)} entries; give at most {MAX_STOP_WORDS}.")
    return tuple(word for word in words if word)


def _value(inputs: Mapping[str, Any], name: str) -> Any:
    return inputs.get(name, DEFAULTS[name])
