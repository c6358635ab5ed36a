"""Synthetic text: the target's tokens and the draft's proposals by hashes, so that acceptance is what a table says.

A target's next token is a hash of its request, its position and the token before it. A draft that knows the hash puts
that token at the rank that the table wants. So networks without trained weights decode at the speed that trained ones
would have.

``xp`` is numpy or torch: a device computes the same text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echo_trt.bundle.manifest import Manifest
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.errors import UserError, shown

VARIABLE = "ECHO_TRT_SYNTHETIC_TEXT"  # of the environment: the rates of any command's bundle
#: P(a further candidate is right), of P(the first one is), where the candidates before it are wrong. The default head's
#: is 0.27 to 0.30 at depths 1 to 4. Larger: wider trees are worth more.
FURTHER = 0.28
MAX_RANKS, MAX_DEPTHS = 64, 64
BITS = 24  # of a uniform number: float32 holds them all
WORD = re.compile(r"[Ġ▁ ]?[A-Za-z]+")  # as a byte-level or a SentencePiece vocabulary spells it
MIN_WORDS = 1000  # of a vocabulary whose texts are words alone; smaller ones take all ordinary tokens


@dataclass(frozen=True)
class Rates:
    """P(the target's token is a draft's candidate) by depth and rank; the last row counts for all deeper levels.

    text  what the user gave
    """

    rows: tuple[tuple[float, ...], ...]
    text: str

    @classmethod
    def parse(cls, text: str, option: str = VARIABLE) -> Rates:
        """Read a rate, such as 0.75, rates by depth, as 0.8,0.7,0.6, or depth x rank, as JSON or a file of it.

        Raises UserError, which names ``option``.
        """
        rows: Any = None
        try:
            if text.endswith(".json") or text.startswith("["):
                rows = json.loads(text if text[0] == "[" else Path(text).read_text(encoding="utf-8"))
            else:
                rows = [_ranks(float(rate)) for rate in text.split(",")]
        except (OSError, ValueError, RecursionError):
            pass
        if not (isinstance(rows, list) and 1 <= len(rows) <= MAX_DEPTHS and all(map(_is_row, rows))):
            raise UserError(
                f"{option} is {shown(text)}; give an acceptance rate above 0 and up to 1, such as 0.75, rates by "
                "depth, such as 0.8,0.7,0.6, or a JSON file of rates by depth and rank, such as [[0.8, 0.1], "
                "[0.7, 0.1]], which do not rise with the rank and are at most 1 together."
            )
        return cls(tuple(tuple(map(float, row)) for row in rows), text)

    @property
    def sentence(self) -> str:
        """What every output says of such a text."""
        return f"synthetic text, whose drafts are accepted at {shown(self.text)[1:-1]}: no model's answers"


def _ranks(first: float) -> list[float]:
    """Return P(right) of the first candidate and of MAX_RANKS - 1 further ones, each where those before are wrong."""
    missed = (1 - first) * (1 - FURTHER * first) ** np.arange(MAX_RANKS - 1)
    return [first, *(missed * FURTHER * first).tolist()]


def _is_row(row: Any) -> bool:
    """Tell whether these are rates by rank."""
    if not isinstance(row, list) or not 1 <= len(row) <= MAX_RANKS or {*map(type, row)} - {int, float}:
        return False
    return 1 >= row[0] > 0 <= min(row) and sorted(row, reverse=True) == row and sum(row) <= 1 + 1e-9


def _hashes(keys: Any, previous: Any, positions: Any) -> Any:
    """Hash ``positions`` in texts, the tokens before them, and their requests' keys, int64 [m] each: int64 [m]."""
    return _mixed(_mixed((keys << 24) + previous) ^ positions)


