"""The one exception that stands for a user's mistake, and how a file's is told."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

#: What numpy and zipfile raise for a file of arrays that is none of theirs, or was changed.
DAMAGED = (
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


class UserError(Exception):
    """Bad input. The message is one sentence: field, value and remedy. The CLI prints it and exits with 2."""


def first_mistake(error: ValidationError) -> str:
    """A clause: the field of a file that is wrong, why, and the value where it is a short one."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    said, value = first["msg"].removeprefix("Value error, ").replace(". ", ", "), first["input"]
    short = isinstance(value, int | float | str | None) and first["type"] != "json_invalid" and len(repr(value)) < 80
    return f"{key} is not valid ({said}{f', not {value!r}' if short else ''})"
