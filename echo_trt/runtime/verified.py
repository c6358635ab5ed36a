"""The target's choice in one call: the next token at a node, and log-probabilities of emitted tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from echo_trt.decoding.arrays import begins, ragged_arange
from echo_trt.decoding.pack import Packed
from echo_trt.decoding.sampling.draw import sample
from echo_trt.decoding.sampling.logprobs import best_tokens, log_normalisers
from echo_trt.decoding.sampling.penalties import penalise, tokens_above
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.runtime.params import TokenLogprobs
from echo_trt.runtime.slots import Slots


@dataclass
class Verified:
    """A verified tree with the target's outputs.

    decoding  number of decoding requests; they come first. Finished prompts follow, with a root alone
    slots     int64 [B]
    """

    tree: SuperTree
    slots: np.ndarray
    decoding: int
    outputs: dict[str, np.ndarray]
    call: Packed
    state: Slots
    failures: dict[int, str] = field(default_factory=dict)  # request -> why its grammar cannot go on
    _places: dict[int, State] = field(default_factory=dict)  # node -> what may follow its path

    @cached_property
    def _constrained(self) -> bool:
        """Whether a grammar constrains any of the requests."""
        return bool(self.state.grammar[self.slots].any())

    @cached_property
    def _greedy(self) -> bool:
        """Whether the next token is the best one everywhere, as the logits are."""
        return not (self.state.adjusted[self.slots].any() or self.state.temperature[self.slots].any())

    def next_token(self, nodes: np.ndarray) -> np.ndarray:
        """Return the target's next tokens at ``nodes`` int64 [m]: the best, or the draw for (seed, place)."""
        tokens = self._next_token(nodes)
        if not self._constrained:
            return tokens
        grammars = self.state.grammar[self._slots_of(nodes)]
        for i in np.flatnonzero(grammars):  # not None
            tokens[i] = self._allowed(nodes[i], tokens[i], grammars[i])
        return tokens

    def _allowed(self, node: int, token: int, grammar: State) -> int:
        """The next token at one node under the grammar of its request, whose text's ``grammar`` is the root's.

        ``token`` is what would follow without it. Where that is allowed it is the choice among allowed tokens, too,
        unless top-k, top-p or min-p look at them all.
        """
        slot, above = self.slots[self.tree.request[node]], self.tree.parent[node]
        try:
            place = self._places[above].after(int(self.tree.token[node])) if above >= 0 else grammar
            assert place  # or the node would not have been visited
            self._places[node] = place
            if (self.state.limited[slot] and place.mask is not None) or place.after(int(token)) is None:
                only = np.array([node])
                logits = (self._adjusted_logits if self.state.adjusted[slot] else self._logits)(only)
                token = self._chosen(only, place.shut_out(logits[0])[None])[0]
            if place.after(int(token)) is None:
                raise GrammarFailed("it allows no token here")
        except GrammarFailed as failure:
            self.failures[int(self.tree.request[node])] = f"its grammar cannot go on ({failure})."
            return int(self.state.stop_tokens[slot, 0])
        return int(token)

    def follow(self, counts: np.ndarray, tokens: np.ndarray) -> None:
        """Move grammars behind what was emitted: tokens end to end, ``counts`` [B] of each request."""
        if not self._constrained:
            return
        begin = begins(counts)
        for i in np.flatnonzero(self.state.grammar[self.slots]):
            for token in tokens[begin[i] : begin[i + 1]].tolist() if i not in self.failures else ():
                place = self.state.grammar[self.slots[i]].after(token)
                self.state.grammar[self.slots[i]] = place

    def _next_token(self, nodes: np.ndarray) -> np.ndarray:
        if self._greedy:
            return self._best(nodes)
        adjusted = self.state.adjusted[self._slots_of(nodes)]
        if not adjusted.any():
            return self._chosen(nodes, self._logits(nodes))
        tokens = np.empty(len(nodes), np.int64)
        for part, logits_of in ((~adjusted, self._logits), (adjusted, self._adjusted_logits)):
            tokens[part] = self._chosen(nodes[part], logits_of(nodes[part]))
        return tokens

    def logprobs(self, path: np.ndarray, emitted: np.ndarray) -> list[tuple[int, list[TokenLogprobs]]]:
        """Return (request, an entry an emitted token), in order, of the requests that ask for log-probabilities.

        ``path`` and ``emitted`` are as ``accept`` returns them.
        """
        if self.state.logprobs[self.slots].max(initial=-1) < 0:
            return []
        top = self.state.logprobs[self._slots_of(path)]
        asked = np.flatnonzero(top >= 0)
        entries = token_logprobs(self._logits(path[asked]), emitted[asked], top[asked])
        by_request: dict[int, list[TokenLogprobs]] = {}
        for request, entry in zip(self.tree.request[path[asked]].tolist(), entries, strict=True):
            by_request.setdefault(request, []).append(entry)
        return list(by_request.items())

    def _slots_of(self, nodes: np.ndarray) -> np.ndarray:
        slots: np.ndarray = self.slots[self.tree.request[nodes]]
        return slots

    def _logits(self, nodes: np.ndarray) -> np.ndarray:
        logits = self.outputs["logits"]
        whole = len(nodes) == len(logits) and (np.diff(nodes) > 0).all()  # most calls: nothing to copy
        return logits if whole else logits[nodes]

    def _best(self, nodes: np.ndarray) -> np.ndarray:
        logits = self.outputs["logits"]
        if len(nodes) == len(logits) or not isinstance(logits, np.ndarray):
            best: np.ndarray = self._logits(nodes).argmax(axis=1)
            return best
        return np.array([logits[node].argmax() for node in nodes.tolist()])  # row by row: to copy them takes longer

    def _adjusted_logits(self, nodes: np.ndarray) -> np.ndarray:
        """Return logits after penalties and bias, without stop tokens where it is too early for them."""
        logits = self._penalised(nodes)
        state, slots = self.state, self._slots_of(nodes)
        row, place = np.repeat(np.arange(len(nodes)), state.biased[slots]), ragged_arange(state.biased[slots])
        logits[row, state.bias_tokens[slots[row], place]] += state.bias[slots[row], place]
        generated = state.length[slots] - state.prompt_length[slots] + self.tree.depth[nodes]
        early = generated < state.min_tokens[slots]
        stops = state.stop_tokens[slots]
        row, place = np.nonzero(early[:, None] & (stops >= 0) & (stops < logits.shape[1]))
        logits[row, stops[row, place]] = -np.inf
        return logits

    def _penalised(self, nodes: np.ndarray) -> np.ndarray:
        """Return logits after penalties, which look at the prompt only where one for repetition asks for it."""
        state, slots = self.state, self._slots_of(nodes)
        first = np.where(state.repetition_penalty[slots] == 1, state.prompt_length[slots], 0)
        said = state.length[slots] - first
        row = np.repeat(np.arange(len(nodes)), said)
        place = first[row] + ragged_arange(said)
        below_row, below = tokens_above(self.tree, nodes)
        return penalise(
            self._logits(nodes),
            np.concatenate((row, below_row)),
            np.concatenate((state.tokens[slots[row], place], below)),
            np.concatenate((place >= state.prompt_length[slots[row]], np.ones(len(below), bool))),
            state.repetition_penalty[slots],
            state.presence_penalty[slots],
            state.frequency_penalty[slots],
        )

    def _chosen(self, nodes: np.ndarray, logits: np.ndarray) -> np.ndarray:
        state, slots = self.state, self._slots_of(nodes)
        # Places count the prompt, so a text goes on alike where its beginning comes as another request's prompt.
        place = state.length[slots] + self.tree.depth[nodes]
        return sample(
            logits,
            state.temperature[slots],
            state.top_k[slots],
            state.top_p[slots],
            state.seed[slots],
            place,
            state.min_p[slots],
        )


def token_logprobs(logits: np.ndarray, tokens: np.ndarray, top: np.ndarray) -> list[TokenLogprobs]:
    """Return the log-probabilities of ``tokens`` int64 [m] by ``logits`` float [m, V], and of a row's ``top`` best."""
    logits = np.asarray(logits, np.float32)
    normaliser = log_normalisers(logits)
    own = (logits[np.arange(len(tokens)), tokens] - normaliser).tolist()
    row, best = best_tokens(logits, top)
    pairs = list(zip(best.tolist(), (logits[row, best] - normaliser[row]).tolist(), strict=True))
    begin = np.searchsorted(row, np.arange(len(tokens) + 1)).tolist()
    return [
        TokenLogprobs(token, logprob, tuple(pairs[begin[i] : begin[i + 1]]))
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), own, strict=True))
    ]
