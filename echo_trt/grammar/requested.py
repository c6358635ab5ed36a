"""What a request asks of its answer, checked before it is compiled: its form, its size, what llguidance misses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from echo_trt.errors import GrammarError, shown

KINDS = ("json", "json_object", "regex", "choice", "grammar")
RULE = (
    'one of {"json": SCHEMA}, {"json_object": true}, {"regex": TEXT}, {"choice": [TEXT, TEXT]} and '
    '{"grammar": LARK_OR_GBNF}'
)
REMEDY = "fix or simplify it."
LONGEST = 2**17  # characters of a grammar: a larger one compiles longer
REFERENCES = 500  # of a schema; llguidance follows a chain of them on the stack, which ends at about 1,000
RULES = 1000  # of a Lark or GBNF grammar; a chain of them ends the stack at about 2,600
SMALLEST_DIVISOR, LARGEST_DIVISOR = 0.0001, 100_000  # of multipleOf; time grows with it, to half a second here
#: Keywords of schemas that hold for the same value.
_JOINED = ("allOf", "anyOf", "oneOf")
#: Keywords of schemas for other values: those by name, and all.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_IDENTIFIERS = frozenset({"$id", "$schema", "$comment"})  # they constrain nothing
_BELOW = _NAMED | {"items", "prefixItems", "additionalItems", "additionalProperties"}
_OF_OBJECTS = frozenset({"properties", "patternProperties", "additionalProperties"})
#: Beside ``properties`` they say that there may be others.
_OPEN = frozenset({"additionalProperties", "patternProperties", "$ref", *_JOINED})
_RULE = re.compile(r"^\s*[?!]?[\w.-]+\s*(?:\[[^\]\n]*\]\s*)?:", re.MULTILINE)
_DIVISOR = re.compile(r'"multipleOf"\s*:\s*([0-9]+(?:[.][0-9]+)?(?:[eE][+-]?[0-9]+)?)')


def checked(structured: Mapping[str, Any]) -> tuple[str, Any]:
    """Kind and value of what a request asks of its answer. Raises UserError."""
    if not isinstance(structured, Mapping) or len(structured) != 1 or next(iter(structured)) not in KINDS:
        raise GrammarError(f"structured is {shown(structured)}; give {RULE}.")
    [(kind, value)] = structured.items()
    fits = {
        "json": lambda: isinstance(value, Mapping | bool),
        "json_object": lambda: value is True,
        "choice": lambda: isinstance(value, list | tuple) and value and all(map(_is_text, value)),
    }.get(kind, lambda: _is_text(value))
    if not fits():
        raise GrammarError(f"structured.{kind} is {shown(value)}; give {RULE}.")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError:
        raise GrammarError(f"structured.{kind} is nested too deep; {REMEDY}") from None
    except (TypeError, ValueError) as error:
        raise GrammarError(f"structured.{kind} is not JSON in UTF-8 ({clause(str(error))}); {REMEDY}") from None
    if len(text) > LONGEST:
        raise GrammarError(f"structured.{kind} has {len(text)} characters; give at most {LONGEST}.")
    if kind == "grammar":
        _check_grammar(value)
    return kind, _checked_schema(text) if kind == "json" else value


@lru_cache(16)  # the choices of a request have one schema
def _checked_schema(text: str) -> Any:
    """Check a schema, written as JSON, and close its objects. Nobody may change what is returned."""
    schema = json.loads(text)
    try:
        _check_schema(schema)
        return closed(schema) if isinstance(schema, Mapping) else schema
    except RecursionError:
        raise GrammarError(f"structured.json is nested too deep; {REMEDY}") from None


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a schema and close its objects: where one lists ``properties`` alone, it allows no others.

    An object stays open where the schema says so (``additionalProperties``, ``patternProperties``), where it requires a
    property that it does not list, and where another part of the schema may add properties to it: through ``allOf``,
    ``anyOf``, ``oneOf`` or ``$ref``. Identifiers, which need not be URIs at clients, are left out where no ``$ref``
    names them.
    """
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    references = [value for key, value in _entries(copy) if key == "$ref"]
    alone = all(isinstance(each, str) and each.startswith("#") for each in references)  # none names an $id
    seen: dict[tuple[int, bool], dict[str, Any]] = {}
    waiting: list[tuple[Any, bool]] = [(copy, False)]  # and whether another part constrains the same value
    while waiting:
        part, shares = waiting.pop()
        if not isinstance(part, dict) or (id(part), shares) in seen:
            continue
        seen[id(part), shares] = part
        for name in part.keys() & _IDENTIFIERS if alone else ():
            del part[name]
        joined = [each for name in _JOINED for each in listed(part.get(name))]
        if isinstance(reference := part.get("$ref"), str):
            joined.append(resolved(reference, copy))
        shares |= bool(part.keys() & _OF_OBJECTS) or sum(name in part for name in (*_JOINED, "$ref")) > 1
        waiting += [(each, shares or len(listed(part.get("allOf"))) > 1) for each in joined]
        for name in part.keys() & _BELOW:
            below = [*part[name].values()] if isinstance(part[name], dict) and name in _NAMED else part[name]
            waiting += [(each, False) for each in ([below] if isinstance(below, dict) else listed(below))]
    for (_, shares), part in seen.items():
        named = part.get("properties")
        if shares or (id(part), True) in seen or part.keys() & _OPEN or not isinstance(named, dict):
            continue
        if {*map(str, listed(part.get("required")))} <= named.keys():
            part["additionalProperties"] = False
    return copy


