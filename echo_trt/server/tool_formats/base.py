"""What every format gives: a parser of texts that come in pieces, and a grammar of texts that hold calls."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echo_trt.grammar.requested import closed

#: Names of functions, in requests and in texts: OpenAI's characters, and those of MCP's names.
NAME = r"[A-Za-z0-9_.:/-]{1,128}"
#: As models were trained to write JSON: what Python's json.dumps gives. Free white space would never have to end.
LAYOUT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
#: A call's object up to its arguments; what is shorter or longer is read once it is complete.
HEAD = re.compile(
    r'\s{0,64}\{\s{0,64}"name"\s{0,64}:\s{0,64}"(' + NAME + r')"\s{0,64},\s{0,64}'
    r'"(?:arguments|parameters)"\s{0,64}:\s{0,64}(?=\{)'
)


@dataclass(frozen=True)
class Content:
    """More text that is no call."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a call."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More JSON of the latest call's arguments."""

    text: str


ParsedPart = Content | Call | Arguments


@dataclass(frozen=True)
class ToolRequest:
    """The texts that a request allows.

    tools          JSON schema of the arguments by name of each function that may be called
    call_required  whether there must be a call
    several        whether there may be more than one
    content        Lark, the right side of a rule, of a text without a call; None: any text
    """

    tools: Mapping[str, Mapping[str, Any]]
    call_required: bool
    several: bool
    content: str | None = None


def call_schema(name: str, key: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's schema with ``schema`` at ``key``; its definitions move up to where its references look."""
    own: dict[str, Any] = {key: value for key, value in schema.items() if key not in ("$schema", "$id")}
    definitions: dict[str, Any] = {part: own.pop(part) for part in ("$defs", "definitions") if part in own}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: own},
        "required": ["name", key],
        "additionalProperties": False,
        **definitions,
    }


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the right side of a Lark rule for JSON that fits a schema, closed as in structured answers."""
    return f"%json {json.dumps({**closed(schema), **LAYOUT}, ensure_ascii=False)}"


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


class FormatReader(ABC):
    """Reads one text. However it is cut into pieces, the events joined are the same; nothing raises.

    A call of a function that is not in ``tools`` stays content. A call that a limit cuts is reported as far as it goes,
    and its markup is no content.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], several: bool = True, required: bool = False):
        """Read a text.

        tools     JSON schema of the arguments by name
        several   whether more than the first call is reported
        required  whether the text is nothing but calls, so that there is no content
        """
        self._tools, self._several, self._required = tools, several, required
        self._text = ""  # what may be content or a part of a call, as far as that is not certain yet
        self._events: list[ParsedPart] = []
        self.calls = 0  # so far, with those that are not reported

    @abstractmethod
    def push(self, text: str) -> list[ParsedPart]: ...

    @abstractmethod
    def finish(self, cut: bool = False) -> list[ParsedPart]:
        """``cut``: a limit ended the text."""

    def _drain(self) -> list[ParsedPart]:
        events, self._events = self._events, []
        return events

    def _emit_content(self, text: str) -> None:
        if text and not self._required:
            self._events.append(Content(text))

    def _call(self, name: str) -> None:
        self.calls += 1
        if self._is_reported:
            self._events.append(Call(name))

    def _emit_arguments(self, text: str) -> None:
        if text and self._is_reported:
            self._events.append(Arguments(text))

    @property
    def _is_reported(self) -> bool:
        return self._several or self.calls == 1


