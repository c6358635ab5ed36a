"""API keys: one per line in a file. Only their digests stay in memory, and nothing here is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Collection
from pathlib import Path

from echo_trt.errors import UserError
from echo_trt.server.errors import log

SHORTEST = 16  # characters; what is shorter can be guessed
SETTLED_S = 1.0  # an empty file that is younger is being written; larger: keys are withdrawn later


class Keys:
    """The API keys of a file, kept as digests. A file that has changed is read again.

    A line is a key, or ``KEY latency=CLASS``: the latency class of its requests.
    """

    def __init__(self, path: Path, classes: Collection[str] | None = None):
        """``classes``: known latency classes; None: any. Raises UserError where the file holds no usable key."""
        self._path, self._classes, self._state = path, classes, _state(path)
        self._digests = read(path, classes)
        if not self._digests:
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
                self._digests = read(self._path, self._classes)
            except UserError as error:
                log.warning("the API keys stay as they were: %s", error)
            else:  # what is below a warning is not shown
                log.warning("API keys file %s has changed; keys that it holds: %d", self._path, len(self._digests))

    def latency(self, authorization: bytes) -> str | None:
        """Return the latency class of the key in a header; None: it has none."""
        self._follow()
        return self._digests.get(hashlib.sha256(authorization.strip().partition(b" ")[2].strip()).digest())

    def allow(self, authorization: bytes) -> bool:
        """Whether the header ``Authorization: Bearer KEY`` names a key. Takes as long for any wrong one."""
        self._follow()
        scheme, _, key = authorization.strip().partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return scheme.lower() == b"bearer" and any(matches)


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what differs once a file was written, replaced, or given to another user; None: it is not there."""
    try:
        now = path.stat()
    except OSError:
        return None
    return now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def read(path: Path, classes: Collection[str] | None = None) -> dict[bytes, str | None]:
    """Read a file of keys: digest -> latency class, one of ``classes``. Blank lines and those with # are skipped.

    Raises UserError for a file that cannot be read, a key that is none, and an unknown class.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = f"{error.strerror}, as user {os.geteuid()}"
        raise UserError(f"API keys file {path} cannot be read ({reason}); name one that this user may read.") from None
    parts = [line.strip().partition(b" latency=") for line in lines]
    keys = {
        key: name.strip().decode(errors="replace") or None for key, _, name in parts if key and not key.startswith(b"#")
    }
    if unknown := {name for name in keys.values() if name and classes is not None and name not in classes}:
        raise UserError(f"API keys file {path} has latency={min(unknown)}; name it in --latency-classes.")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST or len(key.split()) > 1:
            raise UserError(
                f"API keys file {path}: key {number} is shorter than {SHORTEST} characters or holds a blank; "
                "write one longer key per line."
            )
    return {hashlib.sha256(key).digest(): name for key, name in keys.items()}
