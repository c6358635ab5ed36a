"""Compile what a request asks of its answer (a schema, a regex, ...) to the state of the empty text.

Parsing and masks are llguidance's. It bounds its own work by counting steps, so what a hostile grammar costs does not
depend on how busy the machine is.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from echo_trt.errors import GrammarError, UserError
from echo_trt.grammar.layout import Layouts, Writer
from echo_trt.grammar.requested import REMEDY, checked, clause
from echo_trt.grammar.state import ReasoningState, State, Vocabulary

CACHED = 128  # grammars that are kept compiled: more take memory, some 100 KB each
SLOWEST_S = 2.0  # that compiling may take
LARK_RULE = re.compile(r"^\s*[?!]?\w+(\.\d+)?(\[[^\]]*\])?\s*:(?!:)", re.MULTILINE)
PROBED = 6  # tokens of a trial: more find a grammar that is too complex before a request runs into it
#: Between two tokens of JSON; a model may lay a text out, but not fill a page with spaces.
WHITE_SPACE = r"[ \t\r\n]{0,32}"
BARE = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_LIMITS = LLParserLimits(
    max_grammar_size=20_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_items_in_row=2000,  # a choice has a row of all its words
    verbose_errors=False,
)


@dataclass(frozen=True)
class Compiled:
    """A grammar at the beginning of a text, and the writer of its JSON, None for another language."""

    free: LLMatcher
    writer: Writer | None


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the latest. Any thread may ask."""

    def __init__(self, tokenizer: str, tokens: Vocabulary):
        """``tokenizer``: content of a tokenizer.json."""
        self._json, self._tokens = tokenizer, tokens
        self._compiling = threading.Lock()  # held for seconds
        self._lock = threading.Lock()  # of the cache
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[str, Compiled | str] = OrderedDict()  # a refused grammar's sentence is kept, too
        self._always: dict[str, Compiled] = {}  # what no other grammar displaces

    def begin(self, structured: Mapping[str, Any] | None, reasoning: ReasoningState | None = None) -> State:
        """Return the state of an empty text that must fit ``structured``. Raises UserError."""
        if structured is None:
            return State(self._tokens, None, reasoning=reasoning)
        if not self._tokens.ends:
            raise GrammarError("structured is given, but this model has no token to end the text with; leave it out.")
        found = self._compiled(structured)
        if isinstance(found, str):
            raise GrammarError(found)
        return State(self._tokens, found.free, found.writer, reasoning)

    def to_compile(self, structured: Mapping[str, Any]) -> str | None:
        """Name the grammar that ``begin`` would have to compile, which may take seconds; None: it is kept compiled.

        Raises UserError.
        """
        key = _key(*_requested(structured))
        return None if self.keeps(key) else key

    def keeps(self, grammar: str) -> bool:
        """Whether a grammar is kept compiled, by its name."""
        with self._lock:
            return grammar in self._cache or grammar in self._always

    def _compiled(self, structured: Mapping[str, Any]) -> Compiled | str:
        kind, value = _requested(structured)
        key = _key(kind, value)
        if (found := self._kept(key)) is not None:
            return found
        with self._compiling:
            return self._kept(key) or self._compile_and_keep(key, kind, value)

    def _compile_and_keep(self, key: str, kind: str, value: Any) -> Compiled | str:
        self.prepare()
        begin = time.thread_time()
        found: Compiled | str
        try:
            found = self._compile(kind, value)
        except UserError as error:
            found = str(error)
        except Exception as error:  # told, but not kept: its cause may pass
            return f"structured.{kind} cannot be compiled ({clause(str(error))}); {REMEDY}"
        if (seconds := time.thread_time() - begin) > SLOWEST_S:
            found = f"structured.{kind} took {seconds:.1f} s to compile; make it smaller."
        self._keep(key, found)
        return found

    def _kept(self, key: str) -> Compiled | str | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key) or self._always.get(key)

    def _keep(self, key: str, found: Compiled | str) -> None:
        with self._lock:
            self._cache[key] = found
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)

    def prepare(self) -> None:
        """Read the tokenizer, once, which holds Python's lock for a second: a server does it before it takes requests.

        ``json_object``, the commonest, is compiled with it and always kept, so that it never waits for others. Raises
        GrammarError.
        """
        if self._tokenizer is None:
            size, ends = self._tokens.vocab_size, list(self._tokens.ends)
            try:
                self._tokenizer = LLTokenizer(self._json, n_vocab=size, eos_token=ends)
            except Exception as error:  # a kind of tokenizer that llguidance does not know
                raise GrammarError(
                    f"structured is given, but grammars cannot read this model's tokenizer ({clause(str(error))}); "
                    "leave it out."
                ) from None
            self._tokens = replace(self._tokens, spell=self._tokenizer.greedy_tokenize)
            self._layouts = Layouts(self._tokenizer)
            self._always[_key("json_object", True)] = self._compile_json("json_object", {"type": "object"})

    def _compile(self, kind: str, value: Any) -> Compiled:
        if kind in ("json", "json_object"):
            return self._compile_json(kind, value if kind == "json" else {"type": "object"})
        if kind == "choice":
            texts = (json.dumps(each, ensure_ascii=False).replace("\x7f", "\\u007f") for each in value)
            text = "start: " + " | ".join(texts)  # Lark takes no bare U+007F, unlike JSON
            return Compiled(self._matcher(kind, LLMatcher.grammar_from_lark(text)), None)
        if kind == "regex":
            return Compiled(self._matcher(kind, LLMatcher.grammar_from_regex(value)), None)
        lark = value if LARK_RULE.search(value) else any_to_lark(value)
        return Compiled(self._matcher(kind, LLMatcher.grammar_from_lark(lark)), None)

    def _compile_json(self, kind: str, schema: Mapping[str, Any] | bool) -> Compiled:
        free = self._matcher(kind, _json_grammar(schema, {"whitespace_pattern": WHITE_SPACE}))
        return Compiled(free, Writer(self._layouts, self._matcher(kind, _json_grammar(schema, BARE))))

    def _matcher(self, kind: str, grammar: str) -> LLMatcher:
        """Compile a grammar and consume a few tokens: this fails for a grammar that never ends or is too complex."""
        assert self._tokenizer
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(f"structured.{kind} cannot be compiled ({clause(matcher.get_error())}); {REMEDY}")
        for beginning in ([], self._tokenizer.tokenize_str('{"')):
            trial = matcher.deep_copy()
            if trial.try_consume_tokens(beginning) == len(beginning):
                for _ in range(PROBED):
                    token = _first(trial.compute_bitmask(), self._tokens.ends)
                    if trial.is_stopped() or token is None or not trial.try_consume_tokens([token]):
                        break
            if trial.is_error():
                raise GrammarError(f"structured.{kind} cannot be used ({clause(trial.get_error())}); {REMEDY}")
        return matcher


def _requested(structured: Mapping[str, Any]) -> tuple[str, Any]:
    """Return kind and value; the schema {"type": "object"}, Dynamo's, becomes ``json_object``. Raises UserError."""
    kind, value = checked(structured)
    return ("json_object", True) if kind == "json" and value == {"type": "object"} else (kind, value)


def _key(kind: str, value: Any) -> str:
    return json.dumps([kind, value], ensure_ascii=False)


def _json_grammar(schema: Mapping[str, Any] | bool, options: dict[str, Any]) -> str:
    grammar: str = LLMatcher.grammar_from_json_schema(
        dict(schema) if isinstance(schema, Mapping) else {}, overrides=options
    )
    return grammar


def _first(mask: bytes, ends: Sequence[int]) -> int | None:
    """Return the lowest token of a mask that does not end the text."""
    allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    allowed[list(ends)] = 0
    return int(allowed.argmax()) if allowed.any() else None
