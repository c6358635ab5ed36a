"""Files that a command is asked to write: refused before the work begins if they cannot be, and never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from echo_trt.errors import UserError

Writer = Callable[[bytes], None]


@contextmanager
def output_file(option: str, path: Path | None, inputs: Iterable[Path | None] = ()) -> Iterator[Writer]:
    """A writer for ``path``, which ``option`` named; each write replaces the last. None: what is written is dropped.

    A file that is one of ``inputs`` is refused: a user's own prompts are not to be lost for a slip.
    """
    if path is None:
        yield lambda content: None
    elif os.path.isdir(path):
        raise UserError(f"{option} {path} is a folder; name a file.")
    elif os.path.exists(path) and not os.path.isfile(path):
        yield from _written_at_the_end(option, path)
    else:
        _check_apart(option, path, inputs)
        yield from _replaced(option, path)


def _check_apart(option: str, path: Path, inputs: Iterable[Path | None]) -> None:
    with _told(option, path):
        if os.path.realpath(path) in {os.path.realpath(file) for file in inputs if file is not None}:
            raise UserError(f"{option} {path} is a file that the command reads; name another file.")


def _written_at_the_end(option: str, path: Path) -> Iterator[Writer]:
    """A pipe or a device is not to be replaced, and takes nothing back: it gets the last of what is written."""
    if not os.access(path, os.W_OK):
        raise UserError(f"{option} {path} cannot be written (Permission denied); name another file.")
    last: list[bytes] = []

    def write(content: bytes) -> None:
        last[:] = [content]

    try:
        yield write
    finally:
        for content in last:
            with _told(option, path):
                path.write_bytes(content)


def _replaced(option: str, path: Path) -> Iterator[Writer]:
    with _told(option, path):  # a relative path may start in a folder that was deleted
        place = Path(os.path.realpath(path))  # a link stays, and what it names is replaced
    partial = place.with_name(f".{place.name}.{os.urandom(4).hex()}.partial")  # another process writes one of its own
    with _told(option, path):
        partial.touch()

    def write(content: bytes) -> None:
        with _told(option, path):
            partial.write_bytes(content)
            partial.replace(place)

    try:
        yield write
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _told(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror}); name a file in a folder that exists and has room."
        ) from error


@contextmanager
def files_first(out: Console) -> Iterator[None]:
    """What is printed in here may fail, on a full disk or for a reader that has left: that is told after the files."""
    printed = out.file
    out.file = lasting = _Lasting(printed)
    try:
        yield
    finally:
        out.file = printed
    if lasting.error:
        raise lasting.error


class _Lasting:
    """A stream that keeps its first error, and drops what is written after it."""

    def __init__(self, stream: TextIO):
        self._stream, self.error = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *given: str) -> None:
        if self.error is None:
            try:
                action(*given)
            except OSError as error:
                self.error = error


def json_bytes(result: dict[str, Any]) -> bytes:
    return (json.dumps(result, ensure_ascii=False, indent=1) + "\n").encode()
