"""What a caller may ask of a request, and what comes back."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from echo_trt.engine.latency import RULE as RULE_OF_LATENCY
from echo_trt.engine.latency import checked as check_latency
from echo_trt.engine.parameter import Parameter, parameter
from echo_trt.errors import UserError
from echo_trt.grammar.requested import RULE, checked
from echo_trt.speculation.sources import SOURCES, TARGET

#: Most requests that run at once.
MAX_AT_ONCE = 4096
#: Stop token ids that one request may bring, its model's own included.
MAX_STOP_TOKENS = 8
#: Most alternatives per token whose log-probabilities are returned.
MAX_LOGPROBS = 20
#: Log-probabilities at most of one request's echoed prompts: their tokens, times n, times the alternatives and one.
#: Larger: one short request takes more memory of the API server, some 450 bytes each, and holds up other streams
#: longer, by about 10 microseconds each. 8,192 tokens may have 11 alternatives.
MAX_PROMPT_LOGPROBS = 100_000
#: Log-probabilities at most of one request's answers: tokens, times choices, times the alternatives and one; a token's
#: source counts as one. Larger: as above. 8,192 tokens may have 20 alternatives and a source.
MAX_ANSWER_LOGPROBS = 200_000
#: Most tokens whose logits one request may bias.
MAX_BIASED = 300
#: Most characters of a stop string.
MAX_STOP_CHARACTERS = 1000

_SHORT = reprlib.Repr()
_SHORT.fillvalue = "…"


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued. It is complete, as in vLLM: what you leave out is greedy, and at most 256 tokens.

    The command line, the server and ``LLM.sampling(max_tokens=64)`` take what you leave out from the model's own
    recommendation (generation_config.json) first.

    The same seed gives the same text wherever the logits are the same, whichever policy, batch or load. In bf16 their
    rounding depends on those, but for the policies autoregressive and goodput-exact on CPUs (docs/exactness.md says how
    often texts part). A draw depends on the seed and the token's position in the whole text: a request whose prompt is
    another's text so far, with the same seed, continues as the other would have.

    presence_penalty and frequency_penalty are OpenAI's, over generated tokens; repetition_penalty is Hugging Face's,
    over the prompt too, and comes first (``speculation.sampling.penalties``). They precede temperature, and hold for
    greedy text.

    logit_bias (token id -> -100 to 100) is added to logits after the penalties. Before ``min_tokens`` are generated no
    stop token is chosen and no stop string looked for.

    ``structured`` makes the text fit a grammar, whatever the policy: {"json": schema}, {"json_object": True},
    {"regex": ...}, {"choice": [...]} or {"grammar": Lark or GBNF}. Tokens that it forbids are shut out after the bias.
    A reasoning model's thought is free, and takes up to ``thinking_token_budget`` tokens.

    ``latency`` has targets in milliseconds, {"ttft_ms": 300, "tpot_ms": 25} or one of them. The policy goodput keeps
    them as far as it can; the text does not depend on them.

    ``logprobs`` asks for the log-probability of every emitted token and of this number of best tokens at its position;
    None is off. They are the log-softmax of the target's own logits, before all of these and temperature.

    ``prediction`` is a text, or its tokens, that the answer is likely to repeat, in whole or in parts, such as a file
    that is edited. The policies goodput and goodput-exact draft from it; the text does not depend on it.

    ``token_sources`` asks who proposed each emitted token (``TokenSource``). Without ``speculate`` nothing is drafted
    for the request, whatever the policy; its text is the same, as far as a policy cannot change it.
    """

    max_tokens: int = parameter(256, "new tokens at most", low=1, option=True, openai=None)
    temperature: float = parameter(
        0.0, "0 is greedy", high=100, option=True, recommended=True, openai={"default": 1.0, "high": 2}
    )
    top_k: int = parameter(
        0,
        "draws from the k best tokens; 0 and -1 are off",
        low=-1,
        changes="limits",
        off=(-1, 1),  # 1 is greedy
        option=True,
        recommended=True,
    )
    top_p: float = parameter(
        1.0,
        "draws from the smallest set of best tokens with this share; 1 is off",
        high=1,
        above=True,
        changes="limits",
        option=True,
        recommended=True,
    )
    min_p: float = parameter(
        0.0,
        "draws from tokens with at least this share of the best one's; 0 is off",
        high=1,
        changes="limits",
        option=True,
        recommended=True,
    )
    seed: int = parameter(
        0,
        "repeats a text ([how far](exactness.md#what-a-seed-promises))",
        high=2**63 - 1,
        option=True,
        openai={"default": None, "low": -(2**63)},
    )
    stop: str | Sequence[str] = parameter(
        (),
        "strings that end the text, and are left out of it",
        rule=f"a list of strings of 1 to {MAX_STOP_CHARACTERS} characters",
        kind=str,
        low=1,
        high=MAX_STOP_CHARACTERS,
        option=True,
        tensor="stop_words",
    )
    stop_token_ids: Sequence[int] = parameter(
        (), "tokens that end the text, beside the model's own", rule="token ids from 0 to 2^31 - 1", kind=int
    )
    ignore_eos: bool = parameter(False, "goes on after the model's end token")
    presence_penalty: float = parameter(
        0.0, "taken off the logits of tokens that the answer holds", low=-2, high=2, changes="penalties", option=True
    )
    frequency_penalty: float = parameter(
        0.0,
        "taken off the logits of tokens, times how often the answer holds them",
        low=-2,
        high=2,
        changes="penalties",
        option=True,
    )
    repetition_penalty: float = parameter(
        1.0,
        "divides the logits of tokens that prompt or answer hold; 1 is off",
        high=100,
        above=True,
        changes="penalties",
        option=True,
        recommended=True,
    )
    logprobs: int | None = parameter(
        None,
        "log-probabilities of the answer's tokens, and of this number of best tokens at each position",
        kind=int,
        high=MAX_LOGPROBS,
        tensor="top_logprobs",
        openai=None,
    )
    prompt_logprobs: int | None = parameter(
        None,
        "log-probabilities of the prompt's tokens but the first, and of this number of best tokens at each position",
        kind=int,
        high=MAX_LOGPROBS,
        openai=None,
    )
    logit_bias: Mapping[int, float] = parameter(
        {},
        f"added to the logits of these tokens, at most {MAX_BIASED}",
        rule=f"numbers from -100 to 100 by token id, at most {MAX_BIASED}",
        kind=float,
        low=-100,
        high=100,
        entries=MAX_BIASED,
        changes="logits",
    )
    min_tokens: int = parameter(
        0,
        "new tokens before a stop token or stop string counts, at most the limit; 0 is off",
        rule="a whole number from 0 (off) to max_tokens, {0.max_tokens}",
        changes="logits",
        tensor="min_length",
    )
    structured: Mapping[str, Any] | None = parameter(
        None,
        "what the answer must fit: `json` (a schema), `json_object`, `regex`, `choice` or `grammar` (Lark, GBNF)",
        rule=f"{RULE}, or None".replace("{", "{{").replace("}", "}}"),  # it is no format
        kind=dict,
    )
    thinking_token_budget: int | None = parameter(
        None, "tokens of a reasoning model's thought before it is ended", kind=int
    )
    latency: Mapping[str, Any] | None = parameter(
        None,
        "targets: `ttft_ms` to the first token, `tpot_ms` per token behind it, or a class's name ([how]"
        "(latency-targets.md))",
        rule=f"{RULE_OF_LATENCY}, or None",
        kind=dict,
    )
    prediction: str | Sequence[int] = parameter(
        (),
        "a text that the answer is likely to repeat, which is drafted from ([how](openai-api.md#predicted-outputs))",
        rule="a text, or token ids from 0 to 2^31 - 1",
        kind=int,
        text=True,
    )
    token_sources: bool = parameter(False, "tells who proposed each token of the answer, with which probability")
    speculate: bool = parameter(True, "false: the request decodes plainly, one token per pass")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, known in PARAMETERS.items():
            value = getattr(self, name)
            if not known.allows(value) or (name == "min_tokens" and value > self.max_tokens):
                raise UserError(f"{name} is {_SHORT.repr(value)}; give {known.remedy.format(self)}.", name)
        if self.latency is not None:
            check_latency(self.latency)
        if self.structured is not None:
            checked(self.structured)
            if self.min_tokens:
                sentence = f"min_tokens is {self.min_tokens}, but a structured text ends by its grammar; leave it out."
                raise UserError(sentence, "min_tokens")

    @property
    def prediction_ids(self) -> Sequence[int]:
        """The prediction's tokens; a door has made them of its text."""
        assert not isinstance(self.prediction, str)
        return self.prediction

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything comes between the target's logits and the choice of a token."""
        return self.penalises or self._changes("logits")

    @property
    def penalises(self) -> bool:
        """Whether a penalty looks at what was said."""
        return self._changes("penalties")

    @property
    def entries(self) -> int:
        """How many log-probabilities and sources a token of the answer is told with."""
        return (0 if self.logprobs is None else self.logprobs + 1) + self.token_sources

    @property
    def limits_tokens(self) -> bool:
        """Whether a draw is among some tokens only, which depends on all logits of its position."""
        return self.temperature > 0 and self._changes("limits")

    def _changes(self, what: str) -> bool:
        """Whether a parameter that ``changes`` this has a value that does."""
        known = ((getattr(self, name), entry) for name, entry in PARAMETERS.items() if entry.changes == what)
        return any(value != entry.default and value not in entry.off for value, entry in known)


