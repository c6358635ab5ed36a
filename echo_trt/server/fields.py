"""What the bodies' models have in common: strict objects, and bounds that are looked at before entries are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from echo_trt.engine.params import PARAMETERS
from echo_trt.server.errors import ApiError, shown

#: Most messages of a chat, and most content parts of a message: as at OpenAI.
MESSAGES = 2048
#: Most fields of an object. More would only take longer to refuse; there are about 40 that mean something.
FIELDS = 100


def bounded(raw: dict[str, Any]) -> dict[str, Any]:
    """Refuse a body with too many fields to check. Raises ApiError."""
    if len(raw) > FIELDS:
        raise ApiError(400, f"The body has {len(raw)} fields; give at most {FIELDS}.")
    return raw


def check_supported(name: str, value: Any, refused: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether ``refused`` has a field, whose value is then one that asks for nothing. Raises ApiError."""
    if name not in refused:
        return False
    if not any(value == free and type(value) is type(free) for free in refused[name]):
        message = f"{name} is {shown(value)}, which this engine does not support; leave it out."
        raise ApiError(400, message, param=name)
    return True


class Strict(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and len(raw) > FIELDS:
            raise ValueError(f"give at most {FIELDS} fields")
        return raw


class RequestBody(Strict):
    """What is sent to an endpoint.

    REFUSED  fields that ask for something we don't have, unless they hold one of these values (null asks for nothing)
    IGNORED  fields that change no text
    """

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_what_we_have(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        read = {name: value for name, value in bounded(raw).items() if value is not None and name not in cls.IGNORED}
        return cls.kept({name: read[name] for name in read if not check_supported(name, read[name], cls.REFUSED)})

    @classmethod
    def kept(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the fields as they are checked. Raises ApiError."""
        return given

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
