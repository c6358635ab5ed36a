"""API keys: one per line in a file, perhaps with a class of latency targets: ``KEY latency=NAME``.

Only digests of keys stay in memory, and nothing here is ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from echo_trt.errors import UserError

SHORTEST = 16  # characters; what is shorter can be guessed


class Keys:
    """The API keys of a file, one per line, kept as digests."""

    def __init__(self, path: Path):
        """Blank lines and lines that begin with # are skipped. Raises UserError where the file holds no usable key."""
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"API keys file {path} cannot be read ({error.strerror}); name a file of keys.") from None
        parts = [line.strip().partition(b" latency=") for line in lines]
        keys = [key for key, *_ in parts if key and not key.startswith(b"#")]
        self._latency = {hashlib.sha256(key).digest(): name.strip().decode() for key, _, name in parts if name}
        if not keys:
            raise UserError(f"API keys file {path} holds no key; write one key per line.")
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST or len(key.split()) > 1:
                raise UserError(
                    f"API keys file {path}: key {number} is shorter than {SHORTEST} characters or holds a blank; "
                    "write one longer key per line."
                )
        self._digests = [hashlib.sha256(key).digest() for key in keys]

    @property
    def classes(self) -> set[str]:
        return set(self._latency.values())

    def latency(self, authorization: bytes) -> str | None:
        """Return the latency class of the key in a header; None: it has none."""
        return self._latency.get(hashlib.sha256(authorization.strip().partition(b" ")[2].strip()).digest())

    def allow(self, authorization: bytes) -> bool:
        """Whether the header ``Authorization: Bearer KEY`` names a key. Takes as long for any wrong one."""
        scheme, _, key = authorization.strip().partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return scheme.lower() == b"bearer" and any(matches)