def clause(message: str) -> str:
    """Shorten a library's message to a clause: one line of at most 200 characters, without a full stop."""
    text = " ".join(message.replace("<non-verbose/>", "").split()).replace(". ", ", ")
    if text == "NoExtensionBias":
        return "no text fits it, for it never ends"
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "use anyOf")
    return (text if len(text) <= 200 else f"{text[:200]}…").rstrip(".") or "it is too complex"


def _check_grammar(text: str) -> None:
    """Check a Lark or GBNF grammar, and the schemas that stand in Lark behind %json."""
    if (rules := len(_RULE.findall(text))) > RULES:
        raise GrammarError(f"structured.grammar has {rules} rules; give at most {RULES}.")
    if (references := text.count('"$ref"')) > REFERENCES:
        raise GrammarError(f"structured.grammar has {references} times $ref; give at most {REFERENCES}.")
    for divisor in _DIVISOR.findall(text):
        if not SMALLEST_DIVISOR <= abs(float(divisor)) <= LARGEST_DIVISOR:
            raise GrammarError(
                f"structured.grammar has multipleOf {divisor[:20]}; give {SMALLEST_DIVISOR} to {LARGEST_DIVISOR}."
            )


def _check_schema(schema: Any) -> None:
    if schema is False:
        raise GrammarError("structured.json is false, which no text fits; give a schema.")
    references: list[str] = []
    for key, value in _entries(schema):
        if key == "x-guidance":
            raise GrammarError("structured.json has the key x-guidance, which is not supported; leave it out.")
        divides = key == "multipleOf" and isinstance(value, int | float)
        if divides and not SMALLEST_DIVISOR <= abs(value) <= LARGEST_DIVISOR:
            raise GrammarError(
                f"structured.json has multipleOf {shown(value)}; give {SMALLEST_DIVISOR} to {LARGEST_DIVISOR}."
            )
        if key == "$ref" and isinstance(value, str):
            references.append(value)
    if len(references) > REFERENCES:
        raise GrammarError(f"structured.json has {len(references)} times $ref; give at most {REFERENCES}.")
    if references and _blocks(schema, _ending(schema, set(references)), set()):
        raise GrammarError("structured.json cannot be used (no text fits it, for it never ends); fix its $ref.")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of objects in ``value``, at any depth."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _ending(root: Mapping[str, Any], references: set[str]) -> set[str]:
    """Return the ``references`` with a finite text; a reference follows the ones that its text needs."""
    ending: set[str] = set()
    waiting: dict[str, list[str]] = {}  # reference -> references to check again once it ends
    whole: set[int] = set()
    due = list(references)
    while due:
        name = due.pop()
        if name in ending:
            continue
        blocks = _blocks(resolved(name, root), ending, whole)
        for reference in blocks:
            waiting.setdefault(reference, []).append(name)
        if not blocks:
            ending.add(name)
            due += waiting.pop(name, [])
    return ending


def _blocks(schema: Any, ending: set[str], whole: set[int]) -> set[str]:
    """List references of which one must have a finite text before ``schema`` has one; empty: it has one.

    ending  references that are known to have a finite text
    whole   ids of schemas that are known to have a finite text; new ones are added
    """
    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema or id(schema) in whole:
        return set()
    if isinstance(reference := schema.get("$ref"), str) and reference not in ending:
        return {reference}
    for name in ("anyOf", "oneOf"):
        branches: list[set[str]] = []
        for branch in listed(schema.get(name)):
            branches.append(_blocks(branch, ending, whole))
            if not branches[-1]:
                break
        if branches and branches[-1]:
            return set().union(*branches)
    parts = listed(schema.get("allOf"))
    if schema.get("type") == "object" and isinstance(properties := schema.get("properties"), Mapping):
        parts = parts + [properties.get(name) for name in listed(schema.get("required")) if isinstance(name, str)]
    minimum = schema.get("minItems", 0)
    if schema.get("type") == "array" and isinstance(minimum, int) and minimum > 0:
        first = listed(schema.get("prefixItems"))[:minimum]
        parts = parts + (first if len(first) == minimum else [*first, schema.get("items")])
    for part in parts:
        if blocks := _blocks(part, ending, whole):
            return blocks
    whole.add(id(schema))
    return set()


def resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """Resolve a reference within the schema; None: the target is unknown."""
    part: Any = root
    if reference != "#" and not reference.startswith("#/"):
        return None
    for name in reference.removeprefix("#").split("/")[1:]:
        part = part.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(part, Mapping) else None
    return part


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""
