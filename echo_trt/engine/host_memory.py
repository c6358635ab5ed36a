"""The machine's memory that a process may still take, and amounts of memory as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from echo_trt.errors import UserError, shown

OPTION = "--kv-cache-memory"  # bytes of the KV pool
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
#: Version of control groups -> folders where they are mounted, files with the limit, the use and the events, and the
#: keys in memory.stat of the file cache, which the kernel takes back when memory is short.
_GROUPS = {
    1: (
        ("memory",),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
        ("total_inactive_file", "total_active_file"),
    ),
    2: ((".", "unified"), ("memory.max", "memory.current", "memory.events"), ("inactive_file", "active_file")),
}


@dataclass(frozen=True, order=True)
class FreeMemory:
    """Bytes that are ``left`` under a ``limit``, and processes that the kernel has ``killed`` for it.

    ``name``: whose limit it is.
    """

    left: int
    limit: int
    name: str = "this machine's memory"
    killed: int = 0


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that are free on this machine, or under the limit of this process's control groups if fewer.

    A container's limit is such a group's. ``root``: the folder that has ``proc`` and ``sys``.
    """
    return max(tightest(root).left, 0)


def tightest(root: Path = Path("/")) -> FreeMemory:
    """Return the limit under which least is left: this machine's, or a control group's. ``root``: as above."""
    machine = psutil.virtual_memory()
    return min([FreeMemory(machine.available, machine.total), *_groups(root)])


def _groups(root: Path) -> Iterator[FreeMemory]:
    """Yield the memory groups of this process, and the groups around them, as far as they have a limit."""
    lines: list[str] = []
    with suppress(OSError):  # no Linux
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        group_paths, names, caches = _GROUPS[version]
        inner = PurePosixPath(path.lstrip("/"))
        for group_path in group_paths:
            for group in (inner, *inner.parents):  # in a container the path can be the host's: the last is the mount
                with suppress(OSError, ValueError):  # no such group, or "max": no limit
                    folder = root / "sys/fs/cgroup" / group_path / group
                    maximum, used = (int((folder / name).read_text()) for name in names[:2])
                    statistics, events = _counts(folder / "memory.stat"), _counts(folder / names[2])
                    left = maximum - used + sum(statistics.get(key, 0) for key in caches)
                    yield FreeMemory(left, maximum, "the container's limit", events.get("oom_kill", 0))


def _counts(path: Path) -> dict[str, int]:
    """Read lines of a key and a number; {}: there is no such file."""
    with suppress(OSError):
        return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}
    return {}


def bytes_in(name: str, text: str) -> int:
    """Return the bytes that a text such as ``4``, ``4G`` (GiB both) or ``512M`` says. ``name``: the option's."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(|B|[KMGT](?:IB)?)", text.strip().upper())
    amount = int(float(match[1]) * UNITS[match[2][:1] or "G"]) if match else 0
    if amount < 1:
        raise UserError(f"{name} is {shown(text)}; give GiB, such as 4, or an amount such as 4G or 512M.")
    return amount


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
