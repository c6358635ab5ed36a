"""Single tokens as text and as bytes; a token need not be a whole character."""

from __future__ import annotations

import json

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


class TokenTexts:
    """The texts of a tokenizer's tokens, for byte-level vocabularies and SentencePiece's with byte fallback."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        self._piece = backend.id_to_token
        self._added = backend.get_added_tokens_decoder()
        self._bytes = _byte_of_letter() if "ByteLevel" in repr(backend.decoder) else None
        self._json: dict[int, tuple[str, str]] = {}  # some 300 bytes for each token that was asked for

    def is_special(self, token: int) -> bool:
        """Return whether a token is left out of a text."""
        return token in self._added and self._added[token].special

    def raw(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text: its name if it is special, none for an id without a token."""
        piece = self._piece(token)
        if piece is None:
            return b""
        if token in self._added:
            return piece.encode()
        if self._bytes:
            return bytes(self._bytes[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def in_json(self, token: int) -> tuple[str, str]:
        """Return a token's text and the list of its bytes as JSON."""
        if token not in self._json:
            raw = self.raw(token)
            name = json.dumps(raw.decode("utf-8", "backslashreplace"), ensure_ascii=False)
            self._json[token] = name, json.dumps(list(raw), separators=(",", ":"))
        return self._json[token]


def _byte_of_letter() -> dict[str, int]:
    """Build GPT-2's table: printable bytes are their own letters, the others in order are the letters beyond them."""
    letters = sorted(ByteLevel.alphabet())
    printable = [ord(letter) for letter in letters if ord(letter) < 256]
    others = sorted(set(range(256)) - set(printable))
    return dict(zip(letters, [*printable, *others], strict=True))
