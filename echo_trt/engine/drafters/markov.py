"""Corrections of a block drafter's proposals by its Markov head and its confidence head, when a node is expanded.

One pass gives each row's distribution without the token before it. The Markov head adds ``w2 @ z`` to a row's logits,
where z comes from that token: its embedding ``w1[token]`` (vanilla), gated by the row's hidden state (gated), or the
output of a recurrent state along the path (rnn). The confidence head says how likely a row's best token is accepted.

Only the row's ``top_k`` candidates are corrected, and the other tokens keep their share together: a token that the head
would raise from further below is not proposed. So recipes of such drafters have a large ``draft.top_k``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echo_trt.bundle.manifest import MARKOV, BlockFacts, Manifest
from echo_trt.errors import DAMAGED, UserError

MIN_SHARE = 1e-6  # smallest share of the other candidates; it is a divisor


class Markov:
    """The heads' tables, which ``echo_trt.models.block_weights.markov_arrays`` describes."""

    def __init__(self, tables: dict[str, np.ndarray], facts: BlockFacts):
        self._kind, self._confident, self._tables = facts.markov, facts.confidence, tables
        #: Numbers of a node's recurrent state.
        self.state_size = tables["w1"].shape[1] if self._kind == "rnn" else 0

    def correct(
        self, log_q: np.ndarray, tokens: np.ndarray, hidden_states: np.ndarray, previous: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correct the proposals for F expanded nodes. Returns log q and tokens, best first, and the nodes' states.

        log_q          float32 [F, k], log-probabilities of the candidates
        tokens         int64 [F, k]
        hidden_states  float32 [F, G], what the rows' hidden states say to the heads
        previous       int64 [F], the nodes' own tokens
        states         float32 [F, state_size], of the nodes' parents, 0 above roots
        """
        embedded = np.zeros((len(previous), 0), np.float32)
        if self._kind:
            embedded = self._tables["w1"][previous].astype(np.float32)
            mixed, states = self._mix(embedded, hidden_states, states)
            raised = log_q + np.einsum("fkr,fr->fk", self._tables["w2"][tokens].astype(np.float32), mixed)
            rest = np.maximum(1 - np.exp(log_q).sum(axis=1, keepdims=True), 0)
            log_q = raised - np.log(np.exp(raised).sum(axis=1, keepdims=True) + rest)
            order = np.argsort(-log_q, axis=1, kind="stable")
            log_q, tokens = (np.take_along_axis(array, order, axis=1) for array in (log_q, tokens))
        if self._confident:
            log_q = self._confide(log_q, embedded, hidden_states[:, -1])
        return log_q, tokens, states

    def _mix(
        self, embedded: np.ndarray, hidden_states: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return z [F, r], which ``w2`` turns into corrections, and the nodes' states."""
        if self._kind == "vanilla":
            return embedded, states
        tables, rank = self._tables, embedded.shape[1]
        if self._kind == "gated":
            return _sigmoid(hidden_states[:, :rank] + embedded @ tables["token"].T + tables["bias"]) * embedded, states
        joint = (
            hidden_states[:, : 3 * rank] + embedded @ tables["token"].T + states @ tables["state"].T + tables["bias"]
        )
        gate, candidate, output = np.split(joint, 3, axis=1)
        gate = _sigmoid(gate)
        return np.tanh(output), gate * states + (1 - gate) * np.tanh(candidate)

    def _confide(self, log_q: np.ndarray, embedded: np.ndarray, hint: np.ndarray) -> np.ndarray:
        """Give the best candidate the head's probability, and share the rest among the others as they stand."""
        weight, logit = self._tables["confidence_token"], hint + self._tables["confidence_bias"]
        if len(weight):
            logit = logit + embedded @ weight
        best = np.clip(_sigmoid(logit), MIN_SHARE, 1 - MIN_SHARE)
        others = np.log((1 - best) / np.maximum(1 - np.exp(log_q[:, 0]), MIN_SHARE))
        confided: np.ndarray = log_q + others[:, None]
        confided[:, 0] = np.log(best)
        return confided


def _sigmoid(x: np.ndarray) -> np.ndarray:
    positive: np.ndarray = 0.5 * (1 + np.tanh(0.5 * x))  # overflows nowhere
    return positive


def read_markov(folder: Path, manifest: Manifest) -> Markov:
    """Read the tables of the bundle ``folder``, whose drafter has a Markov or a confidence head."""
    draft = manifest.draft
    assert draft is not None
    assert draft.block is not None
    path = folder / MARKOV
    wanted = ["w1", "w2"] if draft.block.markov else []
    wanted += ["token", "bias"] if draft.block.markov in ("gated", "rnn") else []
    wanted += ["state"] if draft.block.markov == "rnn" else []
    wanted += ["confidence_token", "confidence_bias"] if draft.block.confidence else []
    try:
        with np.load(path, allow_pickle=False) as stored:
            tables = {name: stored[name] for name in wanted}
    except DAMAGED as error:
        raise UserError(f"{path} does not hold the tables of this drafter's heads; build the bundle again.") from error
    rows = [len(tables[name]) for name in ("w1", "w2") if name in tables]
    if any(count < manifest.target.vocab_size for count in rows):
        raise UserError(f"{path} has tables of {rows[0]} tokens, fewer than the target's; build the bundle again.")
    return Markov(tables, draft.block)
