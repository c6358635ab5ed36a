"""A store in a folder: blocks in files of their own, an SQLite index of them, and named states of bytes.

A file is named by the index once it is written whole, and a checksum tells what a power cut has left of it. So nothing
waits for the disk: what a crash leaves is a block less. One process at a time has a folder (``flock``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from errno import ENOSPC
from pathlib import Path
from typing import NamedTuple

from echo_trt.errors import UserError

FORMAT = 1
INDEX, BLOCKS, LOCK = "index.db", "blocks", "lock"
_OTHERS = {LOCK, BLOCKS, "lost+found"}  # what an empty store's folder may hold
_TABLES = """
CREATE TABLE blocks (name BLOB PRIMARY KEY, scope BLOB, bytes INTEGER, checksum INTEGER, kind INTEGER, position INTEGER,
                     found INTEGER DEFAULT 0, worth REAL) WITHOUT ROWID;
CREATE INDEX order_of_eviction ON blocks (worth, position DESC);
CREATE TABLE states (scope BLOB, name TEXT, checksum INTEGER, content BLOB, PRIMARY KEY (scope, name)) WITHOUT ROWID;
"""
_EVICTED = 32  # blocks that are looked for at once; larger: fewer look-ups, more blocks than must go


class StoredBlock(NamedTuple):
    """What the index says of a block. ``kind``: its user's, part of the checksum as the key is."""

    bytes: int
    checksum: int
    kind: int


class Store:
    """The blocks and states of one ``scope``; those of others wait for their own, or for eviction.

    Eviction is GreedyDual-Size-Frequency: a block is worth its price per byte times how often it was asked for, on top
    of what the last evicted block was worth, by which blocks that nobody finds any more age. Of equal ones the last of
    a text goes first, since a block is found only through the blocks before it. ``find`` and ``read`` are for any
    thread, the rest for one at a time.
    """

    def __init__(self, folder: Path, size: int, scope: bytes):
        """Open a folder, or make it. ``size``: bytes of blocks at most. Raises UserError where it cannot be used."""
        self._folder, self._size, self._scope = folder, size, scope
        self.damaged = 0  # blocks that were not as they were written
        self._lock = -1
        try:
            self._lock = _locked(folder)
            self._index = _opened(folder)
            self._read_index()
        except (OSError, sqlite3.Error) as error:
            with suppress(OSError):
                os.close(self._lock)
            raise UserError(f"store {folder} cannot be used ({reason(error)}); give another folder.") from error

    def _read_index(self) -> None:
        """Learn what there is; files without an entry and entries without a file go, then what is too much."""
        rows = self._index.execute("SELECT name, scope, bytes, checksum, kind FROM blocks").fetchall()
        files = {file.name: file.stat().st_size for file in os.scandir(self._folder / BLOCKS)}
        lost = [name for name, _, length, *_ in rows if files.get(name.hex()) != length]
        for file in files.keys() - {name.hex() for name, *_ in rows}:
            (self._folder / BLOCKS / file).unlink(missing_ok=True)
        self._known = {name: StoredBlock(*entry) for name, scope, *entry in rows if scope == self._scope}
        self._total = sum(length for _, _, length, *_ in rows)
        (self._clock,) = self._index.execute("SELECT ifnull(min(worth), 0) FROM blocks").fetchone()
        self._drop(lost)
        self._evict(0)

    def find(self, key: bytes) -> StoredBlock | None:
        """Return the index's entry of a block; None: it is not kept."""
        return self._known.get(self._name(key))

    def read(self, key: bytes, entry: StoredBlock) -> bytes | None:
        """Return a block's content; None where it is gone, or not as it was written, and is forgotten."""
        try:
            content = self._path(name := self._name(key)).read_bytes()
        except OSError:  # evicted meanwhile
            return None
        if _checksum(name, entry.kind, content) == entry.checksum:
            return content
        self.damaged += 1
        self._known.pop(name, None)
        return None

    def write(self, key: bytes, kind: int, position: int, content: bytes | bytearray, price: float) -> None:
        """Keep a block that is the ``position``-th of its text and takes ``price`` seconds to compute.

        Raises OSError, and sqlite3.Error, with which the store is of no further use.
        """
        name = self._name(key)
        if len(content) > self._size:
            return
        if name in self._known:
            self._drop([name])
        self._evict(len(content))
        path = self._path(name)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
                if file.write(content) < len(content):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))  # a disk that is full takes the first part
        except OSError:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        entry = StoredBlock(len(content), _checksum(name, kind, content), kind)
        worth = self._clock + price / len(content)
        row = (name, self._scope, *entry, position, worth)
        columns = "name, scope, bytes, checksum, kind, position, worth"
        self._index.execute(f"INSERT OR REPLACE INTO blocks ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._total += len(content)
        self._known[name] = entry

    def touch(self, keys: Iterable[bytes], price: float) -> None:
        """Blocks of a text were asked for again."""
        question = "UPDATE blocks SET found = found + 1, worth = ? + (found + 2) * ? / bytes WHERE name = ?"
        self._index.executemany(question, [(self._clock, price, self._name(key)) for key in keys])

    def drop(self, key: bytes) -> None:
        self._drop([self._name(key)])

    def _drop(self, names: Sequence[bytes]) -> None:
        """Forget blocks, before their files go."""
        for name in names:
            row = self._index.execute("DELETE FROM blocks WHERE name = ? RETURNING bytes", (name,)).fetchone()
            self._total -= row[0] if row else 0
            self._known.pop(name, None)
        self._index.commit()
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def _evict(self, room: int) -> None:
        while self._total + room > self._size and self._total > 0:
            question = "SELECT name, bytes, worth FROM blocks ORDER BY worth, position DESC LIMIT ?"
            going = []
            for name, length, worth in self._index.execute(question, (_EVICTED,)).fetchall():
                if self._total - sum(each for _, each in going) + room > self._size:
                    going.append((name, length))
                    self._clock = max(self._clock, worth)
            self._drop([name for name, _ in going])

    def state(self, name: str) -> bytes | None:
        """Return a state as it was kept; None: there is none."""
        found = self._index.execute(
            "SELECT checksum, content FROM states WHERE scope = ? AND name = ?", (self._scope, name)
        ).fetchone()
        return found[1] if found and _checksum(name.encode(), 0, found[1]) == found[0] else None

    def keep_state(self, name: str, content: bytes) -> None:
        row = self._scope, name, _checksum(name.encode(), 0, content), content
        self._index.execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", row)
        self._index.commit()

    def commit(self) -> None:
        self._index.commit()

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._index.commit()
            self._index.close()
        os.close(self._lock)

    def _name(self, key: bytes) -> bytes:
        """Return what the index and the file's name have of a key: other scopes have others for it."""
        return hashlib.blake2b(key, key=self._scope, digest_size=16).digest()

    def _path(self, name: bytes) -> Path:
        return self._folder / BLOCKS / name.hex()


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def inspect(folder: Path) -> list[tuple[str, str, int, int]]:
    """Return rows of what a store holds: a scope in hex, "blocks" or a state's name, their number and bytes.

    A server may have it open. Raises UserError.
    """
    _check_is_store(folder)
    try:
        with closing(_connected(folder)) as index:
            blocks = "SELECT hex(scope), 'blocks', count(*), sum(bytes) FROM blocks GROUP BY scope"
            states = "SELECT hex(scope), name, 1, length(content) FROM states"
            return index.execute(f"{blocks} UNION ALL {states} ORDER BY 1").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"store {folder} cannot be read ({error}); echo-trt store clear empties it.") from error


