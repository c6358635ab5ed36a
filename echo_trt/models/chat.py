"""Chats as token ids. Control tokens come from the chat template alone; contents of messages are text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, meta, nodes

from echo_trt.errors import UserError, shown
from echo_trt.models.chat_template import GIVEN, compiled, render
from echo_trt.models.messages import Messages, Tools, strings_in, with_short_ids
from echo_trt.models.tokenizer import BundleTokenizer, added_tokens
from echo_trt.models.tools_as_text import MARKS, tools_as_text

BARE = "{{ messages | map(attribute='content') | join('\n') }}"  # the template of a tokenizer that has none
PLAIN_CHATS = [
    [{"role": role, "content": "x"} for role in roles]
    for roles in (("user", "assistant", "user"), ("system", "user", "assistant", "user"))
]
#: A tool's result, whose marks no result may write.
TOOL_CHAT = [{"role": role, "content": "x"} for role in ("user", "assistant", "tool")]
#: A tool for trying whether a template uses tools.
A_TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
MISTRALS = "[TOOL_CALLS]"  # in templates that insist on calls' ids of nine characters
SYSTEM = "a system prompt"  # for trying whether a template writes one


class ChatEncoder:
    """Encodes messages in a tokenizer's chat template.

    Control tokens are the special tokens, and other added tokens that the template writes around turns, such as
    DeepSeek's ``<｜User｜>``. The name of a control token in a message is encoded as ordinary text, so a message cannot
    close its turn and forge the next one. Added tokens that a model's answers show, such as Qwen3's ``<think>``, are
    no control tokens: an answer that comes back as history keeps its token ids.

    ``special_tokens_in_content`` makes names in messages control tokens, as in Hugging Face's templates.
    """

    # The template's source gets aliases, which no message can guess, for the names of control tokens. In a rendered
    # text an alias therefore comes from the template and a name from a message, however contents are transformed.

    def __init__(self, tokenizer: BundleTokenizer, special_tokens_in_content: bool = False):
        self._tokenizer = tokenizer
        self._bare = not tokenizer.chat_template
        self._template = BARE if self._bare else tokenizer.chat_template
        self._variables: dict[str, str] = {}  # aliases for the template's variables, such as bos_token
        self._key = f"\ue000{secrets.randbits(128)}:"  # without letters and spaces, which a template might change
        self._alias = re.compile(f"{self._key}([0-9]+)\ue001")
        self._names = {} if special_tokens_in_content else self._control_tokens()  # by token id
        self._has_aliases = self._put_aliases()

    @property
    def source(self) -> str:
        """The template as the tokenizer has it; empty where it has none."""
        return "" if self._bare else str(self._tokenizer.chat_template)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and a request may set, such as enable_thinking."""
        try:
            environment = compiled(self.source).environment
            tree = environment.parse(self.source)
        except TemplateError:  # it fails when it is rendered, too
            return frozenset()
        asked_for = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
        own = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"} - asked_for
        found = frozenset(meta.find_undeclared_variables(tree)) - own
        return found - GIVEN - environment.globals.keys()

    @cached_property
    def takes_tools(self) -> bool:
        """Whether tools change what the template writes. Where they do not, they are written as text."""
        return any(self._tried(chat, tools=[A_TOOL]) != self._tried(chat) for chat in PLAIN_CHATS)

    @cached_property
    def tokens(self) -> list[str]:
        """Names of added tokens that the template writes, or that stand around calls in tools as text."""
        marks = {*MARKS} - {*self._names.values()}
        return [name for name in added_tokens(self._tokenizer) if name in self.source or name in marks]

    @cached_property
    def _takes_system(self) -> bool:
        chat = [{"role": "system", "content": SYSTEM}, *PLAIN_CHATS[0]]
        return SYSTEM in (self._tried(chat) or "")

    def ids(self, messages: Messages, tools: Tools | None = None, kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt, up to where the answer begins. Raises UserError.

        ``tools`` are those of ``checked_tools``; ``kwargs`` set variables of the template. Strings in both are text.
        """
        self._check(kwargs or {})
        try:
            if not self.takes_tools:
                messages, tools = tools_as_text(messages, tools or (), self._takes_system), None
            elif MISTRALS in self.source:
                messages = with_short_ids(messages)
            rendered = self._rendered(messages, tools=tools, kwargs=kwargs)
        except Exception as error:  # a template may raise what it likes, about roles and their order
            reason = " ".join(str(error).split())
            raise UserError(f"messages do not fit the model's chat template ({reason}).", "messages") from error
        ids = self._encoded(self._without_names(rendered) if self._has_aliases else [rendered])
        if self._is_clean(ids, rendered):
            return ids
        texts = list(strings_in([messages, tools, kwargs]))
        if not self._has_aliases and not any(name in text for name in self._names.values() for text in texts):
            return ids
        raise UserError(
            "a message holds the name of a control token, which this model's chat template or tokenizer cannot keep as "
            "text; leave it out, or have the server started with --special-tokens-in-content.",
            "messages",
        )

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse what the template would leave out of the prompt."""
        for name in kwargs:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables))
                remedy = f"give {known}" if known else "leave it out"
                raise UserError(
                    f"chat_template_kwargs.{shown(name)[1:-1]} is no variable of this model's chat template; {remedy}.",
                    "chat_template_kwargs",
                )

    def _control_tokens(self) -> dict[int, str]:
        around: set[int] = set()
        for chat in (*PLAIN_CHATS, TOOL_CHAT):
            if (rendered := self._tried(chat, answer=False)) is not None:
                around.update(self._encoded([rendered]))
        return {
            token: added.content
            for token, added in self._tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
            if added.special or (token in around and not added.content.isspace())  # "\n" is an added token of Gemma's
        }

    def _put_aliases(self) -> bool:
        """Put aliases for names into the template; returns whether they cover all control tokens that it writes.

        A template that joins names from parts, as in ``'<|' + message['role'] + '|>'``, is left without aliases.
        """
        tokens = {name: token for token, name in self._names.items()}
        longest_first = sorted(tokens, key=len, reverse=True)
        names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

        def aliased(text: str) -> str:
            return names.sub(lambda match: f"{self._key}{tokens[match[0]]}\ue001", text)

        before, texts = self._template, [self._tried(chat) for chat in PLAIN_CHATS]
        self._template = aliased(before)
        self._variables = {role: aliased(name) for role, name in self._tokenizer.special_tokens_map.items()}
        pairs = [(text, self._tried(chat)) for text, chat in zip(texts, PLAIN_CHATS, strict=True) if text is not None]
        if pairs and all(now is not None and self._is_clean(self._encoded([text]), now) for text, now in pairs):
            return True
        self._template, self._variables = before, {}
        return False

    def _tried(self, messages: Messages, answer: bool = True, tools: Tools | None = None) -> str | None:
        """Return the rendered text, None where the template takes no such chat."""
        try:
            return self._rendered(messages, answer, tools)
        except Exception:  # a template may raise what it likes; of a real prompt, ``ids`` tells the client
            return None

    def _rendered(
        self,
        messages: Messages,
        answer: bool = True,
        tools: Tools | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a chat, with aliases; ``answer``: up to where an answer begins."""
        variables = {**self._tokenizer.special_tokens_map, **self._variables, **(kwargs or {})}
        return render(self._template, messages, tools, answer, variables)

    def _is_clean(self, ids: list[int], rendered: str) -> bool:
        """Return whether all control tokens among ``ids`` come from the template."""
        written = [token for token in self._encoded([""]) if token in self._names] if self._bare else []
        written += [int(token) for token in self._alias.findall(rendered)]
        return [token for token in ids if token in self._names] == written

    def _without_names(self, rendered: str) -> list[str]:
        """Cut a text behind the first character of every name that it holds."""
        names = [name for name in self._names.values() if name in rendered]
        cuts = sorted({match.start() + 1 for name in names for match in re.finditer(re.escape(name), rendered)})
        return [rendered[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]

    def _encoded(self, pieces: list[str]) -> list[int]:
        """Encode a text in pieces; no token spans two of them."""
        first, *rest = [self._alias.sub(lambda match: self._names[int(match[1])], piece) for piece in pieces]
        backend = self._tokenizer.backend_tokenizer
        ids: list[int] = backend.encode(first, add_special_tokens=self._bare).ids
        if not rest:
            return ids
        # SentencePiece puts a space before a text, but not after a line's end.
        batch = backend.encode_batch_fast(["\n", *("\n" + piece for piece in rest)], add_special_tokens=False)
        line_end, *others = (encoding.ids for encoding in batch)
        for piece, encoded in zip(rest, others, strict=True):
            joined = encoded[: len(line_end)] != line_end  # the line's end is one token with the piece's beginning
            ids += backend.encode(piece, add_special_tokens=False).ids if joined else encoded[len(line_end) :]
        return ids
