"""N-grams on disk: one .npz beside a head, and a copy in the bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echo_trt.errors import DAMAGED, UserError
from echo_trt.speculation.goodput.model.ngrams import NGrams

STEPS = 255  # steps of a stored probability: more would not fit eight bits
_REMEDY = "make it with scripts/training/train_eagle3.py ngrams, or leave draft.ngrams out of the recipe"
_COLUMNS = {"keys": "u4", "tokens": "u4", "chances": "u1"}


def read_ngrams(path: Path, target_sha256: str, vocab_size: int, remedy: str = _REMEDY) -> NGrams:
    """Read the n-grams of this target's text and refuse another file. ``remedy`` ends the refusal."""
    try:
        with np.load(path) as file:
            stored = {name: file[name] for name in (*_COLUMNS, "longest", "target_sha256")}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from error
    except DAMAGED as error:
        raise UserError(f"{path} holds no n-grams ({str(error).rstrip('.')}); {remedy}.") from error
    source = str(stored["target_sha256"])
    if source != target_sha256:
        hashes = f"hash {source[:12] or 'none'}, this one's is {target_sha256[:12]}"
        raise UserError(f"{path} is of another target's text ({hashes}); {remedy}.")
    longest, keys, tokens = stored["longest"], stored["keys"], stored["tokens"]
    whole = all(stored[name].dtype == kind and stored[name].shape == keys.shape for name, kind in _COLUMNS.items())
    if not whole or keys.ndim != 1 or longest.shape or longest.dtype.kind not in "iu" or not 1 <= longest <= 16:
        raise UserError(f"{path} holds no n-grams (its columns do not fit together); {remedy}.")
    if (keys[1:] <= keys[:-1]).any() or (tokens >= vocab_size).any():
        raise UserError(f"{path} holds no n-grams (keys do not ascend, or a token is beyond {vocab_size}); {remedy}.")
    return NGrams(keys, tokens, stored["chances"] / STEPS, int(longest))
