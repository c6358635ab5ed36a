"""Drafts that propose a synthetic text's tokens as often as a table says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from echo_trt.bundle.manifest import Manifest
from echo_trt.bundle.recipe import NETWORKS
from echo_trt.engine.batch import InputBatch
from echo_trt.errors import UserError
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.speculation.drafts import Draft, Proposals
from echo_trt.speculation.super_tree import SuperTree
from echo_trt.speculation.synthetic import MAX_RANKS, OPTION, Rates, SyntheticText, text_positions

WORD = re.compile(r"[Ġ▁ ]?[A-Za-z]+")  # as a byte-level or a SentencePiece vocabulary spells it
MIN_WORDS = 1000  # of a vocabulary whose texts are words alone; smaller ones take all ordinary tokens


def synthetic_text(folder: Path, manifest: Manifest, rates: Rates) -> SyntheticText:
    """Return the texts of a bundle: of ordinary tokens, so that no end, thought or call is among them.

    Raises UserError for a bundle whose draft has no network to take the place of.
    """
    if manifest.recipe.draft.kind not in NETWORKS:
        raise UserError(
            f"{OPTION} is {rates.text}, a draft network's acceptance, but the draft of {folder} is "
            f"{manifest.recipe.draft.kind}; build it with --draft."
        )
    tokenizer = load_tokenizer(folder)
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids, *manifest.eos_token_ids}
    known = {token: id for token, id in tokenizer.get_vocab().items() if id < manifest.target.vocab_size}
    words = [id for token, id in known.items() if WORD.fullmatch(token)]
    ordinary = np.array(sorted({*(words if len(words) >= MIN_WORDS else known.values())} - special), np.int64)
    if len(ordinary) <= MAX_RANKS:
        raise UserError(f"{folder} has {len(ordinary)} ordinary tokens, and {OPTION} needs more than {MAX_RANKS}.")
    return SyntheticText(rates, ordinary)


class SyntheticDraft(Draft):
    """A draft whose proposals are replaced after they were computed; where there were none, there are none."""

    def __init__(self, draft: Draft, text: SyntheticText, batch: InputBatch, slots: np.ndarray):
        """``slots`` [B] of ``batch`` are drafted for.

        A draft that looks ahead on a device has the same text there (``Levels``).
        """
        self._draft, self._text, self.looks_ahead = draft, text, draft.looks_ahead
        self._keys, self._lengths = batch.text_key[slots], batch.length[slots]
        self._roots = batch.tokens[slots, self._lengths - 1].astype(np.int64)

    def look_ahead(self, levels: int, beams: int, width: int, maximum: int) -> None:
        self._draft.look_ahead(levels, beams, width, maximum)

    def expand_roots(self, requests: np.ndarray) -> Proposals:
        proposals, depth = self._draft.expand_roots(requests), np.zeros(len(requests), np.int64)
        return self._replaced(proposals, requests, self._roots[requests], depth)

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        proposals = self._draft.expand(tree, nodes)
        return self._replaced(proposals, tree.request[nodes], tree.token[nodes], tree.depth[nodes])

    def _replaced(self, proposals: Proposals, requests: np.ndarray, tokens: np.ndarray, depth: np.ndarray) -> Proposals:
        """Replace the proposals below ``tokens`` [F] at a ``depth`` [F]."""
        where = text_positions(self._keys[requests], tokens, self._lengths[requests] + depth)
        log_q, candidates = self._text.propose(where, depth + 1, proposals[0].shape[1])
        return np.where(proposals[0] > -np.inf, log_q, -np.inf).astype(np.float32), candidates
