"""Reading of files that a user names. Sizes are limited, since /dev/zero and some pipes have no end."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from echo_trt.errors import UserError

# Bytes of a text, such as a recipe or a manifest, and of a line. Larger: more memory goes before a file is refused.
LONGEST_TEXT, LONGEST_LINE = 64 * 2**20, 16 * 2**20


def read_text(path: Path) -> str:
    """Read a UTF-8 file. A file of more than LONGEST_TEXT bytes is an OSError."""
    with path.open("rb") as stream:
        content = stream.read(LONGEST_TEXT + 1)
    if len(content) > LONGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content.decode("utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends. A line of more than LONGEST_LINE bytes is an OSError."""
    with path.open("rb") as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise OSError(errno.EFBIG, f"a line is longer than {LONGEST_LINE >> 20} MB", str(path))
            yield from line.splitlines()  # also at a bare carriage return


def is_gguf(path: Path) -> bool:
    """Whether a file is in GGUF, by its first bytes: Ollama's have no suffix. A .gguf file with others is a broken one.

    False for a folder, and where there is no file.
    """
    if not path.is_file():
        return False
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    return path.suffix == ".gguf"


def gguf_parts(path: Path) -> list[Path]:
    """Return the files of a model that begins in ``path``: others where its name ends in -00001-of-0000N.gguf.

    Raises UserError where another part is named, or one is missing.
    """
    numbers = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name)
    if numbers is None:
        return [path]
    stem, count = path.name[: numbers.start()], int(numbers[2])
    parts = [path.with_name(f"{stem}-{part:05}-of-{numbers[2]}.gguf") for part in range(1, count + 1)]
    if numbers[1] != "00001":
        raise UserError(f"{path} is not a model's first file; name {parts[0].name}.")
    if missing := [part.name for part in parts if not part.exists()]:
        raise UserError(f"{path} is one of {count} files, and {missing[0]} is not beside it; download it, too.")
    return parts
