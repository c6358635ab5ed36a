"""N-gram tables outside an engine: keys of contexts, two tables as one, look-ups, and the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from echo_trt.bundle.ngrams import STEPS
from echo_trt.bundle.stored import write_whole
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.goodput.model.ngrams import SEED, NGrams, key_of, longer_by


@compiled("u4[:, ::1](i8[::1], i8)")
def context_keys(text: np.ndarray, longest: int) -> np.ndarray:
    """Return keys uint32 [L + 1, longest] of the last 1, 2, ... tokens before a position of ``text`` int64 [L]; 0
    none.
    """
    keys = np.zeros((len(text) + 1, longest), np.uint32)
    for end in range(1, len(text) + 1):
        state = np.uint64(SEED)
        for size in range(min(longest, end)):
            state = longer_by(state, text[end - 1 - size])
            keys[end, size] = key_of(state)
    return keys


def over(table: NGrams, earlier: NGrams | None) -> NGrams:
    """Return a table of both: of a context that both know, the entry of ``table``."""
    if earlier is None:
        return table
    keys, first = np.unique(np.concatenate((table.keys, earlier.keys)), return_index=True)
    tokens = np.concatenate((table.tokens, earlier.tokens))[first]
    chances = np.concatenate((table.chances, earlier.chances))[first]
    return NGrams(keys, tokens, chances, max(table.longest, earlier.longest))


def look_up(ngrams: NGrams, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the next tokens int64 [n] of contexts, -1 where none is known, and their chances float64 [n].

    keys uint32 [n, longest]: a context's, the shortest first, 0 none. The longest known context decides.
    """
    token, chance = np.full(len(keys), -1), np.zeros(len(keys))
    for column in keys.T:
        entry = np.minimum(np.searchsorted(ngrams.keys, column), max(len(ngrams) - 1, 0))
        known = np.flatnonzero((ngrams.keys[entry] == column) & (column != 0)) if len(ngrams) else entry[:0]
        token[known], chance[known] = ngrams.tokens[entry[known]], ngrams.chances[entry[known]]
    return token, chance


def write_ngrams(ngrams: NGrams, path: Path, target_sha256: str) -> None:
    """Write n-grams; ``path`` appears whole or not at all. ``target_sha256`` names the target that wrote the text."""
    stream = io.BytesIO()
    columns = {
        "keys": ngrams.keys,
        "tokens": ngrams.tokens.astype(np.uint32),
        "chances": np.round(ngrams.chances * STEPS).astype(np.uint8),
    }
    np.savez_compressed(stream, **columns, longest=ngrams.longest, target_sha256=target_sha256)
    write_whole(path, stream.getvalue())
