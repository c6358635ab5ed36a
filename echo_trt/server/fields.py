"""Which fields of a body are read, dropped or refused: one rule for all APIs; and bounds looked at before entries."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from echo_trt.engine.params import PARAMETERS
from echo_trt.server.errors import REFUSED_FIELD, ApiError, shown

#: Most messages of a chat, and most content parts of a message: as at OpenAI.
MESSAGES = 2048
#: Most fields of an object, and most names that are dropped from a body. More would only take longer to look at.
FIELDS = 100
#: Fields of these APIs and of their clients that say something about the caller, and nothing about the text.
ABOUT = frozenset(
    (
        *("cache_control", "client_metadata", "guided_decoding_backend", "index", "inference_geo", "keep_alive"),
        *("metadata", "parsed", "parsed_arguments", "phase", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "speed", "status", "user"),
    )
)
_SAMPLERS = ("dry_multiplier", "dynatemp_range", "mirostat", "mirostat_mode", "smoothing_factor", "top_a")
_STORED = ("cache_salt", "container", "conversation", "previous_response_id")
#: Fields that ask for a text, or for a way to it, that we don't have, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("background", "continue_final_message", "echo", "prefix", "raw", "return_token_strs"), (False,)),
    **dict.fromkeys((*_SAMPLERS, "prompt_logprobs", "xtc_probability"), (0,)),
    **dict.fromkeys(("length_penalty", "tfs", "tfs_z", "n", "typical", "typical_p"), (1,)),
    **dict.fromkeys(("context", "format", "input", "instructions", "messages", "prompt", "system"), ("", [])),
    **dict.fromkeys((*_STORED, "web_search_options"), ()),
    "chat_template": ("",),
    "function_call": ("none",),
    "modalities": (["text"],),
    "store": (False, True),  # nothing is stored either way, as answers say
    "truncation": ("disabled", "auto"),  # nothing is cut off: a prompt that does not fit is refused
    "verbosity": ("medium",),
}
#: Names of other fields that constrain the text, choose its tokens or give the model more to read. What begins with a
#: sampler's name only sets one that UNSUPPORTED refuses where it is on.
_CONSTRAINS = re.compile(
    r"(?!dry_|xtc_|mirostat_|dynatemp_|top_logprobs$).*"
    r"(adapter|allowed|attachment|audio|banned|beam|bias|budget|choice|constrain|cutoff|document|ebnf|(^|_)eos|(^|_)files?$"
    r"|forced|format$|function|grammar|guided|image|logit|lora|(^|_)(min|max)_?\w*(token|len|call)|mcp|no_repeat|penalt"
    r"|refusal|regex|sampler|schema|stop|suffix|template|temperature|tool|(^|_)top_|truncate_prompt|video|words)",
    re.IGNORECASE | re.DOTALL,
)
NEAR = 0.8  # difflib's ratio of two names; larger: fewer typing errors are seen
LONGEST = 50  # characters of a name that is shown, or may be a typing error


@dataclass
class Reading:
    """How one body is read: ``strict`` drops no unknown field; ``ignored`` are names of those that were dropped."""

    strict: bool = False
    ignored: dict[str, None] = field(default_factory=dict)


#: Of the body that is read now, from its parsing to its last check.
READING: ContextVar[Reading] = ContextVar("reading")


def ignore(name: str) -> None:
    """Note that a field had no effect. Raises ApiError where there are too many."""
    if reading := READING.get(None):
        reading.ignored[name] = None  # whole: a shortened name would stand for any number of others
        if len(reading.ignored) > FIELDS:
            raise ApiError(400, f"The body has more than {FIELDS} fields that are not known here; leave them out.")


def read_fields(given: Mapping[str, Any], known: Collection[str], path: str = "") -> dict[str, Any]:
    """Return the fields that are ``known``, and drop the others but those that matter to the text.

    Null asks for nothing. ``path`` stands before the names that are told. Raises PydanticCustomError for
    one that is refused.
    """
    kept = {name: value for name, value in given.items() if name in known}
    for name, value in given.items() if len(kept) < len(given) else ():
        if name in known or value is None or name in ABOUT:
            continue
        if why := _refusal(name, value, known, given, path):
            raise PydanticCustomError(REFUSED_FIELD, "{why}", {"name": name, "why": why})
        ignore(path + name)
    return kept


def read_at(where: str, given: Mapping[str, Any], known: Collection[str], path: str) -> dict[str, Any]:
    """Do as ``read_fields``, for the object in the field ``where``. Raises ApiError."""
    try:
        return read_fields(given, known, path)
    except PydanticCustomError as error:
        param = f"{where}.{error.context['name'][:LONGEST]}" if error.context else where
        raise ApiError(400, f"{param} {error.message()}", param=param) from None


def _refusal(name: str, value: Any, known: Collection[str], given: Mapping[str, Any], path: str) -> str:
    """Say why a field that is not known is refused; "": it is dropped."""
    if name in UNSUPPORTED:
        if any(value == free and isinstance(value, bool) == isinstance(free, bool) for free in UNSUPPORTED[name]):
            return ""
        return f"is {shown(value)}, which this engine does not support; leave it out."
    reading = READING.get(None) or Reading()
    if reading.strict:
        return "is not known here; leave it out."
    if path + name not in reading.ignored and (near := _nearest(name, [each for each in known if each not in given])):
        return f"is {shown(value)}, but no field has this name; did you mean {near}?"
    if value and _constrains(name[: 2 * LONGEST]):
        return f"is {shown(value)}, which this engine does not support; leave it out."
    return ""


@lru_cache(1024)
def _constrains(name: str) -> bool:
    return bool(_CONSTRAINS.match(name))


def _nearest(name: str, missing: list[str]) -> str | None:
    """Find the field that a name is a typing error of, among those that the object lacks."""
    if len(name) > LONGEST:
        return None
    plain = {each.replace("_", "").lower(): each for each in missing}
    found = difflib.get_close_matches(name.replace("_", "").lower(), plain, 1, NEAR)
    return plain[found[0]] if found else None


def bounded(raw: dict[str, Any]) -> dict[str, Any]:
    """Refuse a body with too many fields to check. Raises ApiError."""
    if len(raw) > FIELDS:
        raise ApiError(400, f"The body has {len(raw)} fields; give at most {FIELDS}.")
    return raw


class Strict(BaseModel):
    """An object whose fields are read by the rule of this module, and by their types.

    PATH  what stands before the names of fields that are dropped
    ALSO  fields that are read beside those of the model
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    PATH: ClassVar[str] = ""
    ALSO: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        return cls.kept(raw) if isinstance(raw, dict) else raw

    @classmethod
    @cache
    def known(cls) -> frozenset[str]:
        return frozenset(cls.model_fields).union(cls.ALSO)

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the fields as they are checked. JavaScript and Lua write whole numbers as 2.0."""
        if len(given) > FIELDS:
            raise ValueError(f"give at most {FIELDS} fields")
        read = read_fields(given, cls.known(), cls.PATH)
        return {name: int(x) if type(x) is float and x.is_integer() else x for name, x in read.items()}


class RequestBody(Strict):
    """What is sent to an endpoint.

    NEUTRAL  fields, and values of them that ask for nothing here
    """

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the fields as they are checked. Raises ApiError."""
        read = super().kept({name: value for name, value in bounded(given).items() if value is not None})
        strict = (READING.get(None) or Reading()).strict
        for name in read.keys() & cls.NEUTRAL.keys() if not strict else ():
            if type(read[name]) is not bool and read[name] in cls.NEUTRAL[name]:
                ignore(name)
                del read[name]
        return read

    @property
    def left_out(self) -> list[str]:
        """Types of tools that are not used."""
        return []

    def in_client_fields(self, error: ApiError) -> ApiError:
        """Rewrite a refusal in the names of these fields."""
        return error


def at_most(maximum: int, things: str) -> BeforeValidator:
    """Refuse a longer list or object before pydantic looks at its entries, which takes it microseconds for each."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > maximum:
            raise ValueError(f"give at most {maximum} {things}")
        return value

    return BeforeValidator(check)


def within(name: str, low: int | None = None, high: int | None = None) -> Any:
    """Return the bounds of a sampling parameter, or of its entries. ``low``, ``high``: OpenAI's, where they differ."""
    known = PARAMETERS[name]
    low, high = known.low if low is None else low, known.high if high is None else high
    if known.kind is str:
        return Field(min_length=low, max_length=high)
    return Field(gt=low, le=high) if known.above else Field(ge=low, le=high)
