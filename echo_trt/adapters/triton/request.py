"""What a request to Triton says: its tensors become a job, and what is wanted back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from echo_trt.adapters.triton.inputs import ALIASES, DEFAULTS, MAX_STOP_WORDS
from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.params import MAX_LOGPROBS, SINGLE, SamplingParams
from echo_trt.engine.process.pending import Pending
from echo_trt.engine.request import Request
from echo_trt.engine.service.job import Job
from echo_trt.engine.text.prompts import RULE, ChatPrompt, PromptInput, PromptReader
from echo_trt.engine.text.stream import OutgoingText
from echo_trt.errors import UserError
from echo_trt.models.messages import checked_messages, checked_tools

PROMPTS = ("input_ids", "chat_messages", "text_input")
IN_CHATS = ("tools", "chat_template_kwargs")  # inputs that mean nothing without a chat template


@dataclass(eq=False, kw_only=True)
class Reply(Pending):
    """An open answer to a client of Triton's.

    out         the answer's text
    statistics  whether its client wants them
    sender      takes responses, of which ``index`` were sent
    coded       whether an error's message begins with its code
    """

    out: OutgoingText
    statistics: bool = False
    sender: Any = None
    coded: bool = False
    index: int = 0
    ended: bool = False


class Reader:
    """Reads requests for a bundle."""

    def __init__(
        self, prompts: PromptReader, sampling: Mapping[str, float] | None = None, classes: LatencyClasses | None = None
    ):
        """Prepare to read requests.

        sampling  parameters of requests that leave them out (``Manifest``)
        classes   of latency targets
        """
        self._prompts, self._sampling, self._classes = prompts, dict(sampling or {}), classes or LatencyClasses()

    def read(self, inputs: Mapping[str, Any]) -> Reply:
        """Return what ``inputs`` ask for. Raises UserError.

        inputs  plain values by their names in ``INPUTS``; what is absent has its default
        """
        inputs = self._sampling | _renamed(inputs)
        prompt = _prompt(inputs)
        ids = self._prompts.ids(prompt, bool(_value(inputs, "add_special_tokens")))
        deadline = _value(inputs, "deadline_ms")
        if deadline < 0:
            raise UserError(f"deadline_ms is {deadline}; give milliseconds, or 0 for none.")
        max_tokens, min_tokens = _value(inputs, "max_tokens"), _value(inputs, "min_length")
        if min_tokens > max_tokens >= 1:  # what is wrong with max_tokens itself is said below
            raise UserError(
                f"min_length is {min_tokens}; give a whole number from 0 (off) to max_tokens, {max_tokens}."
            )
        params = SamplingParams(
            **{name: _value(inputs, known.tensor or name) for name, known in SINGLE.items()}
            | {
                "top_p": _value(inputs, "top_p") or 1.0,  # clients of TensorRT-LLM send 0 for "off"
                "stop": _stop_words(inputs),
                "stop_token_ids": tuple(inputs.get("stop_token_ids", ())),
                "logprobs": _logprobs(inputs),
                "logit_bias": _logit_bias(inputs),
                "structured": _json(inputs, "structured"),
                "prediction": _value(inputs, "prediction"),
                "latency": self._classes.read(inputs.get("latency", "")),
            }
        )
        params = self._prompts.params(prompt, params)
        request = Request(-1, np.asarray(ids, np.int64), params, priority=_value(inputs, "priority"))
        echoes = not _value(inputs, "exclude_input_in_output")
        return Reply(
            job=Job(request, seconds=deadline / 1000 if deadline else None),
            streamed=_value(inputs, "stream"),
            statistics=_value(inputs, "return_perf_metrics"),
            out=OutgoingText(self._prompts, prompt, ids, params, echoes),
        )


def _prompt(inputs: Mapping[str, Any]) -> PromptInput:
    given = [name for name in PROMPTS if name in inputs]
    if len(given) != 1:
        raise UserError(f"{' and '.join(given) or 'no prompt'} given; give one of {', '.join(PROMPTS)}.")
    chat = given[0] == "chat_messages" or (given[0] == "text_input" and _value(inputs, "chat"))
    for name in IN_CHATS:
        if name in inputs and not chat:
            raise UserError(f"{name} given without a chat; give chat_messages, or leave it out.")
    if not chat:
        return list(inputs["input_ids"]) if given[0] == "input_ids" else str(inputs["text_input"])
    text = inputs[given[0]]
    turns = _messages(text) if given[0] == "chat_messages" else [{"role": "user", "content": text}]
    return ChatPrompt(turns, _tools(inputs), _kwargs(inputs))


def _renamed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs under our own names. Raises UserError where one comes under two."""
    twice = next((alias for alias, name in ALIASES.items() if alias in inputs and name in inputs), None)
    if twice:
        raise UserError(f"{twice} and {ALIASES[twice]} are both given, and mean the same; give one of them.")
    return {ALIASES.get(name, name): tensor for name, tensor in inputs.items()}


def _tools(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = _json(inputs, "tools")
    return checked_tools(tools) if tools is not None and tools != [] else []


def _kwargs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = _json(inputs, "chat_template_kwargs")
    if not isinstance(kwargs, dict | None):
        raise UserError('chat_template_kwargs is no JSON object; give one, such as {"enable_thinking": false}.')
    if not all(isinstance(text, str) and text.isprintable() for text in kwargs or ()):
        raise UserError("chat_template_kwargs has a name that cannot be printed; give names of variables.")
    return kwargs or {}


def _messages(text: str) -> list[dict[str, Any]]:
    rule = RULE.replace("a list", "a JSON list")
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