class Parser(FormatReader):
    """Reads the calls of one format."""

    _head_pattern = HEAD

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self._scan = Scan()
        self._state = self._begin  # reads what is certain of ``_text``; True: call the next state, more may be certain

    def push(self, text: str) -> list[ParsedPart]:
        self._text += text
        while self._state():
            pass
        return self._drain()

    def finish(self, cut: bool = False) -> list[ParsedPart]:
        self._end(cut)
        return self._drain()

    def _inside(self) -> bool:
        if not self._arguments():
            return False
        self._state = self._after_call
        return True

    @abstractmethod
    def _after_call(self) -> bool:
        """Read what follows a call's arguments."""

    @abstractmethod
    def _begin(self) -> bool:
        """Read the text up to a call."""

    @abstractmethod
    def _end(self, cut: bool) -> None:
        """Take the rest of ``_text``; ``cut``: a limit ended it."""

    def _head(self) -> bool:
        """Take a call's object up to its arguments, where ``_text`` begins with them."""
        match = self._head_pattern.match(self._text)
        if not match or match[1] not in self._tools:
            return False
        self._call(match[1])
        self._text, self._scan = self._text[match.end() :], Scan()
        return True

    def _begun(self) -> bool:
        """Take a call that was cut before its arguments, if the name in ``_text`` can be one tool's alone."""
        match = re.match(self._head_pattern.pattern.partition(NAME)[0] + NAME + ")", self._text)
        if not match:
            return False
        is_whole = match.end() < len(self._text)
        names = [each for each in self._tools if each == match[1] or (not is_whole and each.startswith(match[1]))]
        if len(names) == 1:
            self._call(names[0])
        return len(names) == 1

    def _whole(self, text: str) -> bool:
        """Take the object of a call that is complete."""
        try:
            call = parsed(text)
        except (ValueError, RecursionError):
            return False
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._tools:
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # JSON in JSON
            try:
                arguments = parsed(arguments)
            except (ValueError, RecursionError):
                return False
        if not isinstance(arguments, dict):
            return False
        self._call(name)
        self._emit_arguments(written(arguments))
        return True

    def _arguments(self) -> bool:
        """Take the arguments as far as they have come; whether they have ended."""
        end = self._scan.end(self._text)
        self._emit_arguments(self._text[:end])
        ended = end < len(self._text) or self._scan.over
        self._text = self._text[end:]
        return ended


def parsed(text: str) -> Any:
    """Parse JSON as other languages do, which know no NaN and no Infinity. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    """Read a number that a double can hold: any other could not be written as JSON again. Raises ValueError."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def written(arguments: Any) -> str:
    """Write arguments as JSON that UTF-8 can hold: halves of surrogate pairs stay escaped."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text


class Scan:
    """Finds where an object ends in a text that comes in pieces: a "<" outside of strings ends it, too."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped, self.over = 0, False, False, False

    def end(self, piece: str) -> int:
        """Count the characters of the next piece that belong to the object."""
        for offset, letter in enumerate(piece):
            if self.over:
                return offset
            if self._in_string:
                self._in_string = letter != '"' or self._escaped
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                self.over = self._depth <= 0
            elif letter == "<":
                self.over = True
                return offset
        return len(piece)


class Format(ABC):
    """A way of writing calls.

    several  whether an answer may hold more than one
    tokens   names of those added tokens that the template writes: a grammar spells them otherwise than text
    """

    #: Where a call's arguments stand, in formats of objects.
    key: str
    parser: Callable[..., Parser]

    def __init__(self, tokens: Collection[str] = (), several: bool = True):
        self.several, self.tokens = several, frozenset(tokens)

    def mark(self, text: str) -> str:
        """Lark of a mark around calls, where nothing else may stand."""
        return text if text in self.tokens and text[0] == "<" else json.dumps(text, ensure_ascii=False)

    @abstractmethod
    def rules(self, requested: ToolRequest) -> Sequence[str]:
        """Lark, ``start`` first, in terms of ``function``: any call."""

    def function(self, name: str, schema: Mapping[str, Any]) -> str:
        """Lark of a call, the right side of a rule."""
        return json_rule(call_schema(name, self.key, schema))

    def around(self, name: str) -> tuple[str, str]:
        """Return the texts before and behind a call's arguments."""
        return f'{{"name": {written(name)}, "{self.key}": ', "}"

    def parts(self, name: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the texts of a call up to its first value, between its values, and behind them."""
        before, after = self.around(name)
        texts = [before + "{"]
        for key, part in properties_of(schema).items():
            quote = '"' * (isinstance(part, Mapping) and part.get("type") == "string")
            texts[-1:] = texts[-1] + f"{', ' * (len(texts) > 1)}{written(key)}: {quote}", quote
        return (*texts[:-1], texts[-1] + "}" + after)

    def grammar(self, requested: ToolRequest) -> str:
        """Lark of texts as they are ``requested`` for: a line for each function."""
        calls = [self.function(name, schema) for name, schema in requested.tools.items()]
        names = " | ".join(f"function_{index}" for index in range(len(calls)))
        functions = [f"function_{index}: {call}" for index, call in enumerate(calls)]
        return "\n".join([*self.rules(requested), f"function: {names}", *functions])