def clear(folder: Path) -> None:
    """Delete all that a store holds. Raises UserError where a server has it open."""
    _check_is_store(folder)
    lock = _locked(folder)
    _remove(folder)
    os.close(lock)


def _check_is_store(folder: Path) -> None:
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} is no store; name the folder that serve --store was given.")


def _locked(folder: Path) -> int:
    """Make a store's folder where there is none, and return the lock that this process then has."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"store {folder} is a file; give a folder.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = {entry.name for entry in os.scandir(folder)}
    if INDEX not in names and names - _OTHERS:
        raise UserError(f"store {folder} holds other files; give an empty folder, or one that does not exist.")
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        remedy = "stop that one, or give each a folder of its own."
        raise UserError(f"store {folder} is in use by another server; {remedy}") from None
    return lock


def _opened(folder: Path) -> sqlite3.Connection:
    """Return the index; one that is damaged, or of another format, is made anew."""
    for _ in range(2):
        os.close(os.open(folder / INDEX, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's other files take its mode
        (folder / BLOCKS).mkdir(mode=0o700, exist_ok=True)
        index = _connected(folder)
        with suppress(sqlite3.DatabaseError):
            index.execute("PRAGMA journal_mode = WAL")
            index.execute("PRAGMA synchronous = NORMAL")
            (found,) = index.execute("PRAGMA user_version").fetchone()
            if found == 0:
                index.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
                found = FORMAT
            if found == FORMAT and index.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                return index
        index.close()
        _remove(folder)
    raise sqlite3.Error("no index can be made there")


def _connected(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / INDEX, timeout=5.0, check_same_thread=False)


def _remove(folder: Path) -> None:
    for file in [*folder.glob(f"{INDEX}*"), *folder.glob(f"{BLOCKS}/*")]:
        file.unlink(missing_ok=True)


def _checksum(name: bytes, kind: int, content: bytes | bytearray) -> int:
    return zlib.crc32(content, zlib.crc32(name, kind))
