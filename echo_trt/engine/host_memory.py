"""The machine's memory that a process may still take, and amounts of memory as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

from echo_trt.errors import UserError, shown

OPTION = "--kv-cache-memory"  # bytes of the KV pool
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
#: Version of control groups -> folders where they are mounted, files with the limit and the use, and the keys in
#: memory.stat of the file cache, which the kernel takes back when memory is short.
_GROUPS = {
    1: (("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ((".", "unified"), "memory.max", "memory.current", ("inactive_file", "active_file")),
}


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that are free on this machine, or under the limit of this process's control groups if fewer.

    A container's limit is such a group's. ``root``: the folder that has ``proc`` and ``sys``.
    """
    free: int = psutil.virtual_memory().available
    return max(min([free, *(left for _, left in _groups(root))]), 0)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process's control groups may take, such as a container's; None: all there are."""
    limit = min((maximum for maximum, _ in _groups(root)), default=None)
    return limit if limit and limit < psutil.virtual_memory().total else None


def total_memory() -> int:
    """Return the bytes that this machine has, or this process's control groups may take if that is less."""
    return memory_limit() or int(psutil.virtual_memory().total)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limits of this process's memory groups and of those around them, and the bytes that each has left."""
    lines: list[str] = []
    with suppress(OSError):  # no Linux
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        group_paths, limit, use, caches = _GROUPS[version]
        inner = PurePosixPath(path.lstrip("/"))
        for group_path in group_paths:
            for group in (inner, *inner.parents):  # in a container the path can be the host's: the last is the mount
                with suppress(OSError, ValueError):  # no such group, or "max": no limit
                    folder = root / "sys/fs/cgroup" / group_path / group
                    maximum, used = (int((folder / name).read_text()) for name in (limit, use))
                    pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield maximum, maximum - used + sum(int(value) for key, value in pairs if key in caches)


def bytes_in(name: str, text: object) -> int:
    """Return the bytes that a text such as ``4``, ``4G`` (GiB both) or ``512M`` says. ``name``: the option's."""
    plain = text.strip().upper() if isinstance(text, str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(|B|[KMGT](?:IB)?)", plain)
    amount = int(float(match[1]) * UNITS[match[2][:1] or "G"]) if match else 0
    if amount < 1:
        raise UserError(f"{name} is {shown(text)}; give GiB, such as 4, or an amount such as 4G or 512M.")
    return amount


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
