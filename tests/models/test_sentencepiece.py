"""SentencePiece's tokenizer from pieces and scores, against a plain loop that joins the best neighbours."""

from itertools import pairwise

import pytest

from echo_trt.models.sentencepiece import SPACE, sentencepiece_tokenizer

LEARNT = ["th", "the", "▁the", "at", "cat", "▁c", "▁cat", "he", "▁t", "▁s", "sat", "▁sat", "in", "ing", "▁▁"]
PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LEARNT, SPACE, *"abcdefghijklmnopqrstuvwxyz"]
SCORES = [0.0] * 257 + [-float(rank) for rank in range(len(PIECES) - 257)]
TEXTS = ["the cat sat", "thecatsat", "scathing  the", " a cat", "", "x", "thé 🙂"]


def joined(text: str) -> list[str]:
    parts = list(text)
    while True:
        pairs = [first + second for first, second in pairwise(parts)]
        found = [(SCORES[PIECES.index(pair)], -i) for i, pair in enumerate(pairs) if pair in LEARNT]
        if not found:
            return [piece for part in parts for piece in ([part] if part in PIECES else bytes_of(part))]
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def bytes_of(letter: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in letter.encode()]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_the_best_neighbours_are_joined(text, prefix):
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = sentencepiece_tokenizer(vocabulary, PIECES[257:], SCORES, "<unk>", prefix)
    ids = tokenizer.encode(text).ids
    spaced = (SPACE if prefix and text else "") + text.replace(" ", SPACE)
    assert [PIECES[i] for i in ids] == joined(spaced)
    assert tokenizer.decode(ids) == text
