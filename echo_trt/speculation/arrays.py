"""Ragged batches as flat arrays, and loops over them compiled to machine code by numba.

An iteration's decisions are a few thousand operations. As array calls they are a few hundred, of some microseconds of
overhead each; compiled, they take a tenth of that. numba keeps the machine code in a cache beside the module, or
in NUMBA_CACHE_DIR, so that only the first import on a machine takes seconds. An image has it from its build. Files of
machine code end with their checksum: one that is damaged would crash, or compute something else.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

log = logging.getLogger(__name__)

njit: Any = None  # its overloads take no list of signatures
caching: Any = None
try:
    from numba import njit
    from numba.core import caching
except ImportError:  # where nothing can be installed
    warnings.warn("numba is missing: planning and sampling are interpreted, and slow; install numba.", stacklevel=1)

Loops = TypeVar("Loops", bound=Callable)


def compiled(signature: str | None = None) -> Callable[[Loops], Loops]:
    """Compile a function for arguments of this numba ``signature``; without one, as a part of others."""
    types = [signature] if signature else []
    return lambda function: function if njit is None else compiled_once(partial(njit, *types), function)


def compiled_once(compiler: Callable[..., Callable[[Loops], Any]], function: Loops) -> Any:
    """Compile a function by one of numba's decorators, or take what an earlier process compiled."""
    try:
        return compiler(cache=code_folder(function) is not None)(function)
    except OSError:  # a full disk
        return compiler()(function)


def code_folder(function: Callable) -> Path | None:
    """Return the folder where numba keeps machine code of a function's module; None: no folder can be written."""
    try:
        used = Path(njit(cache=True)(function).stats.cache_path)
    except RuntimeError:
        return None
    _bring_code(Path(function.__code__.co_filename).with_name("__pycache__"), used)
    return used


@cache
def _bring_code(kept: Path, used: Path) -> None:
    """Copy machine code that is ``kept`` beside modules, as in an image, to the other folder that numba uses."""
    if kept == used:  # which can be written
        return
    for file in sorted(kept.glob("*.nb?")):  # code, and then the index that names it
        with suppress(OSError):
            part = used / f"{file.name}.{os.getpid()}"
            shutil.copy(file, part)
            part.rename(used / file.name)


def sealed(code: bytes) -> bytes:
    """Return what a file of machine code holds."""
    return code + sha256(code).digest()


def unsealed(file: Path) -> bytes | None:
    """Return the code of a file as it was written. None: there is none; what is damaged goes."""
    with suppress(OSError):
        kept = file.read_bytes() if file.is_file() else b""
        code = kept[: -sha256().digest_size]
        if kept and sealed(code) == kept:
            return code
        if os.path.lexists(file):
            _report()
            (shutil.rmtree if file.is_dir() else os.unlink)(file)
    return None


@cache
def _report() -> None:
    log.warning("machine code that was kept is damaged or an earlier version's; it is compiled again.")


if njit:

    class _SealedFiles(caching.IndexDataCacheFile):  # type: ignore[misc]
        """numba's files of a function, an index and code. numba reads over a seal, and takes None for code to make."""

        def _load_index(self) -> dict:
            return super()._load_index() if unsealed(Path(self._index_path)) else {}

        def _load_data(self, name: str) -> Any:
            return super()._load_data(name) if unsealed(Path(self._data_path(name))) else None

        @contextmanager
        def _open_for_write(self, path: str) -> Iterator[BytesIO]:
            with super()._open_for_write(path) as file, BytesIO() as whole:
                yield whole
                file.write(sealed(whole.getvalue()))

    caching.IndexDataCacheFile = _SealedFiles


def begins(counts: np.ndarray) -> np.ndarray:
    """Return where sections of ``counts`` [B] elements begin, and the total: int64 [B+1]."""
    return _begins(np.ascontiguousarray(counts, np.int64))


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """Return 0..counts[0]-1, 0..counts[1]-1, ... end to end: int64 [sum counts]."""
    return _ragged_arange(np.ascontiguousarray(counts, np.int64))


@compiled("i8[::1](i8[::1])")
def _begins(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, np.int64)
    out[1:] = counts.cumsum()
    return out


@compiled("i8[::1](i8[::1])")
def _ragged_arange(counts: np.ndarray) -> np.ndarray:
    out, end = np.empty(counts.sum(), np.int64), 0
    for count in counts:
        out[end : end + count] = np.arange(count)
        end += count
    return out


def next_size(sizes: Sequence[int], tokens: int) -> int:
    """Return the first of ``sizes``, ascending, that holds ``tokens``; beyond the last one ``tokens`` themselves."""
    index = bisect_left(sizes, tokens)
    return sizes[index] if index < len(sizes) else tokens