PARAMETERS: dict[str, Parameter] = {entry.name: entry.metadata["parameter"] for entry in fields(SamplingParams)}
#: Parameters of one number or switch; interfaces treat them alike.
SINGLE: dict[str, Parameter] = {name: known for name, known in PARAMETERS.items() if known.single}
#: Who can propose a token, nobody before the target first.
TOKEN_SOURCES = (TARGET.name, *SOURCES)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position of an answer: the emitted token's and the best tokens'.

    ``top`` holds (token id, logprob) of the best tokens, best first; the emitted token need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenSource:
    """Who proposed an emitted token.

    source       one of ``TOKEN_SOURCES``
    probability  the planner's estimate that the token is accepted behind its parent; None for the target's own
    """

    token: int
    source: str
    probability: float | None = None


@dataclass
class Completion:
    """A finished request. ``accepted_length`` is tokens emitted per verification, 1.0 without speculation.

    finish_reason: "stop" (end of text, a stop token or string) or "length". ``logprobs`` has an entry for each of the
    ``token_ids``, None unless asked for; ``prompt_logprobs`` has one for each token of the prompt but the first.
    ``token_sources`` has an entry for each of the ``token_ids``, None unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    accepted_length: float
    prompt_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    token_sources: list[TokenSource] | None = None


@dataclass
class Delta:
    """New text of the prompt at ``index``; ``completion`` comes with its last one.

    Where ``token_sources`` are asked for: ``sources`` of the new tokens, and ``begins``, the offsets in the whole text
    where the text of each next token begins, for tokens whose text has come.
    """

    index: int
    text: str
    completion: Completion | None = None
    sources: Sequence[TokenSource] = ()
    begins: Sequence[int] = ()


@dataclass
class Counters:
    """Sums since the start of the engine core; users see ratios of them.

    Prompts include the text of requests that were preempted. asked_tokens of them were admitted; of these cached_tokens
    were found in the prefix cache, and prompt_tokens computed. restored_seconds: that reading the restored blocks took
    less than computing them. reached: depth -> a request's drafts that had candidates
    there; at depth 0 all verifications but those that end a prompt, at 1 those with a draft. accepted: number of
    accepted draft tokens -> verifications of a draft that had this number.
    """

    iterations: int = 0
    speculative_iterations: int = 0
    emitted_tokens: int = 0
    verified_tokens: int = 0
    drafted_tokens: int = 0
    draft_passes: int = 0
    verifications: int = 0
    preemptions: int = 0
    planner_failures: int = 0
    prompt_tokens: int = 0
    asked_tokens: int = 0
    cached_tokens: int = 0
    evicted_blocks: int = 0
    restored_blocks: int = 0
    restored_seconds: float = 0.0
    stored_bytes: int = 0
    reached: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def copy(self) -> Counters:
        reached, accepted = self.reached.copy(), self.accepted.copy()
        return replace(self, reached=reached, accepted=accepted, seconds=dict(self.seconds))

    @property
    def accepted_tokens(self) -> int:
        """Draft tokens that were accepted, as far as texts went on behind them."""
        return max(self.emitted_tokens - self.verifications, 0)

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per request and verification."""
        return self.emitted_tokens / self.verifications if self.verifications else 0.0


