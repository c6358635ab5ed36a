"""Single tokens as text and as bytes; a token need not be a whole character."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


class TokenTexts:
    """The texts of a tokenizer's tokens, for byte-level vocabularies and SentencePiece's with byte fallback."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        self._piece = backend.id_to_token
        self._added = backend.get_added_tokens_decoder()
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's table
        self._bytes = letters if "ByteLevel" in repr(backend.decoder) else None
        self._raw: dict[int, bytes] = {}  # some 100 bytes for each token that was asked for

    def is_special(self, token: int) -> bool:
        """Return whether a token is left out of a text."""
        return token in self._added and self._added[token].special

    def raw(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text: its name if it is special, none for an id without a token."""
        if (known := self._raw.get(token)) is None:
            known = self._raw[token] = self._bytes_of(token)
        return known

    def _bytes_of(self, token: int) -> bytes:
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
