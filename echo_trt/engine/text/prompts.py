"""Prompts as a client sends them become token ids, and ids become text again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo_trt.engine.params import SamplingParams, too_long
from echo_trt.errors import TooLong, UserError, encodable
from echo_trt.grammar.state import AT_END
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.messages import checked_messages, checked_tools
from echo_trt.models.token_texts import TokenTexts
from echo_trt.models.tokenizer import REASONING, BundleTokenizer, added_tokens, load_tokenizer, think_tokens

#: Tokens before a prefix, a suffix and a middle, as Qwen spells them, and StarCoder; and those that end a middle.
FILLS = (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
FILLED = ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<fim_pad>", "<file_sep>")
RULE = 'give a list of objects such as {"role": "user", "content": "..."}.'


@dataclass(frozen=True)
class ChatPrompt:
    """A chat for the model's template, as Hugging Face's templates take it.

    variables  the template's own
    calls      of each tool that may be called, the texts of a call between its values
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    calls: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Infill:
    """Two texts between which the answer belongs (fill in the middle, arXiv 2207.14255)."""

    prefix: str
    suffix: str


PromptInput = list[int] | str | ChatPrompt | Infill  # token ids as they are, a text, a chat, or the ends of a gap


@dataclass(frozen=True)
class ThinkTokens:
    """The texts around a thought, and the token that closes it."""

    opens: str
    closes: str
    closing_token: int


@dataclass(frozen=True)
class ChatFacts:
    """What the model's chats can hold.

    template     the chat template's text
    tokens       names of added tokens that the template writes
    variables    variables of the template that a request may set
    takes_tools  whether the template shows tools to the model
    thinking     None for a model that does not think
    """

    template: str
    tokens: list[str]
    variables: list[str]
    takes_tools: bool
    thinking: ThinkTokens | None


def with_prediction_ids(params: SamplingParams, tokenizer: BundleTokenizer) -> SamplingParams:
    """Return the parameters with token ids in the place of a prediction's text. Raises UserError."""
    if not isinstance(params.prediction, str):
        return params
    text = encodable(params.prediction, "prediction")
    return replace(params, prediction=tuple(tokenizer.encode(text, add_special_tokens=False)))


class PromptReader:
    """Reads prompts for a bundle. It has a tokenizer of its own: the engine's thread uses another."""

    def __init__(
        self,
        bundle: Path,
        context: int,
        special_tokens_in_content: bool = False,
        tokenizer: BundleTokenizer | None = None,
    ):
        """``context``: tokens of a prompt and its answer. ``tokenizer``: the bundle's, where it is loaded already."""
        self.context, self.tokenizer = context, tokenizer or load_tokenizer(bundle)
        self._chat = ChatEncoder(self.tokenizer, special_tokens_in_content)
        self.texts = TokenTexts(self.tokenizer)
        self._marks = think_tokens(self.tokenizer)
        known = added_tokens(self.tokenizer)
        self._fill = next(([known[name] for name in names] for names in FILLS if known.keys() >= {*names}), None)
        self._filled = {known[name] for name in FILLED if name in known}
        self._calls: tuple[tuple[tuple[str, ...], ...], list[list[list[int]]]] = (), []
        longest = max(map(len, self.tokenizer.get_vocab()))
        self._max_characters = context * longest  # a longer text cannot have as few tokens as fit

    def ids(self, prompt: PromptInput, special_tokens: bool = True) -> list[int]:
        """Return a prompt's token ids. ``special_tokens``: the tokenizer's own around a text. Raises UserError."""
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, ChatPrompt):
            return self._chat_ids(prompt)
        if isinstance(prompt, Infill):
            return self._infill_ids(prompt)
        self._check_length(len(prompt))
        return self.tokenizer.encode(prompt, add_special_tokens=special_tokens)

    def params(self, prompt: PromptInput, params: SamplingParams) -> SamplingParams:
        """Return those of an answer, with a prediction's token ids in the place of its text. Raises UserError."""
        if isinstance(prompt, Infill):
            params = replace(params, stop_token_ids=tuple({*params.stop_token_ids, *self._filled}))
        if isinstance(params.prediction, str) and len(params.prediction) > self._max_characters:
            raise UserError(too_long(f"{len(params.prediction)} characters", self.context), "prediction")
        return with_prediction_ids(params, self.tokenizer)

    def calls(self, prompt: PromptInput) -> list[list[list[int]]]:
        """Return the tokens of ``ChatPrompt.calls``."""
        texts = prompt.calls if isinstance(prompt, ChatPrompt) else ()
        if texts != self._calls[0]:  # an agent's next request has the same
            encode = self.tokenizer.encode
            self._calls = texts, [[encode(part, add_special_tokens=False) for part in parts] for parts in texts]
        return self._calls[1]

    def echoed(self, prompt: PromptInput) -> str:
        """Return the text of a prompt as its client may want to see it; a chat has none."""
        if isinstance(prompt, list):
            known = all(0 <= token < len(self.tokenizer) for token in prompt)
            return self.tokenizer.decode(prompt, skip_special_tokens=True) if known else ""
        return prompt if isinstance(prompt, str) else ""

    def in_thought(self, ids: Sequence[int]) -> bool | None:
        """Say whether a prompt ends inside a thought; None: the model does not think."""
        if not self._marks:
            return None
        return next((token for token in reversed(ids[-AT_END:]) if token in self._marks), None) == self._marks[0]

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens. Raises UserError."""
        if len(tokens) > self.context:
            raise TooLong(
                f"tokens has {len(tokens)} tokens, but this model's maximum context length is {self.context} tokens; "
                "send them in parts.",
                "tokens",
            )
        largest = len(self.tokenizer) - 1
        unknown = next((token for token in tokens if not 0 <= token <= largest), None)
        if unknown is not None:
            raise UserError(f"tokens holds token id {unknown}; give ids from 0 to {largest}.", "tokens")
        return self.tokenizer.decode(tokens)

    @property
    def facts(self) -> ChatFacts:
        chat, marks = self._chat, self._marks
        thinking = ThinkTokens(*REASONING, marks[1]) if marks else None
        return ChatFacts(chat.source, chat.tokens, sorted(chat.variables), chat.takes_tools, thinking)

    def _chat_ids(self, chat: ChatPrompt) -> list[int]:
        messages = checked_messages(chat.messages, "messages", RULE)
        self._check_length(sum(len(message["content"]) for message in messages))
        tools = checked_tools(chat.tools) if chat.tools else None
        return self._chat.ids(messages, tools, chat.variables)

    def _infill_ids(self, gap: Infill) -> list[int]:
        if self._fill is None:
            raise UserError("this model has no tokens by which a gap is filled; leave suffix out.", "suffix")
        self._check_length(len(gap.prefix) + len(gap.suffix))
        prefix, suffix = (self.tokenizer.encode(text, add_special_tokens=False) for text in (gap.prefix, gap.suffix))
        return [self._fill[0], *prefix, self._fill[1], *suffix, self._fill[2]]

    def _check_length(self, characters: int) -> None:
        if characters > self._max_characters:
            raise TooLong(
                f"the prompt has {characters} characters, but this model's maximum context length is {self.context} "
                "tokens; shorten it.",
                "prompt",
            )
