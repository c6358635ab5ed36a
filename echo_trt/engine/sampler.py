"""The target's output of one pass: the next token at a node, and log-probabilities of emitted tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.params import TOKEN_SOURCES, TokenLogprobs, TokenSource
from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.sampling.draw import SamplingBatch, choose
from echo_trt.speculation.sampling.logprobs import best_tokens, log_normalisers
from echo_trt.speculation.sampling.penalties import tokens_above
from echo_trt.speculation.sources import DRAFT
from echo_trt.speculation.super_tree import SuperTree

NO_ROWS = np.zeros(0, np.int64)
Entry = TypeVar("Entry", TokenLogprobs, TokenSource)


class GrammarWalk:
    """The grammars of requests along the nodes of a tree that are visited.

    constrained  bool [B], which requests have a grammar
    failures     request -> why its grammar cannot go on
    """

    def __init__(self, tree: SuperTree, slots: np.ndarray, batch: InputBatch):
        """``slots`` int64 [B]: those of the tree's requests, whose ``grammar`` is the state at the root."""
        self._tree, self._slots, self._batch = tree, slots, batch
        self.constrained: np.ndarray = batch.grammar[slots].astype(bool)  # not None
        self.failures: dict[int, str] = {}
        self._states: dict[int, State] = {}  # node -> what may follow its path

    def allowed(
        self, nodes: np.ndarray, tokens: np.ndarray, choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Correct the next ``tokens`` int64 [m] at ``nodes``, which are the choices without grammars.

        An allowed token is also the choice among the allowed tokens, unless top-k, top-p or min-p apply: these depend
        on all tokens. ``choose`` chooses at nodes among those of masks.
        """
        tokens, again = tokens.copy(), []
        for i in np.flatnonzero(self.constrained[self._tree.request[nodes]]).tolist():
            request = int(self._tree.request[nodes[i]])
            if request in self.failures:  # a draft goes on behind the end of the text
                continue
            with self._failing(request, tokens, i):
                grammar = self._state_at(int(nodes[i]))
                limited = self._batch.sampling["limited"][self._slots[request]] and grammar.mask is not None
                if limited or grammar.after(int(tokens[i])) is None:
                    again.append((i, grammar.mask))
        if again:
            chosen, masks = map(np.array, zip(*again, strict=True))
            tokens[chosen] = choose(nodes[chosen], masks)
        for i, _ in again:
            with self._failing(int(self._tree.request[nodes[i]]), tokens, i):
                if self._state_at(int(nodes[i])).after(int(tokens[i])) is None:
                    raise GrammarFailed("it allows no token here")
        return tokens

    def _state_at(self, node: int) -> State:
        if node not in self._states:
            above, state = int(self._tree.parent[node]), self._batch.grammar[self._slots[self._tree.request[node]]]
            if above >= 0:
                state = self._states[above].after(int(self._tree.token[node]))
            assert state  # or the node would not have been visited
            self._states[node] = state
        return self._states[node]

    @contextmanager
    def _failing(self, request: int, tokens: np.ndarray, i: int) -> Iterator[None]:
        """Note a grammar that cannot go on: its request ends at token ``i``, by a stop token where it has one."""
        try:
            yield
        except GrammarFailed as failure:
            self.failures[request] = f"structured cannot go on here ({failure}); simplify it."
            stop = int(self._batch.stop_tokens[self._slots[request], 0])
            tokens[i] = stop if stop >= 0 else tokens[i]

    def follow(self, counts: np.ndarray, tokens: np.ndarray) -> None:
        """Advance grammars by the emitted tokens: end to end, ``counts`` [B] per request."""
        grammars = self._batch.grammar
        for i in np.flatnonzero(self.constrained):
            begin = counts[:i].sum()
            for token in tokens[begin : begin + counts[i]].tolist() if i not in self.failures else ():
                grammars[self._slots[i]] = grammars[self._slots[i]].after(token)


@dataclass
class TargetOutput:
    """A verified tree with the target's outputs.

    decoding     number of decoding requests; they come first. Finished prompts follow, with a root alone
    slots        int64 [B]
    probability  float64 [n], the planner's P(accept) of the nodes of decoding requests
    proposer     source that nodes of the source DRAFT are reported as (``EngineCore.proposer``)
    """

    tree: SuperTree
    slots: np.ndarray
    decoding: int
    outputs: dict[str, Any]
    call: ForwardBatch
    batch: InputBatch
    probability: np.ndarray = field(default_factory=lambda: np.zeros(0))
    proposer: int = DRAFT

    @cached_property
    def walk(self) -> GrammarWalk:
        return GrammarWalk(self.tree, self.slots, self.batch)

    @cached_property
    def _greedy(self) -> bool:
        """Whether the next token is the best one everywhere, as the logits are."""
        sampling, slots = self.batch.sampling, self.slots
        return not (sampling["adjusted"][slots].any() or sampling["temperature"][slots].any())

    @cached_property
    def _all_tokens(self) -> np.ndarray:
        """The next tokens at all nodes, where logits are on a device: int64 [n]. Greedy requests' are the best ones.

        Of the others' nodes those that the walk cannot visit may have none. Where a grammar may correct a token, the
        walk is not known before.
        """
        logits, tree = self.outputs["logits"], self.tree
        if self._greedy:
            best: np.ndarray = logits.argmax(axis=1)[: len(tree)]
            return best
        slots = self._slots_of(np.arange(len(tree)))
        sampled = self.batch.sampling["adjusted"][slots] | (self.batch.sampling["temperature"][slots] > 0)
        nodes = np.argsort(np.where(sampled, tree.depth, len(tree)), kind="stable")[: sampled.sum()]
        order = np.full(len(tree) + 1, -1)  # parent -1 is the last one
        order[nodes] = np.arange(len(nodes))
        parent = np.where(self.batch.grammar[slots[nodes]].astype(bool), -1, order[tree.parent[nodes]])
        # Prepared and launched while the device still computes the logits: nothing was read so far, and nobody waits.
        chosen = logits.choose(nodes, self._choice(nodes), parent, tree.token[nodes])
        tokens = np.empty(len(tree), np.int64) if sampled.all() else logits.argmax(axis=1)[: len(tree)]
        tokens[nodes] = chosen
        return tokens

    def wait(self) -> None:
        """Wait for a device's results, without which the pass has not ended."""
        if not isinstance(self.outputs["logits"], np.ndarray):
            _ = self._all_tokens

    def next_token(self, nodes: np.ndarray) -> np.ndarray:
        """Return the target's next tokens at ``nodes`` int64 [m]: the best, or the draw for (seed, position)."""
        if not isinstance(self.outputs["logits"], np.ndarray):
            tokens = self._all_tokens[nodes]
        else:
            tokens = self._best(nodes) if self._greedy else self._chosen(nodes)
        return self.walk.allowed(nodes, tokens, self._chosen) if self.walk.constrained.any() else tokens

    def logprobs(self, path: np.ndarray, emitted: np.ndarray) -> list[tuple[int, list[TokenLogprobs]]]:
        """Return (request, one entry per emitted token), in order, of the requests that ask for log-probabilities.

        ``path`` and ``emitted`` are as ``accept`` returns them.
        """
        if self.batch.sampling["logprobs"][self.slots].max(initial=-1) < 0:
            return []
        top = self.batch.sampling["logprobs"][self._slots_of(path)]
        requested = np.flatnonzero(top >= 0)
        entries = token_logprobs(self.outputs["logits"], path[requested], emitted[requested], top[requested])
        return self._by_request(path[requested], entries)

    def sources(self, path: np.ndarray, emitted: np.ndarray) -> list[tuple[int, list[TokenSource]]]:
        """Return likewise, of the requests that ask who proposed their tokens."""
        if not self.batch.sampling["token_sources"][self.slots].any():
            return []
        tree, requests, entries = self.tree, self.tree.request[path].tolist(), []
        requested = np.flatnonzero(self.batch.sampling["token_sources"][self._slots_of(path)])
        for i in requested.tolist():
            source, chance = TOKEN_SOURCES[0], None
            if i + 1 < len(path) and requests[i + 1] == requests[i]:  # the next visited node carries the token
                child, above = int(path[i + 1]), int(path[i])
                source = TOKEN_SOURCES[1 + max(int(tree.source[child]), self.proposer)]
                # A path's may have rounded to 0.
                certain = max(float(self.probability[above]), float(np.finfo(np.float64).tiny))
                chance = min(float(self.probability[child]) / certain, 1.0)
            entries.append(TokenSource(int(emitted[i]), source, chance))
        return self._by_request(path[requested], entries)

    def _by_request(self, nodes: np.ndarray, entries: list[Entry]) -> list[tuple[int, list[Entry]]]:
        found: dict[int, list[Entry]] = {}
        for request, entry in zip(self.tree.request[nodes].tolist(), entries, strict=True):
            found.setdefault(request, []).append(entry)
        return list(found.items())

    def _slots_of(self, nodes: np.ndarray) -> np.ndarray:
        slots: np.ndarray = self.slots[self.tree.request[nodes]]
        return slots

    def _logits(self, nodes: np.ndarray) -> np.ndarray:
        logits = self.outputs["logits"]
        whole = len(nodes) == len(logits) and (np.diff(nodes) > 0).all()  # most calls: nothing to copy
        found: np.ndarray = logits if whole else logits[nodes]
        return found

    def _best(self, nodes: np.ndarray) -> np.ndarray:
        logits = self.outputs["logits"]
        if len(nodes) == len(logits):
            best: np.ndarray = self._logits(nodes).argmax(axis=1)
            return best
        return np.array([logits[node].argmax() for node in nodes.tolist()])  # row by row: to copy them takes longer

    def _chosen(self, nodes: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Choose at ``nodes`` int64 [m] among all tokens, or those of ``masks`` uint8 [m, ceil(V / 8)]."""
        choice, logits = self._choice(nodes, masks), self.outputs["logits"]
        if isinstance(logits, np.ndarray):
            return choose(self._logits(nodes), choice)
        tokens: np.ndarray = logits.choose(nodes, choice)
        return tokens

    def _choice(self, nodes: np.ndarray, masks: np.ndarray | None = None) -> SamplingBatch:
        batch, slots = self.batch, self._slots_of(nodes)
        own = batch.sampling[slots]
        return SamplingBatch(
            **{name: own[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")},
            # Positions count the prompt, so a text continues the same when its beginning is sent as another request's
            # prompt.
            position=batch.length[slots] + self.tree.depth[nodes],
            repetition=own["repetition_penalty"],
            presence=own["presence_penalty"],
            frequency=own["frequency_penalty"],
            **self._history(nodes),
            **self._logit_bias(nodes),
            masks=masks,
        )

    def _history(self, nodes: np.ndarray) -> dict[str, np.ndarray]:
        """List the tokens that penalties at ``nodes`` read, as ``SamplingBatch`` has them.

        Only a repetition penalty reads the prompt.
        """
        batch, slots = self.batch, self._slots_of(nodes)
        penalised = np.flatnonzero(batch.sampling["penalised"][slots])
        if len(penalised) == 0:
            return {"history_row": NO_ROWS, "history_token": NO_ROWS, "history_generated": NO_ROWS.astype(bool)}
        first = np.where(batch.sampling["repetition_penalty"][slots] == 1, batch.prompt_length[slots], 0)[penalised]
        history = batch.length[slots[penalised]] - first
        row, position = np.repeat(penalised, history), np.repeat(first, history) + ragged_arange(history)
        below_row, below = tokens_above(self.tree, nodes[penalised])
        generated = position >= batch.prompt_length[slots[row]]
        return {
            "history_row": np.concatenate((row, penalised[below_row])),
            "history_token": np.concatenate((batch.tokens[slots[row], position], below)).astype(np.int64),
            "history_generated": np.concatenate((generated, np.ones(len(below), bool))),
        }

    def _logit_bias(self, nodes: np.ndarray) -> dict[str, np.ndarray]:
        """List additions to logits, as ``SamplingBatch`` has them: biases, and -inf for stops before ``min_tokens``."""
        batch, slots = self.batch, self._slots_of(nodes)
        row, position = np.repeat(np.arange(len(nodes)), batch.biased[slots]), ragged_arange(batch.biased[slots])
        generated = batch.length[slots] - batch.prompt_length[slots] + self.tree.depth[nodes]
        early = generated < batch.sampling["min_tokens"][slots]
        stops = batch.stop_tokens[slots]
        vocabulary = self.outputs["logits"].shape[1]
        shut_row, shut = np.nonzero(early[:, None] & (stops >= 0) & (stops < vocabulary))
        token, bias = batch.bias_tokens[slots[row], position], batch.bias[slots[row], position]
        return {
            "logit_bias_row": np.concatenate((row, shut_row)),
            "logit_bias_token": np.concatenate((token, stops[shut_row, shut])).astype(np.int64),
            "logit_bias": np.concatenate((bias, np.full(len(shut), -np.inf, np.float32))),
        }


def token_logprobs(logits: Any, rows: np.ndarray, tokens: np.ndarray, top: np.ndarray) -> list[TokenLogprobs]:
    """Return log-probabilities at rows int64 [m] of ``logits`` float [n, V], here or on a device.

    They are those of ``tokens`` int64 [m], and of the ``top`` int64 [m] best of a row.
    """
    if isinstance(logits, np.ndarray):
        logits = np.asarray(logits[rows], np.float32)
        normaliser = log_normalisers(logits)
        own = logits[np.arange(len(tokens)), tokens] - normaliser
        row, best = best_tokens(logits, top)
        values = logits[row, best] - normaliser[row]
    else:
        max_top = min(int(top.max()), logits.shape[1])
        own, found, tokens_of = logits.log_probabilities(rows, tokens, max_top)
        row = np.repeat(np.arange(len(rows)), np.minimum(top, max_top))
        order = np.lexsort((tokens_of, -found), axis=1)[row, ragged_arange(np.minimum(top, max_top))]
        values, best = found[row, order], tokens_of[row, order]
    pairs = list(zip(best.tolist(), values.tolist(), strict=True))
    begin = np.searchsorted(row, np.arange(len(tokens) + 1)).tolist()
    return [
        TokenLogprobs(token, logprob, tuple(pairs[begin[i] : begin[i + 1]]))
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), own.tolist(), strict=True))
    ]
