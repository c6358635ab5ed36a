"""A store in a folder: blocks in files of their own, an SQLite index of them, and named states of bytes.

A file is named by the index once it is written whole, and a checksum tells what a power cut has left of it. So nothing
waits for the disk: what a crash leaves is a block less. One process at a time has a folder (``flock``). It is a cache:
whatever fails but for want of room, all of it is thrown away and made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryDirectory
from typing import NamedTuple

from echo_trt.errors import UserError, shortened

log = logging.getLogger(__name__)

FORMAT = 2
INDEX, BLOCKS, LOCK = "index.db", "blocks", "lock"
_OTHERS = {LOCK, BLOCKS, f"{INDEX}-wal", f"{INDEX}-shm", "lost+found"}  # what a folder without an index may hold
#: A damaged row may have values of any type. The constraints let SQLite's own check find it.
_TABLES = """
CREATE TABLE blocks (name BLOB PRIMARY KEY, scope BLOB, bytes INTEGER, checksum INTEGER, kind INTEGER, position INTEGER,
                     found INTEGER DEFAULT 0, worth REAL,
                     CHECK (typeof(name) || typeof(scope) || typeof(worth) = 'blobblobreal' AND bytes > 0),
                     CHECK (typeof(bytes) || typeof(checksum) || typeof(kind) = 'integerintegerinteger'),
                     CHECK (typeof(position) || typeof(found) = 'integerinteger')) WITHOUT ROWID;
CREATE INDEX order_of_eviction ON blocks (worth, position DESC);
CREATE TABLE states (scope BLOB, name TEXT, checksum INTEGER, content BLOB, PRIMARY KEY (scope, name),
                     CHECK (typeof(name) || typeof(content) = 'textblob')) WITHOUT ROWID;
"""
#: What a store raises. ValueError: a message of SQLite's that quotes the damage is no UTF-8.
FAILURES = (OSError, sqlite3.Error, ValueError)
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
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
            try:
                self._open()
            except FAILURES as error:
                self.renew(error)
        except FAILURES as error:
            with suppress(OSError):
                os.close(self._lock)
            raise UserError(f"store {folder} cannot be used ({reason(error)}); give another folder.") from error

    def renew(self, failure: Exception) -> None:
        """Throw away all there is, for a ``failure`` of the store, and begin anew. Raises one of FAILURES."""
        log.warning("store %s is damaged (%s): all it held is thrown away.", self._folder, reason(failure))
        self._known, self._total = {}, 0
        with suppress(*FAILURES, AttributeError):  # AttributeError: it was never opened
            self._index.close()
        _remove(self._folder)
        self._open()

    def _open(self) -> None:
        """Learn what there is; files without an entry and entries without a file go, then what is too much."""
        self._index = _opened(self._folder)
        rows = self._index.execute("SELECT name, scope, bytes, checksum, kind FROM blocks").fetchall()
        files = {file.name: file.stat(follow_symlinks=False) for file in os.scandir(self._folder / BLOCKS)}
        sizes = {name: facts.st_size for name, facts in files.items() if S_ISREG(facts.st_mode)}
        lost = [name for name, _, length, *_ in rows if sizes.get(name.hex()) != length]
        unnamed = files.keys() - {name.hex() for name, *_ in rows}
        if count := len(unnamed) + len(lost):
            log.warning("store %s: blocks that do not fit its index (%d) are computed again.", self._folder, count)
        for file in unnamed:
            _discard(self._folder / BLOCKS / file)
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
            # A fifo in its place would wait for a writer, and a link may lead to a file without an end.
            with open(os.open(self._path(name := self._name(key)), _SAFELY | os.O_RDONLY), "rb") as file:
                content = file.read(entry.bytes + 1)
        except OSError:  # evicted meanwhile
            return None
        if _checksum(name, entry.kind, content) == entry.checksum:
            return content
        self.damaged += 1
        self._known.pop(name, None)
        return None

    def write(self, key: bytes, kind: int, position: int, content: bytes | bytearray, price: float) -> None:
        """Keep a block that is the ``position``-th of its text and takes ``price`` seconds to compute.

        Raises one of FAILURES; but for want of room (``no_room``) the store is to be made anew.
        """
        name = self._name(key)
        if len(content) > self._size:
            return
        if name in self._known:
            self._drop([name])
        self._evict(len(content))
        path = self._path(name)
        try:
            with open(os.open(path, _SAFELY | os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
                if file.write(content) < len(content):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))  # a disk that is full takes the first part
        except OSError:
            with suppress(OSError):
                _discard(path)
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
            _discard(self._path(name))

    def _evict(self, room: int) -> None:
        while self._total + room > self._size and self._total > 0:
            question = "SELECT name, bytes, worth FROM blocks ORDER BY worth, position DESC LIMIT ?"
            going = []
            for name, length, worth in self._index.execute(question, (_EVICTED,)).fetchall():
                if self._total - sum(each for _, each in going) + room > self._size:
                    going.append((name, length))
                    self._clock = max(self._clock, worth)
            before = self._total
            self._drop([name for name, _ in going])
            if self._total >= before:
                raise sqlite3.DatabaseError("its index contradicts itself")

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
        with suppress(*FAILURES):
            self._index.commit()
        with suppress(*FAILURES):
            self._index.close()
        os.close(self._lock)

    def _name(self, key: bytes) -> bytes:
        """Return what the index and the file's name have of a key: other scopes have others for it."""
        return hashlib.blake2b(key, key=self._scope, digest_size=16).digest()

    def _path(self, name: bytes) -> Path:
        return self._folder / BLOCKS / name.hex()


