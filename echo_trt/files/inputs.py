"""Files that a command reads, and a user may name: /dev/zero and some pipes have no end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_TEXT = 64 * 2**20  # bytes of a recipe, a manifest, a calibration
LONGEST_LINE = 16 * 2**20  # bytes


def read_text(path: Path) -> str:
    """UTF-8. Raises OSError also for what is too large to be meant."""
    with path.open("rb") as stream:
        content = stream.read(LONGEST_TEXT + 1)
    if len(content) > LONGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content.decode("utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """One after another, without their ends. Raises OSError also for a line that is too long to be meant."""
    with path.open("rb") as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise OSError(errno.EFBIG, f"a line is longer than {LONGEST_LINE >> 20} MB", str(path))
            yield from line.splitlines()  # which may end as on a Mac of old