class HashedText:
    """The text and the proposals for it, on the host or on a ``device`` of ``xp``.

    A position has a difficulty, by which the confidence of a draft's first candidate varies about the table's rate, and
    log q says the chance truly. So requests differ at any time in what their drafts are worth, as real ones do.
    """

    def __init__(self, rates: Rates, vocabulary: np.ndarray, xp: Any = np, **placed: Any):
        """``vocabulary`` int64 [n]: the tokens that texts are made of. ``placed``: the device, where ``xp`` has any."""
        self.rates, self.vocabulary, self._xp = rates, vocabulary, xp
        table = np.zeros((len(rates.rows), MAX_RANKS))
        for ranks, row in zip(table, rates.rows, strict=True):
            ranks[: len(row)] = row
        first, missed = table[:, 0], np.maximum(1 - table[:, 0], 1e-9)
        floor = table[:, 1] / (missed + table[:, 1])  # of the first candidate's q: it stays the best one
        # floor + (1 - floor) u^x has the mean ``first`` over u from 0 to 1.
        exponent = (1 - floor) / np.maximum(first - floor, 1e-9) - 1
        with np.errstate(divide="ignore"):
            shares = np.log(table[:, 1:] / missed[:, None])

        def put(array: np.ndarray, dtype: Any) -> Any:
            return xp.asarray(array.astype(dtype), **placed)

        self._tokens, self._ranks = put(vocabulary, np.int64), put(np.arange(MAX_RANKS), np.int64)
        self._floor, self._exponent = put(floor, np.float32), put(exponent, np.float32)
        self._shares = put(shares, np.float32)

    def placed(self, xp: Any, device: Any) -> HashedText:
        """Return the same text on a ``device`` of ``xp``."""
        return HashedText(self.rates, self.vocabulary, xp, device=device)

    def next_tokens(self, keys: Any, previous: Any, positions: Any) -> Any:
        return self._tokens[_hashes(keys, previous, positions) % len(self._tokens)]

    def propose(self, keys: Any, previous: Any, positions: Any, depth: Any, count: int) -> tuple[Any, Any]:
        """Return what a draft proposes at ``positions``.

        depth  int64 [m], of the proposals, 1 below a root

        Returns log q float [m, count], best first, -inf beyond the table's ranks; and tokens int64 [m, count].
        """
        xp, where = self._xp, _hashes(keys, previous, positions)
        row = depth.clip(1, len(self._floor)) - 1
        difficulty, chance = ((_mixed(where + n) >> (63 - BITS) & 2**BITS - 1) * 2.0**-BITS for n in (1, 2))
        floor = self._floor[row]
        first = (floor + (1 - floor) * difficulty ** self._exponent[row]).clip(2.0**-BITS, 1 - 2.0**-BITS)[:, None]
        log_q = xp.concatenate((xp.log(first), xp.log(1 - first) + self._shares[row, : count - 1]), 1)
        rank = (xp.exp(log_q).cumsum(1) <= chance[:, None]).sum(1)  # ``count``: none of the candidates
        # The candidates are neighbours in the vocabulary, and the target's token stands among them at its rank.
        index = (where % len(self._tokens) - rank)[:, None] + self._ranks[:count]
        return log_q, self._tokens[index % len(self._tokens)]


def _mixed(x: Any) -> Any:
    """Mix the bits of ``x`` int64 [m], as SplitMix64 does (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 2**33 - 1)


def synthetic_text(folder: Path, manifest: Manifest, rates: Rates) -> HashedText:
    """Return the texts of a bundle: of ordinary tokens, so that no end, thought or call is among them.

    Raises UserError for a bundle whose draft has no network to take the place of.
    """
    from echo_trt.models.tokenizer import added_tokens, load_tokenizer  # not where texts are of token ids alone

    if not draft_kind(manifest.recipe.draft.kind).network:
        raise UserError(
            f"the synthetic text's rate is {rates.text}, a draft network's acceptance, but the draft of {folder} is "
            f"{manifest.recipe.draft.kind}; build it with --draft."
        )
    tokenizer = load_tokenizer(folder)
    special = {*added_tokens(tokenizer).values(), *manifest.eos_token_ids}
    known = {token: id for token, id in tokenizer.get_vocab().items() if id < manifest.target.vocab_size}
    words = [id for token, id in known.items() if WORD.fullmatch(token)]
    ordinary = np.array(sorted({*(words if len(words) >= MIN_WORDS else known.values())} - special), np.int64)
    if len(ordinary) <= MAX_RANKS:
        raise UserError(
            f"{folder} has {len(ordinary)} ordinary tokens, and a synthetic text needs more than {MAX_RANKS}."
        )
    return HashedText(rates, ordinary)
