"""Single tokens as text and as bytes; a token need not be a whole character."""

from __future__ import annotations

from echo_trt.models.tokenizer import BundleTokenizer

#: Bytes that a byte-level vocabulary writes as the characters of their codes; it counts the others from 256 on.
_PRINTED = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}


class TokenTexts:
    """The texts of a tokenizer's tokens, for byte-level vocabularies and SentencePiece's with byte fallback."""

    def __init__(self, tokenizer: BundleTokenizer):
        backend = tokenizer.backend_tokenizer
        self._piece = backend.id_to_token
        self._added = backend.get_added_tokens_decoder()
        self._bytes = BYTES if "ByteLevel" in repr(backend.decoder) else None
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