def too_long(size: str, context: int) -> str:
    """Say that a prediction of this ``size`` is longer than any answer."""
    return (
        f"prediction has {size}, but this model's maximum context length is {context} tokens; give the part of it "
        "that comes first."
    )


def check_prompt_logprobs(field: str, tokens: int, n: int, alternatives: int) -> None:
    """Refuse prompts of so many ``tokens`` whose log-probabilities are too many. Raises UserError.

    field  which asks for this number of ``alternatives``
    n      choices a prompt
    """
    requested = tokens * n * (alternatives + 1)
    if requested > MAX_PROMPT_LOGPROBS:
        product = f"{tokens} prompt tokens x n = {n} x {alternatives + 1} = {requested} log-probabilities"
        remedy = f"give a smaller {field} or n, or shorter prompts."
        raise UserError(
            f"{field} is {alternatives}, which asks for {product}, more than {MAX_PROMPT_LOGPROBS}; {remedy}"
        )


def check_answer_logprobs(field: str, given: int, tokens: int, choices: int, entries: int) -> None:
    """Refuse answers whose log-probabilities may become too many. Raises UserError.

    field, given     which limits the answers' tokens, and its value
    tokens, entries  tokens of one of the ``choices`` at most, and log-probabilities of a token
    """
    requested = tokens * choices * entries
    if requested > MAX_ANSWER_LOGPROBS:
        product = f"{tokens} tokens x {choices} choices x {entries} = {requested} log-probabilities"
        raise UserError(
            f"{field} is {given}, which allows {product}, more than {MAX_ANSWER_LOGPROBS}; lower one of the factors.",
            field,
        )
