"""API keys: one per line in a file. Only their digests stay in memory, and nothing here is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from echo_trt.engine.request import Sender
from echo_trt.errors import UserError

log = logging.getLogger(__name__)
SHORTEST = 16  # characters; what is shorter can be guessed
SETTLED_S = 1.0  # an empty file that is younger is being written; larger: keys are withdrawn later


@dataclass(frozen=True)
class Key:
    """A key's SHA-256, the latency class of its requests, and whether they find texts of other such keys cached."""

    digest: bytes
    latency: str | None = None
    shared: bool = False


def sender(key: Key | None, cache_salt: str | None) -> Sender:
    """Return whose a request is: texts are found in the prefix cache by requests of the same key and salt alone."""
    own = key.digest if key and not key.shared else b""
    salt = hashlib.blake2b((cache_salt or "").encode(), key=own, digest_size=16).digest() if own or cache_salt else b""
    return Sender(key.digest[:8] if key else b"", salt)


class Keys:
    """The API keys of a file, kept as digests. A file that has changed is read again.

    A line is a key, and words behind it: ``latency=CLASS`` and ``shared`` (``Key``).
    """

    def __init__(self, path: Path, classes: Collection[str] | None = None):
        """``classes``: known latency classes; None: any. Raises UserError where the file holds no usable key."""
        self._path, self._classes, self._state = path, classes, _state(path)
        self._keys = read(path, classes)
        if not self._keys:
            raise UserError(f"API keys file {path} holds no key; write one key per line.")
        if path.stat().st_mode & 0o004:
            log.warning("API keys file %s can be read by every user of this machine; chmod 600 it.", path)

    def _follow(self) -> None:
        """Read the file again if it has changed; the keys stay while it is away or cannot be used.

        One that holds no key lets nobody in.
        """
        if (state := _state(self._path)) != self._state:
            if state and not state[1] and time.time() - state[2] / 1e9 < SETTLED_S:
                return
            self._state = state
            try:
                self._keys = read(self._path, self._classes)
            except UserError as error:
                log.warning("the API keys stay as they were: %s", error)
            else:
                log.warning("API keys file %s has changed; keys that it holds: %d", self._path, len(self._keys))

    def find(self, authorization: bytes) -> Key | None:
        """Return the key that the header ``Authorization: Bearer KEY`` names. Takes as long for any wrong one."""
        self._follow()
        scheme, _, text = authorization.strip().partition(b" ")
        digest = hashlib.sha256(text.strip()).digest()
        found = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]  # all of them, always
        return found[0] if found and scheme.lower() == b"bearer" else None

    def ordinal(self, key: Key) -> int:
        """Return which of the file's keys it is; the first is 1."""
        return 1 + self._keys.index(key) if key in self._keys else 0


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what differs once a file was written, replaced, or given to another user; None: it is not there."""
    try:
        now = path.stat()
    except OSError:
        return None
    return now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def read(path: Path, classes: Collection[str] | None = None) -> list[Key]:
    """Read a file of keys, whose latency classes are among ``classes``. Blank lines and those with # are skipped.

    Raises UserError for a file that cannot be read, a key that is none, and an unknown class.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = f"{error.strerror}, as user {os.geteuid()}"
        raise UserError(f"API keys file {path} cannot be read ({reason}); name one that this user may read.") from None
    known = {text: words for text, *words in filter(None, map(bytes.split, lines)) if not text.startswith(b"#")}
    keys = []
    for number, (text, words) in enumerate(known.items(), 1):
        options = [word.partition(b"=")[::2] for word in words]
        if len(text) < SHORTEST or not {b"latency", b"shared"}.issuperset(name for name, _ in options):
            raise UserError(
                f"API keys file {path}: key {number} is shorter than {SHORTEST} characters or holds a blank; write one "
                "longer key per line, with latency=CLASS or shared behind it."
            )
        latency = dict(options).get(b"latency", b"").decode("utf-8", "backslashreplace") or None
        if latency and classes is not None and latency not in classes:
            raise UserError(f"API keys file {path} has latency={latency}; name it in --latency-classes.")
        keys.append(Key(hashlib.sha256(text).digest(), latency, b"shared" in words))
    return keys
