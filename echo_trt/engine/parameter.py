"""The definition of a sampling parameter. Interfaces take bounds and defaults from it; tests compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from echo_trt.errors import UserError, shown

#: The largest count or token id.
INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What every interface says of one sampling parameter.

    default      of the value; its type tells a single value, a tuple or a mapping from token ids
    kind         type of the value or of its entries: int, float, bool or str; dict: a JSON object
    doc          a line for tables
    rule         how a refusal goes on behind "give"; ``{0.NAME}`` is another parameter's value; "": by type and bounds
    low, high    bounds of the value, of its entries, or of their length where they are strings
    above        whether ``low`` itself is refused
    entries      entries at most
    changes      "limits": among which tokens draws are; "penalties": logits, by what was said; "logits": logits, by
                 other things; "": nothing of these
    off          further values that change nothing, beside the default
    recommended  whether a checkpoint may recommend a value (``bundle.manifest.Sampling``)
    option       whether ``echo-trt generate`` has it
    tensor       Triton's input, where it has another name
    text         whether a text may stand for the token ids
    openai       what OpenAI's field has otherwise (default, low, high); None: no field of one value
    """

    default: Any
    kind: type
    doc: str
    rule: str = ""
    low: int = 0
    high: int = INT32
    above: bool = False
    entries: int = INT32
    changes: str = ""
    off: tuple[object, ...] = ()
    recommended: bool = False
    option: bool = False
    tensor: str = ""
    text: bool = False
    openai: Mapping[str, Any] | None = field(default_factory=dict)

    @property
    def single(self) -> bool:
        return self.kind in (int, float, bool) and not isinstance(self.default, tuple | Mapping)

    @property
    def remedy(self) -> str:
        """Which values are taken, as a refusal says it."""
        if self.rule or self.kind is bool:
            return self.rule or "True or False"
        kind = "a whole number" if self.kind is int else "a number"
        end = ", or None" if self.default is None else f", {self.default:g} is off" if self.changes else ""
        return f"{kind} {'' if self.above else 'from '}{self.values}{end}"

    @property
    def values(self) -> str:
        """The bounds as tables of the docs have them; a string's are those of its length."""
        if self.kind in (bool, dict):
            return ""
        low, high = _spelled(self.low), _spelled(self.high)
        span = f"above {low}, up to {high}" if self.above else f"{low} to {high}"
        return f"{span} characters" if self.kind is str else span

    def allows(self, value: object) -> bool:
        """Whether a value has the right type and is within the bounds."""
        if isinstance(self.default, Mapping):
            return (
                isinstance(value, Mapping)
                and len(value) <= self.entries
                and all(_is_number(token, int) and 0 <= token <= INT32 for token in value)
                and all(map(self._holds, value.values()))
            )
        if isinstance(self.default, tuple):
            if self.text and isinstance(value, str):
                return True
            return isinstance(value, tuple | list) and all(map(self._holds, value))  # a string is no list of strings
        return (value is None and self.default is None) or self._holds(value)

    def check(self, name: str, value: object) -> None:
        """Raise UserError, which calls the value ``name``, unless it is allowed."""
        if not self.allows(value):
            raise UserError(f"{name} is {shown(value)}; give {self.remedy}.", name)

    def _holds(self, value: Any) -> bool:
        if self.kind in (bool, dict):
            return isinstance(value, self.kind)
        if self.kind is str:
            return isinstance(value, str) and self.low <= len(value) <= self.high
        if not _is_number(value, self.kind):
            return False
        within = (self.low < value if self.above else self.low <= value) and value <= self.high  # NaN is within nothing
        return bool(within)


def parameter(default: Any, doc: str, *, kind: type | None = None, **facts: Any) -> Any:
    """Make a dataclass's field with a Parameter in its metadata. ``kind``: by default the default's type."""
    metadata = {"parameter": Parameter(default=default, kind=kind or type(default), doc=doc, **facts)}
    if kind is dict:
        return field(default=default, hash=False, metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)


def _spelled(number: int) -> str:
    """Write the largest numbers of 32 and 64 bits as powers."""
    return next((f"2^{bits} - 1" for bits in (31, 63) if number == 2**bits - 1), f"{number:,}")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)
