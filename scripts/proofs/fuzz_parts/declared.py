"""Values of what is declared: every sampling parameter and every field of the door, with both ends of its range.

A field of a kind that is known needs nothing here; one that is an object or a text of its own needs an entry in OBJECTS
or FIELDS, and a test fails without it.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

from batches import RECORD
from driving import prompt_ids
from pairs import VOCAB

from echo_trt.engine.latency import LARGEST, TARGETS, checked
from echo_trt.engine.parameter import Parameter
from echo_trt.engine.params import MAX_STOP_TOKENS, PARAMETERS, SamplingParams
from echo_trt.errors import UserError
from echo_trt.server.schemas import ALIASES, CHOICES, LONGEST_SALT, SHARED, STOP_STRINGS, ChatRequest, CompletionRequest
from echo_trt.server.structured import GUIDED, STRUCTURED

TEXTS = ("e", "th", "the ", "é", "\ufffd", "😀", "日本", "the theme of a thing", "<|end|>")
GRAMMARS = (
    {"json": RECORD},
    {"json_object": True},
    {"regex": "[A-Z][a-z]{2,9}( [a-z]{1,4}){2,6}"},
    {"choice": ["yes, it is", "yes, it was", "no"]},
    {"grammar": 'root ::= ("ab" | "ba")+ "."'},
)
GUIDING = {kind: value for grammar in GRAMMARS for kind, value in grammar.items()}
EFFORTS = ("none", "low", "max")
SELDOM = {"thinking_token_budget": 0.02, "deadline_ms": 0.1, "speculate": 0.1}  # how often, where it is not OFTEN
OFTEN = 0.2
LENGTHS = (1, 2, 3, 17, 30, 60)  # tokens of answers; their largest number ends at the context


def least(takes: Callable[[float], bool], largest: float) -> float:
    """Return the smallest number that is taken, from 0 to ``largest``, which is."""
    if takes(0.0):
        return 0.0
    low, high = 0, struct.unpack("<q", struct.pack("<d", largest))[0]  # doubles above 0 are sorted as their bits are
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(struct.unpack("<d", struct.pack("<q", middle))[0]) else (middle, high)
    number: float = struct.unpack("<d", struct.pack("<q", high))[0]
    return number


def _is_target(name: str) -> Callable[[float], bool]:
    def takes(milliseconds: float) -> bool:
        try:
            checked({name: milliseconds})
        except UserError:
            return False
        return True

    return takes


LEAST = {name: least(_is_target(name), LARGEST) for name in TARGETS}


def drawn_latency(draw: random.Random) -> dict[str, float]:
    """Draw targets, of which one at least is given."""
    ends = {name: (LEAST[name], math.nextafter(LEAST[name], 1), LARGEST, 10 ** draw.uniform(-2, 4)) for name in TARGETS}
    names = draw.choice((TARGETS[:1], TARGETS[1:], TARGETS))
    return {name: draw.choice(ends[name]) for name in names}


#: Parameters that are objects of their own.
OBJECTS: dict[str, Callable[[random.Random], Any]] = {
    "structured": lambda draw: draw.choice(GRAMMARS),
    "latency": drawn_latency,
}


def drawn_number(kind: type, low: float, high: float, above: bool, off: tuple[Any, ...], draw: random.Random) -> Any:
    """Draw an ordinary number of the range, or one at its ends."""
    ordinary = min(high, low + 40 if kind is int else max(low, 0) + 2)
    if draw.random() < 0.5:
        return (
            draw.randint(int(low) + above, int(ordinary)) if kind is int else 1e-9 + draw.uniform(low, ordinary - 1e-9)
        )
    if kind is int:
        return draw.choice((low + above, low + 1, high, high - 1, *off))
    first = math.nextafter(low, math.inf)
    return draw.choice((first if above else float(low), first, float(high), math.nextafter(high, low), *off))


def drawn(name: str, known: Parameter, draw: random.Random) -> Any:
    """Draw a value of a parameter. Raises KeyError for an object that OBJECTS does not have."""
    if known.kind is dict:
        return draw.choice((None, OBJECTS[name](draw)))
    if known.kind is bool:
        return draw.random() < 0.5
    many = isinstance(known.default, tuple | Mapping)
    if known.kind is str and many:
        ends = ("x" * known.low, "".join(draw.choices("abé ", k=known.high)))
        return tuple(draw.choice((*TEXTS, *ends)) for _ in range(draw.randint(1, 3)))
    if known.kind not in (int, float):
        raise KeyError(f"nothing draws {name}")
    if name == "max_tokens" and draw.random() < 0.95:
        return draw.choice(LENGTHS)

    def one() -> Any:
        return drawn_number(known.kind, known.low, known.high, known.above, known.off, draw)

    if not many:
        return None if known.default is None and draw.random() < 0.3 else one()
    if known.text:
        return tuple(draw.choices(range(VOCAB), k=draw.choice((1, 30, 150))))
    count = draw.choice((1, 2, 3, min(known.entries, MAX_STOP_TOKENS if known.kind is int else VOCAB)))
    tokens = draw.sample(range(VOCAB), min(count, VOCAB))
    tokens[0] = known.high if known.kind is int and draw.random() < 0.1 else tokens[0]
    return tuple(tokens) if isinstance(known.default, tuple) else {token: one() for token in tokens}


def drawn_params(draw: random.Random) -> SamplingParams:
    """Draw each parameter from what is declared of it, and make those agree that depend on each other."""
    given = {
        name: drawn(name, known, draw) for name, known in PARAMETERS.items() if draw.random() < SELDOM.get(name, OFTEN)
    }
    given |= {name: drawn(name, PARAMETERS[name], draw) for name in ("max_tokens", "seed")}
    given["min_tokens"] = min(given.get("min_tokens", 0), given["max_tokens"])
    if given.get("structured"):
        del given["min_tokens"]
    return SamplingParams(**given)


# -- the door ----------------------------------------------------------------------------------------------------------


def _sentence(draw: random.Random) -> str:
    return "".join(draw.choices((*TEXTS, " "), k=draw.randint(1, 12))).replace("<|end|>", "")


def _ids(draw: random.Random) -> list[int]:
    return prompt_ids(draw.choice((1, 2, draw.randint(3, 150))), draw.randrange(50))


def _tool(draw: random.Random) -> dict[str, Any]:
    return {"type": "function", "function": {"name": draw.choice(("f", "g")), "parameters": RECORD}}


def _schema(draw: random.Random) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "record", "schema": RECORD}}


def _thinking(draw: random.Random) -> dict[str, Any]:
    budget = {"budget_tokens": draw.choice((0, 5, 2**31 - 1))} if draw.random() < 0.5 else {}
    return {"type": draw.choice(("enabled", "disabled", "adaptive"))} | budget


#: Fields of the door that are no sampling parameter of one number.
FIELDS: dict[str, Callable[[random.Random], Any]] = {
    "model": lambda draw: "echo",
    "stream": lambda draw: draw.random() < 0.5,
    "stream_options": lambda draw: {
        name: draw.random() < 0.5 for name in ("include_usage", "continuous_usage_stats", "include_obfuscation")
    },
    "logit_bias": lambda draw: {str(i): each for i, each in drawn("", PARAMETERS["logit_bias"], draw).items()},
    "stop": lambda draw: draw.choice((_sentence(draw), [_sentence(draw)] * draw.choice((1, STOP_STRINGS)))),
    "stop_token_ids": lambda draw: list(drawn("", PARAMETERS["stop_token_ids"], draw)),
    "response_format": lambda draw: draw.choice(({"type": "text"}, {"type": "json_object"}, _schema(draw))),
    "structured_outputs": lambda draw: draw.choice(GRAMMARS),
    **{name: lambda draw, kind=kind: GUIDING[kind] for name, kind in GUIDED.items()},
    "n": lambda draw: draw.choice((1, 2, 2, 3, 3, 3, 3, CHOICES)),
    "latency": drawn_latency,
    "priority": lambda draw: drawn_number(int, 0, 2**31 - 1, False, (), draw),
    "deadline_ms": lambda draw: draw.choice((1, 20, 2**31 - 1)),
    "prompt": lambda draw: draw.choice((_sentence(draw), _ids(draw), [_ids(draw), _ids(draw)], [_sentence(draw)])),
    "echo": lambda draw: draw.random() < 0.5,
    "suffix": lambda draw: "",  # these models have no tokens that fill a gap
    "messages": lambda draw: [
        {"role": role, "content": _sentence(draw)} for role in ("user", "assistant", "user")[: draw.choice((1, 3))]
    ],
    "top_logprobs": lambda draw: drawn_number(int, 0, PARAMETERS["logprobs"].high, False, (), draw),
    "tools": lambda draw: [_tool(draw)],
    "tool_choice": lambda draw: draw.choice(("none", "auto", "required")),
    "parallel_tool_calls": lambda draw: draw.random() < 0.5,
    "chat_template_kwargs": lambda draw: {},
    "reasoning_effort": lambda draw: draw.choice(EFFORTS),
    "enable_thinking": lambda draw: draw.random() < 0.5,
    "thinking": _thinking,
    "reasoning": lambda draw: draw.choice(({"effort": draw.choice(EFFORTS)}, {"enabled": draw.random() < 0.5})),
    "cache_salt": lambda draw: draw.choice(("a", "b", "é" * LONGEST_SALT)),
    "prediction": lambda draw: {"type": "content", "content": _sentence(draw)},
}
#: Fields that mean nothing without another.
NEEDS = {"stream_options": "stream", "top_logprobs": "logprobs", "tool_choice": "tools", "parallel_tool_calls": "tools"}
PATHS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


def drawn_field(name: str, path: str, draw: random.Random) -> Any:
    """Draw a field of a body. Raises KeyError for one that nothing draws."""
    if name == "logprobs" and path != "/v1/completions":
        return draw.random() < 0.5
    if name in ("max_tokens", "max_completion_tokens"):
        return drawn("max_tokens", PARAMETERS["max_tokens"], draw)
    if name not in SHARED and name != "logprobs":
        return FIELDS[name](draw)
    known = PARAMETERS[name]
    other = dict(known.openai or {})
    if known.kind is bool:
        return draw.random() < 0.5
    low, high = other.get("low", known.low), other.get("high", known.high)
    return drawn_number(known.kind, low, high, known.above, known.off, draw)


def drawn_body(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Draw a path and its body: most are taken, and all others must be refused as they are refused alone."""
    path, kind = draw.choice([*PATHS.items()])
    names = [name for name in kind.model_fields if draw.random() < SELDOM.get(name, OFTEN)]
    names += ["model", "seed", "max_tokens", "prompt" if kind is CompletionRequest else "messages"]
    grammars = [draw.choice(STRUCTURED)] if draw.random() < 0.6 else []  # a body has one at most
    names = [name for name in dict.fromkeys(names) if name not in STRUCTURED] + grammars
    body = {name: drawn_field(name, path, draw) for name in names}
    if body.get("n", 1) > 3:
        body["max_tokens"] = min(body["max_tokens"], 3)
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    if body.get("n", 1) <= 3 and draw.random() < 0.05:
        body["max_tokens"] = draw.choice((None, -1, 0) if body.get("echo") and "logprobs" in body else (None, -1))
    if body.pop("max_completion_tokens", None):
        body["max_completion_tokens"] = body.pop("max_tokens")
    if draw.random() < 0.1:
        body["best_of"] = body.get("n", 1)
    for name, ours in ALIASES.items():
        if ours in body and draw.random() < 0.2:
            body[name] = body.pop(ours)
    if grammars or body.get("tool_choice") == "required":
        body.pop("min_tokens", None)
    for name, other in NEEDS.items():
        if not body.get(other):
            body.pop(name, None)
    return path, body