def reason(error: Exception) -> str:
    return shortened(" ".join((getattr(error, "strerror", None) or str(error)).split()))


def no_room(error: Exception) -> bool:
    """Whether a failure of the store is a disk that is full, on which the store is as it was."""
    full = getattr(error, "errno", None) in (ENOSPC, EDQUOT, EFBIG)
    return full or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def inspect(folder: Path) -> list[tuple[str, str, int, int]]:
    """Return rows of what a store holds: a scope in hex, "blocks" or a state's name, their number and bytes.

    A server may have it open, whose locks a copy of the index has not. Raises UserError.
    """
    _check_is_store(folder)
    try:
        with TemporaryDirectory() as copy:
            for file in folder.glob(f"{INDEX}*"):
                shutil.copy(file, copy, follow_symlinks=False)
            with closing(_connected(Path(copy))) as index:
                _check(index)
                blocks = "SELECT hex(scope), 'blocks', count(*), sum(bytes) FROM blocks GROUP BY scope"
                states = "SELECT hex(scope), name, 1, length(content) FROM states"
                return index.execute(f"{blocks} UNION ALL {states} ORDER BY 1").fetchall()
    except FAILURES as error:
        remedy = "echo-trt store clear empties it"
        raise UserError(f"store {folder} cannot be read ({reason(error)}); {remedy}.") from error


def clear(folder: Path) -> None:
    """Delete all that a store holds. Raises UserError where a server has it open."""
    _check_is_store(folder)
    lock = _locked(folder)
    try:
        _remove(folder)
    except OSError as error:
        raise UserError(f"store {folder} cannot be emptied ({reason(error)}); delete the folder.") from error
    finally:
        os.close(lock)


def _check_is_store(folder: Path) -> None:
    if not os.path.lexists(folder / INDEX):
        raise UserError(f"{folder} is no store; name the folder that serve --store was given.")


def _locked(folder: Path) -> int:
    """Make a store's folder where there is none, and return the lock that this process then has."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"store {folder} is a file; give a folder.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = {entry.name for entry in os.scandir(folder)}
    if INDEX not in names and names - _OTHERS:
        raise UserError(f"store {folder} holds other files; give an empty folder, or one that does not exist.")
    if LOCK in names and not S_ISREG((folder / LOCK).lstat().st_mode):
        _discard(folder / LOCK)
    lock = os.open(folder / LOCK, _SAFELY | os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        remedy = "stop that one, or give each a folder of its own."
        raise UserError(f"store {folder} is in use by another server; {remedy}") from None
    return lock


def _opened(folder: Path) -> sqlite3.Connection:
    """Return the index, made where there is none. Raises one of FAILURES where it is damaged, or of another format."""
    os.close(os.open(folder / INDEX, _SAFELY | os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's other files take its mode
    (folder / BLOCKS).mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(folder / BLOCKS, _SAFELY | os.O_DIRECTORY))
    index = _connected(folder)
    try:
        index.execute("PRAGMA locking_mode = EXCLUSIVE")  # without a file in memory, whose truncation ends a process
        index.execute("PRAGMA journal_mode = WAL")
        index.execute("PRAGMA synchronous = NORMAL")
        if index.execute("PRAGMA user_version").fetchone() == (0,):
            index.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
        _check(index)
    except BaseException:
        index.close()
        raise
    return index


def _check(index: sqlite3.Connection) -> None:
    (found,), (check,) = (index.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "integrity_check(1)"))
    if (found, check) != (FORMAT, "ok"):
        raise sqlite3.DatabaseError(check if found == FORMAT else f"it has format {found}, this version's is {FORMAT}")


def _connected(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / INDEX, timeout=5.0, check_same_thread=False)


def _remove(folder: Path) -> None:
    for file in [*folder.glob(f"{INDEX}*"), folder / BLOCKS]:
        _discard(file)


def _discard(path: Path) -> None:
    """Delete whatever is there, but not what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checksum(name: bytes, kind: int, content: bytes | bytearray) -> int:
    return zlib.crc32(content, zlib.crc32(name, kind))
