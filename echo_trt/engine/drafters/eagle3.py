"""Drafters with an engine: an EAGLE-3 head or a smaller model.

A drafter counts the tokens of a request in its own KV cache. The pass that next drafts for the request computes the
missing ones, after a prompt, an accepted path or any number of iterations without a draft; so not drafting costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from echo_trt.backends.base import Engine, HostFeatureCache
from echo_trt.engine.batch import InputBatch
from echo_trt.speculation.arrays import begins, ragged_arange
from echo_trt.speculation.drafts import Proposals, TimedDraft
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.sources import DRAFT
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask

RunNewest = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]
NONE = np.zeros(0, np.int64)
UNKNOWN = -1  # entries of a request that has not drafted
NEWEST = 16  # entries per request of one prefill pass, on average; larger: longer passes of many requests


class Drafter(Protocol):
    """Proposes tokens. ``draft_lag`` [B]: tokens that the draft must compute for a slot before it can draft.

    source       that its nodes are reported as (``speculation.sources``)
    block        rows of a request's pass, where one pass drafts all levels; 0: each level takes a pass
    has_network  whether passes of its network take time, which ``run_empty`` measures
    """

    source: int = DRAFT
    block: int = 0
    has_network: bool = False

    def draft_lag(self, slots: np.ndarray) -> np.ndarray: ...

    def begin(self, slots: np.ndarray) -> TimedDraft:
        """Return this iteration's draft for the requests in ``slots`` [B]."""

    def observe(self, rows: np.ndarray, outputs: dict[str, np.ndarray], output_rows: np.ndarray) -> None:
        """Keep the target's outputs at ``output_rows`` [m] for tokens that were committed to pool ``rows`` [m]."""

    def forget(self, slot: int) -> None:
        """Forget a slot, whose request and KV blocks have left."""

    def run_empty(self, call: ForwardBatch) -> None:
        """Run a pass over ``call`` without content, to measure it."""
        return

    def kv_block(self, index: int, drafted: bool) -> Sequence[np.ndarray]:
        """Return views of what the draft keeps of a block's text: its KV rows if the block is ``drafted``
        (``KVBlocks``), else what it makes them of.
        """
        return ()


