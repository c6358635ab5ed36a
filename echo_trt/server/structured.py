"""What an answer must fit, in the spellings of OpenAI, vLLM and their clients, as the engine's ``structured``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from echo_trt.grammar.requested import KINDS
from echo_trt.server.errors import ApiError
from echo_trt.server.fields import read_at

#: Fields that are a constraint themselves: vLLM's older names, and those of llama.cpp and SGLang.
GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
GUIDED |= {"json_schema": "json", "regex": "regex", "grammar": "grammar", "ebnf": "grammar"}
STRUCTURED = ("response_format", "structured_outputs", *GUIDED)
SCHEMAS = ("schema", "response_schema", "value")  # beside the type json_object
TYPES = "text, json_object or json_schema"


@dataclass(frozen=True)
class Structured:
    """A grammar for the engine, and the field that it came in."""

    kind: str
    value: Any
    field: str

    def for_engine(self) -> dict[str, Any]:
        """Return it as ``SamplingParams`` has it."""
        return {self.kind: self.value}


def structured_of(given: Mapping[str, Any]) -> Structured | None:
    """Read the one of STRUCTURED that a request gives, if more than once; None: it gives none. Raises ApiError."""
    found = [each for name in STRUCTURED if given.get(name) is not None and (each := _read(name, given[name]))]
    for other in found[1:]:
        if (other.kind, other.value) != (found[0].kind, found[0].value):
            names = [each.field.partition(".")[0] for each in (found[0], other)]
            raise ApiError(400, f"{' and '.join(names)} are both given; give one of them.", param=names[1])
    return found[0] if found else None


def _read(name: str, value: Any) -> Structured | None:
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        return _structured_outputs(value)
    return Structured(GUIDED[name], _parsed(value, name) if GUIDED[name] == "json" else value, name)


def _response_format(value: Any) -> Structured | None:
    field = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":  # LiteLLM, instructor and Hugging Face's client put a schema beside it
        name = next((name for name in SCHEMAS if value.get(name) is not None), None)
        read_at(field, value, ("type", *SCHEMAS), f"{field}.")
        return Structured("json", _schema(value[name], f"{field}.{name}"), f"{field}.{name}") if name else _any(field)
    if kind != "json_schema":
        raise ApiError(400, f"{field} has no type that is known here; give {TYPES}.", param=field)
    inner, where = value.get("json_schema"), f"{field}.json_schema"
    if not isinstance(inner, dict) or ("schema" not in inner and not inner.keys().isdisjoint(("type", "properties"))):
        raise ApiError(400, f'{where} has no "schema"; give {{"name": ..., "schema": ...}}.', param=where)
    read_at(field, value, ("type", "json_schema"), f"{field}.")
    read_at(where, inner, ("name", "schema", "strict", "description"), f"{where}.")
    if inner.get("schema") is None:
        return _any(field)
    return Structured("json", _schema(inner["schema"], f"{where}.schema"), f"{where}.schema")


def _structured_outputs(value: Any) -> Structured | None:
    field = "structured_outputs"
    requested = (
        {name: each for name, each in value.items() if each not in (None, False)} if isinstance(value, dict) else {}
    )
    unknown = next((name for name in requested if name not in KINDS), None)
    if unknown is not None or len(requested) != 1:
        what = f"has {unknown[:50]!a}" if unknown is not None else f"has {len(requested)} kinds"
        raise ApiError(400, f"{field} {what}; give one of {', '.join(KINDS)}.", param=field)
    [(kind, each)] = requested.items()
    where = f"{field}.{kind}"
    return Structured(kind, _parsed(each, where) if kind == "json" else each, where)


def _parsed(value: Any, field: str) -> Any:
    """Parse a schema, which vLLM's clients may send as text."""
    if isinstance(value, str):
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError:
            raise ApiError(400, f"{field} is not JSON; give a schema.", param=field) from None
    return _schema(value, field)


def _schema(value: Any, field: str) -> Any:
    if not isinstance(value, dict | bool):
        raise ApiError(400, f"{field} is no JSON schema; give an object.", param=field)
    return value


def _any(field: str) -> Structured:
    return Structured("json_object", True, field)
