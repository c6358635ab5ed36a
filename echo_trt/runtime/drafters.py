"""Drafts that keep in step with their requests: an EAGLE-3 head or a smaller model; others are beside this file.

A drafter remembers how many of a request's tokens its own KV cache holds. Whatever is missing, after a prompt, an
accepted path or a pause of any length, is caught up in the pass that next needs it; not drafting costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from echo_trt.backends.base import Engine, bank_of
from echo_trt.decoding.arrays import begins, ragged_arange
from echo_trt.decoding.drafts import Proposals, TimedDraft
from echo_trt.decoding.pack import BLOCK, Packed, pack
from echo_trt.decoding.super_tree import SuperTree, ancestor_mask
from echo_trt.runtime.slots import Slots

RunNewest = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]
NONE = np.zeros(0, np.int64)
UNKNOWN = -1  # entries of a request that has not drafted
NEWEST = 16  # entries a request that one pass may catch up with, on average; larger: passes of many requests are longer


class Drafter(Protocol):
    """``behind`` [B]: tokens that the draft of each slot has to catch up with before it can draft."""

    def behind(self, slots: np.ndarray) -> np.ndarray: ...

    def begin(self, slots: np.ndarray) -> TimedDraft:
        """This iteration's draft, over the requests in ``slots`` [B]."""

    def observe(self, rows: np.ndarray, outputs: dict[str, np.ndarray], output_rows: np.ndarray) -> None:
        """The target has committed tokens to pool ``rows`` [m]; its outputs for them are at ``output_rows`` [m]."""

    def forget(self, slot: int) -> None:
        """The slot's request has left, and its KV blocks with it."""