class EngineDrafter(Drafter):
    """A draft with an engine: a standalone model, whose entry j is token j."""

    #: Entries of a fully cached request less its committed tokens: 1 where the root has an entry.
    ahead = 1
    has_network = True

    def __init__(self, engine: Engine, batch: InputBatch, chunk: int):
        self.engine, self.batch, self.chunk = engine, batch, chunk
        self.cached = np.full(batch.count, UNKNOWN)  # entries in the draft's KV cache

    def begin(self, slots: np.ndarray) -> TimedDraft:
        return EngineDraft(self, slots)

    def observe(self, rows: np.ndarray, outputs: dict[str, Any], output_rows: np.ndarray) -> None:
        pass  # a standalone model draws on tokens alone

    def forget(self, slot: int) -> None:
        self.cached[slot] = UNKNOWN

    def entries(self, slots: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Tokens and further inputs of committed entries ``index`` [m] of ``slots`` [m]."""
        return self.batch.tokens[slots, index], {}

    def keep_states(self, handles: np.ndarray, outputs: dict[str, Any], rows: np.ndarray) -> None:
        """Keep at ``handles`` [m] the states of expanded nodes, ``rows`` [m] of a pass, for their children."""

    def node_inputs(self, handles: np.ndarray) -> dict[str, Any]:
        """Further inputs of drafted nodes, whose parents' states were kept at ``handles`` [m]."""
        return {}

    def dummy_inputs(self, entries: int) -> dict[str, np.ndarray]:
        """Return inputs for ``entries`` committed entries without content, to measure a pass."""
        return {}

    def run_empty(self, call: ForwardBatch) -> None:
        self.engine.run(call, **self.dummy_inputs(len(call.token_ids)))

    def kv_block(self, index: int, drafted: bool) -> Sequence[np.ndarray]:
        return self.engine.kv_block(index) if drafted else ()

    def draft_lag(self, slots: np.ndarray) -> np.ndarray:
        """Entries of each of ``slots`` that the next pass for it must compute: 1 or more."""
        self._find(slots[self.cached[slots] == UNKNOWN])
        # If nothing is missing, the newest entry runs again: the iteration starts from its outputs.
        entries: np.ndarray = np.maximum(self.batch.committed[slots] + self.ahead - self.cached[slots], 1)
        return entries

    def _find(self, slots: np.ndarray) -> None:
        """Skip the draft prefill of blocks that another request with the same text has drafted."""
        batch = self.batch
        if len(slots):
            committed = np.arange(batch.blocks.table.shape[1]) < (batch.committed[slots] // BLOCK)[:, None]
            drafted = committed & batch.blocks.drafted[batch.blocks.table[slots]]
            self.cached[slots] = BLOCK * np.logical_and.accumulate(drafted, axis=1).sum(axis=1)

    def prefill_draft(self, slots: np.ndarray, run: RunNewest | None = None) -> tuple[dict[str, Any], np.ndarray]:
        """Bring the draft's cache in step. Returns the last pass's outputs and the newest entries' rows in it [B].

        ``run`` makes the last pass, by default ``_run_newest``.
        """
        batch = self.batch
        goal = batch.committed[slots] + self.ahead
        start = goal - self.draft_lag(slots)
        maximum = max(self.chunk, NEWEST * len(slots))
        while ((missing := goal - start) > self.chunk).any() or missing.sum() > maximum:
            counts = self._chunk_of(missing - 1)
            part = counts > 0
            self._run_entries(slots[part], start[part], counts[part], np.zeros(0, np.int64))
            start = start + counts
        newest, first = np.cumsum(goal - start) - 1, self.cached[slots] // BLOCK
        full = goal // BLOCK - first
        outputs = (run or self._run_newest)(slots, start, goal - start)
        if full.any():
            index = np.repeat(first, full) + ragged_arange(full)
            batch.blocks.drafted[batch.blocks.table[np.repeat(slots, full), index]] = True
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
        self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray, requested: np.ndarray
    ) -> dict[str, np.ndarray]:
        call, inputs = self._packed(slots, start, counts, requested)
        return self.engine.run(call, **inputs)

    def _packed(
        self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray, requested: np.ndarray
    ) -> tuple[ForwardBatch, dict[str, Any]]:
        owner = np.repeat(slots, counts)
        index = np.repeat(start, counts) + ragged_arange(counts)
        tokens, inputs = self.entries(owner, index)
        return pack(tokens, index, start, counts, self.batch.blocks.table[slots], requested), inputs


class Eagle3Drafter(EngineDrafter):
    """An EAGLE-3 head: entry j is token j+1 beside the target's features of token j, which are kept by pool row."""

    ahead = 0

    def __init__(self, engine: Engine, batch: InputBatch, chunk: int, feature_size: int, hidden_size: int):
        super().__init__(engine, batch, chunk)
        self._features = engine.feature_cache("features") or HostFeatureCache(engine.num_blocks * BLOCK, feature_size)
        self._states = engine.feature_cache("hidden") or HostFeatureCache(batch.count * batch.reserve, hidden_size)

    def observe(self, rows: np.ndarray, outputs: dict[str, Any], output_rows: np.ndarray) -> None:
        self._features.write(rows, outputs["features"], output_rows)

    def kv_block(self, index: int, drafted: bool) -> Sequence[np.ndarray]:
        if drafted or not isinstance(self._features, HostFeatureCache):
            return super().kv_block(index, drafted)
        return (self._features.rows[index * BLOCK : (index + 1) * BLOCK],)

    def dummy_inputs(self, entries: int) -> dict[str, Any]:
        return {"features": self._features.read(np.zeros(entries, np.int64)), "hidden": self._states.read(NONE)}

    def entries(self, slots: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        features = self._features.read(self.batch.blocks.rows(slots, index))
        return self.batch.tokens[slots, index + 1], {"features": features, "hidden": self._states.read(NONE)}

    def keep_states(self, handles: np.ndarray, outputs: dict[str, Any], rows: np.ndarray) -> None:
        self._states.write(handles, outputs["state"], rows)

    def node_inputs(self, handles: np.ndarray) -> dict[str, Any]:
        return {"features": self._features.read(NONE), "hidden": self._states.read(handles)}


class EngineDraft(TimedDraft):
    """One iteration of an EngineDrafter.

    The attention operator shows all committed entries to all new ones. So a level's pass repeats the expanded nodes
    above the level, which writes the same KV rows again, and a mask separates the paths.
    """

    def __init__(self, drafter: EngineDrafter, slots: np.ndarray):
        super().__init__()
        self._drafter, self._slots = drafter, slots
        self._past = drafter.batch.committed[slots] + drafter.ahead
        # Expanded roots, then expanded nodes [m]; the drafter keeps their states for their children in this order.
        self._expanded, self._roots = NONE, 0

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        self.ran(int(self._drafter.draft_lag(self._slots[requests]).sum()), int(self._past[requests].sum()))
        outputs, newest = self._drafter.prefill_draft(self._slots[requests])
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
            drafter.batch.blocks.table[self._slots[requests]],
            row_of[nodes],
            (mask, np.append(mask_begins[requests], mask_begins[-1])),
        )
        sorter = np.argsort(self._expanded)
        position = sorter[np.searchsorted(self._expanded, tree.parent[order], sorter=sorter)]
        outputs = drafter.engine.run(call, **drafter.node_inputs(position))
        return self._proposed(nodes, outputs, row_of[nodes])

    def _proposed(self, nodes: np.ndarray, outputs: dict[str, np.ndarray], rows: np.ndarray) -> Proposals:
        """Return what a pass proposes below ``nodes`` [m], whose states are at ``rows`` [m] of it."""
        begin = len(self._expanded)
        self._expanded = np.concatenate((self._expanded, nodes))
        self._drafter.keep_states(np.arange(begin, len(self._expanded)), outputs, rows)
        return outputs["scores"].copy(), outputs["candidates"].copy()
