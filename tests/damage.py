"""What may become of a file: damage at random, or something else in its place."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

PAGE = 4096  # bytes of SQLite's pages


def _write(path: Path, begin: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(content)


def some_bytes(path: Path, draw: random.Random) -> None:
    for _ in range(64):
        _write(path, draw.randrange(path.stat().st_size or 1), draw.randbytes(1))


def one_bit(path: Path, draw: random.Random) -> None:
    whole = bytearray(path.read_bytes() or b"0")
    whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)


def a_header(path: Path, draw: random.Random) -> None:
    _write(path, draw.randrange(100), draw.randbytes(draw.randrange(1, 100)))


def a_page(path: Path, draw: random.Random) -> None:
    number = draw.randrange(path.stat().st_size // PAGE + 1)
    _write(path, number * PAGE, draw.choice((bytes(PAGE), draw.randbytes(PAGE))))


def other_order(path: Path, draw: random.Random) -> None:
    """Shuffle its pages, as a disk that writes to another place."""
    content = path.read_bytes()
    pages = [content[begin : begin + PAGE] for begin in range(0, len(content), PAGE)]
    path.write_bytes(b"".join(draw.sample(pages, len(pages))))


def truncated(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size + 1))


def empty(path: Path, draw: random.Random) -> None:
    os.truncate(path, 0)


def gone(path: Path, draw: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def a_folder(path: Path, draw: random.Random) -> None:
    gone(path, draw)
    path.mkdir()
    if draw.random() < 0.5:
        (path / "file").write_bytes(b"text")


def a_fifo(path: Path, draw: random.Random) -> None:
    gone(path, draw)
    os.mkfifo(path)


def a_link(path: Path, draw: random.Random) -> None:
    gone(path, draw)
    path.symlink_to(draw.choice(("/dev/zero", "nowhere", "/", path.name, __file__)))


INSIDE = (some_bytes, one_bit, a_header, a_page, other_order, truncated, empty)
PLACED = (gone, a_folder, a_fifo, a_link)


def damage(path: Path, draw: random.Random) -> str:
    """Damage what is there in one of these ways, whose name is returned."""
    way = draw.choice(INSIDE * 2 + PLACED if path.is_file() and not path.is_symlink() else PLACED)
    way(path, draw)
    return way.__name__
