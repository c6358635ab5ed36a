"""What a caller may ask of a request, and what comes back."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from echo_trt.errors import UserError

#: Requests at most that run at once.
MOST_AT_ONCE = 4096
#: Stop token ids that one request may bring, its model's own included.
MAX_STOP_TOKENS = 8
#: Best tokens at most whose log-probabilities are told beside the emitted one's.
MAX_LOGPROBS = 20
#: Tokens at most whose logits one request may bias.
MAX_BIASED = 300
#: Characters at most of a stop string.
MAX_STOP_CHARACTERS = 1000
#: The largest count or token id.
MOST = 2**31 - 1
#: Each penalty, and the value at which it is off.
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

_SHORT = reprlib.Repr()
_SHORT.fillvalue = "…"


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0 or -1 and top_p 1 are off. ``stop`` strings end the text and are left out of it.

    The same seed gives the same text wherever the logits are the same, whichever policy, batch or load. In bf16 their
    rounding depends on those, but for the policies autoregressive and goodput-exact on CPUs (docs/exactness.md says how
    often texts part). The draws are those of places in the whole text, so the text so far, as the prompt of another
    request with the same seed, is continued as it would have been.

    presence_penalty and frequency_penalty are OpenAI's, over generated tokens; repetition_penalty is Hugging Face's,
    over the prompt too, and comes first (``decoding.penalties``). They precede temperature, and hold for greedy text.

    logit_bias (token id -> -100 to 100) is added to logits after the penalties. Before ``min_tokens`` are generated no
    stop token is chosen and no stop string looked for.

    ``logprobs`` asks for the log-probability of every emitted token and of so many of the best tokens at its place;
    None is off. They are the log-softmax of the target's own logits, before all of these and temperature.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("max_tokens", _is_count(self.max_tokens) and self.max_tokens >= 1, "a whole number from 1 to 2^31 - 1"),
            (
                "temperature",
                _is_number(self.temperature) and 0 <= self.temperature <= 100,
                "a number from 0 (greedy) to 100",
            ),
            (
                "top_k",
                _is_int(self.top_k) and -1 <= self.top_k <= MOST,
                "a whole number from 0 (off) to 2^31 - 1, or -1 (off too)",
            ),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and up to 1 (off)"),
            ("seed", _is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
            (
                "stop",
                _each(self.stop, lambda s: isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS),
                f"a list of strings of 1 to {MAX_STOP_CHARACTERS} characters",
            ),
            ("stop_token_ids", _each(self.stop_token_ids, _is_count), "token ids from 0 to 2^31 - 1"),
            ("presence_penalty", _is_penalty(self.presence_penalty), "a number from -2 to 2, 0 is off"),
            ("frequency_penalty", _is_penalty(self.frequency_penalty), "a number from -2 to 2, 0 is off"),
            (
                "repetition_penalty",
                _is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 100,
                "a number above 0 and up to 100, 1 is off",
            ),
            (
                "logprobs",
                self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
                f"a whole number from 0 to {MAX_LOGPROBS}, or None (off)",
            ),
            ("logit_bias", _is_bias(self.logit_bias), f"numbers from -100 to 100 by token id, at most {MAX_BIASED}"),
            (
                "min_tokens",
                _is_count(self.min_tokens) and _is_count(self.max_tokens) and self.min_tokens <= self.max_tokens,
                f"a whole number from 0 (off) to max_tokens, {self.max_tokens}",
            ),
        ):
            if not valid:
                raise UserError(f"{name} is {_SHORT.repr(getattr(self, name))}; give {rule}.")

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything comes between the target's logits and the choice of a token."""
        penalised = any(getattr(self, name) != off for name, off in PENALTIES.items())
        return penalised or bool(self.logit_bias) or self.min_tokens > 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_int(value) and 0 <= value <= MOST


def _each(values: object, valid: Callable[[Any], object]) -> bool:
    return isinstance(values, tuple | list) and all(map(valid, values))  # a bare string is not a list of characters


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is not itself


def _is_penalty(value: object) -> bool:
    return _is_number(value) and -2 <= value <= 2


def _is_bias(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASED
        and all(map(_is_count, value))
        and all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    )


@dataclass(frozen=True)
class TokenLogprobs:
    """An emitted token's natural log-probability, and ``top``, those of the best tokens at its place, best first.

    ``top`` holds (token id, logprob); the emitted token need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """A finished request. ``accepted_length`` is tokens emitted per verification, 1.0 without speculation.

    finish_reason: "stop" (end of text, a stop token or string) or "length". ``logprobs`` has an entry for each of the
    ``token_ids``, None unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    accepted_length: float
    prompt_tokens: int
    logprobs: list[TokenLogprobs] | None = None


@dataclass
class Delta:
    """New text of the prompt at ``index``; ``completion`` comes with its last one."""

    index: int
    text: str
    completion: Completion | None = None


@dataclass
class Counters:
    """What the loop has done so far; ratios of these are the figures that users see.

    Prompts include the text of requests that were set back. asked_tokens of them were admitted; of these cached_tokens
    were found in the prefix cache, and prompt_tokens computed. reached: depth -> a request's drafts that had candidates
    there; at depth 0 all verifications but those that end a prompt, at 1 those with a draft.
    """

    iterations: int = 0
    speculative_iterations: int = 0
    emitted_tokens: int = 0
    verified_tokens: int = 0
    drafted_tokens: int = 0
    draft_passes: int = 0
    verifications: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    asked_tokens: int = 0
    cached_tokens: int = 0
    evicted_blocks: int = 0
    reached: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def copy(self) -> Counters:
        return replace(self, reached=self.reached.copy(), seconds=dict(self.seconds))

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per request and verification."""
        return self.emitted_tokens / self.verifications if self.verifications else 0.0
