"""An n-gram table from a target's answers: what has usually followed the last few tokens, and how sure that is."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from echo_trt.errors import UserError
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt_lab.ngram_tables import context_keys, look_up
from echo_trt_lab.training.corpus import HELD_OUT_EVERY, shard_paths

LONGEST = 6  # tokens of a context
AGREED = 2  # answers that must go on alike: what one alone says is right too seldom for its room
MIN_CHANCE = 0.05  # a chance that is worth its room
_MANY, _SHARES = 20, 10  # votes, and shares of them, beyond which contexts are not told apart

Answer = tuple[np.ndarray, int]  # tokens [L], and how many of them are the prompt's


def read_texts(folders: Sequence[Path], vocab_size: int) -> list[Answer]:
    """All that ``generate`` has written there, by a target of so many tokens."""
    texts: list[Answer] = []
    for path in (path for folder in folders for path in shard_paths(folder)):
        try:
            with np.load(path) as shard:
                tokens = np.split(shard["tokens"].astype(np.int64), np.cumsum(shard["lengths"])[:-1])
                texts += zip(tokens, shard["prompt_lengths"].tolist(), strict=True)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no answers ({str(error).rstrip('.')}); generate them again.") from error
        highest = max(int(text.max()) for text in tokens)
        if highest >= vocab_size:
            raise UserError(
                f"{path} has the token {highest}, but the target's vocabulary ends before {vocab_size}; "
                "generate answers with this target."
            )
    if len(texts) < 2:
        raise UserError(f"{', '.join(map(str, folders))} holds {len(texts)} answers; generate some hundred at least.")
    return texts


def held_out(texts: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Those to count, and one of fifty to try them on."""
    return [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY], texts[::HELD_OUT_EVERY]


def count(texts: list[Answer], longest: int = LONGEST) -> NGrams:
    """Return the table of all contexts that say more than their own endings do.

    An answer has one vote for what follows a context, however often it says so: repetition within a text is what
    prompt lookup finds.
    """
    keys, follows, answer = _occurrences(texts, longest)
    columns = [(np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(0))]
    known = np.zeros(len(follows))  # the chance that shorter contexts give at each place
    for size in range(longest):
        there = np.flatnonzero(keys[:, size])
        if len(there) == 0:
            break
        votes = _Votes(keys[there, size], follows[there], answer[there])
        chance = votes.chances()
        index = np.searchsorted(votes.key, keys[there, size])
        more = chance[index] > np.maximum(known[there], MIN_CHANCE)
        more &= votes.for_best[index] >= AGREED
        known[there] = np.where(more, chance[index], known[there])
        kept = np.unique(index[more])
        columns.append((votes.key[kept], votes.best[kept], chance[kept]))
    key, token, chance = map(np.concatenate, zip(*columns, strict=True))
    key, first = np.unique(key, return_index=True)
    return NGrams(key, token[first], chance[first], longest)


def right(ngrams: NGrams, texts: list[Answer]) -> tuple[float, float]:
    """Of the answers' tokens: the share that the table names, and the share that it thinks it does."""
    keys, follows, _ = _occurrences(texts, ngrams.longest)
    best, chance = look_up(ngrams, keys)
    count = max(len(follows), 1)
    return float((best == follows).sum() / count), float(chance.sum() / count)


def _occurrences(texts: list[Answer], longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token of an answer: the keys [n, longest] of what stands before it, itself, the answer's number."""
    keys = [context_keys(tokens, longest)[prompt:-1] for tokens, prompt in texts]
    follows = [tokens[prompt:] for tokens, prompt in texts]
    return np.concatenate(keys), np.concatenate(follows), np.repeat(np.arange(len(texts)), [len(f) for f in follows])


class _Votes:
    """Of each context, in the order of its ``key`` [n]: how many ``votes`` there are, one of each answer for each token
    that follows it there; what most are for, the ``best``; how many are, ``for_best``, and for the ``second`` one."""

    def __init__(self, key: np.ndarray, follows: np.ndarray, answer: np.ndarray):
        order = np.lexsort((answer, follows, key))
        key, follows, answer = key[order], follows[order], answer[order]
        begins = np.flatnonzero(_changes(key) | _changes(follows))
        votes = np.add.reduceat((_changes(key) | _changes(follows) | _changes(answer)).astype(np.int64), begins)
        key, follows = key[begins], follows[begins]
        order = np.lexsort((-votes, key))
        key, follows, votes = key[order], follows[order], votes[order]
        begins = np.flatnonzero(_changes(key))
        self.key, self.best, self.for_best = key[begins], follows[begins], votes[begins]
        self.votes = np.add.reduceat(votes, begins)
        several = np.diff(np.append(begins, len(key))) > 1
        self.second = np.where(several, votes[np.minimum(begins + 1, len(key) - 1)], 0)

    def chances(self) -> np.ndarray:
        """P(the best follows) [n], by leaving each vote out in turn: how often do the others foretell it?

        Contexts are taken together that have as many votes, of which the best has the same share.
        """
        several = self.votes > 1
        votes, mine, second = self.votes[several], self.for_best[several], self.second[several]
        still = np.where(mine - 1 > second, 1.0, np.where(mine - 1 == second, 0.5, 0.0))
        size = (_MANY + 1) * (_SHARES + 1)
        without_one = _kind(votes - 1, np.maximum(mine - 1, second))
        foretold = np.bincount(without_one, mine * still, size)
        tried = np.bincount(without_one, mine, size) + np.bincount(_kind(votes - 1, mine), votes - mine, size)
        return ((foretold + 0.2) / (tried + 1.0))[_kind(self.votes, self.for_best)]


def _kind(votes: np.ndarray, for_best: np.ndarray) -> np.ndarray:
    share = np.round(_SHARES * np.minimum(for_best / votes, 1.0)).astype(np.int64)
    return np.minimum(votes, _MANY) * (_SHARES + 1) + share


def _changes(values: np.ndarray) -> np.ndarray:
    return np.append(True, values[1:] != values[:-1])
