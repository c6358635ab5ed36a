"""What a caller may ask of a request, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from echo_trt.errors import UserError

#: Stop token ids that one request may bring, its model's own included.
MAX_STOP_TOKENS = 8


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0 and top_p 1 are off. ``stop`` strings end the text and are left out of it.

    The same seed gives the same text, whichever policy, batch or load.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 1, "a whole number of 1 or more"),
            (
                "temperature",
                _is_number(self.temperature) and 0 <= self.temperature <= 100,
                "a number from 0 (greedy) to 100",
            ),
            ("top_k", _is_int(self.top_k) and self.top_k >= 0, "a whole number, 0 (off) or more"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and up to 1 (off)"),
            ("seed", _is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
            ("stop", _each(self.stop, lambda s: isinstance(s, str) and s), "a list of strings that are not empty"),
            ("stop_token_ids", _each(self.stop_token_ids, lambda t: _is_int(t) and t >= 0), "token ids of 0 or more"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {rule}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _each(values: object, valid: Callable[[Any], object]) -> bool:
    return isinstance(values, tuple | list) and all(map(valid, values))  # a bare string is not a list of characters


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is not itself


@dataclass
class Completion:
    """A finished request. ``accepted_length`` is tokens emitted per verification, 1.0 without speculation.

    finish_reason: "stop" (end of text, a stop token or string) or "length".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    accepted_length: float
    prompt_tokens: int


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
    were found in the prefix cache, and prompt_tokens computed.
    """

    iterations: int = 0
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
    seconds: dict[str, float] = field(default_factory=dict)

    def copy(self) -> Counters:
        return replace(self, seconds=dict(self.seconds))

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per request and verification."""
        return self.emitted_tokens / self.verifications if self.verifications else 0.0
