"""The loop: iterations of any planner over all running requests.

``step`` is one iteration: plan (the planner's draft and choice), pack, verify, accept, commit, observe. Prompts are
computed in chunks inside the same calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.decoding.accept import accept
from echo_trt.decoding.arrays import begins, ragged_arange
from echo_trt.decoding.drafts import Pass, TimedDraft
from echo_trt.decoding.pack import Packed, pack
from echo_trt.decoding.planner import RECENT, Iteration, Load, Plan, Planner
from echo_trt.decoding.sources import HEAD, LOOKUP
from echo_trt.decoding.super_tree import SuperTree, ancestor_mask
from echo_trt.runtime.drafters import Drafter
from echo_trt.runtime.guided import GuidedDraft
from echo_trt.runtime.lookup import LookupDrafter
from echo_trt.runtime.params import Counters
from echo_trt.runtime.queue import Queue
from echo_trt.runtime.request import NOTHING, Emission
from echo_trt.runtime.slots import Slots
from echo_trt.runtime.verified import Verified, token_logprobs
from echo_trt.runtime.watch import Seen


@dataclass(frozen=True)
class Chunks:
    """Parts of prompts that one iteration computes, C of them, oldest request first.

    slots, counts  int64 [C]: a part's slot and tokens
    owner          int64 [sum counts]: a token's slot
    position       int64 [sum counts]: its place in the text
    """

    slots: np.ndarray
    counts: np.ndarray
    owner: np.ndarray
    position: np.ndarray


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
        """Begin without requests. ``planner`` may be replaced between iterations; texts stay the same.

        eos: token ids that end a text. chunk: prompt tokens computed in one iteration at most.
        """
        self.target, self.state, self.planner, self.chunk = target, state, planner, chunk
        self.counters = Counters()
        self.queue = Queue(state, tuple(eos), self.counters)
        self.drafter = drafter
        self.watch: Callable[[Seen], None] | None = None  # gets every iteration, on the thread that steps; None: none

    @property
    def drafter(self) -> Drafter | None:
        """The draft. Setting it lets the queue call its ``forget`` when a request leaves a slot."""
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Drafter | None) -> None:
        self._drafter = drafter
        if drafter:
            self.queue.forget = drafter.forget

    @property
    def proposer(self) -> int:
        """The source of nodes that name the draft alone: HEAD, or LOOKUP where the draft copies text."""
        return LOOKUP if isinstance(self.drafter, LookupDrafter) else HEAD

    def step(self) -> Emission:
        """One iteration. Of the requests that emitted, the finished have a finish_reason."""
        self.queue.admit()
        slots = self._hold_for_decoding()
        chunks = self._plan_chunks()
        if len(slots) + len(chunks.slots) == 0:
            return NOTHING
        begin = time.perf_counter()
        watch = self.watch  # another thread may set it at any time
        ids = [request.id for request in self.queue.running_in(slots)] if watch else []
        # Where all requests have opted out of speculation, the planner is skipped, and learns nothing.
        speculates = len(slots) == 0 or bool(self.state.sampling["speculate"][slots].any())
        draft = self.drafter.begin(slots) if self.drafter and speculates else None
        load = self._load(slots, len(chunks.owner))
        plan, planning = self._plan(slots, draft, load)
        verified, target = self._verify(plan, slots, chunks)
        with self._timed("accept"):
            path, emitted = accept(verified.tree, verified.next_token)
        with self._timed("commit"):
            emission = self._commit(verified, path, emitted, chunks)
        drafting = draft.seconds if draft else 0.0
        seconds = time.perf_counter() - begin
        iteration = Iteration(
            plan=plan,
            load=load,
            path=path[path < len(plan.tree)],
            target=target,
            drafts=tuple(draft.passes) if draft else (),
            levels=draft.levels if draft else 0,
            planning=planning,
            seconds=seconds,
            host=seconds - planning - drafting - target.seconds,
        )
        if speculates:
            self.planner.observe(iteration)
        if watch:
            watch(Seen(iteration, ids, drafting, int(emission.counts.sum()), time.time()))
        return emission

    def _hold_for_decoding(self) -> np.ndarray:
        """Return decoding slots, which hold KV blocks for their drafts and verifications; the least urgent give way."""
        while True:
            slots = self.state.decoding()
            if self.state.hold(slots, self.state.committed[slots] + self.state.reserve):
                self.counters.evicted_blocks = self.state.cache.evicted
                return slots
            self.queue.preempt_least_urgent()

    def _plan_chunks(self) -> Chunks:
        """Divide this iteration's prompt budget among prefilling slots, oldest first."""
        state, slots = self.state, self.state.prefilling()
        if len(slots) == 0:
            return Chunks(slots, slots, slots, slots)
        self.counters.cached_tokens += state.skip(slots, self.chunk)
        missing = state.length[slots] - state.committed[slots]
        counts = np.clip(self.chunk - begins(missing)[:-1], 0, missing)
        if self.chunk > 2:
            # No token alone, least of all the last: attention rounds a single token's otherwise than several tokens',
            # and a text must not depend on what was computed beside its prompt.
            counts = np.where(missing - counts == 1, counts - 1, counts)
            counts[counts == 1] = 0
        slots, counts = slots[counts > 0], counts[counts > 0]
        owner = np.repeat(slots, counts)
        return Chunks(slots, counts, owner, state.committed[owner] + ragged_arange(counts))

    def _load(self, slots: np.ndarray, prompt_tokens: int) -> Load:
        state = self.state
        room = state.limit[slots] - state.length[slots] - 1  # the verification emits one token beside the drafted
        room[~state.sampling["speculate"][slots]] = 0
        room[state.committed[slots] == 0] = 0  # a head has nothing to look at yet
        behind = self.drafter.behind(slots) if self.drafter else np.zeros(len(slots), np.int64)
        context, recent = int(state.committed[slots].sum()), state.recent(slots, RECENT)
        return Load(slots, room, behind, context, recent, state.admitted[slots], prompt_tokens)

    def _plan(self, slots: np.ndarray, draft: TimedDraft | None, load: Load) -> tuple[Plan, float]:
        """Ask the planner. Returns its plan for decoding ``slots`` int64 [B], and seconds beside the draft's passes."""
        state, counters = self.state, self.counters
        roots = state.tokens[slots, state.length[slots] - 1]
        if draft is None or len(slots) == 0:
            plan, seconds = Plan.undrafted(roots), 0.0
        else:
            grammars, begin = state.grammar[slots], time.perf_counter()
            plan = self.planner.plan(roots, GuidedDraft(draft, grammars) if grammars.any() else draft, load)
            seconds = time.perf_counter() - begin - draft.seconds
            self.counters.add_seconds("plan", seconds)
            self.counters.add_seconds("draft", draft.seconds)
            counters.draft_passes += len(draft.passes)
        state.drafted[slots] += plan.tree.sizes - 1
        counters.drafted_tokens += len(plan.tree) - len(slots)
        counters.iterations += 1
        if len(plan.tree) > len(slots):
            counters.speculative_iterations += 1
        for depth, requests in enumerate(plan.explanation.candidates.reached.tolist()):
            counters.reached[depth] += requests
        return plan, seconds

    def _verify(self, plan: Plan, slots: np.ndarray, chunks: Chunks) -> tuple[Verified, Pass]:
        """Run the target once over all trees and prompt chunks."""
        state = self.state
        with self._timed("pack"):
            ends = state.committed[chunks.slots] + chunks.counts == state.length[chunks.slots]
            call = self._build_call(plan, slots, chunks, ends)
            # Summed up before the pass: after it the network's weights have evicted these arrays from the CPU's cache.
            nodes = call.seq_begins[1:] - call.seq_begins[:-1] - 1
            context, node_context = int(call.past_lens.sum()), int((nodes * call.past_lens).sum())
        begin = time.perf_counter()
        outputs = self.target.run(call)
        finishing = chunks.slots[ends]  # prompts that emit their next token
        verified = Verified(
            tree=plan.tree.with_roots(state.tokens[finishing, state.length[finishing] - 1]),
            slots=np.concatenate((slots, finishing)),
            decoding=len(slots),
            outputs=outputs,
            call=call,
            state=state,
            probability=plan.probability,
            proposer=self.proposer,
        )
        verified.wait()
        seconds = time.perf_counter() - begin
        self.counters.add_seconds("verify", seconds)
        return verified, Pass(max(len(call.token_ids), call.padded_to), context, seconds, node_context)

    def _build_call(self, plan: Plan, slots: np.ndarray, chunks: Chunks, ends: np.ndarray) -> Packed:
        """Pack the trees of ``slots`` int64 [B], then ``chunks``; ``ends`` bool [C]: whether a chunk ends its prompt.

        Logit rows are those of all nodes, of the last tokens of prompts, and of tokens whose log-probabilities are
        asked for.
        """
        state, tree = self.state, plan.tree
        call_slots = np.concatenate((slots, chunks.slots))
        past = state.committed[call_slots]
        last = len(tree) + np.cumsum(chunks.counts)[ends] - 1
        asked = len(tree) + np.flatnonzero(self._prompt_logprobs_asked(chunks))
        return pack(
            token_ids=np.concatenate((tree.token, state.tokens[chunks.owner, chunks.position])),
            positions=np.concatenate((past[tree.request] + tree.depth, chunks.position)),
            past=past,
            counts=np.concatenate((tree.sizes, chunks.counts)),
            block_table=state.block_table[call_slots],
            logit_rows=np.concatenate((np.arange(len(tree)), last, asked)),
            mask=ancestor_mask(tree) if len(tree) > len(slots) else None,
            padded_to=0 if len(chunks.slots) else plan.padded_to,
        )

    def _prompt_logprobs_asked(self, chunks: Chunks) -> np.ndarray:
        """Whether log-probabilities are asked for of the prompt's token behind each token of ``chunks``: bool [n]."""
        state, owner = self.state, chunks.owner
        asked: np.ndarray = (state.sampling["prompt_logprobs"][owner] >= 0) & (
            chunks.position + 1 < state.prompt_length[owner]
        )
        return asked

    def _note_prompts(self, verified: Verified, chunks: Chunks) -> None:
        asked = self._prompt_logprobs_asked(chunks)
        if asked.any():
            state, owner, place = self.state, chunks.owner[asked], chunks.position[asked] + 1
            rows, tokens = len(verified.tree) + np.arange(len(owner)), state.tokens[owner, place].astype(np.int64)
            entries = token_logprobs(verified.outputs["logits"], rows, tokens, state.sampling["prompt_logprobs"][owner])
            for request, entry in zip(self.queue.running_in(owner), entries, strict=True):
                request.prompt_logprobs.append(entry)

    def _commit(self, verified: Verified, path: np.ndarray, emitted: np.ndarray, chunks: Chunks) -> Emission:
        """Keep the KV rows of visited nodes and of chunks, forget the rest by length, and append the emitted tokens.

        path, emitted  int64 [m], visited nodes of ``verified.tree``, and their tokens
        """
        state, slots, tree, decoding = self.state, verified.slots, verified.tree, verified.decoding
        counts = np.bincount(tree.request[path], minlength=len(slots))
        nodes = path[tree.request[path] < decoding]
        owner = slots[tree.request[nodes]]
        position = state.committed[owner] + ragged_arange(counts[:decoding])
        self._move_accepted(tree, nodes, owner, position)
        if self.drafter:
            # Packed rows are the nodes of the decoding requests, then the chunks' tokens (``_build_call``).
            chunk_rows = len(verified.call.token_ids) - len(chunks.owner) + np.arange(len(chunks.owner))
            rows = state.rows(np.concatenate((owner, chunks.owner)), np.concatenate((position, chunks.position)))
            self.drafter.observe(rows, verified.outputs, np.concatenate((nodes, chunk_rows)))
        state.committed[slots[:decoding]] += counts[:decoding]
        state.committed[chunks.slots] += chunks.counts
        self._note_prompts(verified, chunks)
        for slot in slots[decoding:]:  # prompts that are complete
            state.publish(slot)
        self.counters.prompt_tokens += len(chunks.owner)
        return self._emit(verified, path, counts, emitted)

    def _move_accepted(self, tree: SuperTree, nodes: np.ndarray, owner: np.ndarray, position: np.ndarray) -> None:
        """Move the KV rows of accepted ``nodes`` int64 [m] to their places in the text.

        The pass has written a node's row behind its request's cached tokens, at its place within the request's tree.

        owner, position  int64 [m], a node's slot, and its token's place in the text
        """
        written = self.state.committed[owner] + nodes - begins(tree.sizes)[tree.request[nodes]]
        moved = written != position
        if moved.any():
            from_rows = self.state.rows(owner[moved], written[moved])
            self.target.move(from_rows, self.state.rows(owner[moved], position[moved]))

    def _emit(self, verified: Verified, path: np.ndarray, counts: np.ndarray, emitted: np.ndarray) -> Emission:
        """Append the emitted tokens to their texts, up to stop tokens and limits, and let finished requests go.

        path, emitted  int64 [m], as of ``_commit``
        counts         int64 [B], emitted tokens of a request
        """
        state, slots = self.state, verified.slots
        if len(slots) == 0:
            return NOTHING
        logprobs, sources = verified.logprobs(path, emitted), verified.sources(path, emitted)
        kept, stopped, full = state.append(slots, counts, emitted)
        state.verifications[slots] += 1
        self.counters.verifications += len(slots)
        self.counters.verified_tokens += len(verified.tree)
        total = int(kept.sum())
        self.counters.emitted_tokens += total
        if total < len(emitted):
            emitted = emitted[ragged_arange(counts) < np.repeat(kept, counts)]
        emission = Emission(self.queue.running_in(slots), emitted, kept)
        for i, entries in logprobs:
            emission.requests[i].logprobs += entries[: kept[i]]
        for i, proposed in sources:
            emission.requests[i].sources += proposed[: kept[i]]
        verified.follow(emission.counts, emission.tokens)
        stopped[[*verified.failures]] = True
        for i in (stopped | full).nonzero()[0]:
            request = emission.requests[i]
            request.failure = verified.failures.get(i, "")
            request.finish_reason = "failed" if request.failure else "stop" if stopped[i] else "length"
            self.queue.leave(request)
        return emission

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.counters.add_seconds(phase, time.perf_counter() - start)
