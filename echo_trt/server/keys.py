"""API keys: one per line in a file. Only their digests stay in memory, and nothing here is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from echo_trt.errors import UserError

log = logging.getLogger(__name__)
SHORTEST = 16  # characters; what is shorter can be guessed


class Keys:
    """The API keys of a file, kept as digests. A file that has changed is read again.

    A line is a key, or ``KEY latency=CLASS``: the latency class of its requests.
    """

    def __init__(self, path: Path):
        """Blank lines and lines that begin with # are skipped. Raises UserError where the file holds no usable key."""
        self._path, self._state, self._digests = path, _state(path), read(path)

    def _follow(self) -> None:
        """Read the file again if it has changed; the keys stay while it is away or holds none that can be used."""
        if (state := _state(self._path)) != self._state:
            self._state = state
            try:
                self._digests = read(self._path)
            except UserError as error:
                log.warning("the API keys stay as they were: %s", error)
            else:
                log.warning("API keys file %s has changed; keys that it holds: %d", self._path, len(self._digests))

    @property
    def classes(self) -> set[str]:
        return set(filter(None, self._digests.values()))

    def latency(self, authorization: bytes) -> str | None:
        """Return the latency class of the key in a header; None: it has none."""
        self._follow()
        return self._digests.get(hashlib.sha256(authorization.strip().partition(b" ")[2].strip()).digest())

    def ordinal(self, headers: Mapping[bytes, bytes]) -> int | None:
        """Return which of the file's keys a request's headers have, the first is 1; None: none of them."""
        keys = headers.get(b"authorization", b"").strip().partition(b" ")[2], headers.get(b"x-api-key", b"")
        given = {hashlib.sha256(key.strip()).digest() for key in keys}
        return next((number for number, known in enumerate(self._digests, 1) if known in given), None)

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


def read(path: Path) -> dict[bytes, str | None]:
    """Read a file of keys: digest -> latency class. Raises UserError where the file holds no usable key."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = f"{error.strerror}, as user {os.geteuid()}"
        raise UserError(f"API keys file {path} cannot be read ({reason}); name one that this user may read.") from None
    parts = [line.strip().partition(b" latency=") for line in lines]
    keys = {key: name.strip().decode() or None for key, _, name in parts if key and not key.startswith(b"#")}
    if not keys:
        raise UserError(f"API keys file {path} holds no key; write one key per line.")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST or len(key.split()) > 1:
            raise UserError(
                f"API keys file {path}: key {number} is shorter than {SHORTEST} characters or holds a blank; "
                "write one longer key per line."
            )
    return {hashlib.sha256(key).digest(): name for key, name in keys.items()}
