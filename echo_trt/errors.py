"""The one exception that stands for a user's mistake, and how a file's is told."""

from __future__ import annotations

import tokenize
import traceback
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

NO_MEMORY = "bad_alloc", "start new thread", "allocate memory"  # of what libraries say of it
LONGEST_SHOWN = 200  # characters of a value, or of an error, in a refusal
#: What numpy and zipfile raise for a file of arrays that is none of theirs, or was changed.
DAMAGED = (ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


class UserError(Exception):
    """Bad input. The message is one sentence: field, value and remedy. The CLI prints it and exits with 2.

    field  the field of a request that the sentence is about, where it is known
    """

    def __init__(self, message: str = "", field: str | None = None):
        super().__init__(message)
        self.field = field


class StartFailed(Exception):
    """What failed and is no mistake of the user's. The message is one sentence. The CLI prints it and exits with 1."""


class GrammarError(UserError):
    """A ``structured`` that cannot be used; the sentence begins with its kind, as in ``structured.json``."""

    def __init__(self, message: str):
        super().__init__(message, "structured")


class TooLong(UserError):
    """A prompt that the model's context does not hold."""


def shown(value: Any) -> str:
    """Write a value as a refusal names it: a long one is shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a nest of lists
        return "a value too long to print"
    return shortened(text)


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def no_memory(error: Exception) -> UserError | None:
    """Return what a failure for want of memory means, whichever library tells it; None for another failure."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(words in text for words in NO_MEMORY):
        return None
    amount = f" ({shortened(' '.join(text.split()))})" if text else ""
    limits = "limits.kv_blocks (--kv-cache-memory), limits.context or --batch"
    return UserError(f"there is not enough memory{amount}; lower {limits}.")


def described(error: Exception) -> str:
    """Describe an error in a clause: its type and its message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_SHOWN].rstrip(".: ")


def raised_at(error: Exception) -> str:
    """Return the name of the file, and the line, where an error was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def encodable(text: str, name: str) -> str:
    """Return ``text``, or refuse one that UTF-8 cannot write: half a surrogate pair, from JSON or a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is {text[:40]!r}, which holds half a surrogate pair or a byte that is not UTF-8; "
            "give whole characters."
        ) from error
    return text


def first_mistake(error: ValidationError) -> str:
    """Name the field of a file that is wrong, why it is wrong, and the value where it is a single one."""
    first = error.errors()[0]
    key = shortened(".".join(str(part) for part in first["loc"] if part != "[key]")) or "the file"
    if first["type"] == "missing":
        return f"key {key} is missing"
    message, value = first["msg"].removeprefix("Value error, ").replace(". ", ", "), first["input"]
    single = isinstance(value, int | float | str | None) and first["type"] != "json_invalid"
    return f"{key} is not valid ({message}{f', not {shown(value)}' if single else ''})"
