"""SentencePiece's tokenizers of byte-pair pieces, from a GGUF file's pieces and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\u2581"  # as pieces write a space


def sentencepiece_tokenizer(
    vocabulary: Mapping[str, int], joined: Sequence[str], scores: Sequence[float], unknown: str, space_prefix: bool
) -> Tokenizer:
    """Build a tokenizer that joins the neighbours whose joined piece has the best score, as SentencePiece does.

    joined        pieces that may be joined
    scores        by token id
    space_prefix  whether a text begins with a space that it does not show
    """
    known = set(joined)
    merges = [
        (-scores[vocabulary[piece]], len(piece) - cut, piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    pairs = [(first, second) for *_, first, second in sorted(merges)]
    model = models.BPE(vocab=dict(vocabulary), merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if space_prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if space_prefix else [])])
    return tokenizer
