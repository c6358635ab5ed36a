"""Files that a command writes. A name that cannot be written is refused at the start; no file is left half written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from echo_trt.bundle.stored import partial_name, write_whole
from echo_trt.errors import UserError

WriteBytes = Callable[[bytes], None]


@contextmanager
def output_file(option: str, path: Path | None, inputs: Iterable[Path | None] = ()) -> Iterator[WriteBytes]:
    """Yield a writer for ``path``, which ``option`` named; each write replaces the last. None drops all writes.

    A file that is one of ``inputs`` is refused: a slip must not cost a user's prompts.
    """
    if path is None:
        yield lambda content: None
    elif os.path.isdir(path):
        raise UserError(f"{option} {path} is a folder; name a file.")
    elif os.path.exists(path) and not os.path.isfile(path):
        yield from _pipe_writer(option, path)
    else:
        _check_apart(option, path, inputs)
        yield _file_writer(option, path)


def _check_apart(option: str, path: Path, inputs: Iterable[Path | None]) -> None:
    with _write_errors(option, path):
        if os.path.realpath(path) in {os.path.realpath(file) for file in inputs if file is not None}:
            raise UserError(f"{option} {path} is a file that the command reads; name another file.")


def _pipe_writer(option: str, path: Path) -> Iterator[WriteBytes]:
    """Yield a writer for a pipe or a device, which cannot be replaced: at the end it gets the last content alone."""
    if not os.access(path, os.W_OK):
        raise UserError(f"{option} {path} cannot be written (Permission denied); name another file.")
    last: list[bytes] = []

    def write(content: bytes) -> None:
        last[:] = [content]

    try:
        yield write
    finally:
        for content in last:
            with _write_errors(option, path):
                path.write_bytes(content)


def _file_writer(option: str, path: Path) -> WriteBytes:
    with _write_errors(option, path):  # a relative path may start in a folder that was deleted
        target_path = Path(os.path.realpath(path))  # a link stays, and the file behind it is replaced
        partial = partial_name(target_path)
        partial.touch()
        partial.unlink()

    def write(content: bytes) -> None:
        with _write_errors(option, path):
            write_whole(target_path, content)

    return write


@contextmanager
def _write_errors(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror}); name a file in a folder that exists and has room."
        ) from error


@contextmanager
def files_first(out: Console) -> Iterator[None]:
    """Print without failing, on a full disk or for a reader that has left: the error is raised after the files."""
    printed = out.file
    out.file = stream = _PatientStream(printed)
    try:
        yield
    finally:
        out.file = printed
    if stream.error:
        raise stream.error


class _PatientStream:
    """A stream that keeps its first error and drops all later writes."""

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
