"""The loop: one iteration of ECHO over all running requests, and the queue that feeds it.

``step`` is the paper's iteration: plan (draft, gate, allocate: a planner's), pack, verify, accept, commit, observe.
Prompts are computed in chunks inside the same calls.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.decoding.accept import accept
from echo_trt.decoding.arrays import begins, ragged_arange
from echo_trt.decoding.pack import pack
from echo_trt.decoding.planner import RECENT, Iteration, Load, Pass, Plan, Planner
from echo_trt.decoding.super_tree import ancestor_mask
from echo_trt.errors import UserError
from echo_trt.runtime.drafters import Drafter, TimedDraft
from echo_trt.runtime.params import MAX_STOP_TOKENS, Counters, SamplingParams, TokenLogprobs
from echo_trt.runtime.slots import Slots, blocks_for
from echo_trt.runtime.verified import Verified, with_roots


@dataclass(eq=False)
class Request:
    """A request from its arrival to its end.

    ``generated`` is its text so far whenever it is not running (slot -1); a finish_reason says that it has ended.
    ``logprobs`` has an entry for each token that was emitted, where the request asks for them. ``cached_tokens`` of the
    prompt were in the prefix cache when it first came to a place.
    """

    id: int
    prompt: np.ndarray
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    verifications: int = 0
    drafted: int = 0
    cached_tokens: int | None = None
    finish_reason: str = ""
    slot: int = -1
    keys: list[bytes] = field(default_factory=list)  # of its text's blocks in the prefix cache


@dataclass(frozen=True)
class Emission:
    """What one iteration emitted: requests (an object array [B]), their new tokens end to end, and how many each."""

    requests: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray

    def __iter__(self) -> Iterator[tuple[Request, list[int]]]:
        tokens, begin = self.tokens.tolist(), begins(self.counts).tolist()
        for i, request in enumerate(self.requests):
            yield request, tokens[begin[i] : begin[i + 1]]


NOTHING = Emission(np.empty(0, object), np.zeros(0, np.int64), np.zeros(0, np.int64))


class Loop:
    """Continuous batching: requests join and leave at any iteration."""

    def __init__(
        self,
        target: Engine,
        drafter: Drafter | None,
        state: Slots,
        planner: Planner,
        eos: Iterable[int],
        chunk: int = 256,
    ):
        """``eos``: token ids that end a text. ``chunk``: prompt tokens computed in one iteration at most."""
        self.target, self.drafter, self.state, self.planner = target, drafter, state, planner
        self.eos, self.chunk = tuple(eos), chunk
        self.counters = Counters()
        self.waiting: deque[Request] = deque()
        self._request_in = np.full(state.count, None, object)
        self.admissions = 0

    def plan_with(self, planner: Planner) -> None:
        """Leave plans to another planner from the next iteration on; texts stay the same."""
        self.planner = planner

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request that passes ``check``."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Refuse a prompt that leaves no room for an answer, and too many stop tokens. Any thread may ask."""
        room = self.state.context - len(request.prompt)
        if len(request.prompt) == 0:
            raise UserError("the prompt is empty; give at least one token.")
        if room < 1:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, but this model's maximum context length is "
                f"{self.state.context} tokens; shorten it, or raise limits.context in the recipe and build again."
            )
        state = self.state
        needed = blocks_for(min(len(request.prompt) + request.params.max_tokens, state.context) + state.reserve)
        if needed > state.num_blocks:  # a part of a pool: it would wait for ever
            raise UserError(
                f"the request may need {needed} KV blocks, but there are {state.num_blocks}; lower its "
                "max_tokens, or raise limits.kv_blocks in the recipe and build again."
            )
        own = len(request.params.stop_token_ids)
        most = MAX_STOP_TOKENS - len(self._stop_tokens(request.params)) + own
        if own > most:
            raise UserError(f"stop_token_ids has {own} ids; give at most {most}.")

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is; its KV blocks are free at once."""
        if request.slot >= 0:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def preempt_all(self) -> list[Request]:
        """Take all requests out, oldest first. Each keeps its text so far; added again, it goes on from there."""
        running = [self._request_in[slot] for slot in self.state.oldest_first(self.state.active)]
        for request in running:
            self._leave(request)
        requests = [*running, *self.waiting]
        self.waiting.clear()
        return requests

    @property
    def running(self) -> int:
        return int(self.state.active.sum())

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or bool(self.state.active.any())

    def _stop_tokens(self, params: SamplingParams) -> list[int]:
        return [*(() if params.ignore_eos else self.eos), *params.stop_token_ids]

    def _admit(self) -> None:
        """Oldest first, while there is a slot, and room for the whole text so far."""
        state = self.state
        while self.waiting and not state.active.all():
            request = self.waiting[0]
            text = np.concatenate((request.prompt, np.asarray(request.generated, np.int64)))
            slot = int(np.flatnonzero(~state.active)[0])
            if not state.open(slot, text, request.keys):
                return
            self.waiting.popleft()
            params, stops = request.params, self._stop_tokens(request.params)
            state.prompt_length[slot] = len(request.prompt)
            self.counters.asked_tokens += len(text)
            self.counters.cached_tokens += int(state.committed[slot])
            state.limit[slot] = min(len(request.prompt) + params.max_tokens, state.context)
            state.ask(slot, params)
            state.stop_tokens[slot] = -1
            state.stop_tokens[slot, : len(stops)] = stops
            state.verifications[slot], state.drafted[slot] = request.verifications, request.drafted
            state.admitted[slot], self.admissions = self.admissions, self.admissions + 1
            state.active[slot] = True
            self._request_in[slot], request.slot = request, slot

    def _leave(self, request: Request) -> None:
        """Out of its slot; the request itself keeps its text."""
        state, slot = self.state, request.slot
        request.verifications, request.drafted = int(state.verifications[slot]), int(state.drafted[slot])
        if request.cached_tokens is None:  # what it finds once it was set back is its own
            request.cached_tokens = int(state.found[slot])
        request.generated = state.tokens[slot, state.prompt_length[slot] : state.length[slot]].tolist()
        state.release(slot)
        if self.drafter:
            self.drafter.forget(slot)
        self._request_in[slot], request.slot = None, -1

    def _preempt_youngest(self) -> None:
        """Set the youngest request back: its text is kept and computed again later, nothing is emitted twice."""
        state = self.state
        request = self._request_in[np.where(state.active, state.admitted, -1).argmax()]
        self._leave(request)
        self.waiting.appendleft(request)
        self.counters.preemptions += 1

    # -- one iteration -------------------------------------------------------------------------------------------

    def step(self) -> Emission:
        """One iteration. Of the requests that emitted, the finished have a finish_reason."""
        self._admit()
        slots = self._hold_for_decoding()
        chunk_slots, chunks = self._plan_chunks()
        if len(slots) + len(chunk_slots) == 0:
            return NOTHING
        begin = time.perf_counter()
        load = self._load(slots, int(chunks.sum()))
        draft = TimedDraft(self.drafter, slots) if self.drafter else None
        plan, planning = self._plan(slots, draft, load)
        verified, target = self._verify(plan, slots, chunk_slots, chunks)
        with self._timed("accept"):
            path, emitted = accept(verified.tree, verified.next_token)
        with self._timed("commit"):
            emission = self._commit(verified, path, emitted, chunk_slots, chunks)
        seconds, path = time.perf_counter() - begin, path[path < len(plan.tree)]
        passes, levels, drafting = (tuple(draft.passes), draft.levels, draft.seconds) if draft else ((), 0, 0.0)
        host = seconds - planning - drafting - target.seconds
        self.planner.observe(Iteration(plan, load, path, target, passes, levels, planning, seconds, host))
        return emission

    def _hold_for_decoding(self) -> np.ndarray:
        """Decoding slots, each with KV blocks for what it may draft and verify; the youngest give way if they must."""
        while True:
            slots = self.state.decoding()
            if self.state.hold(slots, self.state.committed[slots] + self.state.reserve):
                self.counters.evicted_blocks = self.state.cache.evicted
                return slots
            self._preempt_youngest()

    def _plan_chunks(self) -> tuple[np.ndarray, np.ndarray]:
        """Prefilling slots that get a part of this iteration's prompt budget, oldest first, and their tokens."""
        slots = self.state.prefilling()
        if len(slots) == 0:
            return slots, slots
        self.counters.cached_tokens += self.state.skip(slots, self.chunk)
        missing = self.state.length[slots] - self.state.committed[slots]
        before = begins(missing)[:-1]
        chunks = np.clip(self.chunk - before, 0, missing)
        if self.chunk > 2:
            # No token alone, least of all the last: attention rounds a single token's otherwise than several tokens',
            # and a text must not depend on what was computed beside its prompt.
            chunks -= missing - chunks == 1
            chunks[chunks == 1] = 0
        return slots[chunks > 0], chunks[chunks > 0]

    def _load(self, slots: np.ndarray, chunks: int) -> Load:
        state = self.state
        room = state.limit[slots] - state.length[slots] - 1  # the verification emits one token beside the drafted
        room[state.committed[slots] == 0] = 0  # a head has nothing to look at yet
        behind = self.drafter.behind(slots) if self.drafter else np.zeros(len(slots), np.int64)
        recent = state.recent(slots, RECENT)
        return Load(slots, room, behind, int(state.committed[slots].sum()), chunks, recent, state.admitted[slots])

    def _plan(self, slots: np.ndarray, draft: TimedDraft | None, load: Load) -> tuple[Plan, float]:
        """Ask the planner. Returns its plan for decoding ``slots`` [B], and the seconds beside the draft's passes."""
        state, counters = self.state, self.counters
        roots = state.tokens[slots, state.length[slots] - 1]
        if draft is None or len(slots) == 0:
            plan, seconds = Plan.undrafted(roots), 0.0
        else:
            begin = time.perf_counter()
            plan = self.planner.plan(roots, draft, load)
            seconds = time.perf_counter() - begin - draft.seconds
            self._add_seconds("plan", seconds)
            self._add_seconds("draft", draft.seconds)
            counters.draft_passes += len(draft.passes)
        state.drafted[slots] += plan.tree.sizes - 1
        counters.drafted_tokens += len(plan.tree) - len(slots)
        counters.iterations += 1
        counters.speculative_iterations += len(plan.tree) > len(slots)
        for depth, requests in enumerate(plan.candidates.reached.tolist()):
            counters.reached[depth] += requests
        return plan, seconds

    def _verify(
        self, plan: Plan, slots: np.ndarray, chunk_slots: np.ndarray, chunks: np.ndarray
    ) -> tuple[Verified, Pass]:
        """One pass of the target over all trees and prompt chunks."""
        state, tree = self.state, plan.tree
        with self._timed("pack"):
            past, rows = state.committed[slots], np.arange(len(tree))
            mask = ancestor_mask(tree) if len(tree) > len(slots) else None
            depths, table = past[tree.request] + tree.depth, state.block_table[slots]
            columns: tuple[np.ndarray, ...] = (tree.token, depths, past, tree.sizes, table, rows)
            finishing = chunk_slots
            if len(chunk_slots):
                ends = state.committed[chunk_slots] + chunks == state.length[chunk_slots]  # these emit their next token
                finishing = chunk_slots[ends]
                behind = self._chunks(chunk_slots, chunks, len(tree), ends)
                columns = tuple(map(np.concatenate, zip(columns, behind, strict=True)))
            tokens, positions, past, counts, table, rows = columns
            padded_to = 0 if len(chunk_slots) else plan.padded_to
            call = pack(tokens, positions, past, counts, table, rows, mask, padded_to)
            # Summed up before the pass: right behind one, whose weights fill the cache, every first line takes longer.
            nodes = call.seq_begins[1:] - call.seq_begins[:-1] - 1
            context, again = int(call.past_lens.sum()), int((nodes * call.past_lens).sum())
        begin = time.perf_counter()
        outputs = self.target.run(call)
        seconds = time.perf_counter() - begin
        self._add_seconds("verify", seconds)
        last = state.tokens[finishing, state.length[finishing] - 1]
        every = np.concatenate((slots, finishing))
        verified = Verified(with_roots(tree, last), every, len(slots), outputs, call, state)
        return verified, Pass(max(len(call.token_ids), call.padded_to), context, seconds, again)

    def _chunks(self, slots: np.ndarray, chunks: np.ndarray, before: int, ends: np.ndarray) -> tuple[np.ndarray, ...]:
        """What ``pack`` is told of ``slots`` that compute ``chunks`` of their prompts behind so many tokens ``before``;
        of those whose prompt ``ends`` the last row is asked for."""
        state, owner = self.state, np.repeat(slots, chunks)
        position, last = state.committed[owner] + ragged_arange(chunks), before + np.cumsum(chunks)[ends] - 1
        return state.tokens[owner, position], position, state.committed[slots], chunks, state.block_table[slots], last

    def _commit(
        self, verified: Verified, path: np.ndarray, emitted: np.ndarray, chunk_slots: np.ndarray, chunks: np.ndarray
    ) -> Emission:
        """Keep the KV rows of visited nodes and of chunks, forget the rest by length, and append the emitted tokens."""
        state, slots, tree = self.state, verified.slots, verified.tree
        counts = np.bincount(tree.request[path], minlength=len(slots))
        place = ragged_arange(counts)
        owner = slots[tree.request[path]]
        trees = verified.trees
        in_tree = tree.request[path] < trees
        source = state.committed[owner] + path - begins(tree.sizes)[tree.request[path]]
        target = state.committed[owner] + place
        moved = in_tree & (source != target)
        if moved.any():
            self.target.move(state.rows(owner[moved], source[moved]), state.rows(owner[moved], target[moved]))
        if self.drafter:
            self._observe(self.drafter, verified, owner[in_tree], target[in_tree], path[in_tree], chunk_slots, chunks)
        state.committed[slots[:trees]] += counts[:trees]
        state.committed[chunk_slots] += chunks
        for slot in slots[trees:]:  # prompts that are complete
            state.publish(slot)
        self.counters.prompt_tokens += int(chunks.sum())
        return self._emit(verified, path, counts, emitted)

    def _observe(
        self,
        drafter: Drafter,
        verified: Verified,
        owner: np.ndarray,
        positions: np.ndarray,
        path: np.ndarray,
        chunk_slots: np.ndarray,
        chunks: np.ndarray,
    ) -> None:
        if len(chunk_slots):
            chunk_owner, total = np.repeat(chunk_slots, chunks), len(verified.call.token_ids)
            owner = np.concatenate((owner, chunk_owner))
            positions = np.concatenate((positions, self.state.committed[chunk_owner] + ragged_arange(chunks)))
            path = np.concatenate((path, np.arange(total - len(chunk_owner), total)))
        drafter.observe(self.state.rows(owner, positions), verified.outputs, path)

    def _emit(self, verified: Verified, path: np.ndarray, counts: np.ndarray, emitted: np.ndarray) -> Emission:
        state, slots = self.state, verified.slots
        if len(slots) == 0:
            return NOTHING
        logprobs = verified.logprobs(path, emitted)
        kept, stopped, full = state.append(slots, counts, emitted)
        state.verifications[slots] += 1
        self.counters.verifications += len(slots)
        self.counters.verified_tokens += len(verified.tree)
        total = int(kept.sum())
        self.counters.emitted_tokens += total
        if total < len(emitted):
            emitted = emitted[ragged_arange(counts) < np.repeat(kept, counts)]
        emission = Emission(self._request_in[slots], emitted, kept)
        for i, entries in logprobs:
            emission.requests[i].logprobs += entries[: kept[i]]
        for i in (stopped | full).nonzero()[0]:
            request = emission.requests[i]
            request.finish_reason = "stop" if stopped[i] else "length"
            self._leave(request)
        return emission

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add_seconds(phase, time.perf_counter() - start)

    def _add_seconds(self, phase: str, seconds: float) -> None:
        known = self.counters.seconds
        known[phase] = known.get(phase, 0.0) + seconds
