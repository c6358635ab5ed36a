"""Files that a command is asked to write: refused before the work begins if they cannot be, and never half written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_trt.errors import UserError


@contextmanager
def output_file(option: str, path: Path | None) -> Iterator[Callable[[bytes], None]]:
    """A writer for ``path``, which ``option`` named; each write replaces the last. None: what is written is dropped."""
    if path is None:
        yield lambda content: None
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror}); name a file in a folder that exists."
        ) from error

    def write(content: bytes) -> None:
        partial.write_bytes(content)
        partial.replace(path)

    try:
        yield write
    finally:
        partial.unlink(missing_ok=True)


def json_bytes(result: dict[str, Any]) -> bytes:
    return (json.dumps(result, ensure_ascii=False, indent=1) + "\n").encode()