class EngineDrafter:
    """A draft with an engine: a standalone model, whose entry j is token j."""

    #: How many entries a request has once its draft is in step, less its committed tokens: the root is one of them.
    ahead = 1

    def __init__(self, engine: Engine, state: Slots, chunk: int):
        self.engine, self.state, self.chunk = engine, state, chunk
        self.cached = np.full(state.count, UNKNOWN)  # entries in the draft's KV cache

    def begin(self, slots: np.ndarray) -> TimedDraft:
        return EngineDraft(self, slots)

    def observe(self, rows: np.ndarray, outputs: dict[str, Any], output_rows: np.ndarray) -> None:
        pass  # a standalone model draws on tokens alone

    def forget(self, slot: int) -> None:
        self.cached[slot] = UNKNOWN

    def entries(self, slots: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Tokens and further inputs of committed entries ``index`` [m] of ``slots`` [m]."""
        return self.state.tokens[slots, index], {}

    def keep_states(self, places: np.ndarray, outputs: dict[str, Any], rows: np.ndarray) -> None:
        """Keep at ``places`` [m] what expanded nodes, at ``rows`` [m] of a pass, hand to their children."""

    def node_inputs(self, places: np.ndarray) -> dict[str, Any]:
        """Further inputs of drafted nodes, whose parents' states were kept at ``places`` [m]."""
        return {}

    def blank(self, entries: int) -> dict[str, np.ndarray]:
        """Further inputs of so many committed entries, without content: for measuring what a pass takes."""
        return {}

    def behind(self, slots: np.ndarray) -> np.ndarray:
        """Entries of each of ``slots`` that the next pass for it must compute: 1 or more."""
        self._find(slots[self.cached[slots] == UNKNOWN])
        # The newest entry runs again if nothing else is missing: its outputs are what the iteration starts from.
        entries: np.ndarray = np.maximum(self.state.committed[slots] + self.ahead - self.cached[slots], 1)
        return entries

    def _find(self, slots: np.ndarray) -> None:
        """What requests that share a text's blocks have drafted of it, its own draft need not catch up with."""
        state = self.state
        if len(slots):
            committed = np.arange(state.block_table.shape[1]) < (state.committed[slots] // BLOCK)[:, None]
            drafted = committed & state.block_drafted[state.block_table[slots]]
            self.cached[slots] = BLOCK * np.logical_and.accumulate(drafted, axis=1).sum(axis=1)

    def catch_up(self, slots: np.ndarray, run: RunNewest | None = None) -> tuple[dict[str, Any], np.ndarray]:
        """Bring the draft's cache in step. Returns the last pass's outputs and the newest entries' rows in it [B].

        ``run`` makes the last pass, by default ``_run_newest``.
        """
        state = self.state
        goal = state.committed[slots] + self.ahead
        start = goal - self.behind(slots)
        most = max(self.chunk, NEWEST * len(slots))
        while ((missing := goal - start) > self.chunk).any() or missing.sum() > most:
            counts = self._chunk_of(missing - 1)
            part = counts > 0
            self._run_entries(slots[part], start[part], counts[part], np.zeros(0, np.int64))
            start = start + counts
        newest, first = np.cumsum(goal - start) - 1, self.cached[slots] // BLOCK
        full = goal // BLOCK - first
        outputs = (run or self._run_newest)(slots, start, goal - start)
        if full.any():
            index = np.repeat(first, full) + ragged_arange(full)
            state.block_drafted[state.block_table[np.repeat(slots, full), index]] = True
        self.cached[slots] = goal
        return outputs, newest

    def _chunk_of(self, missing: np.ndarray) -> np.ndarray:
        """Divide one chunk among requests that miss ``missing`` int64 [B] entries, the largest first: entries [B]."""
        order = np.argsort(-missing, kind="stable")
        counts = np.zeros(len(missing), np.int64)
        counts[order] = np.clip(self.chunk - begins(missing[order])[:-1], 0, missing[order])
        return counts

    def _run_newest(self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Run the last entries, ``counts`` [B] from ``start`` [B] on; the outputs are of the newest ones."""
        return self._run_entries(slots, start, counts, np.cumsum(counts) - 1)

    def _run_entries(
        self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray, asked: np.ndarray
    ) -> dict[str, np.ndarray]:
        call, inputs = self._packed(slots, start, counts, asked)
        return self.engine.run(call, **inputs)

    def _packed(
        self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray, asked: np.ndarray
    ) -> tuple[Packed, dict[str, Any]]:
        owner = np.repeat(slots, counts)
        index = np.repeat(start, counts) + ragged_arange(counts)
        tokens, inputs = self.entries(owner, index)
        return pack(tokens, index, start, counts, self.state.block_table[slots], asked), inputs


class Eagle3Drafter(EngineDrafter):
    """An EAGLE-3 head: entry j is token j+1 beside the target's features of token j, which are kept by pool row."""

    ahead = 0

    def __init__(self, engine: Engine, state: Slots, chunk: int, feature_size: int, hidden_size: int):
        super().__init__(engine, state, chunk)
        self._features = bank_of(engine, "features", engine.num_blocks * BLOCK, feature_size)
        self._states = bank_of(engine, "hidden", state.count * state.reserve, hidden_size)

    def observe(self, rows: np.ndarray, outputs: dict[str, Any], output_rows: np.ndarray) -> None:
        self._features.write(rows, outputs["features"], output_rows)

    def blank(self, entries: int) -> dict[str, Any]:
        return {"features": self._features.read(np.zeros(entries, np.int64)), "hidden": self._states.read(NONE)}

    def entries(self, slots: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        features = self._features.read(self.state.rows(slots, index))
        return self.state.tokens[slots, index + 1], {"features": features, "hidden": self._states.read(NONE)}

    def keep_states(self, places: np.ndarray, outputs: dict[str, Any], rows: np.ndarray) -> None:
        self._states.write(places, outputs["state"], rows)

    def node_inputs(self, places: np.ndarray) -> dict[str, Any]:
        return {"features": self._features.read(NONE), "hidden": self._states.read(places)}


class EngineDraft(TimedDraft):
    """One iteration of an EngineDrafter.

    The operator shows all committed entries to all new ones, so a level's pass takes the expanded nodes above it along
    (their KV rows are written again, with the same values) and a mask tells the paths apart.
    """

    def __init__(self, drafter: EngineDrafter, slots: np.ndarray):
        super().__init__()
        self._drafter, self._slots = drafter, slots
        self._past = drafter.state.committed[slots] + drafter.ahead
        # What was expanded, roots and then nodes [m]; the drafter keeps what each hands to its children in this order.
        self._expanded, self._roots = NONE, 0

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        self.ran(int(self._drafter.behind(self._slots[requests]).sum()), int(self._past[requests].sum()))
        outputs, newest = self._drafter.catch_up(self._slots[requests])
        self._roots = len(requests)
        return self._proposed(requests, outputs, newest)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        drafter, running = self._drafter, np.zeros(tree.num_requests, bool)
        running[tree.request[nodes]] = True
        above = self._expanded[self._roots :]
        above = above[running[tree.request[above]]]
        part, order = tree.sorted_by_request(np.concatenate((above, nodes)))
        mask, mask_begins = ancestor_mask(part)
        requests = running.nonzero()[0]
        self.ran(len(part), int(self._past[requests].sum()))
        row_of = np.empty(len(tree), np.int64)
        row_of[order] = np.arange(len(order))
        call = pack(
            part.token,
            self._past[part.request] + part.depth - 1,
            self._past[requests],
            part.sizes[requests],
            drafter.state.block_table[self._slots[requests]],
            row_of[nodes],
            (mask, np.append(mask_begins[requests], mask_begins[-1])),
        )
        sorter = np.argsort(self._expanded)
        place = sorter[np.searchsorted(self._expanded, tree.parent[order], sorter=sorter)]
        outputs = drafter.engine.run(call, **drafter.node_inputs(place))
        return self._proposed(nodes, outputs, row_of[nodes])

    def _proposed(self, nodes: np.ndarray, outputs: dict[str, np.ndarray], rows: np.ndarray) -> Proposals:
        """Return what a pass proposes below ``nodes`` [m], whose states are at ``rows`` [m] of it."""
        begin = len(self._expanded)
        self._expanded = np.concatenate((self._expanded, nodes))
        self._drafter.keep_states(np.arange(begin, len(self._expanded)), outputs, rows)
        return outputs["scores"].copy(), outputs["candidates"].copy()
